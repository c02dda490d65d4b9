//! `nt bench`: medians of prefill and decode, the rates of the links, and the roofline.

use std::time::Instant;

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::report::Report;
use super::{Failure, ModelArg, Placement, interrupt, run};
use crate::engine::{EngineError, Session};
use crate::model::Outputs;

/// Arguments of `nt bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Tokens of the prompt; 0 skips prefill.
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate; 0 skips decode.
    #[arg(short = 'n', long, default_value_t = 128)]
    n_gen: usize,
    /// Repetitions.
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repetitions: u16,
    #[command(flatten)]
    placement: Placement,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark. Tokens are random ids from a fixed seed: speed does not depend on them.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    interrupt::install()?;
    let opened = run::open(&args.model, &args.placement)?;
    let mut options = run::options(&args.placement, KvArg::F16)?;
    let needed = args.n_prompt.max(args.n_gen).max(1);
    options.n_ctx = match args.placement.ctx {
        Auto::Given(n) if n < needed => return Err(Failure::limits(format!("--ctx {n} is smaller than {needed}"))),
        Auto::Given(n) => n,
        Auto::Auto => needed,
    };
    let mut session = run::start(&opened, options, true)?;
    let n_vocab = opened.model.n_vocab as u32;
    let tokens: Vec<u32> = (0..needed as u32).map(|i| i.wrapping_mul(2_654_435_761) % n_vocab).collect();
    let mut prefill = Vec::new();
    let mut decode = Vec::new();
    // The first round warms caches and settles the ring; it is not counted.
    for round in 0..=args.repetitions {
        let counted = round > 0;
        if args.n_prompt > 0 {
            session.truncate(0);
            let rate = timed(args.n_prompt, || evaluate(&mut session, &tokens[..args.n_prompt]))?;
            prefill.extend(counted.then_some(rate));
        }
        if args.n_gen > 0 {
            session.truncate(0);
            if counted {
                session.start_measuring();
            }
            let rate =
                timed(args.n_gen, || tokens[..args.n_gen].iter().try_for_each(|&t| evaluate(&mut session, &[t])))?;
            decode.extend(counted.then_some(rate));
        }
    }
    // The probes take memory of their own.
    let peak_rss_bytes = crate::machine::peak_rss_bytes();
    let session = session.measure_ceilings().map_err(run::failure)?;
    print(args, &session, &opened, &prefill, &decode, peak_rss_bytes)
}

/// Evaluates tokens and waits for the logits, as sampling does.
fn evaluate(session: &mut Session, tokens: &[u32]) -> Result<(), EngineError> {
    session.eval(tokens, Outputs::Last, &interrupt::interrupted)?;
    session.logits().map(|_| ())
}

fn timed(n: usize, mut work: impl FnMut() -> Result<(), EngineError>) -> Result<f64, Failure> {
    let start = Instant::now();
    work().map_err(run::failure)?;
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
) -> Result<(), Failure> {
    let mut report = Report::new(session, opened);
    report.decode_rate(median(decode));
    report.peak_rss(peak_rss_bytes);
    if let Some(path) = &args.placement.timeline {
        session.write_timeline(path).map_err(|e| Failure::output(&path.display().to_string(), &e))?;
    }
    let phase = |n: usize, runs: &[f64]| -> Json { json!({ "tokens": n, "tokens_per_s": median(runs), "runs": runs }) };
    if args.json {
        let (device, vram_bytes) = report.device_json();
        let all = json!({
            "prefill": phase(args.n_prompt, prefill),
            "decode": phase(args.n_gen, decode),
            "plan": report.plan_json(),
            "links": report.links_json(),
            "roofline": report.roofline_json(),
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
