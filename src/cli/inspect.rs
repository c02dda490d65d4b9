//! `nt inspect`: what a model file holds, from its header alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use clap::Args;
use serde_json::{Map, Value as Json, json};

use super::args::OverrideArgs;
use super::{Failure, ModelArg, report};
use crate::engine::Opened;
use crate::gguf::{Array, Gguf, Value};
use crate::model::{HParams, Model, unused_keys};
use crate::plan::format_bytes;

/// Arguments of `nt inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub(super) model: ModelArg,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    /// List every tensor.
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

/// Elements of an array that are shown.
const ARRAY_SHOWN: usize = 3;

/// Prints the file's contents.
pub fn run(args: &InspectArgs) -> Result<(), Failure> {
    let mut gguf = Gguf::open(args.model.path()).map_err(Failure::usage)?;
    args.overrides.apply(&mut gguf.metadata)?;
    let text = if args.json { as_json(&gguf).to_string() } else { as_text(&gguf, args.tensors) };
    report::print_line(text.trim_end())
}

/// The model's structure, if `nt run` would take it.
fn cannot_run(gguf: &Gguf) -> Result<Model, String> {
    Opened::from_header(gguf.clone()).map(|opened| opened.model).map_err(|e| e.to_string())
}

/// Tensors and bytes of each type.
fn types(gguf: &Gguf) -> BTreeMap<&'static str, (u64, u64)> {
    let mut types = BTreeMap::new();
    for t in &gguf.tensors {
        let entry = types.entry(t.ty.name()).or_insert((0, 0));
        entry.0 += 1;
        entry.1 += t.bytes;
    }
    types
}

fn parameters(gguf: &Gguf) -> u64 {
    gguf.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum()
}

fn value_json(v: &Value) -> Json {
    match v {
        Value::Int(i) => json!(i),
        Value::BigUint(u) => json!(u),
        Value::Float(f) => json!(f),
        Value::Bool(b) => json!(b),
        Value::Str(s) => json!(s),
        Value::Array(a) => json!({ "len": a.len(), "first": first(a) }),
    }
}

fn first(a: &Array) -> Vec<Json> {
    match a {
        Array::Int(v) => v.iter().take(ARRAY_SHOWN).map(|x| json!(x)).collect(),
        Array::Float(v) => v.iter().take(ARRAY_SHOWN).map(|x| json!(x)).collect(),
        Array::Bool(v) => v.iter().take(ARRAY_SHOWN).map(|x| json!(x)).collect(),
        Array::Str(v) => v.iter().take(ARRAY_SHOWN).map(|x| json!(String::from_utf8_lossy(x))).collect(),
        Array::Nested(v) => v.iter().take(ARRAY_SHOWN).map(|x| json!({ "len": x.len(), "first": first(x) })).collect(),
    }
}

fn as_json(gguf: &Gguf) -> Json {
    let metadata: Map<String, Json> = gguf.metadata.iter().map(|(k, v)| (k.to_owned(), value_json(v))).collect();
    let types: Map<String, Json> = types(gguf)
        .into_iter()
        .map(|(k, (n, bytes))| (k.to_owned(), json!({ "tensors": n, "bytes": bytes })))
        .collect();
    let tensors: Vec<Json> = gguf
        .tensors
        .iter()
        .map(|t| json!({ "name": t.name, "type": t.ty.name(), "shape": t.shape, "bytes": t.bytes, "shard": t.shard, "offset": t.offset }))
        .collect();
    let hparams = match HParams::from_metadata(&gguf.metadata) {
        Ok(h) => hparams_json(&h),
        Err(_) => Json::Null,
    };
    let units = Model::new(gguf).map_or(Json::Null, |m| {
        json!(m.units.iter().map(|u| json!({ "name": u.name, "bytes": u.bytes() })).collect::<Vec<_>>())
    });
    let unsupported = cannot_run(gguf).err();
    let unused = Model::read(gguf).map_or(Json::Null, |m| {
        m.unused.iter().map(|(name, harmless)| json!({ "name": name, "harmless_because": harmless })).collect()
    });
    json!({
        "version": gguf.version,
        "alignment": gguf.alignment,
        "shards": gguf.shards.iter().map(|s| json!({ "path": s.path.display().to_string(), "bytes": s.len })).collect::<Vec<_>>(),
        "parameters": parameters(gguf),
        "tensor_bytes": gguf.tensor_bytes(),
        "hparams": hparams,
        "unsupported": unsupported,
        "unused_tensors": unused,
        "unused_keys": unused_keys(&gguf.metadata),
        "translated": gguf.translated,
        "types": types,
        "metadata": metadata,
        "tensors": tensors,
        "units": units,
    })
}

fn hparams_json(h: &HParams) -> Json {
    json!({
        "architecture": h.arch.name, "n_layers": h.n_layers, "n_embd": h.n_embd, "n_heads": h.n_heads,
        "n_kv_heads": h.n_kv_heads, "head_dim": h.head_dim, "n_ff": h.n_ff, "n_experts": h.n_experts,
        "n_experts_used": h.n_experts_used, "n_ff_expert": h.n_ff_expert, "n_ctx_train": h.n_ctx_train,
        "norm_eps": h.norm_eps, "n_rot": h.n_rot, "rope_base": h.rope_base, "rope_scaling": format!("{:?}", h.rope_scaling),
    })
}

fn as_text(gguf: &Gguf, all_tensors: bool) -> String {
    let mut out = String::new();
    let mut line = |s: String| {
        out.push_str(&s);
        out.push('\n');
    };
    for s in &gguf.shards {
        line(format!("{}  {}", s.path.display(), format_bytes(s.len)));
    }
    line(format!(
        "GGUF version {}, alignment {}, {} metadata, {} tensors",
        gguf.version,
        gguf.alignment,
        gguf.metadata.iter().count(),
        gguf.tensors.len()
    ));
    line(format!("{:.3} billion parameters in {}", parameters(gguf) as f64 / 1e9, format_bytes(gguf.tensor_bytes())));
    match cannot_run(gguf) {
        Ok(m) => {
            let h = &m.hparams;
            line(format!(
                "{}: {} blocks, width {}, {} query and {} key/value heads of {}, FFN {}, vocabulary {}{}, context {}",
                h.arch.name,
                h.n_layers,
                h.n_embd,
                h.n_heads,
                h.n_kv_heads,
                h.head_dim,
                h.n_ff,
                m.n_vocab,
                if m.tied { " (tied head)" } else { "" },
                h.n_ctx_train
            ));
            if h.n_experts > 0 {
                line(format!("{} experts of width {}, {} used", h.n_experts, h.n_ff_expert, h.n_experts_used));
            }
            let largest = m.units.iter().map(|u| u.bytes()).max().unwrap_or(0);
            line(format!("{} units, the largest {}", m.units.len(), format_bytes(largest)));
        }
        Err(e) => line(format!("cannot be run: {e}")),
    }
    if !gguf.translated.is_empty() {
        line(format!("\nread otherwise than written, as llama.cpp has it\n  {}", gguf.translated.join("\n  ")));
    }
    if let Ok(m) = Model::read(gguf)
        && !m.unused.is_empty()
    {
        line("\ntensors that are not used".into());
        for (name, harmless) in &m.unused {
            line(format!("  {name}: {}", harmless.unwrap_or("changes the result, so the model is not run")));
        }
    }
    let keys = unused_keys(&gguf.metadata);
    if !keys.is_empty() {
        line(format!("\nkeys that are not used\n  {}", keys.join("\n  ")));
    }
    line("\ntypes".into());
    for (name, (n, bytes)) in types(gguf) {
        line(format!("  {name:8} {n:5} tensors  {:>12}", format_bytes(bytes)));
    }
    line("\nmetadata".into());
    for (k, v) in gguf.metadata.iter() {
        line(format!("  {k} = {}", value_text(v)));
    }
    if all_tensors {
        line("\ntensors".into());
        for t in &gguf.tensors {
            line(format!("  {:40} {:8} {:?} {}", t.name, t.ty, t.shape, format_bytes(t.bytes)));
        }
    }
    out
}

fn value_text(v: &Value) -> String {
    let text = match v {
        Value::Array(a) => {
            let mut s = format!("{} × ", a.len());
            let shown = first(a).iter().map(Json::to_string).collect::<Vec<_>>().join(", ");
            let _ = write!(s, "[{shown}{}]", if a.len() > ARRAY_SHOWN { ", …" } else { "" });
            s
        }
        other => value_json(other).to_string(),
    };
    match text.char_indices().nth(100) {
        Some((i, _)) => format!("{}…", &text[..i]),
        None => text,
    }
}
