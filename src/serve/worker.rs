//! Computes jobs, one at a time, with the session that it alone has. A scheduler of batches may take its place: it meets
//! the rest of the server only in [`Queue::next`], [`Queue::ended`] and the events of a [`Job`].

use std::time::Instant;

use super::choice::{Choice, Next};
use super::error::ApiError;
use super::job::{Event, Finish, Job, Summary};
use super::prefix::Kept;
use super::queue::{End, Queue, seconds};
use super::text::Grown;
use crate::backend::Class;
use crate::engine::{EngineError, Session};
use crate::model::{ForwardError, Outputs};
use crate::state::{SeqId, StateError};
use crate::tokenizer::Tokenizer;

/// Computes what is queued, until the queue closes or `stop` says so, which is asked in the middle of passes too.
pub struct Worker<'a> {
    session: &'a mut Session,
    tokenizer: &'a Tokenizer,
    queue: &'a Queue,
    stop: &'a dyn Fn() -> bool,
    /// A sequence without tokens.
    root: SeqId,
    kept: Kept<SeqId>,
}

/// Why a job ends before its end.
enum Ended {
    /// Nobody waits for it, or the server stops.
    Cancelled,
    Failed(EngineError),
}

impl From<EngineError> for Ended {
    fn from(e: EngineError) -> Ended {
        match e {
            EngineError::Forward(ForwardError::Interrupted) => Ended::Cancelled,
            e => Ended::Failed(e),
        }
    }
}

impl<'a> Worker<'a> {
    /// A worker with a session that has computed nothing.
    pub fn new(
        session: &'a mut Session,
        tokenizer: &'a Tokenizer,
        queue: &'a Queue,
        stop: &'a dyn Fn() -> bool,
    ) -> Worker<'a> {
        let root = session.sequence();
        Worker { session, tokenizer, queue, stop, root, kept: Kept::new() }
    }

    /// Works until there is to be no more.
    pub fn work(&mut self) {
        while let Some(job) = self.queue.next(self.stop) {
            self.job(&job);
        }
    }

    fn job(&mut self, job: &Job) {
        let mut summary = Summary { queued_s: seconds(job.since), ..Summary::default() };
        let ended = self.compute(job, &mut summary);
        let end = match &ended {
            Ok(()) => End::Done,
            Err(Ended::Cancelled) => End::Cancelled,
            Err(Ended::Failed(_)) => End::Failed,
        };
        self.queue.ended(end, &summary);
        job.tell(match ended {
            Ok(()) => Event::Done(summary),
            Err(Ended::Cancelled) => Event::Failed(ApiError::unavailable("the server stopped before the answer's end")),
            Err(Ended::Failed(e)) => {
                tracing::warn!("request {}: {e}", job.id);
                Event::Failed(ApiError::failed(e.to_string()))
            }
        });
    }

    /// Computes a job in a sequence of its own, whose part of the prompt is kept.
    fn compute(&mut self, job: &Job, summary: &mut Summary) -> Result<(), Ended> {
        let prompt = &job.task.prompt;
        let seq = self.begin(job, summary)?;
        let result = self.evaluate_prompt(job, summary).and_then(|()| self.answers(job, summary));
        let n = match &result {
            // Nothing is kept of numbers that are not finite, and the session forgets that there were any.
            Err(Ended::Failed(EngineError::NotFinite { .. })) => 0,
            Err(_) if self.session.overflow().is_some() => 0,
            _ => self.session.position().min(prompt.len()),
        };
        self.session.truncate(n);
        self.session.switch(self.root)?;
        for gone in self.kept.add(seq, prompt[..n].to_vec()) {
            self.session.close(gone)?;
        }
        result
    }

    /// Goes on with a new sequence that has as much of the prompt as is kept. Its last token is computed in any case,
    /// for what follows it.
    fn begin(&mut self, job: &Job, summary: &mut Summary) -> Result<SeqId, EngineError> {
        let prompt = &job.task.prompt;
        let found = if job.task.reuse { self.kept.longest(&prompt[..prompt.len() - 1]) } else { None };
        let (from, cached) = found.unwrap_or((self.root, 0));
        (summary.prompt, summary.cached) = (prompt.len(), cached);
        self.session.switch(from)?;
        let seq = self.session.fork_at(cached)?;
        self.session.switch(seq)?;
        Ok(seq)
    }

    fn evaluate_prompt(&mut self, job: &Job, summary: &mut Summary) -> Result<(), Ended> {
        let start = Instant::now();
        let result = self.evaluate(job, &job.task.prompt[summary.cached..], Class::Bulk);
        summary.prompt_s = seconds(start);
        result
    }

    /// Evaluates tokens behind those of the sequence; prompts that are kept make room for them.
    fn evaluate(&mut self, job: &Job, tokens: &[u32], class: Class) -> Result<(), Ended> {
        let began = self.session.position();
        let stop = || job.is_cancelled() || (self.stop)();
        loop {
            // What was computed before room was wanting stays.
            let rest = &tokens[self.session.position() - began..];
            match self.session.eval(rest, class, Outputs::Last, &stop) {
                Err(EngineError::State(StateError::Full { .. })) => match self.kept.forget() {
                    Some(seq) => self.session.close(seq)?,
                    None => {
                        return Err(Ended::Failed(
                            StateError::Full { positions: rest.len(), needed: 1, free: 0 }.into(),
                        ));
                    }
                },
                other => return Ok(other?),
            }
        }
    }

    /// The answers, one after the other, each behind the prompt.
    fn answers(&mut self, job: &Job, summary: &mut Summary) -> Result<(), Ended> {
        let first = self.session.logits()?.to_vec();
        for choice in 0..job.task.choices {
            self.session.truncate(job.task.prompt.len());
            let start = Instant::now();
            let finish = self.answer(job, choice, &first, summary);
            summary.decode_s += seconds(start);
            job.tell(Event::Finished { choice, finish: finish? });
        }
        Ok(())
    }

    /// One answer, told as it grows. `first`: the logits behind the prompt.
    fn answer(&mut self, job: &Job, number: usize, first: &[f32], summary: &mut Summary) -> Result<Finish, Ended> {
        let mut choice = Choice::new(&job.task, number, first.len(), self.tokenizer);
        let before = summary.generated;
        let mut at_prompt = true;
        loop {
            let full = self.session.position() >= self.session.n_ctx();
            let mut grown = Grown::default();
            let logits = if std::mem::take(&mut at_prompt) { first } else { self.session.logits()? };
            let next = choice.step(logits, full, &mut grown);
            summary.generated = before + choice.generated();
            self.queue.progress(summary.prompt, summary.generated);
            if !grown.bits.is_empty() || !grown.logprobs.is_empty() {
                job.tell(Event::Text { choice: number, bits: grown.bits, logprobs: grown.logprobs });
            }
            match next {
                Next::Finished(finish) => return Ok(finish),
                Next::Evaluate(token) => self.evaluate(job, &[token], Class::Exact)?,
            }
            summary.passes += 1;
        }
    }
}
