//! Texts whose hidden states are computed: pass by pass, each text pooled to one vector of length 1.

use std::time::Instant;

use super::error::ApiError;
use super::job::{Event, Pooling, Summary, Texts, Ticket};
use super::queue::{End, Queue, seconds};
use crate::engine::{EngineError, Session};
use crate::model::ForwardError;
use crate::state::SeqId;

/// A job of this kind that is computed.
pub struct Embedding {
    ticket: Ticket,
    texts: Texts,
    summary: Summary,
    began: Instant,
    /// Where its texts are computed, one after the other.
    seq: Option<SeqId>,
    /// The hidden states of the text at hand, summed, or its last one.
    state: Vec<f64>,
    vectors: Vec<Vec<f32>>,
    /// Tokens that are computed.
    done: usize,
}

impl Embedding {
    /// A job that has not begun.
    pub fn new(ticket: Ticket, texts: Texts, summary: Summary) -> Embedding {
        let vectors = Vec::with_capacity(texts.all.len());
        Embedding { ticket, texts, summary, began: Instant::now(), seq: None, state: Vec::new(), vectors, done: 0 }
    }

    /// Takes a sequence without tokens, and the pages for the longest text.
    ///
    /// # Errors
    /// If they are not there.
    pub fn begin(&mut self, session: &mut Session, seq: SeqId) -> Result<(), EngineError> {
        self.seq = Some(seq);
        session.reserve(seq, self.texts.longest())
    }

    /// Computes a pass. Returns whether that was the last one.
    ///
    /// # Errors
    /// Why the job ends before its end.
    pub fn step(&mut self, session: &mut Session, stop: &dyn Fn() -> bool, queue: &Queue) -> Result<bool, EngineError> {
        let (Some(seq), Some(text)) = (self.seq, self.texts.all.get(self.vectors.len())) else { return Ok(true) };
        let ticket = &self.ticket;
        let over = || ticket.over().is_some() || stop();
        if over() {
            return Err(ForwardError::Interrupted.into());
        }
        let (at, width) = (session.length(seq)?, session.n_embd());
        let end = text.len().min(at + session.max_batch());
        let rows = session.hidden(seq, &text[at..end], &over)?.chunks_exact(width);
        self.state.resize(width, 0.0);
        match self.texts.pooling {
            Pooling::Mean => rows.for_each(|row| self.state.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x))),
            Pooling::Last => rows.last().into_iter().for_each(|row| {
                self.state.iter_mut().zip(row).for_each(|(s, x)| *s = f64::from(*x));
            }),
        }
        self.done += end - at;
        queue.progress(self.ticket.id, self.done, 0);
        if end == text.len() {
            self.vectors.push(unit(&self.state));
            self.state.clear();
            session.keep(seq, 0)?;
            session.reserve(seq, self.texts.longest())?;
        }
        Ok(self.vectors.len() == self.texts.all.len())
    }

    /// Ends the job and tells its vectors, or why there are none.
    pub fn end(mut self, session: &mut Session, queue: &Queue, result: Result<bool, EngineError>) {
        if let Some(seq) = self.seq {
            // It is there, and is no sequence that passes go on with.
            let _ = session.close(seq);
        }
        self.summary.prompt_s = seconds(self.began);
        let (end, event) = match result {
            Ok(_) => {
                self.ticket.out.tell(Event::Vectors(self.vectors));
                (End::Done, Event::Done(self.summary))
            }
            Err(EngineError::Forward(ForwardError::Interrupted)) => (End::Cancelled, Event::Failed(self.ticket.why())),
            Err(e) => {
                tracing::warn!("request {}: {e}", self.ticket.id);
                (End::Failed, Event::Failed(ApiError::failed(e.to_string())))
            }
        };
        queue.ended(self.ticket.id, end, &self.summary);
        self.ticket.out.tell(event);
    }
}

/// A vector of length 1 in the same direction; zeros stay zeros.
fn unit(v: &[f64]) -> Vec<f32> {
    let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    v.iter().map(|x| if length > 0.0 { (x / length) as f32 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_1() {
        assert_eq!(unit(&[3.0, -4.0]), [0.6, -0.8]);
        assert_eq!(unit(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
