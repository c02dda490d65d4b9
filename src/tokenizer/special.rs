//! Special tokens in a text: found before anything else, longest first.

use super::vocab::{Kind, Vocab};

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// Splits `text` on the special tokens in it. Control and unknown tokens count only with
/// `parse_special`; user-defined ones always.
pub(super) fn split<'a>(vocab: &Vocab, special: &[u32], text: &'a str, parse_special: bool) -> Vec<Piece<'a>> {
    let mut pieces = if text.is_empty() { vec![] } else { vec![Piece::Text(text)] };
    for &id in special {
        let wanted = parse_special || vocab.kind(id) == Some(Kind::UserDefined);
        let Ok(name) = std::str::from_utf8(vocab.bytes(id)) else { continue };
        if !wanted || name.is_empty() || !text.contains(name) {
            continue;
        }
        let mut next = Vec::with_capacity(pieces.len() + 2);
        for piece in pieces {
            match piece {
                Piece::Token(t) => next.push(Piece::Token(t)),
                Piece::Text(t) => {
                    for (i, part) in t.split(name).enumerate() {
                        if i > 0 {
                            next.push(Piece::Token(id));
                        }
                        if !part.is_empty() {
                            next.push(Piece::Text(part));
                        }
                    }
                }
            }
        }
        pieces = next;
    }
    pieces
}
