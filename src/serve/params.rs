//! Sampling parameters of requests, under the names that clients use.

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::fields::{Fields, whole, wrong};
use super::served::Served;
use crate::engine::SamplerParams;

/// Fields of all dialects that change no text: whose request it is, how it is billed, stored or cached, and which slot
/// or preview of the answer the client would like. They may hold anything.
pub const HARMLESS: [&str; 22] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
    "prediction",
    "id_slot",
    "timings_per_token",
    "return_progress",
    "return_tokens",
    "n_keep",
    "n_discard",
    "keep_alive",
    "request_id",
    "priority",
    "n_cache_reuse",
    "sse_ping_interval",
    "backend_sampling",
    "verbose",
];

/// Fields that would change the text in a way that nt does not do, and what they may hold.
fn refuse_others(f: &mut Fields) -> Result<(), ApiError> {
    f.only("mirostat", &[json!(0)], "Mirostat is not built")?;
    f.only("dynatemp_range", &[json!(0)], "dynamic temperature is not built")?;
    f.only("min_keep", &[json!(0), json!(1)], "a least number of candidates is not built")?;
    f.only("samplers", &[], "the order of samplers is fixed")?;
    f.only(
        "t_max_predict_ms",
        &[json!(0), json!(-1)],
        "a time limit for one answer is not built; the server has --timeout",
    )?;
    f.only(
        "t_max_prompt_ms",
        &[json!(0), json!(-1)],
        "a time limit for a prompt is not built; the server has --timeout",
    )?;
    f.only("reasoning_budget_message", &[json!("")], "reasoning that has used its budget ends without words")?;
    f.only("lora", &[json!([])], "adapters are not built")?;
    f.only("post_sampling_probs", &[json!(false)], "probabilities are those before sampling")?;
    f.only("use_beam_search", &[json!(false)], "beam search is not built")?;
    f.only("length_penalty", &[json!(1)], "beam search is not built")?;
    f.only("bad_words", &[json!([])], "logit_bias bans tokens; words of several tokens cannot be banned")?;
    f.only("tfs_z", &[json!(1)], "tail free sampling is not built")?;
    // vLLM's.
    f.only("include_stop_str_in_output", &[json!(false)], "a stop text is never part of the answer")?;
    f.only("skip_special_tokens", &[json!(true)], "control tokens are never shown")?;
    f.only("spaces_between_special_tokens", &[json!(true)], "control tokens are never shown")?;
    f.only("truncate_prompt_tokens", &[], "a prompt that is too long is refused, not cut")?;
    f.only("prompt_logprobs", &[json!(0)], "probabilities of the prompt's tokens are not built")?;
    f.only("n_probs", &[json!(0)], "logprobs asks for probabilities here; /completion reads n_probs")
}

/// Reads the sampling parameters of a request.
///
/// # Errors
/// For a value out of range, or one that asks for what nt does not do.
pub fn sampling(f: &mut Fields, served: &Served) -> Result<SamplerParams, ApiError> {
    refuse_others(f)?;
    f.ignore(&["mirostat_tau", "mirostat_eta", "dynatemp_exponent"]);
    let d = &served.defaults;
    let mut p = d.clone();
    let number = |f: &mut Fields, names: &[&str], from: f64, to: f64, default: f32| {
        names.iter().try_fold(default, |value, name| Ok(f.number(name, from, to)?.map_or(value, |v| v as f32)))
    };
    p.temp = number(f, &["temperature"], -100.0, 100.0, d.temp)?.max(0.0);
    p.top_p = number(f, &["top_p"], 0.0, 1.0, d.top_p)?;
    p.min_p = number(f, &["min_p"], 0.0, 1.0, d.min_p)?;
    p.typical = number(f, &["typical_p", "typical"], 0.0, 1.0, d.typical)?;
    p.top_n_sigma = number(f, &["top_n_sigma"], -1.0, 1000.0, d.top_n_sigma)?;
    p.xtc_probability = number(f, &["xtc_probability"], 0.0, 1.0, d.xtc_probability)?;
    p.xtc_threshold = number(f, &["xtc_threshold"], 0.0, 1.0, d.xtc_threshold)?;
    let smallest = f64::from(f32::MIN_POSITIVE);
    p.repeat_penalty = number(f, &["repeat_penalty", "repetition_penalty"], smallest, 1e6, d.repeat_penalty)?;
    p.presence_penalty = number(f, &["presence_penalty"], -1e6, 1e6, d.presence_penalty)?;
    p.frequency_penalty = number(f, &["frequency_penalty"], -1e6, 1e6, d.frequency_penalty)?;
    p.dry.multiplier = number(f, &["dry_multiplier"], 0.0, 1e6, d.dry.multiplier)?;
    p.dry.base = number(f, &["dry_base"], 1.0, 1e6, d.dry.base)?;
    if let Some(k) = f.whole("top_k", i64::MIN, i64::MAX)? {
        p.top_k = usize::try_from(k).unwrap_or(0);
    }
    let all_below_zero = |n: i64| usize::try_from(n).unwrap_or(usize::MAX);
    p.repeat_last_n = f.whole("repeat_last_n", -1, i64::MAX)?.map_or(p.repeat_last_n, all_below_zero);
    p.dry.last_n = f.whole("dry_penalty_last_n", -1, i64::MAX)?.map_or(p.dry.last_n, all_below_zero);
    p.dry.allowed_length = f.whole("dry_allowed_length", 0, i64::MAX)?.map_or(p.dry.allowed_length, all_below_zero);
    let has_breakers = f.has("dry_sequence_breakers");
    let breakers = f.texts("dry_sequence_breakers")?;
    if breakers.len() > BREAKERS_MAX {
        let name = f.name("dry_sequence_breakers");
        let found = breakers.len();
        return Err(ApiError::field(
            &name,
            format!("{name}: at most {BREAKERS_MAX} texts were expected, found {found}"),
        ));
    }
    if has_breakers {
        p.dry.breakers = breakers;
    }
    p.ignore_eos = f.flag("ignore_eos")?.unwrap_or(d.ignore_eos);
    p.min_tokens = f.whole("min_tokens", 0, i64::MAX)?.map_or(0, |n| usize::try_from(n).unwrap_or(usize::MAX));
    p.ends = ends(f, served)?;
    if let Some(biases) = f.any("logit_bias") {
        p.logit_bias = logit_bias(biases, served)?;
    }
    p.seed = match f.whole("seed", -1, i64::MAX)? {
        Some(seed) if seed >= 0 => seed as u64,
        _ => served.seed.unwrap_or_else(clock),
    };
    Ok(p)
}

/// A seed from the clock.
fn clock() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64)
}

/// Ids of tokens that end an answer.
fn ends(f: &mut Fields, served: &Served) -> Result<Vec<u32>, ApiError> {
    let name = f.name("stop_token_ids");
    let list = f.list("stop_token_ids")?.unwrap_or_default();
    if list.len() > STOPS_MAX {
        let message = format!("{name}: at most {STOPS_MAX} token ids were expected, found {}", list.len());
        return Err(ApiError::field(&name, message));
    }
    list.iter().map(|v| token_id(v, served).ok_or_else(|| not_token(&name, served, v))).collect()
}

/// A token of the model.
pub fn token_id(value: &Json, served: &Served) -> Option<u32> {
    whole(value).and_then(|n| u32::try_from(n).ok()).filter(|id| (*id as usize) < served.opened.model.n_vocab)
}

/// The error for what is none.
pub fn not_token(name: &str, served: &Served, found: &Json) -> ApiError {
    wrong(name, &format!("token ids from 0 to {}", served.opened.model.n_vocab - 1), found)
}

/// Biases as OpenAI writes them, `{"ID": X}`, or as llama-server does, `[[ID, X], …]` or `[["TEXT", X], …]` for each token
/// of a text; `false` for X bans a token.
fn logit_bias(value: Json, served: &Served) -> Result<Vec<(u32, f32)>, ApiError> {
    let n_vocab = served.opened.model.n_vocab;
    let expected = "an object of token ids and biases";
    let pairs: Vec<(Json, Json)> = match value {
        Json::Object(map) => {
            let id = |id: String| id.trim().parse::<u32>().map_or_else(|_| Json::String(id), Json::from);
            map.into_iter().map(|(key, x)| (id(key), x)).collect()
        }
        Json::Array(items) => {
            let pair = |item: Json| match item {
                Json::Array(mut pair) if pair.len() == 2 => {
                    let x = pair.pop().unwrap_or_default();
                    Ok((pair.pop().unwrap_or_default(), x))
                }
                other => Err(wrong("logit_bias", "pairs of a token id and a bias", &other)),
            };
            items.into_iter().map(pair).collect::<Result<_, _>>()?
        }
        other => return Err(wrong("logit_bias", expected, &other)),
    };
    let mut biases = Vec::new();
    for (id, x) in pairs {
        let bias = match &x {
            Json::Bool(false) => f32::NEG_INFINITY,
            x => match x.as_f64().filter(|v| v.abs() <= 1e6) {
                Some(v) => v as f32,
                None => {
                    let name = if id.is_number() { format!("logit_bias.{id}") } else { "logit_bias".to_owned() };
                    return Err(wrong(&name, "a number from -1e6 to 1e6, or false", x));
                }
            },
        };
        match &id {
            Json::String(text) if text.len() <= BIASED_TEXT_MAX => {
                biases.extend(served.opened.tokenizer.encode(text, false, true).into_iter().map(|id| (id, bias)));
            }
            other => {
                let number = whole(other).and_then(|n| u32::try_from(n).ok()).filter(|n| (*n as usize) < n_vocab);
                let expected = format!("token ids from 0 to {}, or short texts", n_vocab - 1);
                biases.push((number.ok_or_else(|| wrong("logit_bias", &expected, other))?, bias));
            }
        }
        // All of them are added at each token.
        if biases.len() > n_vocab {
            let message = format!("logit_bias: more biases than the {n_vocab} tokens there are");
            return Err(ApiError::field("logit_bias", message));
        }
    }
    Ok(biases)
}

/// Bytes of a text whose tokens are biased, at most.
const BIASED_TEXT_MAX: usize = 1 << 10;

/// Most texts of a request that interrupt a repetition: each is looked for in the whole vocabulary.
const BREAKERS_MAX: usize = 16;
/// Most stop texts of a request, and most tokens that end an answer.
const STOPS_MAX: usize = 64;
/// Bytes of a stop text at most: as much is held back and searched at each token.
const STOP_BYTES_MAX: usize = 1 << 10;

/// The stop texts in a field.
pub fn stops(f: &mut Fields, field: &str) -> Result<Vec<String>, ApiError> {
    let stops = f.texts(field)?;
    let name = f.name(field);
    if stops.len() > STOPS_MAX {
        return Err(ApiError::field(
            &name,
            format!("{name}: at most {STOPS_MAX} texts were expected, found {}", stops.len()),
        ));
    }
    if let Some(long) = stops.iter().find(|s| s.len() > STOP_BYTES_MAX) {
        let message = format!("{name}: texts of at most {STOP_BYTES_MAX} bytes were expected, found {}", long.len());
        return Err(ApiError::field(&name, message));
    }
    if stops.iter().any(String::is_empty) {
        let message = format!("{name}: an empty text is found before the first token, so nothing would be generated");
        return Err(ApiError::field(&name, message));
    }
    Ok(stops)
}

/// Tokens of an answer at most, of the fields in `names`; -1 until the context is full.
pub fn max_tokens(f: &mut Fields, names: &[&str]) -> Result<Option<usize>, ApiError> {
    let mut most = None;
    for name in names {
        if let Some(n) = f.whole(name, -2, i64::MAX)? {
            most = Some(usize::try_from(n).unwrap_or(usize::MAX));
        }
    }
    Ok(most)
}
