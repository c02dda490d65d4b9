//! Computes jobs with the session that it alone has: as many at once as there are slots, a token of each in every pass
//! ([`Generator`]). It meets the rest of the server in [`Queue`] and in the events of a [`Job`].
//!
//! Each answer of a job is a text of the generator in a sequence of its own, a lane. A job has one lane, in which its
//! answers to a prompt follow each other, and more while slots and pages are idle. A job begins once the pages that its
//! answer may come to need are free, and so does each next prompt of one; prompts that are kept give theirs up for it.

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

/// Computes what is queued for a model, until the queue closes, another is asked for, or `stop` says so, which is asked in
/// the middle of passes too.
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
    /// Where prompts are kept while the model is not loaded.
    shelf: Option<&'a Shelf>,
    /// Why nothing can be computed any more.
    lost: Option<EngineError>,
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
    /// Between two prompts: whether one that waits has begun, or could have.
    gave_way: bool,
}

/// An answer that is computed.
struct Lane {
    text: TextId,
    job: u64,
    /// Its number among those of the job.
    answer: usize,
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
            lost: None,
        }
    }

    /// Takes over the prompts that are kept on disk.
    pub fn load(&mut self) {
        if let Some(shelf) = self.shelf {
            shelf.load(self.session, self.root, &mut self.kept, self.stop);
        }
    }

    /// Keeps prompts on disk for when the model is loaded next, and what it saw of the model's choices of experts.
    pub fn save(&mut self) {
        // What is not kept is counted again.
        let _ = self.session.keep_reuse();
        if let Some(shelf) = self.shelf {
            shelf.save(self.session, self.root, &self.kept);
        }
    }

    /// Works until there is to be no more.
    ///
    /// # Errors
    /// Why nothing can be computed any more, by this session or another; the queue is closed then.
    pub fn work(&mut self) -> Result<(), EngineError> {
        loop {
            if self.lost.is_some() {
                self.queue.close();
            }
            self.end_those_between();
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
            if !self.active.is_empty() {
                continue;
            }
            let Some(job) = self.queue.next(self.stop) else { return self.lost.take().map_or(Ok(()), Err) };
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

    /// The first job at hand that has no lane: it is between two prompts.
    fn between(&self) -> Option<&Active> {
        self.active.iter().find(|a| self.lanes.iter().all(|lane| lane.job != a.ticket.id))
    }

    /// Ends the jobs between two prompts that are not to go on.
    fn end_those_between(&mut self) {
        while let Some(active) = self.between()
            && ((self.stop)() || active.fails.is_some() || active.ticket.over().is_some())
        {
            let (id, why) = (active.ticket.id, active.ticket.why());
            if let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == id) {
                active.fails.get_or_insert((End::Cancelled, why));
            }
            self.end_job(id);
        }
    }

    /// Begins jobs that wait and have room, and more answers of those at hand where slots are idle. One at hand that is
    /// between two prompts lets one that waits begin first, so that many prompts keep nobody waiting for all of them.
    fn take(&mut self) {
        while self.busy() < self.slots
            && let Some(id) = self.between().map(|active| active.ticket.id)
        {
            let active = self.active.iter_mut().find(|a| a.ticket.id == id);
            let gave_way = active.is_none_or(|active| std::mem::replace(&mut active.gave_way, true));
            if !gave_way && self.take_next() {
                continue;
            }
            match self.answer_in_place(id) {
                Ok(true) => {}
                // Whoever begins instead would take its room, too.
                Ok(false) if self.busy() > 0 => return,
                Ok(false) => {
                    self.fail(id, &StateError::Full { positions: 1, needed: 1, free: 0 }.into());
                    self.end_job(id);
                }
                Err(e) => {
                    self.fail(id, &e);
                    self.end_job(id);
                }
            }
        }
        while self.busy() < self.slots && self.take_next() {}
        while self.busy() < self.slots && self.queue.is_empty() {
            match self.spread() {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => return self.fail_all(&e),
            }
        }
    }

    /// Begins the job that is next, if it has room.
    fn take_next(&mut self) -> bool {
        let (queue, mut place) = (self.queue, None);
        let first = queue.take_if(&mut |job| {
            place = self.place(&job.work).transpose();
            place.is_some()
        });
        let (Some(job), Some(place)) = (first, place) else { return false };
        self.begin(job, place);
        true
    }

    /// A new sequence with the first `n` tokens of another.
    fn fork(&mut self, from: SeqId, n: usize) -> Result<SeqId, EngineError> {
        self.session.switch(from)?;
        let fork = self.session.fork_at(n);
        self.session.switch(self.root)?;
        fork
    }

    /// Pages that an answer of a task may come to take in a sequence.
    fn pages(&self, task: &Task, answer: usize, seq: SeqId) -> Result<usize, EngineError> {
        self.session.pages_needed(seq, task.positions(answer).min(self.session.n_ctx()))
    }

    /// A sequence for a job, if there is room for what is computed in it.
    fn place(&mut self, work: &Work) -> Result<Option<Place>, EngineError> {
        match work {
            Work::Answer(task) => self.place_of(task, 0),
            Work::Embed(texts) => self.place_for(&[], texts.longest()),
        }
    }

    /// The same for an answer of a task.
    fn place_of(&mut self, task: &Task, answer: usize) -> Result<Option<Place>, EngineError> {
        let text = task.text_of(answer);
        // The last token of a prompt is computed in any case, for what follows it.
        let reused = if task.reuse { &text[..text.len().saturating_sub(1)] } else { &[] };
        self.place_for(reused, task.positions(answer).min(self.session.n_ctx()))
    }

    /// A sequence that has as much of a prompt as is kept, if there is room for so many positions in it. Kept prompts make
    /// room if that is enough, or if nobody else will.
    fn place_for(&mut self, prompt: &[u32], positions: usize) -> Result<Option<Place>, EngineError> {
        loop {
            let (from, cached) = self.kept.longest(prompt).unwrap_or((self.root, 0));
            let seq = self.fork(from, cached)?;
            let needed = self.session.pages_needed(seq, positions)?;
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
        let Job { ticket, work, .. } = job;
        let (queued_s, load_s) = (seconds(ticket.since), self.queue.load_s(ticket.since));
        let summary = Summary { queued_s, load_s, prompt: work.tokens(), ..Summary::default() };
        let id = ticket.id;
        let task = match work {
            Work::Answer(task) => task,
            // Of a model that is loaded for it, nobody knew before.
            Work::Embed(_) if !self.session.gives_hidden() => {
                let _ = place.and_then(|(seq, _)| self.session.close(seq));
                self.queue.ended(id, End::Failed, &summary);
                return ticket.out.tell(Event::Failed(ApiError::no_hidden_states()));
            }
            Work::Embed(texts) => {
                let mut embedding = Embedding::new(ticket, texts, summary);
                return match place.and_then(|(seq, _)| embedding.begin(self.session, seq)) {
                    Ok(()) => self.embeddings.push(embedding),
                    Err(e) => {
                        embedding.end(self.session, self.queue, Err(e));
                        self.look_for_loss();
                    }
                };
            }
        };
        self.active.push(Active { ticket, task, summary, next: 0, fails: None, gave_way: false });
        if let Err(e) = place.and_then(|place| self.first_lane(id, place)) {
            self.fail(id, &e);
            self.end_job(id);
        }
    }

    /// Begins the next answer of a job, which is the first to its prompt, in its place.
    fn first_lane(&mut self, id: u64, (seq, cached): Place) -> Result<(), EngineError> {
        if let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == id) {
            active.summary.cached += cached;
            active.gave_way = false;
            self.queue.cached(id, active.summary.cached);
        }
        self.lane(id, seq, cached).or_else(|e| self.session.close(seq).and(Err(e)))
    }

    /// The same, if there is room for it.
    fn answer_in_place(&mut self, id: u64) -> Result<bool, EngineError> {
        let Some(at) = self.active.iter().position(|a| a.ticket.id == id) else { return Ok(false) };
        // It goes back at once: its task is read while prompts make room.
        let active = self.active.remove(at);
        let place = self.place_of(&active.task, active.next);
        self.active.insert(at, active);
        match place? {
            Some(place) => self.first_lane(id, place).map(|()| true),
            None => Ok(false),
        }
    }

    /// Begins the next answer of a job in a sequence that has the first tokens of its prompt.
    fn lane(&mut self, id: u64, seq: SeqId, cached: usize) -> Result<(), EngineError> {
        let Some(active) = self.active.iter_mut().find(|a| a.ticket.id == id) else { return Ok(()) };
        let (task, answer) = (&active.task, active.next);
        let choice = task.choice_of(answer);
        let mut params = task.params.clone();
        params.seed = params.seed.wrapping_add(choice as u64);
        let sampler = Sampler::for_model(params, self.session.n_vocab(), self.tokenizer);
        let text = task.text_of(answer);
        let n = task.max_tokens.min((self.session.n_ctx() + 1).saturating_sub(text.len()));
        let request = Request { text, cached, n, stops: &task.stops, special: false };
        let text = self.generator.add_now(self.session, seq, sampler, request)?;
        self.tellings.push((text, Telling::new(task.logprobs)));
        active.next += 1;
        self.lanes.push(Lane { text, job: id, answer, seq, shared: choice > 0 });
        Ok(())
    }

    /// Begins another answer of a job that has more to come, next to the one that is computed. False: there is none, or
    /// no room.
    fn spread(&mut self) -> Result<bool, EngineError> {
        let has_more = |a: &&Active| a.fails.is_none() && a.next < a.task.answers();
        // The first answer to another prompt.
        let other = self.active.iter().filter(has_more).find(|a| a.task.choice_of(a.next) == 0).map(|a| a.ticket.id);
        if let Some(id) = other
            && self.answer_in_place(id)?
        {
            return Ok(true);
        }
        // A state is behind all tokens of its sequence, and the last one of the prompt is computed again.
        if self.session.recurrent() {
            return Ok(false);
        }
        let mut from = self.active.iter().filter(has_more).filter_map(|a| {
            let (n, prompt) = (a.task.text_of(a.next).len(), a.task.prompt_of(a.next));
            let is_of_it = |lane: &&Lane| lane.job == a.ticket.id && a.task.prompt_of(lane.answer) == prompt;
            let has_all = |lane: &&Lane| is_of_it(lane) && self.session.length(lane.seq).is_ok_and(|l| l >= n);
            self.lanes.iter().find(has_all).map(|lane| (a, lane.seq))
        });
        let Some((active, from)) = from.next() else { return Ok(false) };
        let (id, cached) = (active.ticket.id, active.task.text_of(active.next).len() - 1);
        let seq = self.fork(from, cached)?;
        let Some(active) = self.active.iter().find(|a| a.ticket.id == id) else { return Ok(false) };
        // The sequence that it is forked from may need a copy of its last page now.
        if self.pages(&active.task, active.next, seq)? + 1 > self.generator.room(self.session) {
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
                ended => {
                    let failed = ended.is_err();
                    self.embeddings.remove(i).end(self.session, self.queue, ended);
                    if failed {
                        self.look_for_loss();
                    }
                }
            }
        }
    }

    /// Tells what texts have grown by, and how far jobs are.
    fn tell(&mut self) {
        for lane in &self.lanes {
            let telling = self.tellings.iter_mut().find(|t| t.0 == lane.text);
            let active = self.active.iter().find(|a| a.ticket.id == lane.job);
            let (Some((_, telling)), Some(active)) = (telling, active) else { continue };
            if let Some(event) = telling.take(lane.answer) {
                active.ticket.out.tell(event);
            }
        }
        for active in &self.active {
            let task = &active.task;
            // Prompts that have begun, those at hand apart.
            let begun = task.prompts.iter().take(active.next.div_ceil(task.choices.max(1)));
            let mut evaluated: Vec<usize> = begun.map(Vec::len).collect();
            let mut generated = active.summary.generated;
            for lane in self.lanes.iter().filter(|lane| lane.job == active.ticket.id) {
                if let Some(evaluated) = evaluated.get_mut(task.prompt_of(lane.answer)) {
                    *evaluated = (*evaluated).min(self.session.length(lane.seq).unwrap_or(0));
                }
                generated += self.tellings.iter().find(|t| t.0 == lane.text).map_or(0, |t| t.1.tokens());
            }
            self.queue.progress(active.ticket.id, evaluated.iter().sum(), generated);
        }
    }

    /// Keeps prompts that have just been computed, as far as their pages are full, for others that begin alike.
    fn share(&mut self) {
        if self.session.recurrent() {
            return;
        }
        for i in 0..self.lanes.len() {
            let Lane { seq, job, shared, answer, .. } = self.lanes[i];
            let Some(active) = self.active.iter().find(|a| a.ticket.id == job) else { continue };
            let prompt = active.task.text_of(answer);
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
        let task = &active.task;
        let prompt = task.prompt_of(lane.answer);
        let begins = if self.session.recurrent() { 0 } else { task.text_of(lane.answer).len() - 1 };
        let more = active.fails.is_none() && active.next < task.answers();
        let is_last_of_prompt =
            !self.lanes.iter().any(|other| other.job == lane.job && task.prompt_of(other.answer) == prompt);
        // Others whose turn it is come before answers next to the one that every job has.
        if more && task.prompt_of(active.next) == prompt && (alone || self.queue.is_empty()) {
            match self.again(&lane, begins, alone) {
                Ok(true) => return,
                Ok(false) => {}
                Err(e) => self.fail(lane.job, &e),
            }
        }
        if is_last_of_prompt && finite && !self.session.recurrent() {
            self.keep_prompt(&lane);
        } else {
            // It is there, and is not the root.
            let _ = self.session.close(lane.seq);
        }
        // One with another prompt goes on with the next pages that are free.
        let goes_on =
            self.active.iter().any(|a| a.ticket.id == lane.job && a.fails.is_none() && a.next < a.task.answers());
        if alone && !goes_on {
            self.end_job(lane.job);
        }
    }

    /// Keeps what a sequence that is done with has of its prompt.
    fn keep_prompt(&mut self, lane: &Lane) {
        let Some(active) = self.active.iter().find(|a| a.ticket.id == lane.job) else { return };
        let prompt = active.task.text_of(lane.answer);
        let n = self.session.length(lane.seq).unwrap_or(0).min(prompt.len());
        let tokens = prompt[..n].to_vec();
        match self.session.keep(lane.seq, n) {
            Ok(()) => self.keep(lane.seq, tokens),
            Err(e) => tracing::warn!("request {}: {e}", lane.job),
        }
    }

    /// Begins the next answer of a job in the sequence of the one that has ended, if there is room, which there is where
    /// it is the job's only one.
    fn again(&mut self, lane: &Lane, begins: usize, alone: bool) -> Result<bool, EngineError> {
        self.session.keep(lane.seq, begins)?;
        loop {
            let Some(active) = self.active.iter().find(|a| a.ticket.id == lane.job) else { return Ok(false) };
            let (needed, room) = (self.pages(&active.task, active.next, lane.seq)?, self.generator.room(self.session));
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
        match active.task.choice_of(lane.answer) {
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
        if let Some(event) = telling.take(lane.answer) {
            active.ticket.out.tell(event);
        }
        active.ticket.out.tell(Event::Finished { choice: lane.answer, finish });
    }

    /// Something has failed: looks whether all will.
    fn look_for_loss(&mut self) {
        self.lost = self.lost.take().or_else(|| self.session.lost());
    }

    /// A job ends with a failure, once its lanes have.
    fn fail(&mut self, id: u64, e: &EngineError) {
        self.look_for_loss();
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

    /// A job has ended.
    fn end_job(&mut self, id: u64) {
        let Some(at) = self.active.iter().position(|a| a.ticket.id == id) else { return };
        let Active { ticket, summary, fails, .. } = self.active.remove(at);
        let (end, event) = match fails {
            None => (End::Done, Event::Done(summary)),
            Some((end, e)) => (end, Event::Failed(e)),
        };
        self.queue.ended(id, end, &summary);
        ticket.out.tell(event);
    }
}
