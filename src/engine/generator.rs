//! Several texts that are continued at once: each pass carries tokens of all that have room in it ([`Scheduler`]).

use std::borrow::BorrowMut;
use std::time::Instant;

use smallvec::SmallVec;

use super::generate::{Grown, Text};
use super::schedule::{JobId, Limits, Scheduler, Share};
use super::session::Part;
use super::{EngineError, Generation, Request, RequestError, Sampler, Session, StopReason};
use crate::backend::{Class, EXACT_ROWS, all_finite};
use crate::model::{ForwardError, Outputs};
use crate::state::{SeqId, StateError};
use crate::tokenizer::Tokenizer;

/// Continues texts, each in a sequence of its own; `S` is whose samplers they are.
pub struct Generator<'t, S> {
    tokenizer: &'t Tokenizer,
    scheduler: Scheduler,
    jobs: Vec<Job<'t, S>>,
    next_id: u64,
    shares: Vec<Share>,
    /// Jobs of the pass's rows of logits, in order.
    rows: Vec<JobId>,
}

/// A text that is done with.
#[derive(Debug)]
pub struct Ended<S> {
    /// Which.
    pub job: JobId,
    /// What came of it.
    pub result: Result<Generation, EngineError>,
    /// Its sequence, which goes on to be: the caller closes it.
    pub seq: SeqId,
    /// Its sampler.
    pub sampler: S,
}

/// Continues the text of the session's sequence; `show` gets what follows as it becomes certain.
///
/// # Errors
/// Why a pass failed.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    sampler: &mut Sampler,
    request: Request,
    interrupted: &dyn Fn() -> bool,
    show: &mut dyn FnMut(&str),
) -> Result<Generation, EngineError> {
    let mut generator = Generator::new(session, tokenizer);
    generator.add(session, session.sequence(), sampler, request)?;
    let mut ended = Vec::new();
    while ended.is_empty() {
        let mut tell = |_, grown: Grown<'_>| match grown {
            Grown::Piece(piece) if !piece.control || request.special => show(piece.text),
            _ => {}
        };
        if !generator.step(session, &|_| interrupted(), &mut tell, &mut ended)? && ended.is_empty() {
            let (needed, free) = (session.free_pages() + generator.lacks(session), session.free_pages());
            return Err(
                StateError::Full { positions: request.text.len().saturating_add(request.n), needed, free }.into()
            );
        }
    }
    ended.swap_remove(0).result
}

struct Job<'t, S> {
    id: JobId,
    seq: SeqId,
    sampler: S,
    text: Text<'t>,
    /// What is left to evaluate of the prompt, and how far it is.
    prompt: Vec<u32>,
    done: usize,
    /// Positions that it may come to take.
    positions: usize,
    /// Tokens to generate at most.
    n: usize,
    /// The token that was drawn last.
    token: u32,
    g: Generation,
    /// When its first pass began, and when its first token was drawn from.
    began: Option<Instant>,
    decode_began: Option<Instant>,
    /// Why it ended.
    over: Option<Result<(), EngineError>>,
}

impl<S: BorrowMut<Sampler>> Job<'_, S> {
    /// Draws the next token from a row of logits.
    fn draw(
        &mut self,
        tokenizer: &Tokenizer,
        logits: &[f32],
        has_room: bool,
        interrupted: bool,
        tell: &mut dyn FnMut(Grown<'_>),
    ) {
        let (began, g) = (self.began.unwrap_or_else(Instant::now), &mut self.g);
        if self.decode_began.is_none() {
            g.prefill_s = began.elapsed().as_secs_f64();
            self.decode_began = Some(Instant::now());
        } else {
            g.decode_passes += 1;
        }
        if g.tokens.len() == self.n {
            return self.end(StopReason::Length);
        }
        let sampler = self.sampler.borrow_mut();
        let token = match sampler.sample(logits) {
            Ok(token) => token,
            Err(e) => {
                self.over = Some(Err(e.into()));
                return;
            }
        };
        sampler.accept(token);
        self.token = token;
        g.first_token_s.get_or_insert_with(|| began.elapsed().as_secs_f64());
        if tokenizer.is_eog(token) {
            self.text.end(token, &mut |piece| tell(Grown::Piece(piece)));
            return self.end(StopReason::Eos);
        }
        if sampler.is_end(token) {
            return self.end(StopReason::Eos);
        }
        g.tokens.push(token);
        tell(Grown::Token { id: token, logits, at: self.text.added });
        if self.text.push(token, &mut |piece| tell(Grown::Piece(piece))) {
            self.g.stop_text = self.text.stop_text();
            self.end(StopReason::Stop);
        } else if interrupted {
            self.end(StopReason::Interrupt);
        } else if self.g.tokens.len() == self.n {
            self.end(StopReason::Length);
        } else if !has_room {
            self.g.context_full = true;
            self.end(StopReason::Length);
        }
    }

    fn end(&mut self, stop: StopReason) {
        self.g.stop = stop;
        self.over = Some(Ok(()));
    }
}

impl<'t, S: BorrowMut<Sampler>> Generator<'t, S> {
    /// For passes of this session.
    pub fn new(session: &Session, tokenizer: &'t Tokenizer) -> Generator<'t, S> {
        let rows = session.max_batch();
        let parts = session.parts_max().min(session.max_outputs());
        let limits = Limits { rows, shared: session.batch().shared, exact: rows.min(EXACT_ROWS), parts };
        Generator {
            tokenizer,
            scheduler: Scheduler::new(limits),
            jobs: Vec::new(),
            next_id: 0,
            shares: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Adds a text. Its sequence holds the first `cached` tokens of it already, and is no other text's.
    ///
    /// # Errors
    /// If nothing is left to evaluate, a token is not in the vocabulary, the sequence has ended or is another text's, or
    /// the text does not fit the context.
    pub fn add(
        &mut self,
        session: &Session,
        seq: SeqId,
        sampler: S,
        request: Request<'_>,
    ) -> Result<JobId, EngineError> {
        self.add_text(session, seq, sampler, request, false)
    }

    /// Adds a text that takes part from the next pass on, whoever waits for room: the caller has seen that its pages are
    /// there ([`Generator::room`]), as those of a text that ended just now are.
    ///
    /// # Errors
    /// As [`Generator::add`].
    pub fn add_now(
        &mut self,
        session: &Session,
        seq: SeqId,
        sampler: S,
        request: Request<'_>,
    ) -> Result<JobId, EngineError> {
        self.add_text(session, seq, sampler, request, true)
    }

    fn add_text(
        &mut self,
        session: &Session,
        seq: SeqId,
        mut sampler: S,
        request: Request<'_>,
        now: bool,
    ) -> Result<JobId, EngineError> {
        let prompt = request.text.get(request.cached..).unwrap_or_default().to_vec();
        let (position, n_ctx) = (session.length(seq)?, session.n_ctx());
        if prompt.is_empty() {
            return Err(RequestError::NothingLeft.into());
        }
        let n_vocab = session.n_vocab();
        if let Some(&token) = prompt.iter().find(|t| **t as usize >= n_vocab) {
            return Err(RequestError::NoSuchToken { token, n_vocab }.into());
        }
        if self.jobs.iter().any(|j| j.seq == seq) {
            return Err(RequestError::Parts.into());
        }
        if prompt.len() > n_ctx.saturating_sub(position) {
            return Err(RequestError::ContextFull { tokens: prompt.len(), position, n_ctx }.into());
        }
        // The penalties see the text as it is now, also where an earlier one was cut.
        sampler.borrow_mut().begin(request.text);
        let id = JobId(self.next_id);
        self.next_id += 1;
        let mut text = Text::new(self.tokenizer, &request);
        text.begin_without_stops(sampler.borrow().min_tokens());
        // The token that is drawn last is not evaluated.
        let positions = (position + prompt.len()).saturating_add(request.n.saturating_sub(1)).min(n_ctx);
        let pages = session.pages_needed(seq, positions)?;
        match now {
            true => self.scheduler.add_now(id, prompt.len(), pages),
            false => self.scheduler.add(id, prompt.len(), pages),
        }
        self.jobs.push(Job {
            id,
            seq,
            sampler,
            text,
            g: Generation::new(prompt.len(), request.n.min(n_ctx)),
            prompt,
            done: 0,
            positions,
            n: request.n,
            token: 0,
            began: None,
            decode_began: None,
            over: None,
        });
        Ok(id)
    }

    /// Ends a text as it is; it is told of with the next step.
    pub fn cancel(&mut self, job: JobId) {
        if let Some(job) = self.jobs.iter_mut().find(|j| j.id == job) {
            job.end(StopReason::Interrupt);
        }
    }

    /// Texts that take part in passes, and those that wait for room in the cache.
    pub fn counts(&self) -> (usize, usize) {
        (self.scheduler.running(), self.scheduler.waiting())
    }

    /// Pages that the text which waits for room first lacks, where others' sequences could give some back.
    pub fn lacks(&mut self, session: &Session) -> usize {
        self.count_pages(session);
        self.scheduler.lacks(session.free_pages()).map_or(0, |l| l.1)
    }

    /// Pages that are free and promised to no text that takes part in passes.
    pub fn room(&mut self, session: &Session) -> usize {
        self.count_pages(session);
        self.scheduler.room(session.free_pages())
    }

    /// Counts anew what each text may take, since others share pages with it and give them back.
    fn count_pages(&mut self, session: &Session) {
        for job in &mut self.jobs {
            match session.pages_needed(job.seq, job.positions) {
                Ok(pages) => self.scheduler.needs(job.id, pages),
                Err(e) => job.over = Some(Err(e)),
            }
        }
    }

    /// Runs a pass. `tell` hears of texts as they grow; those that ended are appended to `ended`. False: nobody can
    /// run, since no text is there or the first that waits lacks pages. A text of which `interrupted` says so ends; it is
    /// asked within passes too, which are given up once nobody is left for whom they are computed.
    ///
    /// # Errors
    /// Why the pass failed; the texts are as they were before it, or have ended where it was computed and gave no logits.
    pub fn step(
        &mut self,
        session: &mut Session,
        interrupted: &dyn Fn(JobId) -> bool,
        tell: &mut dyn FnMut(JobId, Grown<'_>),
        ended: &mut Vec<Ended<S>>,
    ) -> Result<bool, EngineError> {
        self.count_pages(session);
        self.jobs
            .iter_mut()
            .filter(|j| j.over.is_none() && interrupted(j.id))
            .for_each(|j| j.end(StopReason::Interrupt));
        self.finish(tell, ended);
        let mut shares = std::mem::take(&mut self.shares);
        self.scheduler.next(session.free_pages(), &mut shares);
        let ran = match shares.is_empty() {
            true => Ok(false),
            false => self.pass(session, &shares, interrupted, tell).map(|()| true),
        };
        self.shares = shares;
        self.finish(tell, ended);
        ran
    }

    fn pass(
        &mut self,
        session: &mut Session,
        shares: &[Share],
        interrupted: &dyn Fn(JobId) -> bool,
        tell: &mut dyn FnMut(JobId, Grown<'_>),
    ) -> Result<(), EngineError> {
        self.rows.clear();
        let mut parts: SmallVec<[Part<'_>; 2 * EXACT_ROWS]> = SmallVec::new();
        for share in shares {
            let Some(job) = self.jobs.iter().find(|j| j.id == share.job) else { continue };
            let (tokens, outputs) = match share.class {
                Class::Exact => (std::slice::from_ref(&job.token), Outputs::Last),
                Class::Bulk => {
                    let end = job.done + share.rows;
                    let whole = end == job.prompt.len();
                    (&job.prompt[job.done..end], if whole { Outputs::Last } else { Outputs::None })
                }
            };
            if outputs == Outputs::Last {
                self.rows.push(job.id);
            }
            parts.push(Part { seq: job.seq, class: share.class, tokens, outputs });
        }
        let began = Instant::now();
        let for_nobody = || shares.iter().all(|s| interrupted(s.job));
        let evaluated = session.eval_parts(&parts, &for_nobody);
        drop(parts);
        match evaluated {
            Err(EngineError::Forward(ForwardError::Interrupted)) => {
                self.scheduler.undo(shares);
                let of_pass = |j: &&mut Job<'t, S>| shares.iter().any(|s| s.job == j.id);
                self.jobs.iter_mut().filter(of_pass).for_each(|j| j.end(StopReason::Interrupt));
                return Ok(());
            }
            Err(e) => {
                self.scheduler.undo(shares);
                return Err(e);
            }
            Ok(()) => {}
        }
        for share in shares {
            let Some(job) = self.jobs.iter_mut().find(|j| j.id == share.job) else { continue };
            job.began.get_or_insert(began);
            job.done += if share.class == Class::Bulk { share.rows } else { 0 };
            // Whose it is cannot be told, and a text that went on with it would be wrong in silence.
            if let Some(e) = session.overflow() {
                job.over = Some(Err(e));
            }
        }
        if session.overflow().is_some() {
            session.forget_overflow();
            return Ok(());
        }
        let drawn = self.draw(session, interrupted, tell);
        if drawn.is_err() {
            // Their tokens are evaluated, and nothing says what follows.
            let of_pass = |j: &&mut Job<'t, S>| j.over.is_none() && shares.iter().any(|s| s.job == j.id);
            self.jobs.iter_mut().filter(of_pass).for_each(|j| j.end(StopReason::Interrupt));
        }
        drawn
    }

    /// Draws a token for each row of logits.
    fn draw(
        &mut self,
        session: &mut Session,
        interrupted: &dyn Fn(JobId) -> bool,
        tell: &mut dyn FnMut(JobId, Grown<'_>),
    ) -> Result<(), EngineError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let n_vocab = session.n_vocab();
        let mut wrong: SmallVec<[JobId; EXACT_ROWS]> = SmallVec::new();
        for (i, id) in self.rows.iter().enumerate() {
            let Some(job) = self.jobs.iter_mut().find(|j| j.id == *id) else { continue };
            let has_room = session.length(job.seq)? < session.n_ctx();
            let logits = &session.any_logits()?[i * n_vocab..(i + 1) * n_vocab];
            if !all_finite(logits) {
                wrong.push(*id);
            } else {
                job.draw(self.tokenizer, logits, has_room, interrupted(*id), &mut |grown| tell(*id, grown));
            }
        }
        // The others go on: what is wrong is of these texts.
        let mut told = None;
        for id in wrong {
            // The pass is repeated once for all of them, unless that fails.
            let why = match told.clone() {
                Some((what, cure)) => EngineError::NotFinite { what, cure },
                None => session.where_not_finite(),
            };
            if let EngineError::NotFinite { what, cure } = &why {
                told = Some((what.clone(), cure.clone()));
            }
            if let Some(job) = self.jobs.iter_mut().find(|j| j.id == id) {
                job.over = Some(Err(why));
            }
        }
        Ok(())
    }

    /// Hands over the texts that have ended.
    fn finish(&mut self, tell: &mut dyn FnMut(JobId, Grown<'_>), ended: &mut Vec<Ended<S>>) {
        while let Some(at) = self.jobs.iter().position(|j| j.over.is_some()) {
            let mut job = self.jobs.remove(at);
            self.scheduler.remove(job.id);
            job.g.decode_s = job.decode_began.map_or(0.0, |began| began.elapsed().as_secs_f64());
            if job.g.stop != StopReason::Stop {
                job.text.finish(&mut |piece| tell(job.id, Grown::Piece(piece)));
            }
            (job.g.text, job.g.plain) = (job.text.shown, job.text.plain);
            let result = job.over.unwrap_or(Ok(())).map(|()| job.g);
            ended.push(Ended { job: job.id, result, seq: job.seq, sampler: job.sampler });
        }
    }
}
