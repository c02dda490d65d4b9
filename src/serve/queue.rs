//! Jobs that wait, in the order in which they came, and what is known of their durations. Nobody waits without a bound:
//! a full queue refuses with the time after which another attempt makes sense.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::ApiError;
use super::job::{Event, Job, Summary};

/// How often a waiting worker looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);
/// Weight of the latest job in running means.
const LATEST: f64 = 0.2;

/// Whether jobs are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The model is being loaded.
    Loading,
    /// Jobs are taken and done.
    Open,
    /// No more jobs are taken; those at hand are being ended.
    Closing,
    /// None is left.
    Over,
}

/// Sums since the start, and running means.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Jobs that were done to their end.
    pub done: u64,
    /// Jobs whose client went away.
    pub cancelled: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Requests that the full queue refused.
    pub refused: u64,
    /// Tokens of prompts that were computed, and the seconds for them.
    pub prompt_tokens: u64,
    /// Seconds.
    pub prompt_s: f64,
    /// Tokens of prompts that were taken from the cache.
    pub cached_tokens: u64,
    /// Tokens of answers.
    pub generated: u64,
    /// Passes, and the texts that each had tokens of, summed.
    pub passes: u64,
    /// Texts.
    pub texts_of_passes: u64,
    /// Seconds in which tokens of answers were computed, summed over answers.
    pub decode_s: f64,
    /// Seconds per token of a prompt, lately.
    prompt_rate_s: Option<f64>,
    /// Seconds per pass of one token, lately.
    decode_rate_s: Option<f64>,
    /// Tokens of all answers of a job, lately.
    mean_generated: Option<f64>,
}

/// A job at hand.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Its slot.
    pub slot: usize,
    /// Its number.
    pub id: u64,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Of these, cached or computed.
    pub evaluated: usize,
    /// Tokens of answers so far.
    pub generated: usize,
    /// Tokens of answers at most.
    pub most: usize,
}

/// What there is to see of a queue.
#[derive(Clone, Debug)]
pub struct View {
    /// Whether jobs are taken.
    pub phase: Phase,
    /// Jobs that wait.
    pub waiting: usize,
    /// Jobs at once at most; 0 while that is not known.
    pub slots: usize,
    /// Jobs at hand.
    pub running: Vec<Running>,
    /// Sums and means.
    pub counters: Counters,
}

struct State {
    waiting: VecDeque<Job>,
    phase: Phase,
    slots: usize,
    running: Vec<Running>,
    counters: Counters,
}

/// The queue between the side of HTTP and the side of the session.
pub struct Queue {
    state: Mutex<State>,
    came: Condvar,
    most: usize,
    phase: tokio::sync::watch::Sender<Phase>,
}

impl Queue {
    /// A queue of at most `most` jobs, for a model that is being loaded.
    pub fn new(most: usize) -> Queue {
        let state = State {
            waiting: VecDeque::with_capacity(most),
            phase: Phase::Loading,
            slots: 0,
            running: Vec::new(),
            counters: Counters::default(),
        };
        Queue {
            state: Mutex::new(state),
            came: Condvar::new(),
            most,
            phase: tokio::sync::watch::Sender::new(Phase::Loading),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model is loaded: jobs are taken, and so many computed at once.
    pub fn open(&self, slots: usize) {
        let mut state = self.lock();
        state.slots = slots;
        if state.phase == Phase::Loading {
            state.phase = Phase::Open;
        }
    }

    /// Takes no more jobs, and tells those that wait.
    pub fn close(&self) {
        let mut state = self.lock();
        if state.phase >= Phase::Closing {
            return;
        }
        state.phase = Phase::Closing;
        for job in state.waiting.drain(..) {
            job.ticket.out.tell(Event::Failed(closing()));
        }
        self.phase.send_replace(Phase::Closing);
        self.came.notify_all();
    }

    /// No job is left, and none will come.
    pub fn end(&self) {
        self.close();
        self.lock().phase = Phase::Over;
        self.phase.send_replace(Phase::Over);
    }

    /// Says when the queue closes, and when no job is left.
    pub fn phase(&self) -> tokio::sync::watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Adds a job.
    ///
    /// # Errors
    /// If the model is being loaded, the queue closes, or it is full; the last with the time to wait.
    pub fn push(&self, job: Job) -> Result<(), ApiError> {
        let mut state = self.lock();
        match state.phase {
            Phase::Loading => return Err(loading()),
            Phase::Closing | Phase::Over => return Err(closing()),
            Phase::Open => {}
        }
        if state.waiting.len() >= self.most {
            state.drop_cancelled();
        }
        if state.waiting.len() >= self.most {
            state.counters.refused += 1;
            return Err(ApiError::busy(state.waiting.len(), state.until_free_s()));
        }
        state.waiting.push_back(job);
        self.came.notify_all();
        Ok(())
    }

    /// The next job whose client still waits; `None` once `stop` says so or the queue closes.
    pub fn next(&self, stop: &dyn Fn() -> bool) -> Option<Job> {
        loop {
            // It may close the queue.
            if stop() {
                return None;
            }
            let mut state = self.lock();
            state.drop_cancelled();
            if state.phase >= Phase::Closing {
                return None;
            }
            if let Some(job) = state.take() {
                return Some(job);
            }
            drop(self.came.wait_timeout(state, LOOK));
        }
    }

    /// The job that waits first, if it `fits`, which may not ask the queue for anything.
    pub fn take_if(&self, fits: &mut dyn FnMut(&Job) -> bool) -> Option<Job> {
        let mut state = self.lock();
        state.drop_cancelled();
        match state.waiting.front() {
            Some(job) if fits(job) => state.take(),
            _ => None,
        }
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.lock().waiting.iter().all(|job| job.ticket.is_cancelled())
    }

    /// Tells how far a job at hand has come.
    pub fn progress(&self, id: u64, evaluated: usize, generated: usize) {
        if let Some(running) = self.lock().running.iter_mut().find(|r| r.id == id) {
            (running.evaluated, running.generated) = (evaluated, generated);
        }
    }

    /// Counts a pass with tokens of so many texts.
    pub fn passed(&self, texts: usize) {
        let c = &mut self.lock().counters;
        c.passes += 1;
        c.texts_of_passes += texts as u64;
    }

    /// A job at hand has ended; `summary` says what was computed, whatever its end.
    pub fn ended(&self, id: u64, end: End, summary: &Summary) {
        let mut state = self.lock();
        state.running.retain(|r| r.id != id);
        state.counters.add(end, summary);
    }

    /// What there is to see.
    pub fn view(&self) -> View {
        let state = self.lock();
        View {
            phase: state.phase,
            waiting: state.waiting.iter().filter(|job| !job.ticket.is_cancelled()).count(),
            slots: state.slots,
            running: state.running.clone(),
            counters: state.counters,
        }
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it was asked to.
    Done,
    /// Its client went away.
    Cancelled,
    /// By a failure.
    Failed,
}

impl State {
    /// Takes the job that waits first, to a slot.
    fn take(&mut self) -> Option<Job> {
        let job = self.waiting.pop_front()?;
        let most = job.work.most();
        let slot = (0..).find(|slot| self.running.iter().all(|r| r.slot != *slot)).unwrap_or(0);
        let prompt = job.work.tokens();
        self.running.push(Running { slot, id: job.ticket.id, prompt, evaluated: 0, generated: 0, most });
        Some(job)
    }

    fn drop_cancelled(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain(|job| !job.ticket.is_cancelled());
        self.counters.cancelled += (before - self.waiting.len()) as u64;
    }

    /// Seconds until the first of the jobs at hand has ended, by the rates of those before; at least 1.
    fn until_free_s(&self) -> u64 {
        let c = &self.counters;
        let rest = self.running.iter().map(|r| {
            let prompt = r.prompt.saturating_sub(r.evaluated) as f64 * c.prompt_rate_s.unwrap_or(0.0);
            let expected = c.mean_generated.unwrap_or(r.most as f64).max(r.generated as f64 + 1.0).min(r.most as f64);
            prompt + (expected - r.generated as f64).max(0.0) * c.decode_rate_s.unwrap_or(0.0)
        });
        (rest.min_by(f64::total_cmp).unwrap_or(0.0).ceil() as u64).max(1)
    }
}

impl Counters {
    fn add(&mut self, end: End, s: &Summary) {
        match end {
            End::Done => self.done += 1,
            End::Cancelled => self.cancelled += 1,
            End::Failed => self.failed += 1,
        }
        let computed = s.prompt.saturating_sub(s.cached);
        self.prompt_tokens += computed as u64;
        self.cached_tokens += s.cached as u64;
        self.prompt_s += s.prompt_s;
        self.generated += s.generated as u64;
        self.decode_s += s.decode_s;
        if end != End::Done {
            return;
        }
        let mean = |mean: &mut Option<f64>, latest: f64| {
            *mean = Some(mean.map_or(latest, |m| m + LATEST * (latest - m)));
        };
        if computed > 0 {
            mean(&mut self.prompt_rate_s, s.prompt_s / computed as f64);
        }
        if s.passes > 0 {
            mean(&mut self.decode_rate_s, s.decode_s / s.passes as f64);
        }
        mean(&mut self.mean_generated, s.generated as f64);
    }
}

/// The refusal while the model is being loaded.
pub fn loading() -> ApiError {
    ApiError::unavailable("the model is being loaded; GET /health says when it is there")
}

/// The refusal at the end.
pub fn closing() -> ApiError {
    ApiError::unavailable("the server is shutting down and takes no more requests")
}

/// Seconds since a moment.
pub fn seconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::super::job::{Task, Ticket, Work};
    use super::super::outbox::{Inbox, outbox};
    use super::*;

    fn job(id: u64) -> (Job, Inbox<Event>) {
        let (out, heard) = outbox(&std::sync::Arc::default());
        let task = Task {
            prompt: vec![1; 10],
            params: Default::default(),
            choices: 1,
            max_tokens: 100,
            stops: vec![],
            logprobs: None,
            reuse: true,
        };
        let ticket = Ticket { id, out, since: Instant::now(), limit: Duration::from_secs(60) };
        (Job { ticket, work: Work::Answer(task) }, heard)
    }

    #[test]
    fn a_full_queue_refuses_with_an_estimate_and_those_who_left_make_room() {
        let q = Queue::new(2);
        let (a, b, c, d) = (job(1), job(2), job(3), job(4));
        assert_eq!(q.push(job(0).0).unwrap_err().status, 503);
        q.open(1);
        q.push(a.0).unwrap();
        assert_eq!(q.next(&|| false).unwrap().ticket.id, 1);
        let done =
            Summary { prompt: 10, prompt_s: 1.0, generated: 50, passes: 49, decode_s: 49.0, ..Summary::default() };
        q.ended(1, End::Done, &done);
        q.push(b.0).unwrap();
        q.next(&|| false).unwrap();
        q.progress(2, 10, 20);
        q.push(c.0).unwrap();
        q.push(d.0).unwrap();
        let e = q.push(job(5).0).unwrap_err();
        // 50 tokens are usual, of which 20 are done, at 1 s each.
        assert_eq!((e.status, e.retry_after_s), (429, Some(30)));
        drop(c.1);
        let (last, _heard) = job(6);
        q.push(last).unwrap();
        assert_eq!(q.next(&|| false).unwrap().ticket.id, 4);
        assert_eq!((q.view().counters.refused, q.view().counters.cancelled), (1, 1));
    }

    #[test]
    fn a_queue_that_closes_tells_those_who_wait() {
        let q = Queue::new(2);
        q.open(1);
        let (j, mut heard) = job(1);
        q.push(j).unwrap();
        q.close();
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(matches!(heard.poll(&mut cx), std::task::Poll::Ready(Some(Event::Failed(e))) if e.status == 503));
        assert!(q.next(&|| false).is_none() && *q.phase().borrow() == Phase::Closing);
        assert_eq!(q.push(job(2).0).unwrap_err().status, 503);
    }
}
