//! From metadata to a tokenizer: checks, defaults, special ids.

use super::bpe::BpeBuilder;
use super::pretokenize::{self, PreTokenizer};
use super::vocab::{Kind, Vocab, special_id};
use super::{Algorithm, Tokenizer, TokenizerError, eog, special, spm};
use crate::gguf::{Array, Metadata, StringArray, Value};

fn bad(key: &str, what: impl Into<String>) -> TokenizerError {
    TokenizerError::Metadata { key: format!("tokenizer.ggml.{key}"), what: what.into() }
}

pub(super) fn load(m: &Metadata) -> Result<Tokenizer, TokenizerError> {
    let model = m.str("tokenizer.ggml.model").ok_or_else(|| bad("model", "is missing"))?;
    let (bpe, chars) = match model {
        "gpt2" => (true, false),
        "llama" => (false, false),
        "gemma4" => (true, true),
        other => return Err(TokenizerError::UnknownModel { found: other.to_owned() }),
    };
    let tokens = m.strings("tokenizer.ggml.tokens").ok_or_else(|| bad("tokens", "is missing or no list of strings"))?;
    if tokens.is_empty() {
        return Err(bad("tokens", "is empty"));
    }
    let n = tokens.len();
    let mut warnings = Vec::new();
    let family = match (bpe, chars) {
        (true, true) => Some(&pretokenize::LINES),
        (true, false) => Some(family(m, &mut warnings)?),
        (false, _) => None,
    };
    let (default_bos, default_eos) = match family {
        Some(_) if chars => (None, None),
        Some(f) if f.no_bos => (None, Some(11)),
        Some(_) => (Some(11), Some(11)),
        None => (Some(1), Some(2)),
    };
    let in_range = |id: Option<u32>| id.filter(|&id| (id as usize) < n);
    let bos = special_id(m, "bos_token_id", n, in_range(default_bos), &mut warnings);
    let eos = special_id(m, "eos_token_id", n, in_range(default_eos), &mut warnings);
    let mut kinds = kinds(m, n)?;
    let eog = eog::collect(m, tokens, eos, &mut kinds, &mut warnings);
    let in_bytes = bpe && !chars;
    let vocab = vocab(m, tokens, kinds, in_bytes, !bpe)?;
    warnings.extend(lost_bytes(&vocab, in_bytes));
    let (algorithm, add_bos) = match family {
        Some(f) if chars => (Algorithm::Chars { bpe: merges_of_chars(m, &vocab, f)?, shown: shown(&vocab) }, f.add_bos),
        Some(f) => (Algorithm::Bpe(merges(m, &vocab, f)?), f.add_bos),
        None => {
            let add_space_prefix = flag(m, "add_space_prefix")?.unwrap_or(true);
            (Algorithm::Spm { add_space_prefix, shown: shown(&vocab) }, true)
        }
    };
    let asked = flag(m, "add_bos_token")?;
    if chars && asked == Some(false) {
        warnings.push("tokenizer.ggml.add_bos_token is false, but Gemma 4 needs BOS, which is added".to_owned());
    }
    Ok(Tokenizer {
        algorithm,
        bos,
        eos,
        add_bos: chars || asked.unwrap_or(add_bos),
        add_eos: flag(m, "add_eos_token")?.unwrap_or(false),
        eog,
        suppressed: suppressed(m, n)?,
        special: special::find(m, &vocab)?,
        warnings,
        vocab,
    })
}

/// A bool, and no other value: without it a text would have other tokens.
fn flag(m: &Metadata, key: &str) -> Result<Option<bool>, TokenizerError> {
    match m.get(&format!("tokenizer.ggml.{key}")) {
        None => Ok(None),
        Some(Value::Bool(v)) => Ok(Some(*v)),
        Some(found) => Err(bad(key, format!("true or false was expected, found {found}"))),
    }
}

/// Tokens that are never drawn; ids beyond the vocabulary are none, as in llama.cpp.
fn suppressed(m: &Metadata, n: usize) -> Result<Vec<u32>, TokenizerError> {
    let Some(value) = m.get("tokenizer.ggml.suppress_tokens") else { return Ok(Vec::new()) };
    let ids = match value {
        Value::Array(Array::Int(ids)) => ids,
        Value::Array(a) if a.is_empty() => return Ok(Vec::new()),
        other => return Err(bad("suppress_tokens", format!("an array of ids was expected, found {other}"))),
    };
    Ok(ids.iter().filter_map(|&id| u32::try_from(id).ok()).filter(|&id| (id as usize) < n).collect())
}

/// The family of pre-tokenizer that the metadata name.
fn family(m: &Metadata, warnings: &mut Vec<String>) -> Result<&'static pretokenize::Family, TokenizerError> {
    let pre = match m.get("tokenizer.ggml.pre") {
        // llama.cpp takes an empty name for none.
        None => None,
        Some(Value::Str(name)) => Some(name.as_str()).filter(|p| !p.is_empty()),
        Some(found) => return Err(bad("pre", format!("a name was expected, found {found}"))),
    };
    if pre.is_none() {
        warnings.push("tokenizer.ggml.pre is missing; the default pre-tokenizer is used, and the text may be worse for it: convert the model anew".to_owned());
    }
    pretokenize::family(pre)
}

fn kinds(m: &Metadata, n: usize) -> Result<Vec<Kind>, TokenizerError> {
    let types = match m.get("tokenizer.ggml.token_type") {
        None => return Ok(vec![Kind::Normal; n]),
        Some(Value::Array(Array::Int(types))) => types,
        Some(found) => return Err(bad("token_type", format!("an array of integers was expected, found {found}"))),
    };
    if types.len() < n {
        return Err(bad("token_type", format!("has {} entries for {n} tokens", types.len())));
    }
    let kind = |&t: &i64| match t {
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        6 => Kind::Byte,
        1 => Kind::Normal,
        _ => Kind::Unused,
    };
    Ok(types.iter().take(n).map(kind).collect())
}

/// `in_bytes`: tokens are written in the stand-ins of bytes. `scored`: pairs merge by scores.
fn vocab(
    m: &Metadata,
    tokens: &StringArray,
    kinds: Vec<Kind>,
    in_bytes: bool,
    scored: bool,
) -> Result<Vocab, TokenizerError> {
    let n = tokens.len();
    let alphabet = alphabet();
    let mut vocab = Vocab::default();
    // Texts that are not written in the alphabet are never the outcome of merging.
    let mut out_of_reach = vec![false; n];
    for ((token, kind), out) in tokens.iter().zip(kinds).zip(&mut out_of_reach) {
        if !in_bytes {
            vocab.push(token, kind);
        } else if matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown) {
            *out = !token.iter().all(u8::is_ascii_graphic);
            vocab.push(token, kind);
        } else {
            let bytes = unmap(token, &alphabet);
            *out = bytes.is_none();
            vocab.push(bytes.as_deref().unwrap_or(token), kind);
        }
    }
    vocab.shrink();
    vocab.build_index(|id| !out_of_reach[id as usize]);
    if scored {
        vocab.scores = scores(m, n)?;
    }
    if !in_bytes {
        vocab.byte_tokens =
            (0..=255u8).map(|b| vocab.find(format!("<0x{b:02X}>").as_bytes()).or_else(|| vocab.find(&[b]))).collect();
    }
    Ok(vocab)
}

/// Says which bytes of texts have no token: they are left out, as llama.cpp does. With SentencePiece they count only
/// where a character has no token of its own, and some vocabularies have none of them.
fn lost_bytes(vocab: &Vocab, in_bytes: bool) -> Option<String> {
    // The others are in no UTF-8, begin characters that are not assigned (0xF1, 0xF2) or for private use (0xF4), or are
    // control characters, which vocabularies of real models lack, too.
    let written = |b: &u8| !b.is_ascii_control() || matches!(b, b'\t' | b'\n' | b'\r');
    let in_texts = (0..=0xF3u8).filter(|b| written(b) && !matches!(b, 0xC0 | 0xC1 | 0xF1 | 0xF2));
    let has = |b: u8| match in_bytes {
        true => vocab.find(&[b]).is_some(),
        false => vocab.byte_tokens[usize::from(b)].is_some(),
    };
    let lost: Vec<u8> = in_texts.filter(|&b| !has(b)).collect();
    let first = lost.first()?;
    Some(format!(
        "the vocabulary has no token for {} of the bytes that texts hold (the first is 0x{first:02X}): they are left out of prompts",
        lost.len()
    ))
}

fn scores(m: &Metadata, n: usize) -> Result<Vec<f32>, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.scores";
    let scores: Vec<f32> = match (m.floats(KEY), m.ints(KEY)) {
        (Some(v), _) => v.iter().copied().take(n).collect(),
        (None, Some(v)) => v.iter().map(|&s| s as f32).take(n).collect(),
        (None, None) => return Err(bad("scores", "is missing or no list of numbers")),
    };
    if scores.len() < n {
        return Err(bad("scores", format!("has {} entries for {n} tokens", scores.len())));
    }
    Ok(scores)
}

/// The two sides of a merge: the first space after the first character parts them.
fn sides(rank: usize, merge: &[u8]) -> Result<(&[u8], &[u8]), TokenizerError> {
    match merge.iter().skip(1).position(|&b| b == b' ') {
        Some(at) => Ok((&merge[..=at], &merge[at + 2..])),
        None => Err(bad("merges", format!("entry {rank} ({:?}) is no pair", String::from_utf8_lossy(merge)))),
    }
}

fn merge_list(m: &Metadata) -> Result<&StringArray, TokenizerError> {
    m.strings("tokenizer.ggml.merges").ok_or_else(|| bad("merges", "is missing or no list of strings"))
}

fn merges_of_chars(m: &Metadata, vocab: &Vocab, family: &pretokenize::Family) -> Result<super::Bpe, TokenizerError> {
    let merges = merge_list(m)?;
    let mut builder = BpeBuilder::new(vocab, merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let (left, right) = sides(rank, merge)?;
        builder.merge(left, right, rank as u32);
    }
    Ok(builder.build_of_chars(PreTokenizer::new(family)?))
}

fn merges(m: &Metadata, vocab: &Vocab, family: &pretokenize::Family) -> Result<super::Bpe, TokenizerError> {
    let merges = merge_list(m)?;
    let alphabet = alphabet();
    let mut builder = BpeBuilder::new(vocab, merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let (left, right) = sides(rank, merge)?;
        // A side that is not written in the alphabet occurs in no text.
        if let (Some(left), Some(right)) = (unmap(left, &alphabet), unmap(right, &alphabet)) {
            builder.merge(&left, &right, rank as u32);
        }
    }
    Ok(builder.build(PreTokenizer::new(family)?, family.ignore_merges))
}

/// What SentencePiece tokens stand for: in those that are text, U+2581 is a space.
fn shown(vocab: &Vocab) -> StringArray {
    let mut out = StringArray::default();
    for id in 0..vocab.len() as u32 {
        match (vocab.kind(id), std::str::from_utf8(vocab.bytes(id))) {
            (Some(Kind::Normal | Kind::Unused), Ok(s)) => out.push(s.replace(spm::SPACE, " ").as_bytes()),
            _ => out.push(vocab.bytes(id)),
        }
    }
    out
}

/// The byte behind each printable stand-in of byte-level BPE, by code point (below 512).
/// Source: GPT-2's `bytes_to_unicode`.
fn alphabet() -> [Option<u8>; 512] {
    let mut map = [None; 512];
    let mut spare = 256;
    for b in 0..=255u8 {
        let c = usize::from(b);
        if (33..127).contains(&c) || (161..173).contains(&c) || c >= 174 {
            map[c] = Some(b);
        } else {
            map[spare] = Some(b);
            spare += 1;
        }
    }
    map
}

/// The bytes that a token's text stands for; `None` if it is not written in the alphabet.
fn unmap(token: &[u8], alphabet: &[Option<u8>; 512]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(token).ok()?;
    text.chars().map(|c| alphabet.get(c as usize).copied().flatten()).collect()
}

/// Every byte, so that byte tokens have something to point at.
static BYTES: [u8; 256] = {
    let mut all = [0; 256];
    let mut i = 0;
    while i < 256 {
        all[i] = i as u8;
        i += 1;
    }
    all
};

/// The byte of a token such as `<0x0A>`; the text itself if it is not of that form.
pub(super) fn byte_of(text: &[u8]) -> &[u8] {
    let hex = text.strip_prefix(b"<0x").and_then(|t| t.strip_suffix(b">")).and_then(|h| std::str::from_utf8(h).ok());
    match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
        Some(b) => &BYTES[usize::from(b)..=usize::from(b)],
        None => text,
    }
}
