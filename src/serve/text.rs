//! The text of an answer as it grows: characters made whole, stop texts cut off, each token with the text that it is in.

use std::collections::VecDeque;

use super::job::{Bit, TokenLogprob};
use crate::engine::{Piece, StopFilter};
use crate::tokenizer::{Decoder, Tokenizer};

/// The text of one answer.
pub struct Text<'a> {
    tokenizer: &'a Tokenizer,
    decoder: Decoder<'a>,
    filter: StopFilter,
    /// All that was added, names of control tokens included.
    all: String,
    /// Bytes of it that are certain.
    certain: usize,
    /// Tokens that are not told yet, with the byte that they begin at.
    waiting: VecDeque<(usize, TokenLogprob)>,
}

/// What became certain.
#[derive(Debug, Default)]
pub struct Grown {
    /// Its text.
    pub bits: Vec<Bit>,
    /// Its tokens.
    pub logprobs: Vec<TokenLogprob>,
}

impl<'a> Text<'a> {
    /// A text that ends before any of `stops`.
    pub fn new(tokenizer: &'a Tokenizer, stops: &[String]) -> Text<'a> {
        let (decoder, filter) = (Decoder::new(tokenizer), StopFilter::new(stops));
        Text { tokenizer, decoder, filter, all: String::new(), certain: 0, waiting: VecDeque::new() }
    }

    /// Adds a token. Returns whether it completes a stop text.
    pub fn push(&mut self, token: u32, logprob: Option<TokenLogprob>, grown: &mut Grown) -> bool {
        self.waiting.extend(logprob.map(|l| (self.all.len(), l)));
        if self.tokenizer.is_control(token) {
            let name = String::from_utf8_lossy(self.tokenizer.token_bytes(token)).into_owned();
            self.add(&name, true, grown)
        } else {
            let text = self.decoder.push(token);
            self.add(&text, false, grown)
        }
    }

    /// Ends the text. Returns whether its last characters complete a stop text.
    pub fn finish(&mut self, grown: &mut Grown) -> bool {
        let rest = self.decoder.finish();
        let found = self.add(&rest, false, grown);
        if !found {
            self.with_filter(grown, |filter, show| filter.finish(show));
            grown.logprobs.extend(self.waiting.drain(..).map(|w| w.1));
        }
        found
    }

    /// The stop text that was found, of those that were given: the first in the text.
    pub fn found<'s>(&self, stops: &'s [String]) -> Option<&'s String> {
        let rest = &self.all[self.certain.min(self.all.len())..];
        let at = |s: &&String| (rest.find(s.as_str()).unwrap_or(usize::MAX), std::cmp::Reverse(s.len()));
        stops.iter().filter(|s| !s.is_empty()).min_by_key(at)
    }

    fn add(&mut self, text: &str, control: bool, grown: &mut Grown) -> bool {
        self.all.push_str(text);
        self.with_filter(grown, |filter, show| filter.push(Piece { text, control }, show))
    }

    fn with_filter<T>(
        &mut self,
        grown: &mut Grown,
        work: impl FnOnce(&mut StopFilter, &mut dyn FnMut(Piece)) -> T,
    ) -> T {
        let certain = &mut self.certain;
        let result = work(&mut self.filter, &mut |piece| {
            *certain += piece.text.len();
            grown.bits.push(Bit { text: piece.text.to_owned(), control: piece.control });
        });
        while self.waiting.front().is_some_and(|w| w.0 < self.certain) {
            grown.logprobs.extend(self.waiting.pop_front().map(|w| w.1));
        }
        result
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
        }
        all.sort_unstable_by(order);
    }
    let top = all.into_iter().map(|(id, l)| (id, of(l))).collect();
    TokenLogprob { id, logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |&l| of(l)), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let l = logprob(&[0.0, 1.0, 2.0, f32::NAN], 1, 2);
        let total = 1.0 + 1f32.exp() + 2f32.exp();
        assert!((l.logprob - (1f32.exp() / total).ln()).abs() < 1e-6, "{l:?}");
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 1]);
        assert!(logprob(&[1.0], 9, 0).logprob == f32::NEG_INFINITY);
    }
}
