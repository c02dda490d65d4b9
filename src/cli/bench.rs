//! `nt bench`: medians of prefill and decode, the rates of the links, and the roofline.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::page::{self, Timings};
use super::report::Report;
use super::{Failure, ModelArg, Placement, interrupt, run};
use crate::engine::Session;
use crate::machine;
use crate::machine::pressure::Watch;
use crate::machine::probe::{self, Rate};
use crate::model::Outputs;
use crate::pipeline::Event;

/// Arguments of `nt bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// Tokens of the prompt, evaluated in passes of 512; 0 skips prefill.
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate, one a pass; 0 skips decode.
    #[arg(short = 'n', long, default_value_t = 128)]
    n_gen: usize,
    /// Repetitions that are counted, 1 to 1000, after one that is not; medians are shown.
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repetitions: u16,
    #[command(flatten)]
    placement: Placement,
    /// Write a page with figures, tier map, timeline and rates, which any browser opens.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Bytes of a pass from which on its rate is kept.
const COMPUTE_BYTES_MIN: u64 = 256 << 20;

/// Runs the benchmark. Tokens are random ids from a fixed seed: speed does not depend on them.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    interrupt::install()?;
    let opened = run::open(&args.model, &args.placement)?;
    let mut options = run::options(&args.placement, KvArg::F16)?;
    options.timeline |= args.html.is_some();
    let needed = args.n_prompt.max(args.n_gen).max(1);
    options.n_ctx = match args.placement.ctx {
        Auto::Given(n) if n < needed => return Err(Failure::limits(format!("--ctx {n} is smaller than {needed}"))),
        Auto::Given(n) => n,
        Auto::Auto => needed,
    };
    let watch = run::prepare(&args.placement);
    let mut session = run::start(&opened, options, true, &watch)?;
    let n_vocab = opened.model.n_vocab as u32;
    let tokens: Vec<u32> = (0..needed as u32).map(|i| i.wrapping_mul(2_654_435_761) % n_vocab).collect();
    let mut prefill = Vec::new();
    let mut decode = Vec::new();
    // The first round warms caches and settles the ring; it is not counted.
    for round in 0..=args.repetitions {
        let counted = round > 0;
        if args.n_prompt > 0 {
            session.truncate(0);
            let rate = timed(args.n_prompt, || evaluate(&mut session, &tokens[..args.n_prompt], &watch))?;
            prefill.extend(counted.then_some(rate));
        }
        if args.n_gen > 0 {
            session.truncate(0);
            if counted {
                session.start_measuring();
            }
            let rate = timed(args.n_gen, || {
                tokens[..args.n_gen].iter().try_for_each(|&t| evaluate(&mut session, &[t], &watch))
            })?;
            decode.extend(counted.then_some(rate));
        }
    }
    // The probes take memory of their own.
    let peak_rss_bytes = machine::peak_rss_bytes();
    // Laps of the storage probe are no part of the run.
    let events = if args.html.is_some() { session.events() } else { Vec::new() };
    let session = session.measure_ceilings().map_err(run::failure)?;
    keep_compute_rate(&session);
    print(args, &session, &opened, &prefill, &decode, peak_rss_bytes, &events)
}

/// Evaluates tokens and waits for the logits, as sampling does.
fn evaluate(session: &mut Session, tokens: &[u32], watch: &Watch) -> Result<(), Failure> {
    run::evaluate(session, tokens, Outputs::Last, watch)?;
    session.logits().map(|_| ()).map_err(run::failure)
}

/// Keeps how fast processors compute weights, for later plans. A small model says little of others.
fn keep_compute_rate(session: &Session) {
    let links = session.links();
    if links.on_device || links.bytes_per_pass < COMPUTE_BYTES_MIN {
        return;
    }
    let Some(seconds) = links.compute_s else { return };
    let identity = machine::compute_identity(Path::new("/"), session.threads());
    let rate = Rate::now("decode", &identity, links.bytes_per_pass as f64 / seconds, None, Some(session.threads()));
    if let Err(e) = probe::record(&[rate]) {
        tracing::warn!("the measured rate could not be kept: {e}");
    }
}

fn timed(n: usize, mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let start = Instant::now();
    work()?;
    Ok(n as f64 / start.elapsed().as_secs_f64())
}

fn median(runs: &[f64]) -> Option<f64> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mid = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[mid]),
        _ => Some((sorted[mid - 1] + sorted[mid]) / 2.0),
    }
}

fn print(
    args: &BenchArgs,
    session: &Session,
    opened: &crate::engine::Opened,
    prefill: &[f64],
    decode: &[f64],
    peak_rss_bytes: Option<u64>,
    events: &[Event],
) -> Result<(), Failure> {
    let mut report = Report::new(session, opened);
    report.decode_rate(median(decode));
    report.peak_rss(peak_rss_bytes);
    if let Some(path) = &args.placement.timeline {
        session.write_timeline(path).map_err(|e| Failure::output(&path.display().to_string(), &e))?;
    }
    let prefill_rate = median(prefill);
    let first_token_s = prefill_rate.map(|r| args.n_prompt as f64 / r);
    if let Some(path) = &args.html {
        let prefill = prefill_rate.map(|r| (args.n_prompt, r));
        let timings = Timings { prefill, first_token_s, decode: median(decode), peak_rss_bytes };
        page::write(path, session, opened, events, &timings, &report)?;
    }
    let phase = |n: usize, runs: &[f64]| -> Json { json!({ "tokens": n, "tokens_per_s": median(runs), "runs": runs }) };
    if args.json {
        let (device, vram_bytes) = report.device_json();
        let all = json!({
            "prefill": phase(args.n_prompt, prefill),
            "decode": phase(args.n_gen, decode),
            "first_token_s": first_token_s,
            "plan": report.plan_json(),
            "links": report.links_json(),
            "stall": report.stall_json(),
            "roofline": report.roofline_json(),
            "prediction": report.prediction_json(),
            "n_buffers": session.n_slots(),
            "backend": session.backend_name(),
            "device": device,
            "vram_bytes": vram_bytes,
            "threads": session.threads(),
            "reader": session.reader_name(),
            "peak_rss_bytes": peak_rss_bytes,
        });
        return super::report::print_line(&all.to_string());
    }
    let line = |name: &str, n: usize, runs: &[f64]| {
        let (low, high) = runs.iter().fold((f64::MAX, 0.0f64), |(l, h), &r| (l.min(r), h.max(r)));
        median(runs)
            .map(|m| format!("{name} {n:5} tokens  {m:9.2} tokens/s  ({low:.2} to {high:.2} over {} runs)", runs.len()))
    };
    for l in [line("prefill", args.n_prompt, prefill), line("decode ", args.n_gen, decode)].into_iter().flatten() {
        super::report::print_line(&l)?;
    }
    report.print();
    Ok(())
}
