//! `--html FILE`: the page about a run, filled from its session, or about a plan, filled from its forecast.

use std::path::Path;

use super::Failure;
use super::report::Report;
use crate::engine::{Forecast, LinkWork, Opened, Session, SiteWork};
use crate::machine;
use crate::model::{Model, UnitKind, UnitSpec};
use crate::pipeline::Event;
use crate::plan::{self, Home, LinkName, Machine, format_bytes};
use crate::report_page::{Link, LinkKind, Page, Predicted, Site, Stall, Timeline, Unit, measured, rates};

/// What was timed, for the top of the page.
#[derive(Debug, Default)]
pub struct Timings {
    /// Tokens of the prompt and tokens per second.
    pub prefill: Option<(usize, f64)>,
    /// Seconds to the first token.
    pub first_token_s: Option<f64>,
    /// Tokens per second of decoding.
    pub decode: Option<f64>,
    /// Largest resident set, in bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// Writes the page.
///
/// # Errors
/// If the file cannot be written.
pub fn write(
    path: &Path,
    session: &Session,
    opened: &Opened,
    events: &[Event],
    timings: &Timings,
    report: &Report,
) -> Result<(), Failure> {
    let page = page(session, opened, events, timings, report.notes());
    super::outputs::write(path, &page.html())
}

fn page(session: &Session, opened: &Opened, events: &[Event], timings: &Timings, notes: &[String]) -> Page {
    let units = units_at(session.model(), session.homes(), |u| session.model().units[u].bytes());
    let links = links(session);
    let ceiling = |kind| links.iter().find(|l| l.kind == kind).and_then(|l| l.ceiling_gb_per_s);
    let l = session.links();
    Page {
        title: title(opened),
        facts: facts(session, opened),
        achieved_tokens_per_s: timings.decode,
        predicted: l.roofline().map(|(tokens_per_s, bound_by)| Predicted {
            tokens_per_s,
            bound_by: bound_by.into(),
            source: l.ceilings_from.unwrap_or("roofline").into(),
        }),
        figures: figures(session, timings),
        timelines: timelines(session, events, &units),
        rates: rates(events, &units, ceiling),
        stalls: stalls(session),
        sites: sites(session),
        links,
        units,
        notes: notes.to_vec(),
    }
}

/// What was measured, next to what the simulator makes of the same plan.
fn timelines(session: &Session, events: &[Event], units: &[Unit]) -> Vec<Timeline> {
    let on_device = session.device().is_some();
    let simulated = measured(&session.simulated_events(), units, on_device);
    let simulated = simulated.map(|t| Timeline { title: "Simulated".into(), ..t });
    measured(events, units, on_device).into_iter().chain(simulated).collect()
}

/// Writes the page about a plan, with the simulator's timeline.
///
/// # Errors
/// If the file cannot be written.
pub fn write_plan(path: &Path, forecast: &Forecast, machine: &Machine, opened: &Opened) -> Result<(), Failure> {
    let page = plan_page(forecast, machine, opened);
    super::outputs::write(path, &page.html())
}

fn plan_page(f: &Forecast, machine: &Machine, opened: &Opened) -> Page {
    let p = &f.prediction;
    let on_device = f.based.site == plan::Site::Gpu;
    let units = units_at(f.model(&opened.model), &f.based.plan.homes, |u| f.based.units[u].bytes);
    let events = f.timeline(machine);
    let seconds = p.simulated.map(|s| s.seconds);
    let link = |l: LinkWork| {
        let (kind, name) = match l.link {
            LinkName::Nvme => (LinkKind::Storage, "storage to RAM"),
            LinkName::Gpu => (LinkKind::Gpu, "RAM to VRAM"),
            LinkName::Vram => (LinkKind::Vram, "VRAM, read by the GPU"),
            _ => (LinkKind::Ram, "RAM, all that passes through it"),
        };
        Link {
            kind,
            name: name.into(),
            bytes: Some(l.bytes_per_token as u64),
            gb_per_s: seconds.map(|s| l.bytes_per_token / s / 1e9),
            ceiling_gb_per_s: l.ceiling.map(|c| c / 1e9),
            busy: l.busy,
        }
    };
    let links: Vec<Link> = f.links().into_iter().map(link).collect();
    let ceiling = |kind| links.iter().find(|l| l.kind == kind).and_then(|l| l.ceiling_gb_per_s);
    let stall =
        |cause: &str, s: f64| Stall { cause: cause.into(), seconds: Some(s), share: seconds.map(|all| s / all) };
    let stalls = p.simulated.map_or(Vec::new(), |s| {
        vec![
            stall("a token: computing waits for storage", s.wait_nvme),
            stall("a token: computing waits for the link", s.wait_gpu),
            stall("a token: the GPU waits for processors", s.wait_beside),
            stall("a token: between passes", s.wait_pass),
        ]
    });
    let site = |s: SiteWork| Site {
        name: site_name(s.site).into(),
        units: s.units,
        bytes: s.bytes,
        bytes_per_token: Some(s.bytes_per_token),
        busy: s.busy,
        waits: s.waits,
    };
    let simulated = |t: Timeline| Timeline { title: "Simulated".into(), ..t };
    Page {
        title: format!("{}: plan", title(opened)),
        facts: plan_facts(f, machine, opened),
        achieved_tokens_per_s: None,
        predicted: p.simulated.map(|s| Predicted {
            tokens_per_s: 1.0 / s.seconds,
            bound_by: s.bound_by(&p.rates).name().into(),
            source: "the ring's simulator".into(),
        }),
        figures: plan_figures(f),
        timelines: measured(&events, &units, on_device).map(simulated).into_iter().collect(),
        rates: rates(&events, &units, ceiling),
        stalls,
        sites: f.sites().into_iter().map(site).collect(),
        links,
        units,
        notes: machine
            .rates()
            .iter()
            .filter(|(_, r)| !r.measured)
            .map(|(what, r)| format!("{what} is not measured: {:.2} GB/s, {}", r.gb_per_s, r.source))
            .collect(),
    }
}

fn plan_facts(f: &Forecast, machine: &Machine, opened: &Opened) -> Vec<(String, String)> {
    let h = &opened.model.hparams;
    let out = [
        ("model", format!("{}, {} blocks, {}", h.arch.name, h.n_layers, format_bytes(opened.gguf.tensor_bytes()))),
        ("machine", machine.name.clone()),
        ("buffers", f.n_buffers().to_string()),
        ("prompts", f.batch.to_string()),
        ("context", f.n_ctx.to_string()),
        ("day", crate::machine::probe::today()),
        ("command", command_line()),
    ];
    out.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// What was typed; a path need not be UTF-8.
fn command_line() -> String {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    words.join(" ")
}

fn plan_figures(f: &Forecast) -> Vec<(String, String)> {
    let p = &f.prediction;
    let mut out = Vec::new();
    if let Some(r) = p.decode {
        out.push((format!("roofline, by {}", r.bound_by.name()), format!("{:.3} tok/s", 1.0 / r.seconds)));
    }
    if let Some(s) = p.first_token_s {
        out.push((format!("first token after a prompt of {}", p.prompt), format!("{s:.2} s")));
    }
    if f.based.site == plan::Site::Gpu {
        out.push(("VRAM for weights".into(), format_bytes(f.based.plan.vram_bytes)));
    }
    out.push(("RAM for weights".into(), format_bytes(f.based.plan.ram_bytes)));
    out
}

fn title(opened: &Opened) -> String {
    let file = opened.gguf.shards.first().and_then(|s| s.path.file_name());
    file.map_or_else(|| "model".into(), |f| f.to_string_lossy().into_owned())
}

fn facts(session: &Session, opened: &Opened) -> Vec<(String, String)> {
    let h = &opened.model.hparams;
    let mut out = vec![
        ("model", format!("{}, {} blocks, {}", h.arch.name, h.n_layers, format_bytes(opened.gguf.tensor_bytes()))),
        ("machine", machine::memory_identity(Path::new("/"))),
    ];
    out.extend(session.device().map(|d| ("device", d)));
    out.push(("buffers", session.n_slots().to_string()));
    out.extend(session.reader_name().map(|r| ("reader", r.to_owned())));
    out.push(("day", machine::probe::today()));
    out.push(("command", command_line()));
    out.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn figures(session: &Session, t: &Timings) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut add = |name: &str, value: String| out.push((name.to_owned(), value));
    if let Some((n, rate)) = t.prefill {
        add(&format!("prefill of {n} tokens"), format!("{rate:.1} tok/s"));
    }
    if let Some(s) = t.first_token_s {
        add("first token after", format!("{s:.2} s"));
    }
    if let Some(bytes) = t.peak_rss_bytes {
        add("memory at most", format_bytes(bytes));
    }
    if let Some(bytes) = session.vram_bytes().filter(|b| *b > 0) {
        add("VRAM in use", format_bytes(bytes));
    }
    out
}

fn units_at(model: &Model, homes: &[Home], bytes: impl Fn(usize) -> u64) -> Vec<Unit> {
    let unit = |(i, (u, home)): (usize, (&UnitSpec, &Home))| Unit {
        name: u.name.clone(),
        home: *home,
        bytes: bytes(i),
        block: match u.kind {
            UnitKind::Attention(i)
            | UnitKind::FeedForward(i)
            | UnitKind::Slice(i)
            | UnitKind::Shared(i)
            | UnitKind::Expert { layer: i, .. } => Some(i),
            UnitKind::Head(_) => None,
        },
    };
    model.units.iter().zip(homes).enumerate().map(unit).collect()
}

fn links(session: &Session) -> Vec<Link> {
    let l = session.links();
    let link = |kind, name: &str, bytes: u64, gb_per_s, ceiling: Option<f64>, busy| Link {
        kind,
        name: name.into(),
        bytes: Some(bytes),
        gb_per_s,
        ceiling_gb_per_s: ceiling.map(|c| c / 1e9),
        busy,
    };
    let mut out = Vec::new();
    if l.nvme_bytes > 0 {
        let rate = l.nvme_gb_per_s();
        out.push(link(LinkKind::Storage, "storage to RAM", l.nvme_bytes, rate, l.nvme_ceiling, l.nvme_busy()));
    }
    if l.on_device {
        out.push(link(LinkKind::Gpu, "RAM to VRAM", l.gpu_bytes, l.gpu_gb_per_s(), l.gpu_ceiling, l.gpu_busy()));
        let vram = l.bytes_per_pass.saturating_sub(l.beside_bytes_per_pass) * l.passes;
        let known = l.measured_one_token.then_some(vram).filter(|_| l.pass_s > 0.0);
        out.push(Link {
            bytes: known,
            gb_per_s: known.map(|b| b as f64 / l.pass_s / 1e9),
            ..link(LinkKind::Vram, "VRAM, read by the GPU", 0, None, l.vram_ceiling, None)
        });
    }
    let who = match (l.on_device, l.beside_bytes > 0) {
        (true, true) => "RAM, read for the link and by processors",
        (true, false) => "RAM, read for the link",
        (false, _) => "RAM, read by processors",
    };
    out.push(link(LinkKind::Ram, who, l.ram_bytes, l.ram_gb_per_s(), l.ram_ceiling, None));
    out
}

fn site_name(site: plan::Site) -> &'static str {
    match site {
        plan::Site::Gpu => "GPU",
        plan::Site::Cpu => "processors",
    }
}

/// The sites of a run; how long a GPU computes is not measured.
fn sites(session: &Session) -> Vec<Site> {
    let l = session.links();
    let beside = session.beside().unwrap_or_default();
    let of = |wanted: bool| {
        let of = session.model().units.iter().enumerate().filter(|(i, _)| (beside.get(*i) == Some(&true)) == wanted);
        of.fold((0, 0), |(n, bytes), (_, u)| (n + 1, bytes + u.bytes()))
    };
    let site = |site, (units, bytes): (usize, u64), per_pass: u64, busy, waits| Site {
        name: site_name(site).into(),
        units,
        bytes,
        bytes_per_token: Some(per_pass as f64),
        busy,
        waits,
    };
    let own = if l.on_device { plan::Site::Gpu } else { plan::Site::Cpu };
    let mut out = vec![site(own, of(false), l.bytes_per_pass.saturating_sub(l.beside_bytes_per_pass), None, None)];
    if !beside.is_empty() {
        let (busy, waits) = l.beside_busy().unzip();
        out.push(site(plan::Site::Cpu, of(true), l.beside_bytes_per_pass, busy, waits));
    }
    out
}

fn stalls(session: &Session) -> Vec<Stall> {
    let l = session.links();
    let s = l.stalls();
    let (reader, link) = if l.on_device {
        ("copies to VRAM waited for storage", "the link stood still with all slots full: it waited for computing")
    } else {
        ("computing waited for storage", "storage stood still with all slots full: it waited for computing")
    };
    let all = [
        (reader, s.storage_s, l.nvme_bytes > 0),
        ("computing waited for the link", s.link_s, l.on_device),
        (link, s.compute_s, l.nvme_bytes > 0 || l.gpu_bytes > 0),
    ];
    let stall = |(cause, seconds, _): (&str, Option<f64>, bool)| Stall {
        cause: cause.into(),
        seconds,
        share: seconds.filter(|_| l.pass_s > 0.0).map(|v| v / l.pass_s),
    };
    all.into_iter().filter(|(.., there)| *there).map(stall).collect()
}
