//! From metadata to a tokenizer: checks, defaults, special ids.

use super::bpe::BpeBuilder;
use super::pretokenize::{self, PreTokenizer};
use super::vocab::{Kind, Vocab};
use super::{Algorithm, Tokenizer, TokenizerError};
use crate::gguf::{Metadata, StringArray, Value};

/// Texts that end generation wherever they are tokens. Source: llama.cpp's `llama-vocab.cpp`.
const EOG_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

fn bad(key: &str, what: impl Into<String>) -> TokenizerError {
    TokenizerError::Metadata { key: format!("tokenizer.ggml.{key}"), what: what.into() }
}

pub(super) fn load(m: &Metadata) -> Result<Tokenizer, TokenizerError> {
    let model = m.str("tokenizer.ggml.model").ok_or_else(|| bad("model", "is missing"))?;
    let bpe = match model {
        "gpt2" => true,
        "llama" => false,
        other => return Err(TokenizerError::UnknownModel { found: other.to_owned() }),
    };
    let tokens = m.strings("tokenizer.ggml.tokens").ok_or_else(|| bad("tokens", "is missing or no list of strings"))?;
    if tokens.is_empty() {
        return Err(bad("tokens", "is empty"));
    }
    let vocab = vocab(m, tokens, bpe)?;
    let mut warnings = Vec::new();
    let (algorithm, add_bos, default_special) = if bpe {
        let pre = m.str("tokenizer.ggml.pre");
        if pre.is_none() {
            warnings.push("tokenizer.ggml.pre is missing; the default pre-tokenizer is used, and the text may be worse for it: convert the model anew".to_owned());
        }
        let family = pretokenize::family(pre)?;
        let ids = if family.no_bos { (None, Some(11)) } else { (Some(11), Some(11)) };
        (Algorithm::Bpe(merges(m, &vocab, family)?), family.add_bos, ids)
    } else {
        let add_space_prefix = m.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        (Algorithm::Spm { add_space_prefix }, true, (Some(1), Some(2)))
    };
    let in_range = |id: Option<u32>| id.filter(|&id| (id as usize) < vocab.len());
    let bos = special_id(m, "bos_token_id", vocab.len())?.or(in_range(default_special.0));
    let eos = special_id(m, "eos_token_id", vocab.len())?.or(in_range(default_special.1));
    let eog = eog(m, &vocab, eos)?;
    let mut special: Vec<u32> = (0..vocab.len() as u32)
        .filter(|&id| matches!(vocab.kind(id), Some(Kind::Control | Kind::UserDefined | Kind::Unknown)))
        .collect();
    special.sort_by_key(|&id| std::cmp::Reverse(vocab.bytes(id).len()));
    Ok(Tokenizer {
        algorithm,
        bos,
        eos,
        add_bos: m.bool("tokenizer.ggml.add_bos_token").unwrap_or(add_bos),
        add_eos: m.bool("tokenizer.ggml.add_eos_token").unwrap_or(false),
        eog,
        special,
        warnings,
        vocab,
    })
}

fn kinds(m: &Metadata, n: usize) -> Result<Vec<Kind>, TokenizerError> {
    let Some(types) = m.ints("tokenizer.ggml.token_type") else { return Ok(vec![Kind::Normal; n]) };
    if types.len() < n {
        return Err(bad("token_type", format!("has {} entries for {n} tokens", types.len())));
    }
    let kind = |&t: &i64| match t {
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        6 => Kind::Byte,
        _ => Kind::Normal,
    };
    Ok(types.iter().take(n).map(kind).collect())
}

fn vocab(m: &Metadata, tokens: &StringArray, bpe: bool) -> Result<Vocab, TokenizerError> {
    let n = tokens.len();
    let mut kinds = kinds(m, n)?;
    mend_kinds(tokens, &mut kinds);
    let alphabet = alphabet();
    let mut vocab = Vocab::default();
    for (token, kind) in tokens.iter().zip(kinds) {
        if bpe && !matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown) {
            vocab.push(&unmap(token, &alphabet), kind);
        } else {
            vocab.push(token, kind);
        }
    }
    vocab.shrink();
    vocab.build_index();
    if !bpe {
        let scores =
            m.floats("tokenizer.ggml.scores").ok_or_else(|| bad("scores", "is missing or no list of numbers"))?;
        if scores.len() < n {
            return Err(bad("scores", format!("has {} entries for {n} tokens", scores.len())));
        }
        vocab.scores = scores[..n].to_vec();
        vocab.byte_tokens =
            (0..=255u8).map(|b| vocab.find(format!("<0x{b:02X}>").as_bytes()).or_else(|| vocab.find(&[b]))).collect();
    }
    Ok(vocab)
}

/// End-of-generation texts are control tokens even where a file calls them something else.
fn mend_kinds(tokens: &StringArray, kinds: &mut [Kind]) {
    for (token, kind) in tokens.iter().zip(kinds) {
        let special = token.first().is_some_and(|b| matches!(b, b'<' | b'[' | b'_'));
        if special && *kind == Kind::Normal && EOG_TEXTS.iter().any(|t| t.as_bytes() == token && t.len() > 5) {
            *kind = Kind::Control;
        }
    }
}

fn merges(m: &Metadata, vocab: &Vocab, family: &pretokenize::Family) -> Result<super::Bpe, TokenizerError> {
    let merges = m.strings("tokenizer.ggml.merges").ok_or_else(|| bad("merges", "is missing or no list of strings"))?;
    let alphabet = alphabet();
    let mut builder = BpeBuilder::new(vocab, merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        // The first space after the first character parts the two sides.
        let Some(at) = merge.iter().skip(1).position(|&b| b == b' ') else {
            return Err(bad("merges", format!("entry {rank} ({:?}) is no pair", String::from_utf8_lossy(merge))));
        };
        let (left, right) = (&merge[..=at], &merge[at + 2..]);
        builder.merge(&unmap(left, &alphabet), &unmap(right, &alphabet), rank as u32);
    }
    Ok(builder.build(PreTokenizer::new(family)?, family.ignore_merges))
}

/// A special token's id from metadata; `None` if absent.
fn special_id(m: &Metadata, key: &str, n: usize) -> Result<Option<u32>, TokenizerError> {
    match m.get(&format!("tokenizer.ggml.{key}")) {
        None => Ok(None),
        // -1 (also as an unsigned number) says that there is none.
        Some(Value::Int(-1 | 0xffff_ffff)) => Ok(None),
        Some(v) => match m.u32(&format!("tokenizer.ggml.{key}")) {
            Some(id) if (id as usize) < n => Ok(Some(id)),
            _ => Err(bad(key, format!("is {v:?}, but there are {n} tokens"))),
        },
    }
}

fn eog(m: &Metadata, vocab: &Vocab, eos: Option<u32>) -> Result<Vec<u32>, TokenizerError> {
    let mut eog: Vec<u32> = EOG_TEXTS.iter().filter_map(|t| vocab.find(t.as_bytes())).collect();
    eog.extend(eos);
    for key in ["eot_token_id", "eom_token_id"] {
        eog.extend(special_id(m, key, vocab.len())?);
    }
    // Models that speak in channels (gpt-oss) end a message, not the turn, with <|end|>.
    let has = |t: &str| vocab.find(t.as_bytes());
    if let (Some(end), Some(_)) = (has("<|end|>"), has("<|call|>").or(has("<|calls|>")))
        && (has("<|return|>").is_some() || has("<|flush|>").is_some())
    {
        eog.retain(|&id| id != end);
    }
    eog.sort_unstable();
    eog.dedup();
    Ok(eog)
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

/// The bytes that a token's text stands for. Characters outside the alphabet stand for themselves.
fn unmap(token: &[u8], alphabet: &[Option<u8>; 512]) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(token) else { return token.to_vec() };
    let mut out = Vec::with_capacity(token.len());
    for c in text.chars() {
        match alphabet.get(c as usize).copied().flatten() {
            Some(b) => out.push(b),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    out
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
