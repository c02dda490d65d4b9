//! What is asked of whoever computes, and what comes back while it does. This is all that the side of HTTP and the
//! side of the session know of each other.

use tokio::sync::mpsc::UnboundedSender;

use super::error::ApiError;
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
    pub out: UnboundedSender<Event>,
    /// When it came.
    pub since: std::time::Instant,
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
    /// Whether nobody waits for it any more.
    pub fn is_cancelled(&self) -> bool {
        self.out.is_closed()
    }

    /// Tells what happened; a client that is gone hears nothing.
    pub fn tell(&self, event: Event) {
        let _ = self.out.send(event);
    }
}
