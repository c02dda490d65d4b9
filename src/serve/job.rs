//! What is asked of whoever computes, and what comes back while it does. This is all that the side of HTTP and the
//! side of the session know of each other.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::error::ApiError;
use super::outbox::{Outbox, Weighed};
use super::present::Keep;
use crate::engine::SamplerParams;

/// What is to be generated.
#[derive(Clone, Debug)]
pub struct Task {
    /// Each whole text that is continued; one or more, of one token or more.
    pub prompts: Vec<Vec<u32>>,
    /// How tokens are drawn; answer number `i` to a prompt has the seed and `i` more.
    pub params: SamplerParams,
    /// How many answers to each prompt; those to the first come first.
    pub choices: usize,
    /// Tokens of an answer at most, as far as the context has room behind its prompt.
    pub max_tokens: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Probabilities of so many of the likeliest tokens at each place, besides that of the drawn one.
    pub logprobs: Option<usize>,
    /// Whether what is cached of earlier prompts may be used. It changes no text.
    pub reuse: bool,
}

impl Task {
    /// How many answers to all prompts.
    pub fn answers(&self) -> usize {
        self.prompts.len().saturating_mul(self.choices)
    }

    /// The prompt that an answer is to, by its number.
    pub fn prompt_of(&self, answer: usize) -> usize {
        answer / self.choices.max(1)
    }

    /// Which of the answers to its prompt an answer is.
    pub fn choice_of(&self, answer: usize) -> usize {
        answer % self.choices.max(1)
    }

    /// The text that an answer continues.
    pub fn text_of(&self, answer: usize) -> &[u32] {
        self.prompts.get(self.prompt_of(answer)).map_or(&[], |prompt| prompt)
    }

    /// Tokens of all prompts.
    pub fn tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// Positions that an answer may come to take.
    pub fn positions(&self, answer: usize) -> usize {
        self.text_of(answer).len().saturating_add(self.max_tokens.saturating_sub(1))
    }
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

/// Texts whose vectors are to be computed.
#[derive(Clone, Debug)]
pub struct Texts {
    /// One or more, of a token or more each.
    pub all: Vec<Vec<u32>>,
    /// How.
    pub pooling: Pooling,
}

impl Texts {
    /// Tokens of the longest.
    pub fn longest(&self) -> usize {
        self.all.iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there are few, and nearly all are of the larger kind")]
pub enum Work {
    /// A text is to be continued.
    Answer(Task),
    /// Vectors are to be made of texts.
    Embed(Texts),
}

impl Work {
    /// Tokens of prompts.
    pub fn tokens(&self) -> usize {
        match self {
            Work::Answer(task) => task.tokens(),
            Work::Embed(texts) => texts.all.iter().map(Vec::len).sum(),
        }
    }

    /// Tokens of answers at most.
    pub fn most(&self) -> usize {
        match self {
            Work::Answer(task) => task.max_tokens.saturating_mul(task.answers()),
            Work::Embed(_) => 0,
        }
    }

    /// Whether answers have as many tokens as they may.
    pub fn is_endless(&self) -> bool {
        matches!(self, Work::Answer(task) if task.is_endless())
    }
}

impl Task {
    /// Whether nothing but their number ends the tokens of an answer.
    fn is_endless(&self) -> bool {
        self.params.ignore_eos && self.stops.is_empty()
    }
}

/// Work in the queue.
#[derive(Debug)]
pub struct Job {
    /// Whose it is.
    pub ticket: Ticket,
    /// The number of the model that it is for.
    pub model: usize,
    /// How long that one is to stay behind it.
    pub keep: Keep,
    /// What is to be done.
    pub work: Work,
}

/// Whose requests share a queue's places: that of a key, or of an address where there are none. A network of 2^64
/// addresses of IPv6 is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Client {
    /// The number of its key.
    Key(usize),
    /// Its address, or the first half of it.
    Address(IpAddr),
}

impl Client {
    /// The client at an address.
    pub fn at(address: IpAddr) -> Client {
        Client::Address(match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
            v4 => v4,
        })
    }
}

/// Who waits for a job, and how long.
#[derive(Debug)]
pub struct Ticket {
    /// The job's number.
    pub id: u64,
    /// Whose it is.
    pub client: Client,
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
    /// Of these, seconds in which the model was being loaded.
    pub load_s: f64,
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
        /// Which answer, by its number among all.
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
    /// Vectors of all texts, in order.
    Vectors(Vec<Vec<f32>>),
    /// All is told.
    Done(Summary),
    /// There will be no more.
    Failed(ApiError),
}

impl Ticket {
    /// Why it is not to be computed any more, if it is not.
    pub fn over(&self) -> Option<Over> {
        match () {
            () if self.out.is_closed() => Some(Over::Gone),
            () if self.since.elapsed() >= self.limit => Some(Over::Late),
            () if self.out.is_full() => Some(Over::Unread),
            () => None,
        }
    }

    /// What is told of a job that was given up: why it is over, or that the server stops.
    pub fn why(&self) -> ApiError {
        match self.over() {
            Some(Over::Late) => ApiError::timed_out(self.limit.as_secs()),
            Some(Over::Unread) => ApiError::unread(),
            Some(Over::Gone) | None => ApiError::unavailable("the server stopped before the answer's end"),
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
            Event::Vectors(vectors) => vectors.iter().map(|v| size_of_val(&v[..])).sum(),
            _ => 0,
        };
        size_of::<Event>() + texts
    }
}
