//! `nt bench`: prefill and decode speed, the rates of the links, and the roofline.
//!
//! `-o md|csv|jsonl` writes a row per test in the columns and field names of llama-bench, whose tests these are: `pp512`
//! evaluates 512 tokens, `tg128` generates 128 one at a time, both behind `-d` tokens that are in the KV cache already. `tg64 cold`
//! begins with empty caches of experts.

mod list;
mod measure;
mod rows;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value as Json, json};

use self::list::List;
use self::measure::{Caches, Measured, Stand, Test};
use self::rows::{About, Rows};
use super::args::{Auto, KvArg};
use super::page::{self, Timings};
use super::report::{Report, print_line};
use super::routing::RoutingArg;
use super::{Failure, ModelArg, Placement, interrupt, options, outputs, start};
use crate::backend::EXACT_ROWS;
use crate::engine::{ExpertUses, Opened, Session};
use crate::machine;
use crate::machine::probe::{self, Rate};
use crate::pipeline::Event;

/// Arguments of `nt bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// Tokens of the prompt, evaluated in passes of `--batch` or as the plan finds best; several between commas, or a range as 128-1024*2 or
    /// 100-400+100; 0 skips prefill.
    #[arg(short = 'p', long, default_value = "512", value_name = "N[,N…]")]
    n_prompt: List,
    /// Tokens to generate, one per pass; several as for -p; 0 skips decode. Where a model has caches or slots of experts, a
    /// second row has the first 64 at most, generated once, from empty ones.
    #[arg(short = 'n', long, default_value = "128", value_name = "N[,N…]")]
    n_gen: List,
    /// Tokens in the KV cache before each test; several as for -p.
    #[arg(short = 'd', long, default_value = "0", value_name = "N[,N…]")]
    n_depth: List,
    /// Texts that are generated at once, a token of each in every pass, 1 to 8; several as for -p. Rates are of all
    /// together.
    #[arg(long, default_value = "1", value_name = "N[,N…]")]
    parallel: List,
    /// Repetitions that are counted, 1 to 1000, after one that is not.
    #[arg(short, long, default_value_t = 5, value_parser = repetitions)]
    repetitions: u16,
    /// Write a row per test as llama-bench does, mean and standard deviation, in place of medians.
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", conflicts_with = "json")]
    output: Option<OutputArg>,
    /// Force the experts that tokens choose, in place of their routers' choices: each as likely, by Zipf's law, or as in
    /// FILE, a JSON list per token. Routers are computed still, and what they chose is dropped; a layer whose experts are all
    /// in VRAM keeps it. Beside a GPU processors compute all experts in RAM then, which are else divided with it.
    #[arg(long, value_name = "uniform|zipf:S|trace:FILE")]
    routing: Option<RoutingArg>,
    #[command(flatten)]
    placement: Placement,
    /// Write a page with figures, tier map, timeline and rates, which any browser opens.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

fn repetitions(text: &str) -> Result<u16, String> {
    super::args::within(text, 1, 1000)
}

/// `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputArg {
    /// A Markdown table.
    Md,
    /// Comma separated values.
    Csv,
    /// A JSON object per line.
    Jsonl,
}

/// Bytes of a pass from which on its rate is kept.
const COMPUTE_BYTES_MIN: u64 = 256 << 20;

/// The tests, depth by depth, prompts first, as llama-bench orders them.
fn tests(args: &BenchArgs) -> Vec<Test> {
    let of_depth = |&depth: &usize| {
        let prompts = args.n_prompt.0.iter().map(move |&prompt| Test { prompt, depth, ..Test::default() });
        let texts = move |&generated: &usize| {
            let test = move |&parallel: &usize| Test { generated, depth, parallel, ..Test::default() };
            args.parallel.0.iter().map(test)
        };
        let generated = args.n_gen.0.iter().flat_map(texts);
        prompts.chain(generated).filter(|t| t.tokens() > 0).collect::<Vec<_>>()
    };
    args.n_depth.0.iter().flat_map(of_depth).collect()
}

/// Runs the benchmark. Tokens are random ids from a fixed seed: speed does not depend on them.
pub fn run(args: &BenchArgs) -> Result<(), Failure> {
    if args.parallel.0.iter().any(|n| !(1..=EXACT_ROWS).contains(n)) {
        return Err(Failure::usage(format!("--parallel takes 1 to {EXACT_ROWS}, the generated tokens of a pass")));
    }
    if tests(args).is_empty() {
        return Err(Failure::usage("there is nothing to measure: -p and -n are both 0"));
    }
    interrupt::install()?;
    let opened = start::open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[("--html", args.html.as_deref())])?;
    let mut options = options::options(&args.placement, KvArg::F16)?;
    options.sequences += args.parallel.0.iter().max().copied().unwrap_or(1);
    let (kv, threads) = (options.kv_type, options.threads);
    options.timeline |= args.html.is_some();
    options.routing = args.routing.as_ref().map(|r| r.of(&opened)).transpose()?;
    let tests = tests(args);
    let needed = tests.iter().map(Test::positions).max().unwrap_or(1);
    let longest = tests.iter().map(|t| t.prompt.max(t.depth)).max();
    options.longest_prompt = options.longest_prompt.and(longest);
    options.prompt_ctx = needed;
    options.outputs = tests.iter().map(Test::texts).max().unwrap_or(1);
    options.n_ctx = match args.placement.ctx(&opened.model.hparams) {
        Auto::Given(n) if n < needed => {
            return Err(Failure::limits(format!(
                "--ctx {n} holds fewer tokens than the longest test with its depth (-p or -n, and -d), which has {needed}; --ctx {needed} would do"
            )));
        }
        Auto::Given(n) => n,
        Auto::Auto => needed,
    };
    let watch = start::prepare(&args.placement);
    let mut session = start::start(&opened, options, true, &watch)?;
    let (texts, most) = (session.max_outputs(), session.parts_max());
    if texts > most {
        let why = format!("--parallel {texts}: a pass carries tokens of {most} texts at most");
        let cure = if most == 1 { "measure --parallel 1, or give --backend cpu" } else { "give a larger --batch" };
        return Err(Failure::limits(format!("{why} on {}; {cure}", session.backend_name())));
    }
    let n_vocab = opened.model.n_vocab as u32;
    let tokens: Vec<u32> = (0..needed as u32).map(|i| i.wrapping_mul(2_654_435_761) % n_vocab).collect();
    let about = || About::new(&session, &opened, args.routing.as_ref(), kv, threads);
    let rows = args.output.map(|format| Rows::new(format, about()));
    let head = rows.as_ref().and_then(Rows::head);
    head.map_or(Ok(()), |h| print_line(&h))?;
    let mut all = Vec::new();
    let mut stand = Stand { session: &mut session, tokens: &tokens, repetitions: args.repetitions, watch: &watch };
    let ended = tests.into_iter().try_for_each(|test| {
        stand.measure(test, &mut |measured| {
            rows.as_ref().map_or(Ok(()), |r| print_line(&r.row(&measured)))?;
            all.push(measured);
            Ok(())
        })
    });
    // What was measured before a failure is told, and that nothing was before an interrupt.
    if all.is_empty() && ended.is_err() && !interrupt::interrupted() {
        return ended;
    }
    // The probes take memory of their own.
    let peak_rss_bytes = machine::peak_rss_bytes();
    // Laps of the storage probe are no part of the run.
    let events = if args.html.is_some() { session.events() } else { Vec::new() };
    let ended = ended.and_then(|()| {
        session.measure_ceilings(&|| start::to_stop(&watch)).map_err(|e| start::stopped(e, &watch))?;
        keep_compute_rate(&session);
        Ok(())
    });
    let interrupted = ended.is_err() && interrupt::interrupted();
    Outcome { args, session, opened, all, peak_rss_bytes, events, interrupted }.write().and(ended)
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

/// All that was measured.
struct Outcome<'a> {
    args: &'a BenchArgs,
    session: Session,
    opened: Opened,
    all: Vec<Measured>,
    peak_rss_bytes: Option<u64>,
    events: Vec<Event>,
    interrupted: bool,
}

impl Outcome<'_> {
    /// The first test of prefill (`prompt`) or of decode: what the report and the page are about.
    fn first(&self, prompt: bool) -> Measured {
        // What is compared with the roofline is passes of one token.
        let of = |m: &&Measured| (m.test.prompt > 0) == prompt && m.test.texts() == 1;
        self.all.iter().find(of).cloned().unwrap_or_default()
    }

    fn write(&self) -> Result<(), Failure> {
        let (prefill, decode) = (self.first(true), self.first(false));
        let (prefill_rate, decode_rate) = (median(&prefill.rates()), median(&decode.rates()));
        let mut report = Report::new(&self.session, &self.opened);
        report.decode_rate(decode_rate);
        report.peak_rss(self.peak_rss_bytes);
        let first_token_s = prefill_rate.map(|r| prefill.test.prompt as f64 / r);
        // The result comes first: a file that cannot be written takes nothing from it.
        if self.args.json {
            print_line(&self.as_json(&report, &prefill, &decode, first_token_s).to_string())?;
        } else {
            // With -o each row is written as soon as it is measured.
            for m in self.all.iter().filter(|_| self.args.output.is_none()) {
                print_line(&line(m))?;
            }
            if let Some(routing) = self.session.routing().filter(|_| self.args.output.is_none()) {
                print_line(&format!("routing   {}", routing.describe()))?;
            }
            report.print();
        }
        if let Some(path) = &self.args.placement.timeline {
            self.session.write_timeline(path).map_err(|e| outputs::failed(path, &e))?;
        }
        let Some(path) = &self.args.html else { return Ok(()) };
        let timings = Timings {
            prefill: prefill_rate.map(|r| (prefill.test.prompt, r)),
            first_token_s,
            decode: decode_rate,
            peak_rss_bytes: self.peak_rss_bytes,
        };
        page::write(path, &self.session, &self.opened, &self.events, &timings, &report)
    }

    /// The contract's JSON: `prefill` and `decode` are the first test of each, `tests` are all.
    fn as_json(&self, report: &Report, prefill: &Measured, decode: &Measured, first_token_s: Option<f64>) -> Json {
        let phase = |m: &Measured| {
            let runs = m.rates();
            json!({ "tokens": m.test.tokens(), "tokens_per_s": median(&runs), "runs": runs })
        };
        let test = |m: &Measured| {
            let runs = m.rates();
            json!({
                "test": m.name(), "n_prompt": m.test.prompt, "n_gen": m.test.generated, "n_depth": m.test.depth,
                "n_parallel": m.test.texts(), "caches": m.caches, "experts": experts_json(&m.experts),
                "tokens_per_s": median(&runs), "runs": runs,
            })
        };
        let (device, vram_bytes) = report.device_json();
        let s = &self.session;
        json!({
            "prefill": phase(prefill),
            "decode": phase(decode),
            "tests": self.all.iter().map(test).collect::<Vec<_>>(),
            "interrupted": self.interrupted,
            "first_token_s": first_token_s,
            "plan": report.plan_json(),
            "links": report.links_json(),
            "stall": report.stall_json(),
            "experts": report.experts_json(),
            "routing": s.routing().map(|r| r.describe()),
            "roofline": report.roofline_json(),
            "prediction": report.prediction_json(),
            "n_buffers": s.n_slots(),
            "batch": s.batch(),
            "backend": s.backend_name(),
            "device": device,
            "vram_bytes": vram_bytes,
            "threads": s.threads(),
            "reader": s.reader_name(),
            "peak_rss_bytes": self.peak_rss_bytes,
        })
    }
}

/// A test for people: the median and the range.
fn line(m: &Measured) -> String {
    let runs = m.rates();
    let (low, high) = runs.iter().fold((f64::MAX, 0.0f64), |(l, h), &r| (l.min(r), h.max(r)));
    let name = if m.test.prompt > 0 { "prefill" } else { "decode " };
    let depth = if m.test.depth > 0 { format!(" at depth {}", m.test.depth) } else { String::new() };
    let texts = if m.test.texts() > 1 { format!(" in {} texts", m.test.texts()) } else { String::new() };
    let (n, median) = (m.test.tokens(), median(&runs).unwrap_or(0.0));
    let hits = hits(m).map_or(String::new(), |h| format!("; {h}"));
    let from = match m.caches {
        Some(Caches::Cold) => "from empty caches, once".into(),
        _ => format!("{low:.2} to {high:.2} over {} runs", runs.len()),
    };
    format!("{name} {n:5} tokens{texts}{depth}  {median:9.2} tokens/s  ({from}){hits}")
}

/// What slots and caches of experts had, for people; `None` without such.
fn hits(m: &Measured) -> Option<String> {
    let told = |rate: Option<f64>, name| Some(format!("{name} hit {:.1} %", rate? * 100.0));
    let of = [(m.experts.slot_hit_rate(), "slots in VRAM"), (m.experts.cache_hit_rate(), "caches in RAM")];
    let all: Vec<String> = of.into_iter().filter_map(|(rate, name)| told(rate, name)).collect();
    (m.caches.is_some() && !all.is_empty()).then(|| all.join(", "))
}

/// Where the experts lay that a test of generated tokens used, as shares, and what caches and slots had of them; null without any.
fn experts_json(used: &ExpertUses) -> Json {
    let Some([vram, ram, cache, storage]) = used.shares() else { return Json::Null };
    json!({
        "uses": used.homes.iter().sum::<u64>(), "vram": vram, "ram": ram, "cache": cache, "storage": storage,
        "slot_hit_rate": used.slot_hit_rate(), "cache_hit_rate": used.cache_hit_rate(),
    })
}
