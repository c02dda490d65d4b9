//! Computes jobs with the session that it alone has: as many at once as there are slots, a token of each in every pass
//! ([`Generator`]). It meets the rest of the server in [`Queue`] and in the events of a [`Job`].
//!
//! Each answer of a job is a text of the generator in a sequence of its own, a lane. A job has one lane, in which its
//! answers follow each other, and more while slots and pages are idle. A job begins once the pages that its answer may
//! come to need are free; prompts that are kept give theirs up for it.

use super::disk::Shelf;
use super::embedding::Embedding;
use super::error::ApiError;
use super::job::{Event, Finish, Job, Summary, Task, Ticket, Work};
use super::prefix::Kept;
use super::queue::{End, Queue, seconds};
use super::text::Telling;
use crate::engine::{
    Ended, EngineError, Generation, Generator, JobId as TextId, Request, Sampler, Session, StopReason,
};
use crate::state::{PAGE, SeqId, StateError};
use crate::tokenizer::Tokenizer;

/// Computes what is queued, until the queue closes or `stop` says so, which is asked in the middle of passes too.
pub struct Worker<'a> {
    session: &'a mut Session,
    tokenizer: &'a Tokenizer,
    queue: &'a Queue,
    stop: &'a dyn Fn() -> bool,
    /// Texts at once.
    slots: usize,
    /// A sequence without tokens.
    root: SeqId,
    kept: Kept<SeqId>,
    generator: Generator<'a, Sampler>,
    active: Vec<Active>,
    lanes: Vec<Lane>,
    tellings: Vec<(TextId, Telling)>,
    /// Texts whose states are computed, in passes between the others.
    embeddings: Vec<Embedding>,
    /// Where prompts are kept while no server runs.
    shelf: Option<&'a Shelf>,
}

/// A job whose answers are computed.
struct Active {
    ticket: Ticket,
    task: Task,
    summary: Summary,
    /// The answer that begins next.
    next: usize,
    /// Why it ends before its end.
    fails: Option<(End, ApiError)>,
}

/// An answer that is computed.
struct Lane {
    text: TextId,
    job: u64,
    choice: usize,
    seq: SeqId,
    /// Whether its prompt is kept for others already.
    shared: bool,
}

/// A sequence that a job can begin in, and how many tokens of its prompt it has.
type Place = (SeqId, usize);

impl<'a> Worker<'a> {
    /// A worker with a session that has computed nothing.
    pub fn new(
        session: &'a mut Session,
        tokenizer: &'a Tokenizer,
        queue: &'a Queue,
        stop: &'a dyn Fn() -> bool,
        slots: usize,
        shelf: Option<&'a Shelf>,
    ) -> Worker<'a> {
        let root = session.sequence();
        let generator = Generator::new(session, tokenizer);
        Worker {
            session,
            tokenizer,
            queue,
            stop,
            slots,
            root,
            kept: Kept::new(),
            generator,
            active: Vec::new(),
            lanes: Vec::new(),
            tellings: Vec::new(),
            embeddings: Vec::new(),
            shelf,
        }
    }

    /// Takes over the prompts that are kept on disk.
    pub fn load(&mut self) {
        if let Some(shelf) = self.shelf {
            shelf.load(self.session, self.root, &mut self.kept, self.stop);
        }
    }

    /// Keeps prompts on disk for the next server, and what it saw of the model's choices of experts.
    pub fn save(&mut self) {
        // What is not kept is counted again.
        let _ = self.session.keep_reuse();
        if let Some(shelf) = self.shelf {
            shelf.save(self.session, self.root, &self.kept);
        }
    }

    /// Works until there is to be no more.
    pub fn work(&mut self) {
        loop {
            if !(self.stop)() {
                self.take();
            }
            if self.busy() > 0 {
                if !self.lanes.is_empty() {
                    self.step();
                }
                self.embed();
                self.queue.carried(self.session.links());
                continue;
            }
            let Some(job) = self.queue.next(self.stop) else { return };
            let place = self.place(&job.work).transpose();
            // Nobody else has pages.
            let full = StateError::Full { positions: job.work.tokens(), needed: 1, free: 0 };
            self.begin(job, place.unwrap_or_else(|| Err(full.into())));
        }
    }

    /// Slots in use.
    fn busy(&self) -> usize {
        self.lanes.len() + self.embeddings.len()
    }

    /// Begins jobs that wait and have room, and more answers of those at hand where slots are idle.
    fn take(&mut self) {
        while self.busy() < self.slots {
            let (queue, mut place) = (self.queue, None);
            let first = queue.take_if(&mut |job| {
                place = self.place(&job.work).transpose();
                place.is_some()
            });
            match (first, place) {
                (Some(job), Some(place)) => self.begin(job, place),
                _ => break,
            }
        }
        while self.busy() < self.slots && self.queue.is_empty() {
            match self.spread() {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => return self.fail_all(&e),
            }
        }
    }

    /// A new sequence with the first `n` tokens of another.
    fn fork(&mut self, from: SeqId, n: usize) -> Result<SeqId, EngineError> {
        self.session.switch(from)?;
        let fork = self.session.fork_at(n);
        self.session.switch(self.root)?;
        fork
    }

    /// Pages that an answer of a task may come to take in a sequence.
    fn pages(&self, task: &Task, seq: SeqId) -> Result<usize, EngineError> {
        let positions = task.prompt.len().saturating_add(task.max_tokens.saturating_sub(1));
        self.session.pages_needed(seq, positions.min(self.session.n_ctx()))
    }

    /// A sequence for a job that has as much of its prompt as is kept, if there is room for what is computed in it. The
    /// last token of a prompt is computed in any case, for what follows it. Kept prompts make room if that is enough, or
    /// if nobody else will.
    fn place(&mut self, work: &Work) -> Result<Option<Place>, EngineError> {
        loop {
            let found = match work {
                Work::Answer(task) if task.reuse => self.kept.longest(&task.prompt[..task.prompt.len() - 1]),
                _ => None,
            };
            let (from, cached) = found.unwrap_or((self.root, 0));
            let seq = self.fork(from, cached)?;
            let needed = match work {
                Work::Answer(task) => self.pages(task, seq)?,
                Work::Embed(texts) => self.session.pages_needed(seq, texts.longest())?,
            };
            let room = self.generator.room(self.session);
            if needed <= room {
                return Ok(Some((seq, cached)));
            }
            self.session.close(seq)?;
            let idle = self.session.free_without(&self.kept.all()) - self.session.free_pages();
            if room + idle < needed && self.busy() > 0 {
                return Ok(None);
            }
            let Some(gone) = self.kept.forget() else { return Ok(None) };
            self.session.close(gone)?;
        }
    }

    /// Begins a job in its place.
    fn begin(&mut self, job: Job, place: Result<Place, EngineError>) {
        let Job { ticket, work } = job;
        let summary = Summary { queued_s: seconds(ticket.since), prompt: work.tokens(), ..Summary::default() };
        let id = ticket.id;
        let task = match work {
            Work::Answer(task) => task,
            Work::Embed(texts) => {
                let mut embedding = Embedding::new(ticket, texts, summary);
                return match place.and_then(|(seq, _)| embedding.begin(self.session, seq)) {
                    Ok(()) => self.embeddings.push(embedding),
                    Err(e) => embedding.end(self.session, self.queue, Err(e)),
                };
            }
        };
        self.active.push(Active { ticket, task, summary, next: 0, fails: None });
        let begun = place.and_then(|(seq, cached)| {
            if let Some(active) = self.active.last_mut() {
                active.summary.cached = cached;
            }
            self.queue.cached(id, cached);
            self.lane(id, seq, cached).or_else(|e| self.session.close(seq).and(Err(e)))
        });
        if let Err(e) = begun {
            self.fail(id, &e);
            self.end_job(id, None);
        }
    }

    /// Begins the next answer of a job in a sequence that has the first tokens of its prompt.
    fn lane(&mut self, id: u64, seq: SeqId, cached: usize) -> Result<(), EngineError> {
        let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == id) else { return Ok(()) };
        let (task, choice) = (&active.task, active.next);
        let mut params = task.params.clone();
        params.seed = params.seed.wrapping_add(choice as u64);
        let sampler = Sampler::for_model(params, self.session.n_vocab(), self.tokenizer);
        let request = Request { text: &task.prompt, cached, n: task.max_tokens, stops: &task.stops, special: false };
        let text = self.generator.add_now(self.session, seq, sampler, request)?;
        self.tellings.push((text, Telling::new(task.logprobs)));
        active.next += 1;
        self.lanes.push(Lane { text, job: id, choice, seq, shared: choice > 0 });
        Ok(())
    }

    /// Begins another answer of a job that has more to come, next to the one that is computed. False: there is none, or
    /// no room.
    fn spread(&mut self) -> Result<bool, EngineError> {
        // A state is behind all tokens of its sequence, and the last one of the prompt is computed again.
        if self.session.recurrent() {
            return Ok(false);
        }
        let more = self.active.iter().filter(|a| a.fails.is_none() && a.next < a.task.choices);
        let from = more.filter_map(|a| {
            let n = a.task.prompt.len();
            let has_all = |lane: &&Lane| lane.job == a.ticket.id && self.session.length(lane.seq).is_ok_and(|l| l >= n);
            self.lanes.iter().find(has_all).map(|lane| (a, lane.seq))
        });
        let Some((active, from)) = from.into_iter().next() else { return Ok(false) };
        let (id, cached) = (active.ticket.id, active.task.prompt.len() - 1);
        let seq = self.fork(from, cached)?;
        let Some(active) = self.active.iter().find(|a| a.ticket.id == id) else { return Ok(false) };
        // The sequence that it is forked from may need a copy of its last page now.
        if self.pages(&active.task, seq)? + 1 > self.generator.room(self.session) {
            self.session.close(seq)?;
            return Ok(false);
        }
        self.lane(id, seq, cached).or_else(|e| self.session.close(seq).and(Err(e))).map(|()| true)
    }

    /// Runs a pass and tells what came of it.
    fn step(&mut self) {
        let mut ended = Vec::new();
        let Worker { generator, session, active, lanes, tellings, stop, .. } = self;
        let is_over = |text: TextId| {
            let job = lanes.iter().find(|lane| lane.text == text).map(|lane| lane.job);
            let active = active.iter().find(|a| Some(a.ticket.id) == job);
            stop() || active.is_some_and(|a| a.fails.is_some() || a.ticket.over().is_some())
        };
        let ran = generator.step(
            session,
            &is_over,
            &mut |text, grown| {
                if let Some((_, telling)) = tellings.iter_mut().find(|t| t.0 == text) {
                    telling.hear(grown);
                }
            },
            &mut ended,
        );
        match ran {
            Ok(true) => self.queue.passed(self.lanes.len()),
            Ok(false) if !ended.is_empty() => {}
            Ok(false) => self.fail_all(&StateError::Full { positions: 1, needed: 1, free: 0 }.into()),
            Err(e) => self.fail_all(&e),
        }
        self.tell();
        for e in ended {
            self.lane_ended(e);
        }
        self.share();
    }

    /// Runs a pass of each job that wants hidden states.
    fn embed(&mut self) {
        let mut i = 0;
        while i < self.embeddings.len() {
            match self.embeddings[i].step(self.session, self.stop, self.queue) {
                Ok(false) => i += 1,
                ended => self.embeddings.remove(i).end(self.session, self.queue, ended),
            }
        }
    }

    /// Tells what texts have grown by, and how far jobs are.
    fn tell(&mut self) {
        for lane in &self.lanes {
            let telling = self.tellings.iter_mut().find(|t| t.0 == lane.text);
            let active = self.active.iter().find(|a| a.ticket.id == lane.job);
            let (Some((_, telling)), Some(active)) = (telling, active) else { continue };
            if let Some(event) = telling.take(lane.choice) {
                active.ticket.out.tell(event);
            }
        }
        for active in &self.active {
            let mut evaluated = 0;
            let mut generated = active.summary.generated;
            for lane in self.lanes.iter().filter(|lane| lane.job == active.ticket.id) {
                evaluated = evaluated.max(self.session.length(lane.seq).unwrap_or(0).min(active.summary.prompt));
                generated += self.tellings.iter().find(|t| t.0 == lane.text).map_or(0, |t| t.1.tokens());
            }
            self.queue.progress(active.ticket.id, evaluated, generated);
        }
    }

    /// Keeps prompts that have just been computed, as far as their pages are full, for others that begin alike.
    fn share(&mut self) {
        if self.session.recurrent() {
            return;
        }
        for i in 0..self.lanes.len() {
            let Lane { seq, job, shared, .. } = self.lanes[i];
            let Some(active) = self.active.iter().find(|a| a.ticket.id == job) else { continue };
            let prompt = &active.task.prompt;
            if shared || !self.session.length(seq).is_ok_and(|n| n >= prompt.len()) {
                continue;
            }
            self.lanes[i].shared = true;
            // A page that this answer or the next goes on in would have to be copied.
            let n = (prompt.len() - 1) / PAGE * PAGE;
            let tokens = prompt[..n].to_vec();
            if n > 0
                && let Ok(fork) = self.fork(seq, n)
            {
                self.keep(fork, tokens);
            }
        }
    }

    /// Keeps a prompt in a sequence, and ends what is no longer kept.
    fn keep(&mut self, seq: SeqId, tokens: Vec<u32>) {
        for gone in self.kept.add(seq, tokens) {
            // It is there, and is not the root.
            let _ = self.session.close(gone);
        }
    }

    /// An answer has ended: tells so, and goes on with the job's next one in its place.
    fn lane_ended(&mut self, e: Ended<Sampler>) {
        let Some(at) = self.lanes.iter().position(|lane| lane.text == e.job) else { return };
        let lane = self.lanes.remove(at);
        let telling = self.tellings.iter().position(|t| t.0 == e.job).map(|at| self.tellings.remove(at).1);
        let finite = !matches!(e.result, Err(EngineError::NotFinite { .. }));
        match (e.result, telling) {
            (Ok(g), Some(telling)) => self.answer_ended(&lane, g, telling),
            (Ok(_), None) => {}
            (Err(e), _) => self.fail(lane.job, &e),
        }
        let alone = !self.lanes.iter().any(|other| other.job == lane.job);
        let Some(active) = self.active.iter().find(|a| a.ticket.id == lane.job) else { return };
        let more = active.fails.is_none() && active.next < active.task.choices;
        let begins = if self.session.recurrent() { 0 } else { active.task.prompt.len() - 1 };
        // Others that wait come before answers next to the one that every job has.
        if more && (alone || self.queue.is_empty()) {
            match self.again(&lane, begins, alone) {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => self.fail(lane.job, &e),
            }
        }
        let keeps = alone && finite && !self.session.recurrent();
        if alone {
            self.end_job(lane.job, Some(lane.seq).filter(|_| keeps));
        }
        if !keeps {
            // It is there, and is not the root.
            let _ = self.session.close(lane.seq);
        }
    }

    /// Begins the next answer of a job in the sequence of the one that has ended, if there is room, which there is where
    /// it is the job's only one.
    fn again(&mut self, lane: &Lane, begins: usize, alone: bool) -> Result<bool, EngineError> {
        self.session.keep(lane.seq, begins)?;
        loop {
            let Some(active) = self.active.iter().find(|a| a.ticket.id == lane.job) else { return Ok(false) };
            let (needed, room) = (self.pages(&active.task, lane.seq)?, self.generator.room(self.session));
            if needed <= room {
                break;
            }
            match alone.then(|| self.kept.forget()).flatten() {
                Some(gone) => self.session.close(gone)?,
                None if alone => return Err(StateError::Full { positions: begins, needed, free: room }.into()),
                None => return Ok(false),
            }
        }
        self.lane(lane.job, lane.seq, begins).map(|()| true)
    }

    /// Adds an answer's figures and tells its end.
    fn answer_ended(&mut self, lane: &Lane, g: Generation, mut telling: Telling) {
        let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == lane.job) else { return };
        let s = &mut active.summary;
        s.generated += g.tokens.len();
        s.passes += g.decode_passes;
        s.decode_s += g.decode_s;
        match lane.choice {
            0 => s.prompt_s += g.prefill_s,
            // The prompt's last token alone.
            _ => s.decode_s += g.prefill_s,
        }
        let finish = match g.stop {
            StopReason::Interrupt => {
                active.fails.get_or_insert_with(|| (End::Cancelled, active.ticket.why()));
                return;
            }
            StopReason::Eos => Finish::End,
            StopReason::Length => Finish::Length,
            StopReason::Stop => Finish::Stop(g.stop_text.unwrap_or_default()),
        };
        telling.end(&finish);
        if let Some(event) = telling.take(lane.choice) {
            active.ticket.out.tell(event);
        }
        active.ticket.out.tell(Event::Finished { choice: lane.choice, finish });
    }

    /// A job ends with a failure, once its lanes have.
    fn fail(&mut self, id: u64, e: &EngineError) {
        if let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == id) {
            tracing::warn!("request {id}: {e}");
            let error = match e {
                // What the request asks for cannot be had, and nothing else is wrong.
                EngineError::Constraint(e) => ApiError::request(e.to_string()),
                e => ApiError::failed(e.to_string()),
            };
            active.fails.get_or_insert((End::Failed, error));
        }
    }

    fn fail_all(&mut self, e: &EngineError) {
        let all: Vec<u64> = self.active.iter().map(|a| a.ticket.id).collect();
        all.into_iter().for_each(|id| self.fail(id, e));
    }

    /// A job has ended; what its last sequence has of the prompt is kept.
    fn end_job(&mut self, id: u64, seq: Option<SeqId>) {
        let Some(at) = self.active.iter().position(|a| a.ticket.id == id) else { return };
        let Active { ticket, task, summary, fails, .. } = self.active.remove(at);
        if let Some(seq) = seq {
            let prompt = &task.prompt;
            let n = self.session.length(seq).unwrap_or(0).min(prompt.len());
            match self.session.keep(seq, n) {
                Ok(()) => self.keep(seq, prompt[..n].to_vec()),
                Err(e) => tracing::warn!("request {id}: {e}"),
            }
        }
        let (end, event) = match fails {
            None => (End::Done, Event::Done(summary)),
            Some((end, e)) => (end, Event::Failed(e)),
        };
        self.queue.ended(id, end, &summary);
        ticket.out.tell(event);
    }
}
