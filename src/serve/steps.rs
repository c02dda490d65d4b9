//! Events of a job as every dialect tells them: words, reasoning, calls, ends; and a whole answer made of them.

use super::error::ApiError;
use super::job::{Event, Finish, Summary, TokenLogprob};
use super::present::Keep;
use super::split::{Call, Looks, Part, Splitter};

/// What happens in an answer, in order.
#[derive(Clone, Debug)]
pub enum Step {
    /// Words for the user, with their tokens if they were asked for.
    Words {
        /// Which answer.
        choice: usize,
        /// The words.
        text: String,
        /// Tokens that became certain with them.
        logprobs: Vec<TokenLogprob>,
    },
    /// Reasoning.
    Thought {
        /// Which answer.
        choice: usize,
        /// The words.
        text: String,
    },
    /// A call of a tool.
    Call {
        /// Which answer.
        choice: usize,
        /// Its number in the answer.
        number: usize,
        /// The call.
        call: Call,
    },
    /// An answer has ended.
    Finished {
        /// Which.
        choice: usize,
        /// Why.
        finish: Finish,
        /// Whether it has calls.
        calls: bool,
    },
    /// All have.
    Done(Summary),
    /// There will be no more.
    Failed(ApiError),
}

/// Makes steps of events.
pub struct Steps {
    splitters: Vec<Splitter>,
    /// Tokens of reasoning.
    reasoning: usize,
}

impl Steps {
    /// For so many answers.
    pub fn new(looks: &Looks, choices: usize) -> Steps {
        Steps { splitters: (0..choices).map(|_| Splitter::new(looks)).collect(), reasoning: 0 }
    }

    /// The steps of an event.
    pub fn of(&mut self, event: Event, tell: &mut dyn FnMut(Step)) {
        let mut parts = Vec::new();
        match event {
            Event::Done(summary) => tell(Step::Done(Summary { reasoning: self.reasoning, ..summary })),
            Event::Failed(e) => tell(Step::Failed(e)),
            // Of jobs that have no answers.
            Event::Vectors(_) => {}
            Event::Text { choice, bits, logprobs, tokens } => {
                let Some(splitter) = self.splitters.get_mut(choice) else { return };
                let (before, thinks) = (splitter.calls(), splitter.thinks());
                splitter.push(&bits, &mut parts);
                // The marks count as reasoning.
                self.reasoning += if thinks || splitter.thinks() { tokens } else { 0 };
                tell_parts(choice, before, parts, logprobs, tell);
            }
            Event::Finished { choice, finish } => {
                let Some(splitter) = self.splitters.get_mut(choice) else { return };
                let before = splitter.calls();
                splitter.finish(&mut parts);
                let calls = splitter.calls() > 0;
                tell_parts(choice, before, parts, Vec::new(), tell);
                tell(Step::Finished { choice, finish, calls });
            }
        }
    }
}

fn tell_parts(
    choice: usize,
    mut number: usize,
    parts: Vec<Part>,
    mut logprobs: Vec<TokenLogprob>,
    tell: &mut dyn FnMut(Step),
) {
    for part in parts {
        tell(match part {
            Part::Words(text) => Step::Words { choice, text, logprobs: std::mem::take(&mut logprobs) },
            Part::Thought(text) => Step::Thought { choice, text },
            Part::Call(call) => {
                number += 1;
                Step::Call { choice, number: number - 1, call }
            }
        });
    }
    if !logprobs.is_empty() {
        tell(Step::Words { choice, text: String::new(), logprobs });
    }
}

/// One whole answer.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Words for the user.
    pub text: String,
    /// Reasoning.
    pub thought: String,
    /// Calls.
    pub calls: Vec<Call>,
    /// Tokens, if they were asked for.
    pub logprobs: Vec<TokenLogprob>,
    /// Why it ended.
    pub finish: Option<Finish>,
}

/// All answers of a job.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// In order.
    pub all: Vec<Answer>,
    /// Figures.
    pub summary: Summary,
}

impl Answers {
    /// Adds a step.
    ///
    /// # Errors
    /// Where there will be no more.
    pub fn add(&mut self, step: Step) -> Result<(), ApiError> {
        match step {
            Step::Words { choice, text, logprobs } => {
                let answer = self.answer(choice);
                answer.text.push_str(&text);
                answer.logprobs.extend(logprobs);
            }
            Step::Thought { choice, text } => self.answer(choice).thought.push_str(&text),
            Step::Call { choice, call, .. } => self.answer(choice).calls.push(call),
            Step::Finished { choice, finish, .. } => self.answer(choice).finish = Some(finish),
            Step::Done(summary) => self.summary = summary,
            Step::Failed(e) => return Err(e),
        }
        Ok(())
    }

    fn answer(&mut self, choice: usize) -> &mut Answer {
        if self.all.len() <= choice {
            self.all.resize(choice + 1, Answer::default());
        }
        &mut self.all[choice]
    }
}

/// How an answer is written for a client.
pub trait Dialect: Send {
    /// Appends what a stream begins with.
    fn begin(&mut self, out: &mut String);
    /// Appends what a stream says of a step.
    fn step(&mut self, step: Step, out: &mut String);
    /// An answer that is not streamed.
    fn whole(&mut self, answers: &Answers) -> serde_json::Value;
    /// What keeps a connection alive while nothing happens; nothing where a client would stumble over it.
    fn ping(&self) -> Option<&'static str>;
    /// The type of a stream.
    fn content_type(&self) -> &'static str {
        "text/event-stream"
    }
}

/// A request that was read.
pub struct Prepared {
    /// What is to be generated.
    pub task: super::job::Task,
    /// What to look for in it.
    pub looks: Looks,
    /// How it is told.
    pub dialect: Box<dyn Dialect>,
    /// Whether it is told as it grows.
    pub stream: bool,
    /// How long the model is to stay behind it.
    pub keep: Keep,
    /// Nothing is to be generated: the model is to be given up, if it is loaded.
    pub gives_up: bool,
}

impl Prepared {
    /// A request that says nothing of how long the model is to stay.
    pub fn new(task: super::job::Task, looks: Looks, dialect: impl Dialect + 'static, stream: bool) -> Prepared {
        Prepared { task, looks, dialect: Box::new(dialect), stream, keep: Keep::Server, gives_up: false }
    }
}

/// An event of a stream (server-sent events), without a name.
pub fn data(json: &serde_json::Value, out: &mut String) {
    out.push_str("data: ");
    out.push_str(&json.to_string());
    out.push_str("\n\n");
}

/// A named event.
pub fn named(name: &str, json: &serde_json::Value, out: &mut String) {
    out.push_str("event: ");
    out.push_str(name);
    out.push('\n');
    data(json, out);
}
