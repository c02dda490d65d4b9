//! Requests for vectors of texts: `/v1/embeddings`, and Ollama's `/api/embed` and `/api/embeddings`.

use std::fmt::Write as _;
use std::time::Instant;

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::fields::{Fields, whole, wrong};
use super::job::{Summary, Texts};
use super::ollama::keep_alive;
use super::params::HARMLESS;
use super::present::Keep;
use super::served::Served;

/// Most texts of a request.
const TEXTS_MAX: usize = 2048;

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// OpenAI's list of objects with lists of numbers.
    Numbers,
    /// The same with the bytes of F32 in base64, which OpenAI's clients ask for.
    Base64,
    /// Ollama's list of lists.
    Ollama,
    /// Ollama's older one of a single list.
    OllamaOne,
}

/// A request that was read.
pub struct Asked {
    /// The texts.
    pub texts: Texts,
    /// How their vectors are written.
    pub written: Written,
    /// When it was read.
    pub since: Instant,
    /// How long the model is to stay behind it.
    pub keep: Keep,
}

/// Reads a request to `/v1/embeddings`.
///
/// # Errors
/// What is wrong with it.
pub fn openai(served: &Served, mut f: Fields) -> Result<Asked, ApiError> {
    let written = match f.text("encoding_format")?.as_deref() {
        None | Some("float") => Written::Numbers,
        Some("base64") => Written::Base64,
        Some(other) => return Err(wrong("encoding_format", "float or base64", &json!(other))),
    };
    let width = served.opened.model.hparams.n_embd;
    f.only("dimensions", &[json!(width)], &format!("vectors have the model's {width} elements; they are not cut"))?;
    let input = f.any("input").ok_or_else(|| wrong("input", "a text or a list of texts", &Json::Null))?;
    f.ignore(&HARMLESS);
    f.finish()?;
    let all = inputs(input, served)?;
    asked(served, all, written, served.n_ctx, false, "input")
}

/// Reads a request to `/api/embed`.
///
/// # Errors
/// What is wrong with it.
pub fn ollama(served: &Served, mut f: Fields) -> Result<Asked, ApiError> {
    let truncate = f.flag("truncate")?.unwrap_or(true);
    let width = served.opened.model.hparams.n_embd;
    f.only("dimensions", &[json!(0), json!(width)], "vectors have the model's elements; they are not cut")?;
    let n_ctx = num_ctx(&mut f, served)?;
    let all = f.texts("input")?;
    let keep = keep_alive(&mut f)?;
    f.finish()?;
    let all = all.iter().map(|text| served.opened.tokenizer.encode_prompt(text)).collect();
    Ok(Asked { keep, ..asked(served, all, Written::Ollama, n_ctx, truncate, "input")? })
}

/// Reads a request to `/api/embeddings`, which older clients of Ollama send.
///
/// # Errors
/// What is wrong with it.
pub fn ollama_one(served: &Served, mut f: Fields) -> Result<Asked, ApiError> {
    let n_ctx = num_ctx(&mut f, served)?;
    let text = f.text("prompt")?.ok_or_else(|| wrong("prompt", "a text", &Json::Null))?;
    let keep = keep_alive(&mut f)?;
    f.finish()?;
    let all = vec![served.opened.tokenizer.encode_prompt(&text)];
    Ok(Asked { keep, ..asked(served, all, Written::OllamaOne, n_ctx, true, "prompt")? })
}

/// The context that `options` ask for; the others say how an answer is drawn, and there is none.
fn num_ctx(f: &mut Fields, served: &Served) -> Result<usize, ApiError> {
    let Some(mut options) = f.object("options")? else { return Ok(served.n_ctx) };
    let most = i64::try_from(served.n_ctx).unwrap_or(i64::MAX);
    Ok(options.whole("num_ctx", 1, most)?.map_or(served.n_ctx, |n| n as usize))
}

/// Texts as OpenAI gives them: one or several, as words or as tokens.
fn inputs(input: Json, served: &Served) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &str| {
        served.check_bytes(text.len(), "input")?;
        Ok(served.opened.tokenizer.encode_prompt(text))
    };
    match input {
        Json::String(text) => Ok(vec![encode(&text)?]),
        Json::Array(items) if items.first().is_some_and(Json::is_number) => Ok(vec![ids(&items, served)?]),
        Json::Array(items) => {
            count(items.len(), "input")?;
            let one = |item: &Json| match item {
                Json::String(text) => encode(text),
                Json::Array(items) => ids(items, served),
                other => Err(wrong("input", "texts, or lists of token ids", other)),
            };
            items.iter().map(one).collect()
        }
        other => Err(wrong("input", "a text or a list of texts", &other)),
    }
}

fn ids(items: &[Json], served: &Served) -> Result<Vec<u32>, ApiError> {
    let n_vocab = served.opened.model.n_vocab;
    let id = |v: &Json| {
        let id = whole(v).and_then(|n| u32::try_from(n).ok()).filter(|id| (*id as usize) < n_vocab);
        id.ok_or_else(|| wrong("input", &format!("token ids from 0 to {}", n_vocab - 1), v))
    };
    items.iter().map(id).collect()
}

fn count(n: usize, field: &str) -> Result<(), ApiError> {
    if (1..=TEXTS_MAX).contains(&n) {
        return Ok(());
    }
    Err(ApiError::field(field, format!("{field}: from 1 to {TEXTS_MAX} texts were expected, found {n}")))
}

/// Texts within the limits of the server; those that are longer than `n_ctx` are cut, or refused.
fn asked(
    served: &Served,
    mut all: Vec<Vec<u32>>,
    written: Written,
    n_ctx: usize,
    truncate: bool,
    field: &str,
) -> Result<Asked, ApiError> {
    count(all.len(), field)?;
    for (i, text) in all.iter_mut().enumerate() {
        let n = text.len();
        if n == 0 {
            return Err(ApiError::field(
                field,
                format!("{field}: text {i} is empty, and this model adds no BOS token"),
            ));
        }
        if n > n_ctx && !truncate {
            let message = format!("{field}: text {i} has {n} tokens, but the context holds {n_ctx}");
            return Err(ApiError { param: Some(field.to_owned()), ..ApiError::too_long(message) });
        }
        text.truncate(n_ctx);
    }
    Ok(Asked { texts: Texts { all, pooling: served.pooling }, written, since: Instant::now(), keep: Keep::Server })
}

impl Asked {
    /// About how many bytes the texts and the answer have.
    pub fn bytes(&self, width: usize) -> usize {
        let texts: usize = self.texts.all.iter().map(|text| size_of_val(&text[..])).sum();
        // A number as text, and as itself.
        texts + self.texts.all.len().saturating_mul(width).saturating_mul(16)
    }
}

/// The answer, as JSON.
pub fn answer(vectors: &[Vec<f32>], written: Written, since: Instant, summary: &Summary, served: &Served) -> String {
    let list = |v: &[f32]| {
        let mut out = String::with_capacity(v.len() * 12 + 2);
        out.push('[');
        for (i, x) in v.iter().enumerate() {
            // Writing to a text cannot fail.
            let _ = write!(out, "{}{x}", if i > 0 { "," } else { "" });
        }
        out.push(']');
        out
    };
    let name = json!(served.name());
    if matches!(written, Written::Ollama | Written::OllamaOne) {
        let ns = since.elapsed().as_nanos() as u64;
        if written == Written::OllamaOne {
            return format!("{{\"embedding\":{}}}", vectors.first().map_or_else(|| "[]".into(), |v| list(v)));
        }
        let all: Vec<String> = vectors.iter().map(|v| list(v)).collect();
        return format!(
            "{{\"model\":{name},\"embeddings\":[{}],\"total_duration\":{ns},\"load_duration\":{},\"prompt_eval_count\":{}}}",
            all.join(","),
            (summary.load_s * 1e9) as u64,
            summary.prompt
        );
    }
    let object = |(i, v): (usize, &Vec<f32>)| {
        let vector = if written == Written::Base64 { format!("\"{}\"", base64(v)) } else { list(v) };
        format!("{{\"object\":\"embedding\",\"index\":{i},\"embedding\":{vector}}}")
    };
    let all: Vec<String> = vectors.iter().enumerate().map(object).collect();
    format!(
        "{{\"object\":\"list\",\"model\":{name},\"data\":[{}],\"usage\":{{\"prompt_tokens\":{n},\"total_tokens\":{n}}}}}",
        all.join(","),
        n = summary.prompt
    )
}

/// The bytes of numbers, the lowest first, in base64 (RFC 4648, section 4).
fn base64(v: &[f32]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = v.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0u32, |bits, b| bits << 8 | u32::from(*b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= three.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_base64() {
        assert_eq!(base64(&[]), "");
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(base64(&[1.0, -2.5, 0.1]), "AACAPwAAIMDNzMw9");
    }
}
