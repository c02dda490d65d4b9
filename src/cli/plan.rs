//! `nt plan`: what a model will do on this machine or another, from its header alone.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::page;
use super::report::{of_each, part_of_each, print_line, requant_json};
use super::routing::RoutingArg;
use super::{Failure, ModelArg, Placement, codes, options, outputs, start, text};
use crate::backend::{BackendError, BackendKind};
use crate::engine::{
    Change, Forecast, Opened, Options, beyond_training, not_cut, refused_by_gpu, sensitivity, this_machine,
    too_few_slots,
};
use crate::model::Model;
use crate::pipeline::{Event, write_events};
use crate::plan::{Home, LinkName, Machine, PROFILES, Rate, Roofline, Site, format_bytes};
use crate::storage::safe;
use crate::units::is_rate;

/// Arguments of `nt plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// Another machine than this one: a TOML file, or a profile that is shipped (rtx-5060-ti,
    /// rtx-3090-gen3x8, rtx-4080-64gb, rtx-4090, h100, laptop-8gb, cpu-only).
    #[arg(long, value_name = "FILE|PROFILE")]
    machine: Option<String>,
    /// Tokens of the prompt, for the time to the first token (default: 512, or the context where that is shorter).
    #[arg(short = 'p', long, value_name = "N", value_parser = super::args::count)]
    n_prompt: Option<usize>,
    /// Rate of the link to the GPU in GB/s, in place of the machine's.
    #[arg(long, value_name = "GB/S", value_parser = rate)]
    link: Option<f64>,
    /// Rate of a drive in GB/s, in place of the machine's.
    #[arg(long, value_name = "GB/S", value_parser = rate)]
    drive: Option<f64>,
    /// Begin each pass with an empty ring, as programs do that bring nothing while a token is drawn; for
    /// comparison.
    #[arg(long)]
    no_wrap: bool,
    /// Count with these experts of each token: each as likely, by Zipf's law, or as in FILE, a JSON list per token (`nt bench
    /// --routing` forces them).
    #[arg(long, value_name = "uniform|zipf:S|trace:FILE")]
    routing: Option<RoutingArg>,
    #[command(flatten)]
    placement: Placement,
    /// Write a page about the plan to FILE: what is printed, the tier map and the simulator's timeline.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the plan to FILE, for `--plan FILE`.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse::<f64>().ok().filter(|r| is_rate(r * 1e9));
    rate.ok_or_else(|| "a number of GB/s above 0 was expected, from 0.0001 to 1000000".into())
}

/// Context where `--ctx` does not say.
const CTX_DEFAULT: usize = 4096;
/// Tokens of the prompt where `-p` does not say.
const PROMPT_DEFAULT: usize = 512;

/// Plans and prints.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let opened = start::open(&args.model, &args.placement)?;
    outputs::check(&opened, &args.placement, &[("--html", args.html.as_deref()), ("--save", args.save.as_deref())])?;
    let mut machine = machine(args.machine.as_deref(), &opened)?;
    let given = |gb_per_s: f64| Rate { gb_per_s, measured: false, source: "as given".into() };
    if let (Some(gpu), Some(gb)) = (&mut machine.gpu, args.link) {
        gpu.link = given(gb);
    }
    if let (Some(storage), Some(gb)) = (&mut machine.storage, args.drive) {
        storage.read = given(gb);
    }
    let mut options = options::options(&args.placement, KvArg::F16)?;
    options.routing = args.routing.as_ref().map(|r| r.of(&opened)).transpose()?;
    let routing = options.routing.as_ref().map_or_else(|| "each expert as likely".into(), |r| r.describe());
    let trained = opened.model.hparams.n_ctx_reach;
    // On this machine a plan is what a run makes.
    options.buffers_by_guess = args.machine.is_some() || args.link.is_some() || args.drive.is_some();
    // Of a machine that one does not have, all processors compute.
    options.threads = args.placement.threads.given().unwrap_or(machine.cpu.threads);
    options.n_ctx = match args.placement.ctx(&opened.model.hparams) {
        Auto::Given(n) => n,
        Auto::Auto => CTX_DEFAULT.max(args.n_prompt.unwrap_or_default()).min(trained),
    };
    let n_prompt = args.n_prompt.unwrap_or(PROMPT_DEFAULT.min(options.n_ctx));
    // As a run with a prompt of that length would choose the tokens of a pass.
    let given = args.n_prompt.and(options.longest_prompt).map(|_| n_prompt);
    options.longest_prompt = given.or(options.longest_prompt);
    if n_prompt > options.n_ctx {
        return Err(Failure::limits(format!(
            "-p {n_prompt}: the context holds {} tokens (the model was trained on {trained}); give a shorter prompt or a larger --ctx",
            options.n_ctx
        )));
    }
    if let Some(beyond) = beyond_training(&opened.model.hparams, options.n_ctx) {
        tracing::warn!("{beyond}");
    }
    let forecast = Forecast::new(&opened.model, &machine, &options, n_prompt.max(1))
        .map_err(|e| codes::refusal(e, &opened, || machine.clone(), &options))?;
    let forecast = if args.no_wrap { forecast.without_wrap(&machine) } else { forecast };
    if let Some(whole) = not_cut(options.slices, forecast.based.slices) {
        tracing::warn!("{whole}");
    }
    // Of a plan that is made again, its own type counts.
    let chosen = forecast.options(&options);
    let before = forecast.requant.as_ref().map(|_| {
        let options = Options { requant: None, repeat: None, ..chosen.clone() };
        Forecast::new(&opened.model, &machine, &options, n_prompt.max(1)).ok()
    });
    let shown = Shown {
        ctx_max: Forecast::ctx_max(&opened.model, &machine, &options),
        changes: sensitivity(&opened.model, &machine, &chosen, &forecast),
        beyond: match (options.backend, &machine.gpu) {
            (BackendKind::Auto, Some(_)) => refused_by_gpu(&opened.model, &options).map(|why| match why {
                BackendError::Beyond { what, .. } => what.to_owned(),
                BackendError::Cache { ty, .. } => format!("a KV cache of {ty}"),
                other => other.to_string(),
            }),
            _ => None,
        },
        routing,
        before: before.flatten(),
        forecast,
        machine,
        opened,
    };
    // The result comes first: a file that cannot be written takes nothing from it.
    if args.json {
        print_line(&shown.as_json().to_string())?;
    } else {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = shown.as_text(&mut out);
        print_line(out.trim_end())?;
    }
    let Shown { forecast, machine, opened, .. } = &shown;
    // What is not kept can be had by --save.
    let _ = forecast.based.recipe.keep();
    args.save.as_ref().map_or(Ok(()), |path| outputs::write(path, &forecast.based.recipe.text()))?;
    if let Some(path) = &args.placement.timeline {
        write_timeline(path, &forecast.timeline(machine), forecast.model(&opened.model))
            .map_err(|e| outputs::failed(path, &e))?;
    }
    args.html.as_ref().map_or(Ok(()), |path| page::write_plan(path, forecast, machine, opened))
}

fn write_timeline(path: &Path, events: &[Event], model: &Model) -> std::io::Result<()> {
    let mut out = std::io::BufWriter::new(safe::create(path)?);
    write_events(events, &mut out, |u| model.units[u].name.clone())?;
    std::io::Write::flush(&mut out)
}

/// What is printed.
struct Shown {
    /// What the machine's GPU has no kernels for.
    beyond: Option<String>,
    /// What experts are counted with.
    routing: String,
    /// The same without requantising, where the plan requantises and it fits without.
    before: Option<Forecast>,
    forecast: Forecast,
    machine: Machine,
    opened: Opened,
    ctx_max: Option<usize>,
    changes: Vec<Change>,
}

/// Links in the order in which they are shown, with what people call them.
const LINKS: [(LinkName, &str); 4] =
    [(LinkName::Nvme, "storage"), (LinkName::Gpu, "link"), (LinkName::Ram, "RAM"), (LinkName::Flops, "compute")];
/// The last where processors compute next to the GPU.
const ON_GPU: &str = "GPU";

/// Changes that are worth a line.
const CHANGE_MIN: f64 = 0.01;

/// The machine that `--machine` names, else this one.
fn machine(given: Option<&str>, opened: &Opened) -> Result<Machine, Failure> {
    let Some(given) = given else { return Ok(this_machine(opened, BackendKind::Auto)) };
    if let Some(profile) = Machine::profile(given) {
        return profile.map_err(|e| Failure::usage(format!("profile {given}: {e}")));
    }
    if !Path::new(given).exists() {
        let names = PROFILES.map(|p| p.0).join(", ");
        return Err(Failure::usage(format!("--machine {given}: no such file; give a TOML file or one of {names}")));
    }
    let text = text::read_text(Path::new(given))?;
    Machine::parse(&text).map_err(|e| Failure::usage(format!("--machine {given}: {e}")))
}

/// Tokens per second, with three digits at least.
fn speed(tokens_per_s: f64) -> String {
    if tokens_per_s < 1.0 { format!("{tokens_per_s:.3}") } else { format!("{tokens_per_s:.2}") }
}

/// Bytes that a token uses of weights in VRAM, in RAM and on storage.
fn per_token(f: &Forecast) -> [f64; 3] {
    [Home::A, Home::B, Home::C].map(|home| {
        let of = f.based.units.iter().zip(&f.based.plan.homes).filter(|(_, h)| **h == home);
        of.map(|(u, _)| u.bytes as f64 * u.share).sum()
    })
}

/// What is compared of a plan with requantising and without.
fn won(f: &Forecast) -> Json {
    let ([a, b, c], p) = (per_token(f).map(|bytes| bytes as u64), &f.prediction);
    json!({
        "bytes_per_token": { "a": a, "b": b, "c": c, "link": p.traffic.over_link as u64, "storage": p.traffic.from_storage as u64 },
        "units": { "a": f.tier(Home::A).0, "b": f.tier(Home::B).0, "c": f.tier(Home::C).0 },
        "tokens_per_s": p.simulated.map(|s| 1.0 / s.seconds),
    })
}

/// Homes as letters.
fn map(homes: &[Home]) -> String {
    let letter = |h: Home| match h {
        Home::A => 'A',
        Home::B => 'B',
        Home::C => 'C',
    };
    homes.iter().copied().map(letter).collect()
}

impl Shown {
    fn as_json(&self) -> Json {
        let (f, p) = (&self.forecast, &self.forecast.prediction);
        let [a, b, c] = [Home::A, Home::B, Home::C].map(|h| {
            let (units, bytes) = f.tier(h);
            json!({ "units": units, "bytes": bytes })
        });
        let roofline = |r: Option<Roofline>, tokens: usize| match r {
            Some(r) => json!({ "tokens_per_s": tokens as f64 / r.seconds, "bound_by": r.bound_by }),
            None => Json::Null,
        };
        let simulated = p.simulated.map(|s| {
            let busy = |l| s.busy(l, &p.rates);
            json!({
                "tokens_per_s": 1.0 / s.seconds,
                "bound_by": s.bound_by(&p.rates),
                "busy": { "nvme": busy(LinkName::Nvme), "gpu": busy(LinkName::Gpu), "ram": busy(LinkName::Ram), "flops": busy(LinkName::Flops), "chain": busy(LinkName::Chain), "beside": s.beside() },
                "stall": { "nvme": s.wait_nvme / s.seconds, "gpu": s.wait_gpu / s.seconds, "beside": s.wait_beside / s.seconds, "pass": s.wait_pass / s.seconds },
            })
        });
        json!({
            "machine": self.machine,
            "site": if f.based.beside.is_some() { json!("both") } else { json!(f.based.site) },
            "beside": f.computed_beside().map(|(units, bytes)| json!({
                "site": "cpu", "units": units, "bytes": bytes, "threads": f.based.threads, "part_of_choices": f.part_of_choices(),
                "part_of_each": f.based.slices.map(part_of_each),
            })),
            "sites": f.sites(),
            "links": f.links(),
            "n_buffers": f.n_buffers(),
            "batch": f.batch,
            "plan_id": f.based.recipe.id(),
            "plan": { "a": a, "b": b, "c": c, "blocks": map(&f.blocks()), "attention": map(&f.attention()), "embedding_resident": f.based.plan.embedding_resident },
            "memory": {
                "vram_weights_bytes": f.based.plan.vram_bytes, "vram_room_bytes": f.based.vram_room,
                "vram_session_bytes": f.based.workspace_bytes, "ram_weights_bytes": f.based.plan.ram_bytes,
                "ram_session_bytes": f.based.ram_workspace_bytes, "ram_room_bytes": f.based.ram_room,
                "kv_bytes": f.kv_bytes, "ctx": f.n_ctx, "ctx_max": self.ctx_max,
                "ctx_trained": self.opened.model.hparams.n_ctx_train,
            },
            "caches": f.caches().map(|(slots, experts, layers, hits)| json!({
                "layers": layers, "slots": slots, "experts": experts, "bytes": f.based.plan.cache_bytes(), "routing": self.routing,
                "hit_rate": hits, "misses_per_layer": f.misses_per_layer(),
            })),
            "requant": f.requant.as_ref().map(|r| {
                let mut requant = requant_json(Some(r), None);
                requant["before"] = self.before.as_ref().map_or(Json::Null, won);
                requant["after"] = won(f);
                requant
            }),
            "storage_bytes_per_token": p.traffic.from_storage,
            "roofline": {
                "decode": roofline(p.decode, 1),
                "prefill": roofline(p.prefill, p.batch),
            },
            "simulated": simulated,
            "first_token": { "prompt_tokens": p.prompt, "seconds": p.first_token_s, "load_s": p.load_s },
            "changes": self.changes,
        })
    }

    fn as_text(&self, out: &mut String) -> std::fmt::Result {
        self.write_machine(out)?;
        self.write_memory(out)?;
        self.write_speed(out)?;
        self.write_requant(out)?;
        for (i, c) in self.changes.iter().filter(|c| (c.factor - 1.0).abs() >= CHANGE_MIN).enumerate() {
            let head = if i == 0 { "changes" } else { "" };
            writeln!(
                out,
                "{head:<9} {:<26} {:+4.0} %, {} tokens/s",
                c.what,
                (c.factor - 1.0) * 100.0,
                speed(c.tokens_per_s)
            )?;
        }
        Ok(())
    }

    fn write_machine(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "machine   {}", self.machine.name)?;
        for (what, rate) in self.machine.rates() {
            let mark = if rate.measured { "" } else { "guess: " };
            writeln!(out, "  {what:<22} {:>8.2} GB/s  {mark}{}", rate.gb_per_s, rate.source)?;
        }
        if let (Some(gpu), Some(_)) = (&self.machine.gpu, &self.forecast.based.beside) {
            let (idle, loaded) = (&gpu.costs.hand_over, &gpu.costs.hand_over_loaded);
            let mark = if idle.measured && loaded.measured { "" } else { "guess: " };
            writeln!(
                out,
                "  {:<22} {:>8.0} us    {mark}to processors and back; {:.0} us while copies fill the link",
                "hand-over", idle.us, loaded.us
            )?;
        }
        if let Some(what) = &self.beyond {
            writeln!(out, "  computed on processors: the GPU has no kernels for {what}")?;
        }
        if self.machine.rates().iter().any(|(_, r)| !r.measured) {
            writeln!(out, "  what follows is as good as these; guesses may be far off")?;
        }
        Ok(())
    }

    fn write_memory(&self, out: &mut String) -> std::fmt::Result {
        let (f, plan) = (&self.forecast, &self.forecast.based.plan);
        let (blocks, attention) = (f.blocks(), f.attention());
        writeln!(out, "plan id   {}", f.based.recipe.id())?;
        writeln!(out, "blocks    {}", map(&blocks))?;
        if attention != blocks {
            writeln!(out, "attention {}", map(&attention))?;
        }
        let names = [(Home::A, "A, in VRAM"), (Home::B, "B, in RAM"), (Home::C, "C, on storage")];
        for (home, name) in names.into_iter().filter(|(h, _)| *h != Home::A || f.based.site == Site::Gpu) {
            let (units, bytes) = f.tier(home);
            writeln!(out, "  {name:<14} {units:>5} units  {:>11}", format_bytes(bytes))?;
        }
        if let Some((units, bytes)) = f.computed_beside() {
            let (bytes, threads) = (format_bytes(bytes), f.based.threads);
            match (f.part_of_choices(), f.based.slices.map(part_of_each)) {
                (None, Some(part)) => writeln!(out, "  {}", of_each(threads, part, &bytes))?,
                (None, None) => writeln!(
                    out,
                    "  while generating, {threads} processors compute {units} units ({bytes}) of those in RAM"
                )?,
                (Some(part), _) => writeln!(
                    out,
                    "  while generating, {threads} processors compute {:.0} % of what a token chooses of {units} units in RAM ({bytes}); the link brings the rest",
                    part * 100.0
                )?,
            }
            for s in f.sites() {
                let name = match s.site {
                    Site::Gpu => "the GPU",
                    Site::Cpu => "processors",
                };
                writeln!(out, "  {name:<14} {:>18} computed per token", format_bytes(s.bytes_per_token as u64))?;
            }
        }
        let slots = |n: usize, bytes: u64, attention: u64| match (n, attention) {
            (0, _) => "no slots".into(),
            (_, 0) => format!("{n} slots of {}", format_bytes(bytes)),
            _ => format!("{n} slots of {} and {n} of {}", format_bytes(bytes), format_bytes(attention)),
        };
        let kv = format_bytes(f.kv_bytes);
        if let Some(room) = f.based.vram_room {
            writeln!(
                out,
                "vram      {} of {} for weights, {}; {} for the session, of it KV cache {kv}",
                format_bytes(plan.vram_bytes),
                format_bytes(room),
                slots(plan.device_slots, plan.device_slot_bytes, plan.device_attention_slot_bytes),
                format_bytes(f.based.workspace_bytes)
            )?;
        }
        let session = match f.based.ram_workspace_bytes {
            0 => String::new(),
            bytes => format!("; {} for the session, of it KV cache {kv}", format_bytes(bytes)),
        };
        writeln!(
            out,
            "ram       {} of {} for weights, {}{session}",
            format_bytes(plan.ram_bytes),
            format_bytes(f.based.ram_room.saturating_sub(f.based.ram_workspace_bytes)),
            slots(plan.n_slots, plan.slot_bytes, plan.attention_slot_bytes),
        )?;
        if let Some((slots, experts, layers, hits)) = f.caches() {
            writeln!(
                out,
                "caches    {} of {} experts per layer ({}), hit {:.1} %, {}; {:.2} misses per layer and {} from storage per token",
                slots / layers,
                experts / layers,
                format_bytes(plan.cache_bytes()),
                hits * 100.0,
                self.routing,
                f.misses_per_layer(),
                format_bytes(f.prediction.traffic.from_storage as u64)
            )?;
        }
        if let Some(few) = plan.too_few_slots {
            writeln!(out, "caches    none: {}", too_few_slots(few))?;
        }
        let fits = self.ctx_max.map_or(String::new(), |n| format!(", at most {n} would fit"));
        writeln!(out, "context   {} of {} trained{fits}", f.n_ctx, self.opened.model.hparams.n_ctx_train)
    }

    /// What requantising wins.
    fn write_requant(&self, out: &mut String) -> std::fmt::Result {
        let Some(requant) = &self.forecast.requant else { return Ok(()) };
        writeln!(out, "requant   {}", requant.line())?;
        if let Some(note) = requant.note() {
            writeln!(out, "  {note}")?;
        }
        let line = |f: &Forecast| {
            let [a, b, c] = per_token(f).map(|bytes| format_bytes(bytes as u64));
            let vram = if f.based.site == Site::Gpu { format!("{a} in VRAM, ") } else { String::new() };
            let carried = match f.prediction.traffic.over_link {
                0.0 => String::new(),
                bytes => format!(", {} carried to the GPU", format_bytes(bytes as u64)),
            };
            let rate =
                f.prediction.simulated.map_or(String::new(), |s| format!("; {} tokens/s", speed(1.0 / s.seconds)));
            format!("{vram}{b} in RAM, {c} on storage{carried}{rate}")
        };
        let before = self.before.as_ref().map_or_else(|| "it would not fit".into(), line);
        writeln!(out, "  a token before       {before}")?;
        writeln!(out, "  a token requantised  {}", line(&self.forecast))
    }

    fn write_speed(&self, out: &mut String) -> std::fmt::Result {
        let p = &self.forecast.prediction;
        let roofline = |r: Option<Roofline>, tokens: usize| match r {
            Some(r) => format!("at most {}, bound by {}", speed(tokens as f64 / r.seconds), r.bound_by.name()),
            None => "a rate that it needs is not known".into(),
        };
        let simulated = p.simulated.map_or(String::new(), |s| format!("{} tokens/s; ", speed(1.0 / s.seconds)));
        writeln!(out, "decode    {simulated}{}", roofline(p.decode, 1))?;
        if let Some(s) = p.simulated {
            let told = |name: &str, b: Option<f64>| Some(format!("{name} {:.0} %", b.filter(|b| *b >= 0.005)? * 100.0));
            let own = |l, name| if l == LinkName::Flops && s.beside().is_some() { ON_GPU } else { name };
            let links = LINKS.iter().filter_map(|(l, name)| told(own(*l, name), s.busy(*l, &p.rates)));
            let busy: Vec<String> = links.chain(told("processors", s.beside())).collect();
            writeln!(out, "busy      {}", busy.join(", "))?;
            let share = |t: f64| t / s.seconds * 100.0;
            writeln!(
                out,
                "stall     {:.0} % for storage, {:.0} % for the link, {}{:.0} % between passes",
                share(s.wait_nvme),
                share(s.wait_gpu),
                s.beside().map_or(String::new(), |_| format!("{:.0} % for processors, ", share(s.wait_beside))),
                share(s.wait_pass)
            )?;
        }
        let rate = roofline(p.prefill, p.batch).replacen("at most", "tokens/s at most", 1);
        writeln!(out, "prefill   {rate}; {}", self.forecast.batch)?;
        if let Some(s) = p.first_token_s {
            let load = p.load_s.map_or(String::new(), |l| format!(", once {l:.0} s of loading are over"));
            writeln!(out, "first     token after {s:.2} s with a prompt of {} tokens{load}", p.prompt)?;
        }
        Ok(())
    }
}
