//! Choosing the next token: biases, penalties, DRY, the filters, temperature, in the order of llama.cpp's default chain.
//!
//! Definitions and defaults are those of llama.cpp (`src/llama-sampler.cpp`): a parameter at its neutral value leaves
//! the candidates as they are. Only the generator differs, so the same seed draws other tokens there.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::budget::{Thought, ThoughtBudget};
use super::constraint::{Constraint, ConstraintError, Grammar};
use super::dry::{Breakers, Dry, DryParams};
use super::window::Window;
use crate::tokenizer::Tokenizer;

/// Sampling parameters; the defaults are llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerParams {
    /// 0 chooses the most likely token.
    pub temp: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens up to this probability mass; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely, relative to the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens whose surprise is nearest the expected one, up to this probability mass; 1 keeps all.
    pub typical: f32,
    /// Keep tokens whose logit is at most this many standard deviations below the largest; 0 or less keeps all.
    pub top_n_sigma: f32,
    /// Probability of dropping all but the least likely of the tokens above the threshold; 0 is off.
    pub xtc_probability: f32,
    /// Probability from which XTC counts a token; above 0.5 is off.
    pub xtc_threshold: f32,
    /// Divides (or multiplies, if negative) the logits of the last tokens; 1 is off.
    pub repeat_penalty: f32,
    /// Taken off the logits of the last tokens, once a token; 0 is off.
    pub presence_penalty: f32,
    /// Taken off the logits of the last tokens, for each time they occur; 0 is off.
    pub frequency_penalty: f32,
    /// How many of the last tokens count for the penalties; `usize::MAX` for all.
    pub repeat_last_n: usize,
    /// The penalty of repeated sequences.
    pub dry: DryParams,
    /// Added to the logits of tokens; -inf never draws one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Never draw a token that ends generation.
    pub ignore_eos: bool,
    /// Tokens that end generation besides the model's own.
    pub ends: Vec<u32>,
    /// Never draw a token that ends generation before so many others.
    pub min_tokens: usize,
    /// Seed of the generator.
    pub seed: u64,
    /// What the text is held to: only its tokens are drawn, whatever is added to the logits of others.
    pub grammar: Option<Grammar>,
    /// Where its reasoning must end.
    pub thought: Option<ThoughtBudget>,
}

impl Default for SamplerParams {
    fn default() -> Self {
        SamplerParams {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: 64,
            dry: DryParams::default(),
            logit_bias: Vec::new(),
            ignore_eos: false,
            ends: Vec::new(),
            min_tokens: 0,
            seed: 0,
            grammar: None,
            thought: None,
        }
    }
}

impl SamplerParams {
    fn penalises(&self) -> bool {
        self.repeat_last_n > 0
            && (self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0)
    }

    /// Whether a filter may drop the most likely token.
    fn drops_the_likeliest(&self) -> bool {
        self.typical < 1.0 || (self.xtc_probability > 0.0 && self.xtc_threshold <= 0.5)
    }
}

/// Draws tokens. Allocates at construction only, unless a window is the whole text.
#[derive(Debug)]
pub struct Sampler {
    params: SamplerParams,
    rng: ChaCha8Rng,
    candidates: Vec<(u32, f32)>,
    /// Scratch of the typical filter: surprise, token, logit, probability.
    typical: Vec<(f32, u32, f32, f32)>,
    window: Window,
    dry: Dry,
    constraint: Option<Constraint>,
    thought: Option<Thought>,
    /// Tokens that are drawn, and those that may not be among the first ones.
    drawn: usize,
    not_first: Vec<u32>,
}

impl Sampler {
    /// A sampler over `n_vocab` tokens that knows nothing of their texts: DRY has no breakers, no token ends a text.
    pub fn new(params: SamplerParams, n_vocab: usize) -> Sampler {
        Sampler::with_breakers(params, n_vocab, Breakers::default())
    }

    /// A sampler for a model of `n_vocab` rows of logits and this tokenizer.
    pub fn for_model(mut params: SamplerParams, n_vocab: usize, tokenizer: &Tokenizer) -> Sampler {
        params.logit_bias.extend(tokenizer.suppressed_ids().iter().map(|&id| (id, f32::NEG_INFINITY)));
        if params.ignore_eos {
            params.logit_bias.extend(tokenizer.eog_ids().iter().map(|&id| (id, f32::NEG_INFINITY)));
        }
        let breakers =
            if params.dry.is_on() { Breakers::new(tokenizer, &params.dry.breakers) } else { Breakers::default() };
        let mut sampler = Sampler::with_breakers(params, n_vocab, breakers);
        sampler.not_first.extend(tokenizer.eog_ids());
        sampler
    }

    fn with_breakers(params: SamplerParams, n_vocab: usize, breakers: Breakers) -> Sampler {
        let last_n = if params.penalises() { params.repeat_last_n } else { 0 };
        Sampler {
            rng: ChaCha8Rng::seed_from_u64(params.seed),
            candidates: Vec::with_capacity(n_vocab),
            typical: Vec::with_capacity(if params.typical < 1.0 { n_vocab } else { 0 }),
            window: Window::new(last_n, n_vocab),
            dry: Dry::new(&params.dry, breakers),
            constraint: params.grammar.as_ref().map(Grammar::begin),
            thought: params.thought.map(Thought::new),
            drawn: 0,
            not_first: params.ends.clone(),
            params,
        }
    }

    /// Whether a token ends generation, though the model does not say so.
    pub fn is_end(&self, token: u32) -> bool {
        self.params.ends.contains(&token)
    }

    /// Tokens before which none is drawn that ends generation.
    pub fn min_tokens(&self) -> usize {
        self.params.min_tokens
    }

    /// Forgets the text that the penalties know and tells them of another, a prompt. What follows it is held to the
    /// grammar from its beginning.
    pub fn begin(&mut self, text: &[u32]) {
        self.window.clear();
        self.dry.clear();
        text.iter().for_each(|&t| self.count(t));
        self.constraint = self.params.grammar.as_ref().map(Grammar::begin);
        self.thought = self.params.thought.map(Thought::new);
        self.drawn = 0;
    }

    /// Tells the sampler of a token that was drawn: the penalties, and the grammar.
    pub fn accept(&mut self, token: u32) {
        self.count(token);
        self.drawn += 1;
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
        if let Some(thought) = &mut self.thought {
            thought.accept(token);
        }
    }

    fn count(&mut self, token: u32) {
        self.window.push(token);
        self.dry.push(token);
    }

    /// Draws from `logits`, one per token of the vocabulary. A logit that is no number is never drawn.
    ///
    /// # Errors
    /// If every token is banned, or the text is held to a grammar and cannot go on in it.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, ConstraintError> {
        let greedy = self.params.temp <= 0.0;
        if let Some(token) = self.forced(logits) {
            return Ok(token);
        }
        if greedy && !self.edits() && self.constraint.is_none() && !self.params.drops_the_likeliest() {
            return Ok(argmax(logits.iter().copied()));
        }
        self.take(logits)?;
        if greedy && !self.params.drops_the_likeliest() {
            let at = argmax(self.candidates.iter().map(|c| c.1));
            return Ok(self.candidates.get(at as usize).map_or(0, |c| c.0));
        }
        self.filter();
        Ok(if greedy { self.candidates.first().map_or(0, |c| c.0) } else { self.draw() })
    }

    /// The tokens that could be drawn from `logits` and their probabilities, the likeliest first.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&mut self, logits: &[f32]) -> Result<Vec<(u32, f32)>, ConstraintError> {
        if let Some(token) = self.forced(logits) {
            return Ok(vec![(token, 1.0)]);
        }
        self.take(logits)?;
        self.filter();
        if self.params.temp <= 0.0 {
            return Ok(self.candidates.first().map(|c| (c.0, 1.0)).into_iter().collect());
        }
        let total = self.exponentiate();
        Ok(self.candidates.iter().map(|c| (c.0, c.1 / total)).collect())
    }

    /// The token that ends reasoning, where that must end now.
    fn forced(&self, logits: &[f32]) -> Option<u32> {
        self.thought.as_ref().and_then(Thought::forced).filter(|token| (*token as usize) < logits.len())
    }

    fn edits(&self) -> bool {
        !self.params.logit_bias.is_empty() || !self.window.is_empty() || self.params.dry.is_on() || self.is_early()
    }

    /// Whether no token may come yet that ends generation.
    fn is_early(&self) -> bool {
        self.drawn < self.params.min_tokens
    }

    /// Makes candidates of the logits: all, or those that the grammar allows.
    fn take(&mut self, logits: &[f32]) -> Result<(), ConstraintError> {
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits).map(|(i, &l)| (i, usable(l))));
        if self.edits() {
            self.edit();
        }
        let Some(constraint) = &mut self.constraint else {
            let banned = self.edits() && self.candidates.iter().all(|c| c.1 == f32::NEG_INFINITY);
            return if banned { Err(ConstraintError::AllBanned) } else { Ok(()) };
        };
        let allowed = constraint.allowed()?;
        self.candidates.retain(|c| allowed.has(c.0) && c.1 > f32::NEG_INFINITY);
        match self.candidates.is_empty() {
            false => Ok(()),
            true if constraint.may_end() => Err(ConstraintError::NothingLeft(
                "the text may end, but the tokens that end it are banned or not there (ignore_eos, logit_bias)"
                    .to_owned(),
            )),
            true => Err(ConstraintError::NothingLeft("all that may follow are banned (logit_bias)".to_owned())),
        }
    }

    fn filter(&mut self) {
        self.keep_near_the_largest();
        self.keep_top_k();
        self.keep_typical();
        self.keep_top_p();
        self.keep_min_p();
        self.exclude_top_choices();
    }

    /// Biases, penalties, DRY: whatever changes logits, while candidates lie by id.
    fn edit(&mut self) {
        let p = &self.params;
        for &(id, bias) in &p.logit_bias {
            if let Some((_, l)) = self.candidates.get_mut(id as usize) {
                *l = usable(*l + bias);
            }
        }
        let (repeat, presence, frequency) = (p.repeat_penalty, p.presence_penalty, p.frequency_penalty);
        let candidates = &mut self.candidates;
        // What can be drawn before a penalty can be drawn after it, however large it is.
        let mut change = |token: u32, to: &dyn Fn(f32) -> f32| {
            if let Some((_, l)) = candidates.get_mut(token as usize).filter(|c| c.1.is_finite()) {
                *l = to(*l).clamp(f32::MIN, f32::MAX);
            }
        };
        self.window.each(|token, count| {
            let taken = count as f32 * frequency + presence;
            change(token, &|l| if l > 0.0 { l / repeat - taken } else { l * repeat - taken });
        });
        self.dry.penalise(&p.dry, |token, penalty| change(token, &|l| l - penalty));
        if self.is_early() {
            for &token in &self.not_first {
                if let Some(candidate) = self.candidates.get_mut(token as usize) {
                    candidate.1 = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Top-n-sigma: what lies far below the largest logit is dropped.
    fn keep_near_the_largest(&mut self) {
        let n = self.params.top_n_sigma;
        if n <= 0.0 {
            return;
        }
        let logits = || self.candidates.iter().map(|c| c.1).filter(|l| *l != f32::NEG_INFINITY);
        let count = logits().count().max(1) as f32;
        let mean = logits().sum::<f32>() / count;
        let sigma = (logits().map(|l| (l - mean) * (l - mean)).sum::<f32>() / count).sqrt();
        let floor = logits().fold(f32::NEG_INFINITY, f32::max) - n * sigma;
        // Sums of the largest floats overflow, and then nothing is far.
        if floor.is_finite() {
            self.candidates.retain(|c| c.1 >= floor);
        }
    }

    /// Sorts by logit, descending, and keeps the first `top_k`.
    fn keep_top_k(&mut self) {
        let k = self.params.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, likelier);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(likelier);
    }

    /// Locally typical sampling (Meister et al., 2022): the candidates nearest the entropy, up to a mass.
    fn keep_typical(&mut self) {
        if self.params.typical >= 1.0 {
            return;
        }
        let (max, total) = self.softmax_terms();
        let scratch = &mut self.typical;
        scratch.clear();
        scratch.extend(self.candidates.iter().map(|&(id, l)| (0.0, id, l, (l - max).exp() / total)));
        let entropy: f32 = scratch.iter().filter(|c| c.3 > 0.0).map(|c| -c.3 * c.3.ln()).sum();
        scratch.iter_mut().for_each(|c| c.0 = (-c.3.ln() - entropy).abs());
        scratch.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(b.2.total_cmp(&a.2)).then(a.1.cmp(&b.1)));
        let mut mass = 0.0;
        let beyond = scratch.iter().position(|c| {
            mass += c.3;
            mass > self.params.typical
        });
        self.candidates.clear();
        self.candidates.extend(scratch[..beyond.map_or(scratch.len(), |i| i + 1)].iter().map(|c| (c.1, c.2)));
        self.candidates.sort_unstable_by(likelier);
    }

    fn keep_top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        let (max, total) = self.softmax_terms();
        let mut mass = 0.0;
        let reached = self.candidates.iter().position(|c| {
            mass += (c.1 - max).exp() / total;
            mass >= self.params.top_p
        });
        self.candidates.truncate(reached.map_or(self.candidates.len(), |i| i + 1));
    }

    fn keep_min_p(&mut self) {
        if self.params.min_p <= 0.0 {
            return;
        }
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        let floor = max + self.params.min_p.max(f32::MIN_POSITIVE).ln();
        let likely = self.candidates.iter().take_while(|c| c.1 >= floor).count().max(1);
        self.candidates.truncate(likely);
    }

    /// XTC: with a probability, of the candidates above the threshold only the least likely stays.
    fn exclude_top_choices(&mut self) {
        let p = &self.params;
        if p.xtc_probability <= 0.0 || p.xtc_threshold > 0.5 || self.candidates.len() < 2 {
            return;
        }
        if self.rng.random::<f32>() > p.xtc_probability {
            return;
        }
        let (max, total) = self.softmax_terms();
        // One that cannot be drawn counts for none, whatever the threshold.
        let counts = |l: f32| l > f32::NEG_INFINITY && (l - max).exp() / total >= self.params.xtc_threshold;
        let above = self.candidates.iter().take_while(|c| counts(c.1)).count();
        self.candidates.drain(..above.saturating_sub(1));
    }

    /// The largest logit and the sum of exponentials less it, of sorted candidates.
    fn softmax_terms(&self) -> (f32, f32) {
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        (max, self.candidates.iter().map(|c| (c.1 - max).exp()).sum())
    }

    /// Turns logits into weights of probability at the temperature; returns their sum.
    fn exponentiate(&mut self) -> f32 {
        let max = self.candidates.first().map_or(0.0, |c| c.1);
        if !max.is_finite() {
            // All are banned, or one is certain.
            self.candidates.truncate(1);
            self.candidates.iter_mut().for_each(|c| c.1 = 1.0);
        } else {
            self.candidates.iter_mut().for_each(|c| c.1 = ((c.1 - max) / self.params.temp).exp());
        }
        self.candidates.iter().map(|c| c.1).sum()
    }

    fn draw(&mut self) -> u32 {
        let total = self.exponentiate();
        let mut x = self.rng.random::<f32>() * total;
        for c in &self.candidates {
            x -= c.1;
            if x < 0.0 {
                return c.0;
            }
        }
        // Rounding: the last that can be drawn at all.
        self.candidates.iter().rev().find(|c| c.1 > 0.0).map_or(0, |c| c.0)
    }
}

/// A logit to compute with: what is no number is never drawn, and what is certain is finite, so that two of them have a
/// difference.
fn usable(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

/// The order of candidates: descending by logit, ascending by id where they are equal.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
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
    fn no_end_is_drawn_before_the_least_number_of_tokens() {
        let mut s = sampler(SamplerParams { temp: 0.0, ends: vec![1], min_tokens: 2, ..Default::default() });
        for _ in 0..2 {
            s.begin(&[]);
            for expected in [2, 2, 1] {
                let token = s.sample(&[0.0, 4.0, 3.0, 1.0]).unwrap();
                assert_eq!((token, s.is_end(token)), (expected, expected == 1));
                s.accept(token);
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_maximum() {
        let mut s = sampler(SamplerParams { temp: 0.0, ..Default::default() });
        assert_eq!(s.sample(&[0.0, 3.0, 3.0, 1.0]).unwrap(), 1);
    }

    #[test]
    fn top_k_of_one_is_greedy_at_any_temperature() {
        let mut s = sampler(SamplerParams { temp: 5.0, top_k: 1, ..Default::default() });
        assert!((0..50).all(|_| s.sample(&[0.0, 1.0, 1.1, 0.5]).unwrap() == 2));
    }

    #[test]
    fn top_p_and_min_p_drop_the_tail() {
        let logits = [10.0, 9.9, 0.0, -5.0];
        let mut s = sampler(SamplerParams { temp: 1.0, top_p: 0.9, min_p: 0.0, ..Default::default() });
        assert!((0..200).all(|_| s.sample(&logits).unwrap() < 2));
        let mut s = sampler(SamplerParams { temp: 1.0, top_p: 1.0, min_p: 0.95, ..Default::default() });
        assert!((0..200).all(|_| s.sample(&logits).unwrap() == 0));
    }

    #[test]
    fn the_same_seed_draws_the_same_and_frequencies_follow_the_softmax() {
        let p = SamplerParams { temp: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, ..Default::default() };
        let (mut a, mut b) = (sampler(p.clone()), sampler(p));
        let logits = [0.0, 1.0, 2.0, 0.5];
        let drawn: Vec<u32> = (0..4000).map(|_| a.sample(&logits).unwrap()).collect();
        assert!(drawn.iter().all(|&t| t == b.sample(&logits).unwrap()));
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
        assert_eq!(s.sample(&[1.4, 3.0, -1.0, 0.0]).unwrap(), 1);
        assert_eq!(s.sample(&[1.6, 3.0, -1.0, 0.0]).unwrap(), 0);
    }
}
