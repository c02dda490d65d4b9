//! DRY ("don't repeat yourself"): a token that would go on with a sequence which occurred before is penalised, the
//! more the longer that sequence is.
//!
//! Source: llama.cpp's `llama_sampler_dry` (after p-e-w's proposal for text-generation-webui).

use std::collections::{HashMap, VecDeque};

use crate::tokenizer::Tokenizer;

/// Bytes of a breaker that count.
const BREAKER_BYTES_MAX: usize = 40;
/// Tokens of a breaker that count behind its first.
const TAIL_MAX: usize = 20;
/// Tokens for which room is made at first where the window has no end.
const ROOM: usize = 1 << 16;

/// Parameters of DRY; the defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct DryParams {
    /// The penalty of the shortest repetition that counts; 0 is off.
    pub multiplier: f32,
    /// What each further token multiplies it by; below 1 is off.
    pub base: f32,
    /// Repetitions that are shorter are free.
    pub allowed_length: usize,
    /// How many of the last tokens are searched; 0 is off, `usize::MAX` for all.
    pub last_n: usize,
    /// Texts over which no repetition reaches.
    pub breakers: Vec<String>,
}

impl Default for DryParams {
    fn default() -> Self {
        DryParams {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            last_n: 64,
            breakers: ["\n", ":", "\"", "*"].map(String::from).to_vec(),
        }
    }
}

impl DryParams {
    /// Whether anything is penalised at all.
    pub fn is_on(&self) -> bool {
        self.multiplier != 0.0 && self.base >= 1.0 && self.last_n > 0
    }
}

/// Sequences of tokens that hold a breaker: by the first token, what must follow it.
#[derive(Clone, Debug, Default)]
pub struct Breakers {
    tails: HashMap<u32, Vec<Vec<u32>>>,
}

impl Breakers {
    /// The sequences of a vocabulary: tokens that hold a text, and tokens that end with its beginning followed by the
    /// tokens of its rest. Empty texts are left out.
    pub fn new(tokenizer: &Tokenizer, texts: &[String]) -> Breakers {
        let mut breakers = Breakers::default();
        for text in texts.iter().filter(|t| !t.is_empty()) {
            let end = (0..=text.len().min(BREAKER_BYTES_MAX)).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
            for id in 0..tokenizer.vocab_size() as u32 {
                breakers.add(tokenizer, id, &text[..end]);
            }
        }
        breakers
    }

    fn add(&mut self, tokenizer: &Tokenizer, id: u32, text: &str) {
        let (word, text_bytes) = (tokenizer.token_bytes(id), text.as_bytes());
        if word.windows(text.len()).any(|w| w == text_bytes) {
            let tails = self.tails.entry(id).or_default();
            if !tails.iter().any(Vec::is_empty) {
                tails.push(Vec::new());
            }
            return;
        }
        // The end of the token may be the beginning of the text.
        for len in (1..text.len().min(word.len() + 1)).rev().filter(|&n| text.is_char_boundary(n)) {
            if word.ends_with(&text_bytes[..len]) {
                let mut tail = tokenizer.encode(&text[len..], false, false);
                tail.truncate(TAIL_MAX);
                let tails = self.tails.entry(id).or_default();
                if !tails.contains(&tail) {
                    tails.push(tail);
                }
            }
        }
    }

    /// Tokens at the end of `last` that may be part of a repetition: those behind the last breaker.
    fn limit(&self, last: &Reversed) -> usize {
        for i in 0..last.len() {
            let Some(tails) = self.tails.get(&last.at(i)) else { continue };
            let fits = |tail: &&Vec<u32>| tail.len() <= i && tail.iter().zip(1..).all(|(t, k)| last.at(i - k) == *t);
            if let Some(longest) = tails.iter().filter(fits).map(Vec::len).max() {
                return i - longest;
            }
        }
        last.len()
    }

    fn is_breaker(&self, token: u32) -> bool {
        self.tails.get(&token).is_some_and(|tails| tails.iter().any(Vec::is_empty))
    }
}

/// The window, read from its end.
struct Reversed<'a>(&'a VecDeque<u32>);

impl Reversed<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn at(&self, i: usize) -> u32 {
        self.0[self.0.len() - 1 - i]
    }
}

/// The last tokens, and scratch for looking through them.
#[derive(Debug)]
pub(super) struct Dry {
    last_n: usize,
    last: VecDeque<u32>,
    breakers: Breakers,
    /// For each distance from the end, how many tokens before it repeat the end.
    repeats: Vec<usize>,
    /// The longest repetition that a token would go on with.
    longest: HashMap<u32, usize>,
}

impl Dry {
    pub fn new(params: &DryParams, breakers: Breakers) -> Dry {
        let last_n = if params.is_on() { params.last_n } else { 0 };
        let room = last_n.min(ROOM);
        Dry {
            last_n,
            last: VecDeque::with_capacity(room),
            breakers,
            repeats: Vec::with_capacity(room),
            longest: HashMap::with_capacity(room),
        }
    }

    pub fn push(&mut self, token: u32) {
        if self.last_n == 0 {
            return;
        }
        if self.last.len() == self.last_n {
            self.last.pop_front();
        }
        self.last.push_back(token);
    }

    pub fn clear(&mut self) {
        self.last.clear();
    }

    /// Calls `take_off` with each token to penalise and its penalty.
    pub fn penalise(&mut self, params: &DryParams, mut take_off: impl FnMut(u32, f32)) {
        let n = self.last.len();
        if self.last_n == 0 || n <= params.allowed_length {
            return;
        }
        let last = Reversed(&self.last);
        let limit = self.breakers.limit(&last);
        if limit < params.allowed_length {
            return;
        }
        repeats(&last, &mut self.repeats);
        self.longest.clear();
        for k in 1..n {
            let length = self.repeats[k].min(limit);
            if length >= params.allowed_length {
                // The token behind the earlier occurrence would go on with it.
                let longest = self.longest.entry(last.at(k - 1)).or_insert(length);
                *longest = length.max(*longest);
            }
        }
        // Larger powers overflow.
        let exponent_max =
            if params.base > 1.000_001 { (f32::MAX.ln() / params.base.ln()) as usize } else { usize::MAX };
        for (&token, &length) in self.longest.iter().filter(|(t, _)| !self.breakers.is_breaker(**t)) {
            let exponent = (length - params.allowed_length).min(exponent_max).min(i32::MAX as usize);
            take_off(token, params.multiplier * params.base.powi(exponent as i32));
        }
    }
}

/// For each `k`, how many tokens from the end on equal those from `k` before the end on (the Z-algorithm, backwards).
fn repeats(last: &Reversed, out: &mut Vec<usize>) {
    let n = last.len();
    out.clear();
    out.resize(n, 0);
    // The stretch that is known to repeat the end: from `left` up to, not including, `right`.
    let (mut left, mut right) = (0, 0);
    for k in 1..n {
        let mut len = if k < right { out[k - left].min(right - k) } else { 0 };
        while k + len < n && last.at(len) == last.at(k + len) {
            len += 1;
        }
        if k + len > right {
            (left, right) = (k, k + len);
        }
        out[k] = len;
    }
}
