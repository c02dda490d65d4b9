//! Special tokens in a text: found before anything else, longest first.
//!
//! llama.cpp goes through the special tokens, the longest first, and cuts what is still text at every place where one
//! occurs. That takes the time of going through the text for each token. Here an automaton goes through it once and
//! gives the longest token that ends at each place; they are taken in llama.cpp's order, and where one cannot be had
//! because a part of its place was taken before, the next shorter one that ends there stands in for it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::TokenizerError;
use super::automaton::{Automaton, Found};
use super::stop::Stop;
use super::vocab::{Kind, Vocab};
use crate::gguf::Metadata;

/// A token that is looked for in texts.
#[derive(Clone, Copy, Debug)]
struct Special {
    id: u32,
    /// White space before it belongs to it.
    lstrip: bool,
    /// White space after it belongs to it.
    rstrip: bool,
}

/// Bytes of all special tokens at most. The largest vocabularies have 2 MB in all their tokens.
const BYTES_MAX: usize = 4 << 20;

/// The special tokens of a vocabulary.
#[derive(Debug)]
pub(super) struct Specials {
    all: Finder,
    /// Those that count in every text.
    user_defined: Finder,
}

/// Finds tokens.
#[derive(Debug)]
struct Finder {
    /// By the automaton's numbers, the longest text first.
    tokens: Vec<Special>,
    automaton: Automaton,
}

/// Control, unknown and user-defined tokens.
///
/// GGUF does not say which of them take the white space beside them; llama.cpp knows some models by
/// name, and so does this.
pub(super) fn find(m: &Metadata, vocab: &Vocab) -> Result<Specials, TokenizerError> {
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
    let text = |id: u32| std::str::from_utf8(vocab.bytes(id)).ok().filter(|t| !t.is_empty());
    let mut all: Vec<u32> = (0..vocab.len() as u32).filter(|id| is_special(id) && text(*id).is_some()).collect();
    let bytes: usize = all.iter().map(|&id| vocab.bytes(id).len()).sum();
    if bytes > BYTES_MAX {
        let what = format!("marks {} tokens with {bytes} bytes as special, more than {BYTES_MAX}", all.len());
        return Err(TokenizerError::Metadata { key: "tokenizer.ggml.token_type".into(), what });
    }
    all.sort_by_key(|&id| Reverse(vocab.bytes(id).len()));
    let finder = |ids: &[u32]| Finder {
        tokens: ids.iter().map(|&id| special(id)).collect(),
        automaton: Automaton::new(ids.iter().map(|&id| vocab.bytes(id))),
    };
    let user_defined: Vec<u32> = all.iter().copied().filter(|&id| vocab.kind(id) == Some(Kind::UserDefined)).collect();
    Ok(Specials { all: finder(&all), user_defined: finder(&user_defined) })
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// What was taken of a text, from where it is filed under.
struct Taken {
    end: usize,
    id: u32,
}

/// What C's isspace takes for white space.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

impl Specials {
    /// Splits `text` on the special tokens in it. Control and unknown tokens count only with `parse_special`;
    /// user-defined ones always. `None` if `stop` says so.
    pub fn split<'a>(&self, text: &'a str, parse_special: bool, stop: &Stop) -> Option<Vec<Piece<'a>>> {
        let finder = if parse_special { &self.all } else { &self.user_defined };
        let (mut pieces, mut at) = (Vec::new(), 0);
        for (start, taken) in finder.taken(text.as_bytes(), stop)? {
            if start > at {
                pieces.push(Piece::Text(&text[at..start]));
            }
            pieces.push(Piece::Token(taken.id));
            at = taken.end;
        }
        if at < text.len() {
            pieces.push(Piece::Text(&text[at..]));
        }
        Some(pieces)
    }
}

impl Finder {
    /// The places of tokens, with the white space that belongs to them, by where they begin.
    fn taken(&self, text: &[u8], stop: &Stop) -> Option<BTreeMap<usize, Taken>> {
        let mut open = BinaryHeap::from(self.candidates(text, stop)?);
        let mut taken = BTreeMap::new();
        let (mut stripping, mut left_over) = (Vec::new(), Vec::new());
        while let Some(&Reverse((number, ..))) = open.peek() {
            let Special { id, lstrip, rstrip } = self.tokens[number as usize];
            // All places of one token, from the left.
            while let Some(&Reverse((next, end, found))) = open.peek()
                && next == number
            {
                open.pop();
                stop.check()?;
                let start = end - self.automaton.len(found);
                if taken_before(&taken, end) > start {
                    left_over.push((end, found));
                    continue;
                }
                taken.insert(start, Taken { end, id });
                if lstrip || rstrip {
                    stripping.push(start);
                }
            }
            for start in stripping.drain(..) {
                strip(text, start, lstrip, rstrip, &mut taken);
            }
            // Most of these lie within what was taken since.
            for (end, found) in left_over.drain(..) {
                stop.check()?;
                let room = end.saturating_sub(taken_before(&taken, end));
                let shorter = self.automaton.within(found, room);
                open.extend(shorter.map(|f| Reverse((self.automaton.number(f), end, f))));
            }
        }
        Some(taken)
    }

    /// The longest token that ends at each place.
    fn candidates(&self, text: &[u8], stop: &Stop) -> Option<Vec<Reverse<(u32, usize, Found)>>> {
        let mut all = Vec::new();
        if self.tokens.is_empty() {
            return Some(all);
        }
        let mut at = self.automaton.start();
        for (i, &byte) in text.iter().enumerate() {
            stop.check()?;
            at = self.automaton.step(at, byte);
            if let Some(found) = self.automaton.longest(at) {
                all.push(Reverse((self.automaton.number(found), i + 1, found)));
            }
        }
        Some(all)
    }
}

/// Where the last part ends that was taken and begins before `at`.
fn taken_before(taken: &BTreeMap<usize, Taken>, at: usize) -> usize {
    taken.range(..at).next_back().map_or(0, |(_, t)| t.end)
}

/// Takes the white space that is still text beside what was taken at `start`.
fn strip(text: &[u8], start: usize, lstrip: bool, rstrip: bool, taken: &mut BTreeMap<usize, Taken>) {
    let next = taken.range(start + 1..).next().map_or(text.len(), |(s, _)| *s);
    let before = taken.range(..start).next_back().map_or(0, |(_, t)| t.end);
    let Some(Taken { mut end, id }) = taken.remove(&start) else { return };
    if rstrip {
        end += text[end..next].iter().take_while(|b| is_space(**b)).count();
    }
    let spaces = text[before..start].iter().rev().take_while(|b| is_space(**b)).count();
    taken.insert(if lstrip { start - spaces } else { start }, Taken { end, id });
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn finder(tokens: &[(Special, &str)]) -> Specials {
        let finder = || Finder {
            tokens: tokens.iter().map(|(s, _)| *s).collect(),
            automaton: Automaton::new(tokens.iter().map(|(_, t)| t.as_bytes())),
        };
        Specials { all: finder(), user_defined: finder() }
    }

    fn split<'a>(tokens: &[(Special, &str)], text: &'a str) -> Vec<Piece<'a>> {
        finder(tokens).split(text, true, &Stop::new(&|| false)).unwrap()
    }

    #[test]
    fn white_space_beside_a_token_goes_with_it_where_it_strips() {
        let strip = |lstrip, rstrip| split(&[(Special { id: 7, lstrip, rstrip }, "<x>")], "a \n<x>\t b<x>");
        use Piece::{Text, Token};
        assert_eq!(strip(false, false), [Text("a \n"), Token(7), Text("\t b"), Token(7)]);
        assert_eq!(strip(true, false), [Text("a"), Token(7), Text("\t b"), Token(7)]);
        assert_eq!(strip(false, true), [Text("a \n"), Token(7), Text("b"), Token(7)]);
    }

    /// What llama.cpp does: each token by itself cuts every part that is still text.
    fn one_after_the_other<'a>(tokens: &[(Special, &str)], text: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = if text.is_empty() { vec![] } else { vec![Piece::Text(text)] };
        for (s, name) in tokens {
            let mut next = Vec::new();
            for piece in pieces {
                let Piece::Text(text) = piece else {
                    next.push(piece);
                    continue;
                };
                let mut parts = text.split(name).enumerate().peekable();
                while let Some((i, mut part)) = parts.next() {
                    let space = |c: char| u8::try_from(c).is_ok_and(is_space);
                    if i > 0 {
                        next.push(Piece::Token(s.id));
                        part = if s.rstrip { part.trim_start_matches(space) } else { part };
                    }
                    if s.lstrip && parts.peek().is_some() {
                        part = part.trim_end_matches(space);
                    }
                    if !part.is_empty() {
                        next.push(Piece::Text(part));
                    }
                }
            }
            pieces = next;
        }
        pieces
    }

    /// Tokens were looked for one after the other, each in the whole text; the places are the same.
    #[test]
    fn tokens_are_found_where_one_after_the_other_would_be() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
        for round in 0..20_000 {
            let letters: &[char] = if round % 2 == 0 { &['a', 'b', ' '] } else { &['a', 'é', 'c', '\n', ' '] };
            let mut word =
                |n: usize| -> String { (0..n).map(|_| letters[rng.random_range(0..letters.len())]).collect() };
            let lens: Vec<usize> = (0..8).map(|i| 1 + (round / 7 + i * 5) % 6).collect();
            let mut words: Vec<String> = lens.into_iter().map(&mut word).collect();
            let text = word(round % 41);
            words.sort_by_key(|w| Reverse(w.len()));
            let (l, r) = (round % 5 == 0, round % 3 == 0);
            let special =
                |id: usize| Special { id: id as u32, lstrip: l && id.is_multiple_of(2), rstrip: r && id % 3 != 1 };
            let tokens: Vec<_> = words.iter().enumerate().map(|(i, w)| (special(i), w.as_str())).collect();
            assert_eq!(split(&tokens, &text), one_after_the_other(&tokens, &text), "{text:?} {words:?} {l} {r}");
        }
    }

    #[test]
    fn looking_for_tokens_can_be_stopped() {
        let tokens = [(Special { id: 7, lstrip: false, rstrip: false }, "<x>")];
        assert!(finder(&tokens).split(&"a<x>".repeat(9999), true, &Stop::new(&|| true)).is_none());
    }
}
