//! `nt plan`: what a model will do on this machine or another, from its header alone.

use std::fmt::Write as _;
use std::path::Path;

use clap::Args;
use serde_json::{Value as Json, json};

use super::args::{Auto, KvArg};
use super::report::print_line;
use super::{Failure, ModelArg, Placement, run};
use crate::engine::{EngineError, Forecast, Opened, Options, nearest, this_machine};
use crate::plan::{Home, Machine, PROFILES, Roofline, Site, format_bytes};

/// Arguments of `nt plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    model: ModelArg,
    /// Another machine than this one: a TOML file, or a profile that is shipped (rtx-5060-ti,
    /// rtx-3090-gen3x8, rtx-4090, h100, laptop-8gb, cpu-only).
    #[arg(long, value_name = "FILE|PROFILE")]
    machine: Option<String>,
    /// Tokens of the prompt.
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    #[command(flatten)]
    placement: Placement,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Context where `--ctx` does not say.
const CTX_DEFAULT: usize = 4096;

/// Plans and prints.
pub fn run(args: &PlanArgs) -> Result<(), Failure> {
    let opened = run::open(&args.model)?;
    let machine = machine(args.machine.as_deref(), &opened)?;
    let mut options = run::options(&args.placement, KvArg::F16)?;
    let trained = opened.model.hparams.n_ctx_train;
    options.n_ctx = match args.placement.ctx {
        Auto::Given(n) => n,
        Auto::Auto => CTX_DEFAULT.max(args.n_prompt).min(trained),
    };
    let forecast = Forecast::new(&opened.model, &machine, &options, args.n_prompt.max(1))
        .map_err(|e| refusal(e, &opened, &machine, &options))?;
    let ctx_max = Forecast::ctx_max(&opened.model, &machine, &options);
    if args.json {
        return print_line(&as_json(&forecast, &machine, &opened, ctx_max).to_string());
    }
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = as_text(&mut out, &forecast, &machine, &opened, ctx_max);
    print_line(out.trim_end())
}

/// The machine that `--machine` names, else this one.
fn machine(given: Option<&str>, opened: &Opened) -> Result<Machine, Failure> {
    let Some(given) = given else { return Ok(this_machine(opened)) };
    if let Some(profile) = Machine::profile(given) {
        return profile.map_err(|e| Failure::usage(format!("profile {given}: {e}")));
    }
    let text = std::fs::read_to_string(Path::new(given)).map_err(|e| {
        let names = PROFILES.map(|p| p.0).join(", ");
        Failure::usage(format!("--machine {given}: {e}; give a TOML file or one of {names}"))
    })?;
    Machine::parse(&text).map_err(|e| Failure::usage(format!("--machine {given}: {e}")))
}

/// An error with what would fit instead.
fn refusal(e: EngineError, opened: &Opened, machine: &Machine, options: &Options) -> Failure {
    match (&e, nearest(&opened.model, machine, options)) {
        (EngineError::Plan(_), Some(other)) => Failure::limits(format!("{e}; {other}")),
        _ => run::failure(e),
    }
}

/// The home of each block as a letter.
fn map(forecast: &Forecast) -> String {
    let letter = |h: Home| match h {
        Home::A => 'A',
        Home::B => 'B',
        Home::C => 'C',
    };
    forecast.blocks().into_iter().map(letter).collect()
}

fn as_json(f: &Forecast, machine: &Machine, opened: &Opened, ctx_max: Option<usize>) -> Json {
    let [a, b, c] = [Home::A, Home::B, Home::C].map(|h| {
        let (units, bytes) = f.tier(h);
        json!({ "units": units, "bytes": bytes })
    });
    let roofline = |r: Option<Roofline>, tokens: usize| match r {
        Some(r) => json!({ "tokens_per_s": tokens as f64 / r.seconds, "seconds": r.seconds, "bound_by": r.bound_by }),
        None => Json::Null,
    };
    let p = &f.prediction;
    json!({
        "machine": machine,
        "site": f.site,
        "plan": { "a": a, "b": b, "c": c, "blocks": map(f), "n_buffers": f.n_buffers(), "embedding_resident": f.plan.embedding_resident },
        "memory": {
            "vram_weights_bytes": f.plan.vram_bytes, "vram_room_bytes": f.vram_room, "vram_workspace_bytes": f.workspace_bytes,
            "ram_weights_bytes": f.plan.ram_bytes, "ram_room_bytes": f.ram_room,
            "kv_bytes": f.kv_bytes, "ctx": f.n_ctx, "ctx_max": ctx_max, "ctx_trained": opened.model.hparams.n_ctx_train,
        },
        "roofline": {
            "decode": roofline(p.decode, 1),
            "prefill": roofline(p.prefill, p.prompt.min(Options::MAX_BATCH)),
            "first_token_s": p.first_token_s, "prompt_tokens": p.prompt, "load_s": p.load_s,
        },
    })
}

fn as_text(
    out: &mut String,
    f: &Forecast,
    machine: &Machine,
    opened: &Opened,
    ctx_max: Option<usize>,
) -> std::fmt::Result {
    writeln!(out, "machine   {}", machine.name)?;
    let mut guesses = false;
    for (what, rate) in machine.rates() {
        let mark = if rate.measured { "" } else { "guess: " };
        guesses |= !rate.measured;
        writeln!(out, "  {what:<22} {:>8.2} GB/s  {mark}{}", rate.gb_per_s, rate.source)?;
    }
    if guesses {
        writeln!(out, "  guesses may be far off; what is measured counts")?;
    }
    writeln!(out, "blocks    {}", map(f))?;
    let names = [(Home::A, "A, in VRAM"), (Home::B, "B, in RAM"), (Home::C, "C, on storage")];
    for (home, name) in names.into_iter().filter(|(h, _)| *h != Home::A || f.site == Site::Gpu) {
        let (units, bytes) = f.tier(home);
        writeln!(out, "  {name:<14} {units:>5} units  {:>11}", format_bytes(bytes))?;
    }
    let (plan, kv) = (&f.plan, format_bytes(f.kv_bytes));
    if let Some(room) = f.vram_room {
        writeln!(
            out,
            "vram      {} of {} for weights, {} slots of {}; {} for the session, of it KV cache {kv}",
            format_bytes(plan.vram_bytes),
            format_bytes(room),
            plan.device_slots,
            format_bytes(plan.device_slot_bytes),
            format_bytes(f.workspace_bytes)
        )?;
    }
    writeln!(
        out,
        "ram       {} of {} for weights, {} slots of {}{}",
        format_bytes(plan.ram_bytes),
        format_bytes(f.ram_room),
        plan.n_slots,
        format_bytes(plan.slot_bytes),
        if f.site == Site::Cpu { format!("; KV cache {kv}") } else { String::new() }
    )?;
    let fits = ctx_max.map_or(String::new(), |n| format!(", at most {n} would fit"));
    writeln!(out, "context   {} of {} trained{fits}", f.n_ctx, opened.model.hparams.n_ctx_train)?;
    let p = &f.prediction;
    let line = |r: Option<Roofline>, tokens: usize| match r {
        Some(r) => format!("{:.2} tokens/s at most, bound by {}", tokens as f64 / r.seconds, r.bound_by.name()),
        None => "not known: a rate that it needs is not known".into(),
    };
    writeln!(out, "decode    {}", line(p.decode, 1))?;
    writeln!(out, "prefill   {}", line(p.prefill, p.prompt.min(Options::MAX_BATCH)))?;
    if let Some(s) = p.first_token_s {
        writeln!(out, "first     token after {s:.2} s with a prompt of {} tokens", p.prompt)?;
    }
    Ok(())
}
