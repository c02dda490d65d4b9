//! What is asked of whoever computes, and what comes back while it does. This is all that the side of HTTP and the
//! side of the session know of each other.

use std::time::{Duration, Instant};

use super::error::ApiError;
use super::outbox::{Outbox, Weighed};
use crate::engine::SamplerParams;

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct Task {
    /// The whole text that is continued; one token or more.
    pub prompt: Vec<u32>,
    /// How tokens are drawn; choice number `i` has the seed and `i` more.
    pub params: SamplerParams,
    /// How many answers.
    pub choices: usize,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Probabilities of so many of the likeliest tokens at each place, besides that of the drawn one.
    pub logprobs: Option<usize>,
    /// Whether what is cached of earlier prompts may be used. It changes no text.
    pub reuse: bool,
}

/// A task in the queue.
#[derive(Debug)]
pub struct Job {
    /// Its number.
    pub id: u64,
    /// What is to be done.
    pub task: Task,
    /// Where it is told. Once nobody listens, the job is cancelled.
    pub out: Outbox<Event>,
    /// When it came.
    pub since: Instant,
    /// The longest that it may take, waiting included.
    pub limit: Duration,
}

/// Why a job ends before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nobody waits for it any more.
    Gone,
    /// It has taken as long as it may.
    Late,
    /// Its client leaves too much unread.
    Unread,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bit {
    /// The text, or the name of a control token.
    pub text: String,
    /// Whether it is such a name, which is not shown.
    pub control: bool,
}

/// A drawn token and what else could have been.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability, before any filter.
    pub logprob: f32,
    /// The likeliest tokens, in order.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends a text.
    End,
    /// As many tokens as asked for, or the context is full.
    Length,
    /// A stop text, which is given.
    Stop(String),
}

/// Figures of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, those that were not computed again.
    pub cached: usize,
    /// Tokens of all answers.
    pub generated: usize,
    /// Seconds in the queue.
    pub queued_s: f64,
    /// Seconds for the prompt.
    pub prompt_s: f64,
    /// Passes after the first token of each answer.
    pub passes: usize,
    /// Seconds for them.
    pub decode_s: f64,
    /// Tokens of answers that are reasoning, as far as their client tells them apart.
    pub reasoning: usize,
}

/// What is told of a job.
#[derive(Clone, Debug)]
pub enum Event {
    /// Text of an answer that is certain, and the tokens behind it if they were asked for.
    Text {
        /// Which answer.
        choice: usize,
        /// The text.
        bits: Vec<Bit>,
        /// The tokens.
        logprobs: Vec<TokenLogprob>,
        /// How many tokens were drawn for it.
        tokens: usize,
    },
    /// An answer has ended.
    Finished {
        /// Which.
        choice: usize,
        /// Why.
        finish: Finish,
    },
    /// All answers have ended.
    Done(Summary),
    /// There will be no more.
    Failed(ApiError),
}

impl Job {
    /// Why it is not to be computed any more, if it is not.
    pub fn over(&self) -> Option<Over> {
        match () {
            () if self.out.is_closed() => Some(Over::Gone),
            () if self.since.elapsed() >= self.limit => Some(Over::Late),
            () if self.out.is_full() => Some(Over::Unread),
            () => None,
        }
    }

    /// Whether nobody waits for it any more.
    pub fn is_cancelled(&self) -> bool {
        self.out.is_closed()
    }
}

impl Weighed for Event {
    fn bytes(&self) -> usize {
        let texts = match self {
            Event::Text { bits, logprobs, .. } => {
                let bits: usize = bits.iter().map(|b| size_of::<Bit>() + b.text.capacity()).sum();
                let top = |l: &TokenLogprob| l.top.capacity() * size_of::<(u32, f32)>();
                bits + logprobs.iter().map(|l| size_of::<TokenLogprob>() + top(l)).sum::<usize>()
            }
            _ => 0,
        };
        size_of::<Event>() + texts
    }
}
