//! What a server tells of itself: metrics, slots, properties; and its tokenizer and template.

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::fields::{Fields, whole, wrong};
use super::histogram::Histogram;
use super::openai;
use super::present::Present;
use super::prompt;
use super::queue::{Phase, Running, View};
use super::served::{Models, Served};
use crate::engine::SamplerParams;

/// Whether a model is in memory, in llama-server's words.
pub fn state(view: &View, model: usize) -> &'static str {
    match view.present {
        Present::Loaded { model: there, .. } if there == model => "loaded",
        Present::Loading { model: there, .. } if there == model => "loading",
        _ => "unloaded",
    }
}

/// The model that is shown where there is room for one: that in memory, or the first.
fn shown<'m>(view: &View, models: &'m Models) -> &'m Served {
    &models.all()[view.present.model().unwrap_or(0)]
}

/// `/metrics` in Prometheus' text form: llama-server's names, vLLM's gauges and histograms for each model, and nt's own.
pub fn metrics(view: &View, models: &Models) -> String {
    let c = &view.counters;
    let (running, waiting) = (view.running.len(), view.waiting);
    let used: usize = view.running.iter().map(|r| r.evaluated + r.generated).sum();
    let kv = (used as f64 / shown(view, models).n_ctx.max(1) as f64).min(1.0);
    let rate = |n: u64, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
    let mut out = String::new();
    let mut add = |name: &str, kind: &str, help: &str, value: f64| {
        out.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n"));
    };
    add("llamacpp:prompt_tokens_total", "counter", "Tokens of prompts that were computed.", c.prompt_tokens as f64);
    add("llamacpp:prompt_seconds_total", "counter", "Seconds for them.", c.prompt_s);
    add("llamacpp:tokens_predicted_total", "counter", "Tokens generated.", c.generated as f64);
    add("llamacpp:tokens_predicted_seconds_total", "counter", "Seconds for them.", c.decode_s);
    add("llamacpp:n_decode_total", "counter", "Passes.", c.passes as f64);
    let busy = if c.passes > 0 { c.texts_of_passes as f64 / c.passes as f64 } else { 0.0 };
    add("llamacpp:n_busy_slots_per_decode", "gauge", "Texts that a pass had tokens of, on average.", busy);
    let prompt_rate = rate(c.prompt_tokens, c.prompt_s);
    add("llamacpp:prompt_tokens_seconds", "gauge", "Tokens of prompts per second.", prompt_rate);
    let rate = rate(c.generated, c.decode_s);
    add("llamacpp:predicted_tokens_seconds", "gauge", "Tokens generated per second.", rate);
    add("llamacpp:requests_processing", "gauge", "Requests being computed.", running as f64);
    add("llamacpp:requests_deferred", "gauge", "Requests that wait.", waiting as f64);
    add("llamacpp:kv_cache_usage_ratio", "gauge", "Share of the context that is in use.", kv);
    add("nt:slots", "gauge", "Requests that are computed at once at most.", view.slots as f64);
    add("nt:requests_done_total", "counter", "Requests answered.", c.done as f64);
    add("nt:requests_cancelled_total", "counter", "Requests whose client went away.", c.cancelled as f64);
    add("nt:requests_failed_total", "counter", "Requests that failed.", c.failed as f64);
    add("nt:requests_refused_total", "counter", "Requests that the full queue refused.", c.refused as f64);
    let cached = c.cached_tokens as f64;
    add("nt:prompt_tokens_cached_total", "counter", "Tokens of prompts taken from the cache.", cached);
    add_of_models(view, models, kv, &mut out);
    out
}

/// vLLM's gauges and histograms, for each model.
fn add_of_models(view: &View, models: &Models, kv: f64, out: &mut String) {
    let labels: Vec<String> = models.all().iter().map(|s| format!("model_name={}", json!(s.name()))).collect();
    let is_loaded = |i: usize| view.present.loaded() == Some(i);
    let mut add = |name: &str, help: &str, value: &dyn Fn(usize) -> f64| {
        out.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        for (i, labels) in labels.iter().enumerate() {
            out.push_str(&format!("{name}{{{labels}}} {}\n", value(i)));
        }
    };
    let running = |i| if is_loaded(i) { view.running.len() as f64 } else { 0.0 };
    let used = |i| if is_loaded(i) { kv } else { 0.0 };
    add("vllm:num_requests_running", "Requests being computed.", &running);
    add("vllm:num_requests_waiting", "Requests that wait.", &|i| view.models[i].waiting as f64);
    add("vllm:kv_cache_usage_perc", "Share of the context that is in use, 1 for all.", &used);
    add("vllm:gpu_cache_usage_perc", "The same under its older name.", &used);
    add("nt:model_loaded", "Whether the model is in memory.", &|i| f64::from(u8::from(is_loaded(i))));
    let first = "Seconds from a request to its first token, waiting included.";
    let first_token = view.models.iter().map(|m| &m.counters.first_token);
    Histogram::write("vllm:time_to_first_token_seconds", first, labels.iter().zip(first_token), out);
    let token = view.models.iter().map(|m| &m.counters.token);
    let help = "Seconds per token behind the first.";
    Histogram::write("vllm:time_per_output_token_seconds", help, labels.iter().zip(token), out);
}

/// `/slots`: one for each request that may be computed at once.
pub fn slots(view: &View, models: &Models) -> Json {
    let served = shown(view, models);
    let slot = |id: usize| slot_json(id, view.running.iter().find(|r| r.slot == id), served);
    (0..view.slots).map(slot).collect()
}

fn slot_json(id: usize, r: Option<&Running>, served: &Served) -> Json {
    json!({
        "id": id,
        "id_task": r.map_or(-1, |r| r.id as i64),
        "n_ctx": served.n_ctx,
        "speculative": false,
        "is_processing": r.is_some(),
        "n_prompt_tokens": r.map_or(0, |r| r.prompt),
        "n_prompt_tokens_processed": r.map_or(0, |r| r.evaluated),
        "next_token": [{
            "n_decoded": r.map_or(0, |r| r.generated),
            "n_remain": r.map_or(-1, |r| r.most.saturating_sub(r.generated) as i64),
            "has_next_token": r.is_some(),
        }],
    })
}

/// `/machine`: what the page at `/` shows. Bytes and sums only grow, so that whoever asks twice knows rates.
pub fn machine(view: &View, models: &Models) -> Json {
    let (c, l, served) = (&view.counters, &view.links, shown(view, models));
    let loaded = view.present.loaded();
    let session = |key: &str| loaded.map_or(Json::Null, |_| served.session(key));
    let phase = match (view.phase, view.present) {
        (Phase::Open, Present::Nothing) => "unloaded",
        (Phase::Open, Present::Loading { .. }) => "loading",
        (phase, _) => phase.name(),
    };
    let link = |bytes: u64, per_pass: u64, busy_s: Option<f64>, ceiling: Option<f64>| json!({ "bytes": bytes, "used": per_pass > 0, "busy_s": busy_s, "ceiling_gb_per_s": ceiling.map(|c| c / 1e9) });
    let from_ram =
        l.bytes_per_pass.saturating_sub(l.nvme_bytes_per_pass) * u64::from(!l.on_device) + l.beside_bytes_per_pass;
    let running = view.running.iter().map(|r| {
        json!({ "slot": r.slot, "prompt": r.prompt, "evaluated": r.evaluated, "generated": r.generated, "most": r.most })
    });
    let at_hand = |of: fn(&Running) -> usize| view.running.iter().map(|r| of(r) as u64).sum::<u64>();
    json!({
        "model": served.name(),
        "models": models.all().iter().map(|served| served.name()).collect::<Vec<_>>(),
        "version": concat!("nt ", env!("CARGO_PKG_VERSION")),
        "phase": phase,
        "time_s": view.up_s,
        "n_ctx": served.n_ctx,
        "backend": session("backend"),
        "device": session("device"),
        "site": session("site"),
        "reader": session("reader"),
        "plan": session("plan"),
        "roofline": session("roofline"),
        "links": {
            "nvme": link(l.nvme_bytes, l.nvme_bytes_per_pass, Some(l.nvme_busy_s), l.nvme_ceiling),
            "ram": link(l.ram_bytes, from_ram, None, l.ram_ceiling),
            "gpu": link(l.gpu_bytes, l.gpu_bytes_per_pass, l.gpu_timed.then_some(l.gpu_busy_s), l.gpu_ceiling),
        },
        "passes": { "count": l.passes, "seconds": l.pass_s },
        "queue": {
            "slots": view.slots, "waiting": view.waiting, "most": served.limits.queue,
            "running": running.collect::<Vec<_>>(),
        },
        "totals": {
            "done": c.done, "cancelled": c.cancelled, "failed": c.failed, "refused": c.refused,
            "prompt_tokens": c.prompt_tokens + at_hand(|r| r.evaluated.saturating_sub(r.cached)),
            "cached_tokens": c.cached_tokens,
            "generated": c.generated + at_hand(|r| r.generated),
        },
    })
}

/// Parameters as llama-server tells them.
pub fn params(p: &SamplerParams) -> Json {
    let all = |n: usize| i64::try_from(n).unwrap_or(-1);
    json!({
        "temperature": p.temp,
        "top_k": p.top_k,
        "top_p": p.top_p,
        "min_p": p.min_p,
        "typical_p": p.typical,
        "top_n_sigma": p.top_n_sigma,
        "xtc_probability": p.xtc_probability,
        "xtc_threshold": p.xtc_threshold,
        "repeat_penalty": p.repeat_penalty,
        "repeat_last_n": all(p.repeat_last_n),
        "presence_penalty": p.presence_penalty,
        "frequency_penalty": p.frequency_penalty,
        "dry_multiplier": p.dry.multiplier,
        "dry_base": p.dry.base,
        "dry_allowed_length": p.dry.allowed_length,
        "dry_penalty_last_n": all(p.dry.last_n),
        "ignore_eos": p.ignore_eos,
    })
}

/// `/props`: of the model in memory, or else the first, with the names of all.
pub fn props(view: &View, models: &Models) -> Json {
    let served = shown(view, models);
    let all = models.all().iter().enumerate();
    let all =
        all.map(|(i, s)| json!({ "id": s.name(), "aliases": &s.names[1..], "status": { "value": state(view, i) } }));
    let t = &served.opened.tokenizer;
    let token = |id: Option<u32>| id.map(|id| String::from_utf8_lossy(t.token_bytes(id)).into_owned());
    json!({
        "default_generation_settings": { "n_ctx": served.n_ctx, "params": params(&served.defaults) },
        "total_slots": view.slots,
        "model_alias": served.name(),
        "models": all.collect::<Vec<_>>(),
        // The name alone: where the file lies is no business of a client's.
        "model_path": served.opened.gguf.shards.first().and_then(|s| s.path.file_name()).map(|n| n.to_string_lossy()),
        "chat_template": served.template_source,
        "chat_template_caps": { "supports_tools": served.family().is_some(), "supports_reasoning": served.thinks() },
        "bos_token": token(t.bos()),
        "eos_token": token(t.eos()),
        "modalities": { "vision": false, "audio": false },
        "build_info": concat!("nt ", env!("CARGO_PKG_VERSION")),
        "tiers": served.plan(),
    })
}

/// Tokens of a text, and whether their pieces are to be told.
pub struct Tokenized {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Whether each is told with its text.
    pub pieces: bool,
}

/// `/tokenize`.
///
/// # Errors
/// What is wrong with the request.
pub fn tokenize(served: &Served, mut f: Fields) -> Result<Tokenized, ApiError> {
    let text =
        f.text("content")?.ok_or_else(|| ApiError::field("content", "content: a text was expected, found nothing"))?;
    let add = f.flag("add_special")?.unwrap_or(false);
    let parse = f.flag("parse_special")?.unwrap_or(true);
    let pieces = f.flag("with_pieces")?.unwrap_or(false);
    f.finish()?;
    Ok(Tokenized { ids: served.opened.tokenizer.encode(&text, add, parse), pieces })
}

/// Most tokens of a request to `/detokenize`: each may be a long text.
const DETOKENIZE_MAX: usize = 1 << 17;

/// `/detokenize`.
///
/// # Errors
/// What is wrong with the request.
pub fn detokenize(served: &Served, mut f: Fields) -> Result<Json, ApiError> {
    let list =
        f.list("tokens")?.ok_or_else(|| ApiError::field("tokens", "tokens: a list was expected, found nothing"))?;
    f.finish()?;
    if list.len() > DETOKENIZE_MAX {
        let message = format!("tokens: at most {DETOKENIZE_MAX} were expected, found {}", list.len());
        return Err(ApiError::field("tokens", message));
    }
    let t = &served.opened.tokenizer;
    let id = |v: &Json| {
        let id = whole(v).and_then(|n| u32::try_from(n).ok()).filter(|id| (*id as usize) < t.vocab_size());
        id.ok_or_else(|| wrong("tokens", &format!("token ids from 0 to {}", t.vocab_size() - 1), v))
    };
    let ids = list.iter().map(id).collect::<Result<Vec<_>, _>>()?;
    Ok(json!({ "content": t.decode(&ids, true) }))
}

/// `/apply-template`.
///
/// # Errors
/// What is wrong with the request.
pub fn apply_template(served: &Served, mut f: Fields, stop: &dyn Fn() -> bool) -> Result<Json, ApiError> {
    let (conversation, _) = openai::conversation(&mut f, served)?;
    f.finish()?;
    Ok(json!({ "prompt": prompt::rendered(served, &conversation, stop)?.text }))
}
