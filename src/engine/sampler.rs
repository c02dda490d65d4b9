//! Choosing the next token: penalties, top-k, top-p, min-p, temperature, in llama.cpp's order.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Sampling parameters; the defaults are llama.cpp's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplerParams {
    /// 0 chooses the most likely token.
    pub temp: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens up to this probability mass.
    pub top_p: f32,
    /// Keep tokens at least this likely, relative to the most likely one.
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logits of the last tokens; 1 is off.
    pub repeat_penalty: f32,
    /// How many of the last tokens count for the penalty.
    pub repeat_last_n: usize,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

/// Draws tokens. Allocates at construction only.
#[derive(Debug)]
pub struct Sampler {
    params: SamplerParams,
    rng: ChaCha8Rng,
    candidates: Vec<(u32, f32)>,
    last: std::collections::VecDeque<u32>,
}

impl Sampler {
    /// A sampler over `n_vocab` tokens.
    pub fn new(params: SamplerParams, n_vocab: usize) -> Sampler {
        Sampler {
            params,
            rng: ChaCha8Rng::seed_from_u64(params.seed),
            candidates: Vec::with_capacity(n_vocab),
            last: std::collections::VecDeque::with_capacity(params.repeat_last_n + 1),
        }
    }

    /// Tells the sampler of a token in the text, prompt or drawn, for the penalty.
    pub fn accept(&mut self, token: u32) {
        if self.params.repeat_last_n == 0 {
            return;
        }
        if self.last.len() == self.params.repeat_last_n {
            self.last.pop_front();
        }
        self.last.push_back(token);
    }

    /// Draws from `logits`, one a token of the vocabulary.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let p = self.params;
        let penalised = p.repeat_penalty != 1.0 && !self.last.is_empty();
        if p.temp <= 0.0 && !penalised {
            return argmax(logits.iter().copied());
        }
        self.candidates.clear();
        self.candidates.extend(logits.iter().enumerate().map(|(i, &l)| (i as u32, l)));
        if penalised {
            self.penalise();
        }
        if p.temp <= 0.0 {
            return argmax(self.candidates.iter().map(|c| c.1));
        }
        self.keep_top_k();
        self.keep_likely();
        self.draw()
    }

    fn penalise(&mut self) {
        for (i, token) in self.last.iter().enumerate() {
            // Once a token, however often it occurs.
            if self.last.iter().take(i).any(|t| t == token) {
                continue;
            }
            if let Some((_, l)) = self.candidates.get_mut(*token as usize) {
                *l = if *l > 0.0 { *l / self.params.repeat_penalty } else { *l * self.params.repeat_penalty };
            }
        }
    }

    /// Sorts by logit, descending, and keeps the first `top_k`.
    fn keep_top_k(&mut self) {
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let k = self.params.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, order);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(order);
    }

    /// Top-p, then min-p, over the sorted candidates.
    fn keep_likely(&mut self) {
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        let total: f32 = self.candidates.iter().map(|c| (c.1 - max).exp()).sum();
        let mut mass = 0.0;
        let mut keep = self.candidates.len();
        for (i, c) in self.candidates.iter().enumerate() {
            mass += (c.1 - max).exp() / total;
            if mass >= self.params.top_p {
                keep = i + 1;
                break;
            }
        }
        self.candidates.truncate(keep);
        let floor = max + self.params.min_p.max(f32::MIN_POSITIVE).ln();
        let likely = self.candidates.iter().take_while(|c| c.1 >= floor).count().max(1);
        self.candidates.truncate(likely);
    }

    fn draw(&mut self) -> u32 {
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        for c in &mut self.candidates {
            c.1 = ((c.1 - max) / self.params.temp).exp();
        }
        let total: f32 = self.candidates.iter().map(|c| c.1).sum();
        let mut x = self.rng.random::<f32>() * total;
        for c in &self.candidates {
            x -= c.1;
            if x < 0.0 {
                return c.0;
            }
        }
        self.candidates.last().map_or(0, |c| c.0)
    }
}

/// Index of the largest value; the first of equals; 0 for none.
pub fn argmax(values: impl Iterator<Item = f32>) -> u32 {
    let mut best = (0u32, f32::NEG_INFINITY);
    for (i, v) in values.enumerate() {
        if v > best.1 {
            best = (i as u32, v);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(p: SamplerParams) -> Sampler {
        Sampler::new(p, 4)
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        let mut s = sampler(SamplerParams { temp: 0.0, ..Default::default() });
        assert_eq!(s.sample(&[0.0, 3.0, 3.0, 1.0]), 1);
    }

    #[test]
    fn top_k_of_one_is_greedy_at_any_temperature() {
        let mut s = sampler(SamplerParams { temp: 5.0, top_k: 1, ..Default::default() });
        assert!((0..50).all(|_| s.sample(&[0.0, 1.0, 1.1, 0.5]) == 2));
    }

    #[test]
    fn top_p_and_min_p_drop_the_tail() {
        let logits = [10.0, 9.9, 0.0, -5.0];
        let mut s = sampler(SamplerParams { temp: 1.0, top_p: 0.9, min_p: 0.0, ..Default::default() });
        assert!((0..200).all(|_| s.sample(&logits) < 2));
        let mut s = sampler(SamplerParams { temp: 1.0, top_p: 1.0, min_p: 0.95, ..Default::default() });
        assert!((0..200).all(|_| s.sample(&logits) == 0));
    }

    #[test]
    fn the_same_seed_draws_the_same_and_frequencies_follow_the_softmax() {
        let p = SamplerParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, ..Default::default() };
        let (mut a, mut b) = (sampler(p), sampler(p));
        let logits = [0.0, 1.0, 2.0, 0.5];
        let drawn: Vec<u32> = (0..4000).map(|_| a.sample(&logits)).collect();
        assert!(drawn.iter().all(|&t| t == b.sample(&logits)));
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        for (i, l) in logits.iter().enumerate() {
            let share = drawn.iter().filter(|&&t| t == i as u32).count() as f32 / 4000.0;
            assert!((share - l.exp() / total).abs() < 0.03, "{i}: {share}");
        }
    }

    #[test]
    fn a_repeated_token_is_penalised_once() {
        let mut s = sampler(SamplerParams { temp: 0.0, repeat_penalty: 2.0, ..Default::default() });
        s.accept(1);
        s.accept(1);
        assert_eq!(s.sample(&[1.4, 3.0, -1.0, 0.0]), 1);
        assert_eq!(s.sample(&[1.6, 3.0, -1.0, 0.0]), 0);
    }
}
