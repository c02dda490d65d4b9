//! Special tokens in a text: found before anything else, longest first.

use super::vocab::{Kind, Vocab};
use crate::gguf::Metadata;

/// A token that is looked for in texts.
#[derive(Debug)]
pub(super) struct Special {
    id: u32,
    /// White space before it belongs to it.
    lstrip: bool,
    /// White space after it belongs to it.
    rstrip: bool,
}

/// Control, unknown and user-defined tokens, longest text first.
///
/// GGUF does not say which of them take the white space beside them; llama.cpp knows some models by
/// name, and so does this.
pub(super) fn list(m: &Metadata, vocab: &Vocab) -> Vec<Special> {
    let name = m.str("general.name").unwrap_or_default().to_lowercase();
    let pre = m.str("tokenizer.ggml.pre").unwrap_or_default();
    let phi3 = name.contains("phi-3") || name.contains("phi3");
    let mask: Option<&[u8]> = if ["jina-v2-de", "jina-v2-es", "jina-v2-code"].iter().any(|p| pre.contains(p)) {
        Some(b"<mask>")
    } else if !phi3 && name.contains("modern-bert") {
        Some(b"[MASK]")
    } else {
        None
    };
    let special = |id: u32| {
        let text = vocab.bytes(id);
        let kept: [&[u8]; 3] = [b"<unk>", b"<s>", b"<|endoftext|>"];
        Special { id, lstrip: mask == Some(text), rstrip: mask.is_none() && phi3 && !kept.contains(&text) }
    };
    let is_special = |&id: &u32| matches!(vocab.kind(id), Some(Kind::Control | Kind::UserDefined | Kind::Unknown));
    let mut all: Vec<Special> = (0..vocab.len() as u32).filter(is_special).map(special).collect();
    all.sort_by_key(|s| std::cmp::Reverse(vocab.bytes(s.id).len()));
    all
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// Splits `text` on the special tokens in it. Control and unknown tokens count only with
/// `parse_special`; user-defined ones always.
pub(super) fn split<'a>(vocab: &Vocab, special: &[Special], text: &'a str, parse_special: bool) -> Vec<Piece<'a>> {
    let mut pieces = if text.is_empty() { vec![] } else { vec![Piece::Text(text)] };
    for s in special {
        let wanted = parse_special || vocab.kind(s.id) == Some(Kind::UserDefined);
        if !wanted {
            continue;
        }
        let Ok(name) = std::str::from_utf8(vocab.bytes(s.id)) else { continue };
        if name.is_empty() || !text.contains(name) {
            continue;
        }
        let mut next = Vec::with_capacity(pieces.len() + 2);
        for piece in pieces {
            match piece {
                Piece::Token(t) => next.push(Piece::Token(t)),
                Piece::Text(t) => split_one(s, name, t, &mut next),
            }
        }
        pieces = next;
    }
    pieces
}

fn split_one<'a>(s: &Special, name: &str, text: &'a str, out: &mut Vec<Piece<'a>>) {
    // What C's isspace takes for white space.
    let space = |c: char| matches!(c, ' ' | '\t'..='\r');
    let mut parts = text.split(name).enumerate().peekable();
    while let Some((i, mut part)) = parts.next() {
        if i > 0 {
            out.push(Piece::Token(s.id));
            if s.rstrip {
                part = part.trim_start_matches(space);
            }
        }
        if s.lstrip && parts.peek().is_some() {
            part = part.trim_end_matches(space);
        }
        if !part.is_empty() {
            out.push(Piece::Text(part));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_beside_a_token_goes_with_it_where_it_strips() {
        let strip = |lstrip, rstrip| {
            let mut out = Vec::new();
            split_one(&Special { id: 7, lstrip, rstrip }, "<x>", "a \n<x>\t b<x>", &mut out);
            out
        };
        use Piece::{Text, Token};
        assert_eq!(strip(false, false), [Text("a \n"), Token(7), Text("\t b"), Token(7)]);
        assert_eq!(strip(true, false), [Text("a"), Token(7), Text("\t b"), Token(7)]);
        assert_eq!(strip(false, true), [Text("a \n"), Token(7), Text("b"), Token(7)]);
    }
}
