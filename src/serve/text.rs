//! What is told of an answer as it grows: its certain text, and each token with the text that it is in.

use std::collections::VecDeque;

use super::job::{Bit, Event, Finish, TokenLogprob};
use crate::engine::Grown;

/// What is heard of one answer and is yet to be told.
#[derive(Debug)]
pub struct Telling {
    /// Likeliest tokens to tell at each place, if probabilities are told.
    top: Option<usize>,
    /// Bytes of the text that are certain.
    certain: usize,
    /// Tokens whose text is not certain yet, with the byte that they begin at.
    waiting: VecDeque<(usize, TokenLogprob)>,
    bits: Vec<Bit>,
    logprobs: Vec<TokenLogprob>,
    /// Tokens drawn, and those that have been told.
    tokens: usize,
    told: usize,
}

impl Telling {
    /// Of an answer, with the probabilities of so many of the likeliest tokens if they were asked for.
    pub fn new(top: Option<usize>) -> Telling {
        Telling {
            top,
            certain: 0,
            waiting: VecDeque::new(),
            bits: Vec::new(),
            logprobs: Vec::new(),
            tokens: 0,
            told: 0,
        }
    }

    /// Hears of it.
    pub fn hear(&mut self, grown: Grown<'_>) {
        match grown {
            Grown::Token { id, logits, at } => {
                self.tokens += 1;
                self.waiting.extend(self.top.map(|n| (at, logprob(logits, id, n))));
            }
            Grown::Piece(piece) => {
                self.certain += piece.text.len();
                self.bits.push(Bit { text: piece.text.to_owned(), control: piece.control });
                while self.waiting.front().is_some_and(|w| w.0 < self.certain) {
                    self.logprobs.extend(self.waiting.pop_front().map(|w| w.1));
                }
            }
        }
    }

    /// Tokens drawn so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Nothing more comes: tokens without a text are told too, those of a stop text apart.
    pub fn end(&mut self, finish: &Finish) {
        if !matches!(finish, Finish::Stop(_)) {
            self.logprobs.extend(self.waiting.drain(..).map(|w| w.1));
        }
    }

    /// What there is to tell, if anything.
    pub fn take(&mut self, choice: usize) -> Option<Event> {
        if self.bits.is_empty() && self.logprobs.is_empty() {
            return None;
        }
        let tokens = self.tokens - std::mem::replace(&mut self.told, self.tokens);
        let (bits, logprobs) = (std::mem::take(&mut self.bits), std::mem::take(&mut self.logprobs));
        Some(Event::Text { choice, bits, logprobs, tokens })
    }
}

/// The probability of a token, and the likeliest `n`.
pub fn logprob(logits: &[f32], id: u32, n: usize) -> TokenLogprob {
    let usable = |l: f32| if l.is_nan() { f32::NEG_INFINITY } else { l };
    let max = logits.iter().copied().map(usable).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(usable(l) - max).exp()).sum();
    let of = |l: f32| (f64::from(usable(l) - max) - sum.ln()) as f32;
    let mut all: Vec<(u32, f32)> = Vec::new();
    if n > 0 {
        all = (0u32..).zip(logits.iter().copied().map(usable)).collect();
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if n < all.len() {
            all.select_nth_unstable_by(n - 1, order);
            all.truncate(n);
            all.shrink_to_fit();
        }
        all.sort_unstable_by(order);
    }
    let top = all.into_iter().map(|(id, l)| (id, of(l))).collect();
    TokenLogprob { id, logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |&l| of(l)), top }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Piece;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let l = logprob(&[0.0, 1.0, 2.0, f32::NAN], 1, 2);
        let total = 1.0 + 1f32.exp() + 2f32.exp();
        assert!((l.logprob - (1f32.exp() / total).ln()).abs() < 1e-6, "{l:?}");
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 1]);
        assert!(logprob(&[1.0], 9, 0).logprob == f32::NEG_INFINITY);
    }

    #[test]
    fn a_token_is_told_with_its_text() {
        let mut t = Telling::new(Some(0));
        let token = |id, at| Grown::Token { id, logits: &[0.0; 8], at };
        let piece = |text| Grown::Piece(Piece { text, control: false });
        t.hear(token(1, 0));
        assert!(t.take(0).is_none());
        t.hear(piece("ab"));
        t.hear(token(2, 2));
        let ids = |event: Option<Event>| match event {
            Some(Event::Text { logprobs, tokens, .. }) => (logprobs.iter().map(|l| l.id).collect(), tokens),
            _ => (Vec::new(), 0),
        };
        assert_eq!(ids(t.take(0)), (vec![1], 2));
        t.hear(token(3, 3));
        t.end(&Finish::Stop("c".into()));
        assert!(t.take(0).is_none());
        t.end(&Finish::Length);
        assert_eq!(ids(t.take(0)), (vec![2, 3], 1));
    }
}
