//! Jobs that wait, and what is known of their durations. Nobody waits without a bound: a full queue refuses with the time
//! after which another attempt makes sense. Clients take turns, each with its jobs in the order in which they came, and
//! none may have all of the queue. Jobs are of models, of which one is loaded at a time ([`Present`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::ApiError;
use super::histogram::Histogram;
use super::job::{Client, Event, Job, Summary};
use super::present::{Keep, Present, rest};
use crate::engine::Links;

/// How often a waiting worker looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);
/// Weight of the latest job in running means.
const LATEST: f64 = 0.2;

/// Whether jobs are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The first model is being loaded.
    Loading,
    /// Jobs are taken and done.
    Open,
    /// No more jobs are taken; those at hand are being ended.
    Closing,
    /// None is left.
    Over,
}

impl Phase {
    /// Its name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Loading => "loading",
            Phase::Open => "open",
            Phase::Closing => "closing",
            Phase::Over => "over",
        }
    }
}

/// Sums since the start, and running means.
#[derive(Clone, Copy, Debug)]
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
    /// Seconds from a request to its first token, of one model.
    pub first_token: Histogram,
    /// Seconds per token behind the first of each request, of one model.
    pub token: Histogram,
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
    /// Of those, cached.
    pub cached: usize,
    /// Tokens of answers so far.
    pub generated: usize,
    /// Tokens of answers at most.
    pub most: usize,
    /// Whether they have as many.
    pub endless: bool,
    /// How long its model is to stay behind it.
    keep: Keep,
}

/// A model, as the queue knows it.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Sums and means of its jobs.
    pub counters: Counters,
    /// Its jobs that wait.
    pub waiting: usize,
    /// How long loading it took last.
    load: Option<Duration>,
    /// Until when it is not tried again, and why it could not be loaded.
    broken: Option<(Instant, ApiError)>,
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
    /// Sums of all models.
    pub counters: Counters,
    /// Each model.
    pub models: Vec<Known>,
    /// Which of them is in memory.
    pub present: Present,
    /// What the links have carried for the model that is loaded.
    pub links: Links,
    /// Seconds since the start.
    pub up_s: f64,
}

struct State {
    waiting: VecDeque<Job>,
    /// For each client whose jobs wait, the turn at which it was served last, or came.
    turns: BTreeMap<Client, u64>,
    turn: u64,
    phase: Phase,
    slots: usize,
    running: Vec<Running>,
    models: Vec<Known>,
    present: Present,
    links: Links,
}

/// The queue between the side of HTTP and the side of the session.
pub struct Queue {
    state: Mutex<State>,
    came: Condvar,
    most: usize,
    /// How long a model stays behind a request that says nothing of it; `None` until another is asked for.
    keep: Option<Duration>,
    phase: tokio::sync::watch::Sender<Phase>,
    since: Instant,
}

impl Queue {
    /// A queue of at most `most` jobs for so many models, of which the first is being loaded. Behind a request that says
    /// nothing of it, a model stays for `keep`; `None` until another is asked for.
    pub fn new(most: usize, models: usize, keep: Option<Duration>) -> Queue {
        let state = State {
            waiting: VecDeque::with_capacity(most),
            turns: BTreeMap::new(),
            turn: 0,
            phase: Phase::Loading,
            slots: 0,
            running: Vec::new(),
            models: vec![Known::default(); models],
            present: Present::Loading { model: 0, since: Instant::now() },
            links: Links::default(),
        };
        Queue {
            state: Mutex::new(state),
            came: Condvar::new(),
            most,
            keep,
            phase: tokio::sync::watch::Sender::new(Phase::Loading),
            since: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, without jobs whose clients have gone; `None` once `stop`, which may close the queue, says so, or it closes.
    fn open(&self, stop: &dyn Fn() -> bool) -> Option<MutexGuard<'_, State>> {
        if stop() {
            return None;
        }
        let mut state = self.lock();
        state.drop_cancelled();
        (state.phase < Phase::Closing).then_some(state)
    }

    /// A model is loaded: jobs are taken, and so many of it computed at once.
    pub fn loaded(&self, model: usize, slots: usize) {
        let mut state = self.lock();
        let now = Instant::now();
        let took = match state.present {
            Present::Loading { since, .. } => now.saturating_duration_since(since),
            _ => Duration::ZERO,
        };
        state.present = Present::Loaded { model, since: now, took, used: false, until: None };
        // Whoever had it loaded may have gone.
        state.present.stay(self.keep, now);
        state.models[model].load = Some(took);
        state.slots = slots;
        if state.phase == Phase::Loading {
            state.phase = Phase::Open;
        }
    }

    /// Nothing is loaded any more.
    pub fn unloaded(&self) {
        let mut state = self.lock();
        (state.present, state.slots, state.links) = (Present::Nothing, 0, Links::default());
    }

    /// A model could not be loaded: tells its jobs, and refuses more of them for a while.
    pub fn failed(&self, model: usize, why: &ApiError) {
        let mut state = self.lock();
        let now = Instant::now();
        let took = match state.present {
            Present::Loading { since, .. } => now.saturating_duration_since(since),
            _ => Duration::ZERO,
        };
        state.present = Present::Nothing;
        state.models[model].broken = Some((now + rest(took), why.clone()));
        let (its, others) = std::mem::take(&mut state.waiting).into_iter().partition(|job| job.model == model);
        state.waiting = others;
        let its: VecDeque<Job> = its;
        state.models[model].counters.failed += its.len() as u64;
        state.forget_turns();
        drop(state);
        its.iter().for_each(|job| job.ticket.out.tell(Event::Failed(why.clone())));
    }

    /// Gives a model up once its jobs have ended, if it is loaded.
    pub fn give_up(&self, model: usize) {
        let mut state = self.lock();
        if state.present.loaded() == Some(model) {
            state.present.stay(Some(Duration::ZERO), Instant::now());
            self.came.notify_all();
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
        let model = job.model;
        if let Some((until, why)) = &state.models[model].broken {
            let left = until.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                return Err(ApiError { retry_after_s: Some(left.as_secs() + 1), ..why.clone() });
            }
            state.models[model].broken = None;
        }
        if state.waiting.len() >= self.most {
            state.drop_cancelled();
        }
        if state.waiting.len() >= self.most {
            state.models[model].counters.refused += 1;
            return Err(ApiError::busy(state.waiting.len(), state.until_free_s()));
        }
        let client = job.ticket.client;
        let own = |state: &State| state.waiting.iter().filter(|j| j.ticket.client == client).count();
        if own(&state) >= share(self.most) {
            state.drop_cancelled();
        }
        let waiting = own(&state);
        if waiting >= share(self.most) {
            state.models[model].counters.refused += 1;
            return Err(ApiError::share(waiting, self.most, state.until_free_s()));
        }
        // Who comes anew has its turn behind those who wait.
        let turn = state.turn;
        state.turns.entry(client).or_insert(turn);
        state.waiting.push_back(job);
        self.came.notify_all();
        Ok(())
    }

    /// The next job of the loaded model whose client still waits; `None` once `stop` says so, the queue closes, the model
    /// is to be given up, or only jobs of others wait.
    pub fn next(&self, stop: &dyn Fn() -> bool) -> Option<Job> {
        loop {
            let mut state = self.open(stop)?;
            if let Some(job) = state.take() {
                return Some(job);
            }
            if !state.waiting.is_empty() || state.present.is_over(Instant::now()) {
                return None;
            }
            drop(self.came.wait_timeout(state, LOOK));
        }
    }

    /// The model that is to be loaded next, which it is from now on, as soon as somebody waits for one; `None` once `stop`
    /// says so or the queue closes.
    pub fn wanted(&self, stop: &dyn Fn() -> bool) -> Option<usize> {
        loop {
            let mut state = self.open(stop)?;
            if let Some(model) = state.first(|_| true).map(|at| state.waiting[at].model) {
                state.present = Present::Loading { model, since: Instant::now() };
                return Some(model);
            }
            drop(self.came.wait_timeout(state, LOOK));
        }
    }

    /// Whether somebody waits, but nobody for this model, which is being loaded.
    pub fn is_abandoned(&self, model: usize) -> bool {
        let state = self.lock();
        let mut waiting = state.waiting.iter().filter(|job| !job.ticket.is_cancelled()).peekable();
        waiting.peek().is_some() && waiting.all(|job| job.model != model)
    }

    /// The job of the loaded model whose turn it is, if it `fits`, which may not ask the queue for anything.
    pub fn take_if(&self, fits: &mut dyn FnMut(&Job) -> bool) -> Option<Job> {
        let mut state = self.lock();
        state.drop_cancelled();
        match state.next().and_then(|at| state.waiting.get(at)) {
            Some(job) if fits(job) => state.take(),
            _ => None,
        }
    }

    /// Whether no job waits that the loaded model begins before it gives way to another.
    pub fn is_empty(&self) -> bool {
        let mut state = self.lock();
        state.drop_cancelled();
        state.next().is_none()
    }

    /// Seconds for which a job that came then has waited for the model that is loaded now to be loaded.
    pub fn load_s(&self, came: Instant) -> f64 {
        match self.lock().present {
            Present::Loaded { since, took, .. } => since.saturating_duration_since(came).min(took).as_secs_f64(),
            _ => 0.0,
        }
    }

    /// Tells how far a job at hand has come.
    pub fn progress(&self, id: u64, evaluated: usize, generated: usize) {
        if let Some(running) = self.lock().running.iter_mut().find(|r| r.id == id) {
            (running.evaluated, running.generated) = (evaluated, generated);
        }
    }

    /// Counts a pass with tokens of so many texts.
    pub fn passed(&self, texts: usize) {
        let mut state = self.lock();
        let Some(model) = state.present.loaded() else { return };
        let c = &mut state.models[model].counters;
        c.passes += 1;
        c.texts_of_passes += texts as u64;
    }

    /// Tells what the links have carried.
    pub fn carried(&self, links: Links) {
        self.lock().links = links;
    }

    /// A job at hand begins with so many tokens of its prompt from the cache.
    pub fn cached(&self, id: u64, n: usize) {
        if let Some(running) = self.lock().running.iter_mut().find(|r| r.id == id) {
            (running.cached, running.evaluated) = (n, n);
        }
    }

    /// A job at hand has ended; `summary` says what was computed, whatever its end.
    pub fn ended(&self, id: u64, end: End, summary: &Summary) {
        let mut state = self.lock();
        let Some(at) = state.running.iter().position(|r| r.id == id) else { return };
        let keep = state.running.remove(at).keep.time(self.keep);
        state.present.stay(keep, Instant::now());
        if let Some(model) = state.present.loaded() {
            state.models[model].counters.add(end, summary);
        }
    }

    /// What there is to see.
    pub fn view(&self) -> View {
        let state = self.lock();
        let mut models = state.models.clone();
        for job in state.waiting.iter().filter(|job| !job.ticket.is_cancelled()) {
            models[job.model].waiting += 1;
        }
        let mut counters = Counters::default();
        models.iter().for_each(|known| counters.merge(&known.counters));
        View {
            phase: state.phase,
            waiting: models.iter().map(|known| known.waiting).sum(),
            slots: state.slots,
            running: state.running.clone(),
            counters,
            models,
            present: state.present,
            links: state.links,
            up_s: seconds(self.since),
        }
    }
}

/// Places that one client may have of a queue of `most`: all but a quarter.
fn share(most: usize) -> usize {
    most - most / 4
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
    /// Where the job is whose turn it is among those of some models: the first one of the client that was served longest
    /// ago.
    fn first(&self, of: impl Fn(usize) -> bool) -> Option<usize> {
        let turn = |job: &Job| self.turns.get(&job.ticket.client).copied().unwrap_or(0);
        let all = self.waiting.iter().enumerate().filter(|(_, job)| of(job.model));
        all.min_by_key(|(at, job)| (turn(job), *at)).map(|(at, _)| at)
    }

    /// Where the job is that the loaded model begins next, if it does not give way to another.
    fn next(&self) -> Option<usize> {
        let model = self.present.loaded()?;
        if self.gives_way() { None } else { self.first(|of| of == model) }
    }

    /// Whether the loaded model begins no more jobs, since others have waited for their turn.
    fn gives_way(&self) -> bool {
        let others = self.waiting.iter().filter(|job| Some(job.model) != self.present.loaded());
        self.present.gives_way(others.map(|job| job.ticket.since).min(), Instant::now())
    }

    /// Forgets the turns of clients that wait for nothing.
    fn forget_turns(&mut self) {
        let waiting: BTreeSet<Client> = self.waiting.iter().map(|job| job.ticket.client).collect();
        self.turns.retain(|client, _| waiting.contains(client));
    }

    /// Takes the job that is next, to a slot.
    fn take(&mut self) -> Option<Job> {
        let job = self.waiting.remove(self.next()?)?;
        self.turn += 1;
        self.turns.insert(job.ticket.client, self.turn);
        self.forget_turns();
        self.present.begin();
        let (most, keep) = (job.work.most(), job.keep);
        let slot = (0..).find(|slot| self.running.iter().all(|r| r.slot != *slot)).unwrap_or(0);
        let prompt = job.work.tokens();
        let (id, endless) = (job.ticket.id, job.work.is_endless());
        let running = Running { slot, id, prompt, evaluated: 0, cached: 0, generated: 0, most, endless, keep };
        self.running.push(running);
        Some(job)
    }

    fn drop_cancelled(&mut self) {
        let before = self.waiting.len();
        let models = &mut self.models;
        self.waiting.retain(|job| {
            let gone = job.ticket.is_cancelled();
            models[job.model].counters.cancelled += u64::from(gone);
            !gone
        });
        if self.waiting.len() < before {
            self.forget_turns();
        }
    }

    /// Seconds until a job that waits can begin, by the rates of those before; at least 1.
    fn until_free_s(&self) -> u64 {
        let load_s = |model: usize| self.models[model].load.map_or(0.0, |load| load.as_secs_f64());
        let next_s = || self.first(|_| true).map_or(0.0, |at| load_s(self.waiting[at].model));
        let seconds = match self.present {
            Present::Nothing => next_s(),
            Present::Loading { model, since } => load_s(model) - seconds(since),
            Present::Loaded { model, .. } => {
                let rest = self.running.iter().map(|r| r.rest_s(&self.models[model].counters));
                match self.next() {
                    Some(_) => rest.min_by(f64::total_cmp).unwrap_or(0.0),
                    // All of them end before another model is loaded.
                    None => rest.max_by(f64::total_cmp).unwrap_or(0.0) + next_s(),
                }
            }
        };
        (seconds.ceil() as u64).max(1)
    }
}

impl Running {
    /// Seconds that it takes still, by the rates of those before.
    fn rest_s(&self, c: &Counters) -> f64 {
        let prompt = self.prompt.saturating_sub(self.evaluated) as f64 * c.prompt_rate_s.unwrap_or(0.0);
        let usual = c.mean_generated.filter(|_| !self.endless).unwrap_or(self.most as f64);
        let expected = usual.max(self.generated as f64 + 1.0).min(self.most as f64);
        prompt + (expected - self.generated as f64).max(0.0) * c.decode_rate_s.unwrap_or(0.0)
    }
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            done: 0,
            cancelled: 0,
            failed: 0,
            refused: 0,
            prompt_tokens: 0,
            prompt_s: 0.0,
            cached_tokens: 0,
            generated: 0,
            passes: 0,
            texts_of_passes: 0,
            decode_s: 0.0,
            first_token: Histogram::FIRST_TOKEN,
            token: Histogram::TOKEN,
            prompt_rate_s: None,
            decode_rate_s: None,
            mean_generated: None,
        }
    }
}

impl Counters {
    /// Adds the sums of another model.
    fn merge(&mut self, other: &Counters) {
        self.done += other.done;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.refused += other.refused;
        self.prompt_tokens += other.prompt_tokens;
        self.prompt_s += other.prompt_s;
        self.cached_tokens += other.cached_tokens;
        self.generated += other.generated;
        self.passes += other.passes;
        self.texts_of_passes += other.texts_of_passes;
        self.decode_s += other.decode_s;
    }

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
        if s.generated > 0 {
            self.first_token.add(s.queued_s + s.prompt_s);
        }
        if s.passes > 0 {
            self.token.add(s.decode_s / s.passes as f64);
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
        job_of(id, 1)
    }

    fn job_of(id: u64, client: usize) -> (Job, Inbox<Event>) {
        job_for(id, client, 0)
    }

    fn job_for(id: u64, client: usize, model: usize) -> (Job, Inbox<Event>) {
        let (out, heard) = outbox(&std::sync::Arc::default());
        let task = Task {
            prompts: vec![vec![1; 10]],
            params: Default::default(),
            choices: 1,
            max_tokens: 100,
            stops: vec![],
            logprobs: None,
            reuse: true,
        };
        let ticket =
            Ticket { id, client: Client::Key(client), out, since: Instant::now(), limit: Duration::from_secs(60) };
        (Job { ticket, model, keep: Keep::Server, work: Work::Answer(task) }, heard)
    }

    #[test]
    fn a_full_queue_refuses_with_an_estimate_and_those_who_left_make_room() {
        let q = Queue::new(2, 1, None);
        let (a, b, c, d) = (job(1), job(2), job(3), job(4));
        assert_eq!(q.push(job(0).0).unwrap_err().status, 503);
        q.loaded(0, 1);
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
        // Of answers that nothing ends, all 100 come.
        q.state.lock().unwrap().running[0].endless = true;
        assert_eq!(q.push(job(5).0).unwrap_err().retry_after_s, Some(80));
        drop(c.1);
        let (last, _heard) = job(6);
        q.push(last).unwrap();
        assert_eq!(q.next(&|| false).unwrap().ticket.id, 4);
        assert_eq!((q.view().counters.refused, q.view().counters.cancelled), (2, 1));
    }

    /// Guards against a client that fills the queue, after which everybody else is refused or waits for all of it.
    #[test]
    fn clients_take_turns_and_none_has_all_of_the_queue() {
        let q = Queue::new(8, 1, None);
        q.loaded(0, 1);
        let mut heard = Vec::new();
        let mut push = |id, client| {
            let (job, inbox) = job_of(id, client);
            heard.push(inbox);
            q.push(job)
        };
        for id in 0..6 {
            push(id, 1).unwrap();
        }
        let e = push(6, 1).unwrap_err();
        assert!(e.status == 429 && e.message.contains("share of the queue of 8"), "{e:?}");
        push(10, 2).unwrap();
        push(20, 3).unwrap();
        assert_eq!(push(30, 4).unwrap_err().status, 429);
        let next = || q.next(&|| false).unwrap().ticket.id;
        assert_eq!([next(), next(), next(), next()], [0, 10, 20, 1]);
        // One that comes again does not go before those who wait.
        push(11, 2).unwrap();
        push(12, 2).unwrap();
        assert_eq!([next(), next(), next(), next()], [2, 11, 3, 12]);
        assert_eq!([next(), next()], [4, 5]);
        assert!(q.is_empty() && q.lock().turns.is_empty());
    }

    #[test]
    fn a_queue_that_closes_tells_those_who_wait() {
        let q = Queue::new(2, 1, None);
        q.loaded(0, 1);
        let (j, mut heard) = job(1);
        q.push(j).unwrap();
        q.close();
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(matches!(heard.poll(&mut cx), std::task::Poll::Ready(Some(Event::Failed(e))) if e.status == 503));
        assert!(q.next(&|| false).is_none() && *q.phase().borrow() == Phase::Closing);
        assert_eq!(q.push(job(2).0).unwrap_err().status, 503);
    }
}
