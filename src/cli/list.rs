//! `nt list`: the model library, with what would fit where and how fast. Reads headers alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value as Json, json};

use super::Failure;
use super::report::print_line;
use crate::backend::{BackendKind, reference};
use crate::engine::{EngineError, Forecast, Here, Opened, Options};
use crate::gguf::{Gguf, TensorType};
use crate::library::{self, Entry, Place, printable};
use crate::model::Model;
use crate::plan::{Home, Machine, Site, format_bytes};

/// Arguments of `nt list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Folders to list, or stores of Ollama (default: nt/models in $XDG_CACHE_HOME or ~/.cache, the folders of
    /// $NT_MODELS between colons, Ollama's store, and drives that hold models).
    #[arg(value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Positions of the KV cache that room is left for, as in `nt plan`.
const CTX: usize = 4096;
/// Types of a model that are named in a line, the largest first.
const TYPES_SHOWN: usize = 3;

/// What an entry's header says.
struct Shown {
    entry: Entry,
    header: Option<Facts>,
    /// The forecast, or why the model cannot run.
    forecast: Result<Box<Forecast>, String>,
    /// Whether every rate that the forecast counts with was measured.
    measured: bool,
}

struct Facts {
    architecture: String,
    parameters: u64,
    shards: usize,
    types: Vec<(TensorType, u64)>,
}

/// Prints the library. A model that cannot run is no failure.
pub fn run(args: &ListArgs) -> Result<(), Failure> {
    if let Some(gone) = args.folders.iter().find(|f| !f.is_dir()) {
        let name = printable(&gone.to_string_lossy());
        return Err(Failure::usage(match gone.exists() {
            true => format!("{name}: is no folder; `nt inspect {name}` shows a file"),
            false => format!("{name}: no such folder"),
        }));
    }
    let places = match args.folders.is_empty() {
        true => library::places(),
        false => args.folders.iter().map(|f| Place::at(f, true)).collect(),
    };
    let mut catalog = library::scan(&places);
    if args.folders.is_empty() {
        library::scan_drives(&mut catalog);
    }
    let here = Here::new(BackendKind::Auto);
    let options = Options { buffers_by_guess: false, ..Options::new(BackendKind::Auto, CTX) };
    let models: Vec<Shown> = catalog.entries.into_iter().map(|e| look(e, &here, &options)).collect();
    if args.json {
        let all = json!({
            "places": places.iter().map(|p| p.path.display().to_string()).collect::<Vec<_>>(),
            "ctx": CTX,
            "models": models.iter().map(Shown::as_json).collect::<Vec<_>>(),
            "notes": catalog.notes,
        });
        return print_line(&all.to_string());
    }
    for line in lines(&models) {
        print_line(&line)?;
    }
    for note in &catalog.notes {
        print_line(&format!("not looked at: {note}"))?;
    }
    if models.is_empty() {
        let all: Vec<_> = places.iter().map(|p| printable(&p.path.to_string_lossy())).collect();
        print_line(&format!("no models in {}; NT_MODELS=DIR[:DIR…] names other folders", all.join(", ")))?;
    }
    Ok(())
}

fn look(entry: Entry, here: &Here, options: &Options) -> Shown {
    let failed = |entry, header, why: EngineError| {
        let forecast = Err(printable(&why.to_string()));
        Shown { entry, header, forecast, measured: false }
    };
    let gguf = match entry.open() {
        Ok(gguf) => gguf,
        Err(why) => return failed(entry, None, why),
    };
    let facts = Some(facts(&gguf));
    let opened = match Opened::from_header(gguf) {
        Ok(opened) => opened,
        Err(why) => return failed(entry, facts, why),
    };
    if let Some(ty) = unsupported(&opened.model) {
        let forecast = Err(format!("it holds tensors of type {ty}, for which nt has no kernel"));
        return Shown { entry, header: facts, forecast, measured: false };
    }
    let machine = here.with_storage_of(&opened);
    let n_ctx = CTX.min(opened.model.hparams.n_ctx_reach);
    match Forecast::new(&opened.model, &machine, &Options { n_ctx, ..options.clone() }, 1) {
        Ok(f) => {
            let measured = is_measured(&f, &machine);
            Shown { entry, header: facts, forecast: Ok(Box::new(f)), measured }
        }
        Err(why) => failed(entry, facts, why),
    }
}

/// The first type that is multiplied and has no kernel.
fn unsupported(model: &Model) -> Option<TensorType> {
    let all = model.matrices().into_iter().map(|(_, _, t)| t.ty).chain([model.embedding.ty]);
    all.into_iter().find(|ty| !reference::TYPES.contains(ty))
}

fn is_measured(f: &Forecast, machine: &Machine) -> bool {
    let (streams, resident) = (f.tier(Home::C).0 > 0, f.tier(Home::B).0 > 0);
    let storage = !streams || machine.storage.as_ref().is_some_and(|s| s.read.measured);
    let compute = match (f.based.site, &machine.gpu) {
        (Site::Gpu, Some(g)) => g.memory.measured && (g.link.measured || !streams && !resident),
        _ => machine.ram.read.measured && machine.cpu.decode.as_ref().is_some_and(|d| d.measured),
    };
    storage && compute
}

fn facts(gguf: &Gguf) -> Facts {
    let mut types = BTreeMap::new();
    for t in &gguf.tensors {
        *types.entry(t.ty).or_insert(0) += t.bytes;
    }
    let mut types: Vec<_> = types.into_iter().collect();
    types.sort_by_key(|t| std::cmp::Reverse(t.1));
    Facts {
        architecture: printable(gguf.metadata.str("general.architecture").unwrap_or("?")),
        parameters: gguf.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum(),
        shards: gguf.shards.len(),
        types,
    }
}

/// Tokens per second of decoding: as simulated, else the roofline.
fn speed(f: &Forecast) -> Option<f64> {
    let p = &f.prediction;
    p.simulated.map(|s| 1.0 / s.seconds).or(p.decode.map(|d| 1.0 / d.seconds))
}

/// A count as 135M or 7.6B.
pub(super) fn count(n: u64) -> String {
    match n as f64 {
        n if n >= 99.5e9 => format!("{:.0}B", n / 1e9),
        n if n >= 0.9995e9 => format!("{:.1}B", n / 1e9),
        n if n >= 0.9995e6 => format!("{:.0}M", n / 1e6),
        n => format!("{:.0}K", n / 1e3),
    }
}

/// Where blocks would live, in words.
fn fits(f: &Forecast) -> String {
    let blocks = f.blocks();
    let of = |home| blocks.iter().filter(|h| **h == home).count();
    match (of(Home::A), of(Home::B), of(Home::C)) {
        (_, 0, 0) => "all in VRAM".into(),
        (0, _, 0) => "all in RAM".into(),
        (a, b, c) if f.based.site == Site::Gpu => format!("{a} blocks in VRAM, {b} RAM, {c} storage"),
        (_, b, c) => format!("{b} blocks in RAM, {c} storage"),
    }
}

/// One line a model below a line a place.
fn lines(models: &[Shown]) -> Vec<String> {
    let width = models.iter().map(|m| m.entry.name.chars().count()).max().unwrap_or(0).min(48);
    let (mut out, mut place) = (Vec::new(), "");
    for m in models {
        if m.entry.place != place {
            place = &m.entry.place;
            out.push(place.to_owned());
        }
        out.push(m.line(width));
    }
    if models.iter().any(|m| m.forecast.is_ok() && !m.measured) {
        out.push(format!(
            "~: counts with guessed rates (`nt probe` and `nt bench` measure them); context of {CTX} tokens"
        ));
    }
    out
}

impl Shown {
    fn line(&self, width: usize) -> String {
        let bytes = self.entry.bytes.map_or_else(|| "?".into(), format_bytes);
        let head = format!("  {:<width$} {bytes:>11}", self.entry.name);
        let facts = self.header.as_ref().map_or_else(String::new, |h| {
            let types = h.types.iter().take(TYPES_SHOWN).map(|t| t.0.name()).collect::<Vec<_>>().join(" ");
            format!("  {} {}  {types}", h.architecture, count(h.parameters))
        });
        match &self.forecast {
            Err(why) => format!("{head}{facts}  cannot run: {why}"),
            Ok(f) => {
                let speed = speed(f).map_or_else(|| "speed unknown".into(), |t| tokens_per_s(t, self.measured));
                format!("{head}{facts}  {}  {speed}", fits(f))
            }
        }
    }

    fn as_json(&self) -> Json {
        let e = &self.entry;
        let forecast = self.forecast.as_ref().ok();
        let plan = forecast.map(|f| {
            let [a, b, c] = [Home::A, Home::B, Home::C].map(|h| {
                let (units, bytes) = f.tier(h);
                json!({ "units": units, "bytes": bytes })
            });
            json!({ "a": a, "b": b, "c": c })
        });
        let h = self.header.as_ref();
        let types: Option<Vec<Json>> =
            h.map(|h| h.types.iter().map(|(t, bytes)| json!({ "type": t.name(), "bytes": bytes })).collect());
        json!({
            "name": e.name,
            "place": e.place,
            "path": e.path.display().to_string(),
            "bytes": e.bytes,
            "shards": h.map(|h| h.shards),
            "architecture": h.map(|h| h.architecture.as_str()),
            "parameters": h.map(|h| h.parameters),
            "types": types,
            "runs": forecast.is_some(),
            "reason": self.forecast.as_ref().err(),
            "site": forecast.map(|f| f.based.site),
            "plan": plan,
            "predicted_tokens_per_s": forecast.and_then(|f| speed(f)),
            "bound_by": forecast.and_then(|f| f.prediction.decode.map(|d| d.bound_by)),
            "rates_measured": forecast.map(|_| self.measured),
        })
    }
}

/// A speed with the three digits that a prediction is worth.
fn tokens_per_s(t: f64, measured: bool) -> String {
    let decimals = if t >= 100.0 {
        0
    } else if t >= 10.0 {
        1
    } else {
        2
    };
    format!("{}{t:.decimals$} tokens/s", if measured { "" } else { "~" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_short() {
        for (n, text) in
            [(134_515_008, "135M"), (8_030_261_248, "8.0B"), (235_000_000_000, "235B"), (999_600_000, "1.0B")]
        {
            assert_eq!(count(n), text);
        }
    }
}
