//! One answer of a task, a step for each row of logits. Whoever computes evaluates what a step asks for and comes back
//! with the next row; the order of steps is that of [`crate::engine::generate`], so that the text is the same.

use super::job::{Finish, Task};
use super::text::{Grown, Text, logprob};
use crate::engine::Sampler;
use crate::tokenizer::Tokenizer;

/// An answer that is being generated.
pub struct Choice<'a> {
    task: &'a Task,
    tokenizer: &'a Tokenizer,
    sampler: Sampler,
    text: Text<'a>,
    generated: usize,
}

/// What a step leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// This token is to be evaluated, in the class of generated ones.
    Evaluate(u32),
    /// The answer has ended.
    Finished(Finish),
}

impl<'a> Choice<'a> {
    /// Answer number `number` of a task, for a model of `n_vocab` rows of logits.
    pub fn new(task: &'a Task, number: usize, n_vocab: usize, tokenizer: &'a Tokenizer) -> Choice<'a> {
        let mut params = task.params.clone();
        params.seed = params.seed.wrapping_add(number as u64);
        let mut sampler = Sampler::for_model(params, n_vocab, tokenizer);
        sampler.begin(&task.prompt);
        Choice { task, tokenizer, sampler, text: Text::new(tokenizer, &task.stops), generated: 0 }
    }

    /// Tokens so far, the one that ended the text apart.
    pub fn generated(&self) -> usize {
        self.generated
    }

    /// Draws a token from the logits behind what was evaluated. `full`: nothing more can be.
    pub fn step(&mut self, logits: &[f32], full: bool, grown: &mut Grown) -> Next {
        if self.task.max_tokens == 0 {
            return Next::Finished(Finish::Length);
        }
        let token = self.sampler.sample(logits);
        self.sampler.accept(token);
        if self.tokenizer.is_eog(token) {
            self.text.finish(grown);
            return Next::Finished(Finish::End);
        }
        self.generated += 1;
        let probability = self.task.logprobs.map(|n| logprob(logits, token, n));
        if self.text.push(token, probability, grown) {
            let found = self.text.found(&self.task.stops).cloned().unwrap_or_default();
            return Next::Finished(Finish::Stop(found));
        }
        if self.generated == self.task.max_tokens || full {
            self.text.finish(grown);
            return Next::Finished(Finish::Length);
        }
        Next::Evaluate(token)
    }
}
