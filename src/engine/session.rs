//! A model that is ready to compute: plan carried out, resident units loaded, ring turning.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::weights::Weights;
use super::{BatchSizes, EngineError, ExpertUses, Links, Options, Recipe, RequestError, reuse};
use smallvec::SmallVec;

use crate::backend::quantise::quantise;
use crate::backend::{
    Backend, BackendKind, Class, DeviceAlloc, DeviceMemory, EXACT_ROWS, Pinned, Run, all_finite, reference,
};
use crate::flow::CacheStats;
use crate::gguf::TensorType;
use crate::memory::{Arena, Region, bounded};
use crate::model::{
    Batch, ForcedRouting, ForwardError, Model, ModelError, NotFinite, Outputs, Scratch, Tape, Turn, first_not_finite,
    forward,
};
use crate::pipeline::{Event, EventKind, StreamError};
use crate::plan::{Cache, Home, Plan};
use crate::state::{Pages, SeqId, StateOp};
use crate::storage::{FileId, StorageError, Watched};

/// Tokens of one sequence in a pass, behind those that it has.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// What they are: of a prompt, or generated.
    pub class: Class,
    /// The tokens.
    pub tokens: &'a [u32],
    /// Which of them logits are wanted of.
    pub outputs: Outputs,
}

/// A part of the last pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evaluated {
    seq: SeqId,
    class: Class,
    first_pos: usize,
    rows: usize,
    state: u32,
}

/// Bytes of logits that a pass may take.
const LOGITS_BYTES_MAX: usize = 32 << 20;
/// A running model. Fields are dropped in this order: the ring ends before what it works on.
pub struct Session {
    pub(super) model: Model,
    pub(super) weights: Weights,
    pub(super) backend: Box<dyn Backend>,
    pub(super) plan: Plan,
    pub(super) recipe: Recipe,
    pub(super) options: Options,
    pub(super) reader_name: Option<&'static str>,
    /// The files that passes read from; none where all is in memory.
    pub(super) watched: Vec<Watched>,
    pub(super) notes: Vec<String>,
    pub(super) fallback: Option<String>,
    pub(super) embedding: Embedding,
    /// Embeddings for each block, where there are such.
    pub(super) per_block: Option<Embedding>,
    pub(super) rows: Vec<u8>,
    pub(super) rows_per_block: Vec<u8>,
    /// Rows as the file has them, and one as floats, where they get another type.
    pub(super) stored_rows: Vec<u8>,
    pub(super) floats: Vec<f32>,
    /// What requantising did, where it was asked for.
    pub(super) requant: Option<super::requant::RequantReport>,
    pub(super) row_offsets: Vec<u64>,
    pub(super) tape: Tape,
    pub(super) scratch: Scratch,
    /// Pages of the cache, and the sequence that passes go on with.
    pub(super) pages: Pages,
    pub(super) seq: SeqId,
    pub(super) ops: Vec<StateOp>,
    /// Tokens of the last pass, and whose they are.
    pub(super) last: Vec<u32>,
    pub(super) last_parts: Vec<Evaluated>,
    /// Rows whose logits the pass at hand computes, by class.
    pub(super) wanted: [Vec<usize>; 2],
    /// Whether the pass at hand gives final hidden states.
    pub(super) wants_hidden: bool,
    pub(super) links: Links,
    pub(super) measuring: bool,
    /// Whether passes are counted at all.
    pub(super) counting: bool,
    /// Where units lie that are resident in RAM.
    pub(super) in_ram: Vec<Option<Region>>,
    pub(super) device: Option<OnDevice>,
    pub(super) arena: Arena,
    /// Vectors that no unit holds.
    pub(super) _apart: super::apart::Apart,
}

/// What a session holds on a device with memory of its own.
pub(super) struct OnDevice {
    pub memory: Arc<dyn DeviceMemory>,
    pub resident: DeviceAlloc,
    pub slots: DeviceAlloc,
    /// The arena's registration.
    pub _pinned: Pinned,
}

/// Where rows of the embedding come from.
#[derive(Clone)]
pub(super) struct Embedding {
    pub file: FileId,
    pub offset: u64,
    /// Bytes of a row as it is computed with, and as the file and memory have it.
    pub row_bytes: usize,
    pub stored_bytes: usize,
    pub resident: Option<(Region, u64)>,
    /// What becomes of a row.
    pub turn: Option<Turn>,
}

impl Session {
    /// Rows of logits a pass should ask for at once, so that they stay small.
    pub fn outputs_at_once(n_vocab: usize) -> usize {
        (LOGITS_BYTES_MAX / 4 / n_vocab.max(1)).clamp(1, Options::BATCH)
    }

    /// Why every pass will fail from now on, so that the session is of no use; `None` if the next may well succeed. To be asked when
    /// one has failed.
    pub fn lost(&self) -> Option<EngineError> {
        self.backend.lost().map(EngineError::from)
    }

    /// Evaluates `tokens` of one class after what the cache holds: prompts are [`Class::Bulk`], in passes of at most
    /// `max_batch`, and generated tokens [`Class::Exact`], in passes of at most [`EXACT_ROWS`].
    ///
    /// # Errors
    /// Before anything is computed: a token that the model has not, more tokens than the cache has room for, or
    /// with [`Outputs::All`] more than a pass or the session holds rows of logits. Else what made a pass fail, or
    /// [`ForwardError::Interrupted`].
    pub fn eval(
        &mut self,
        tokens: &[u32],
        class: Class,
        outputs: Outputs,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), EngineError> {
        let all = self.part(tokens, class, outputs);
        self.check(&[all])?;
        let each = self.rows_of_pass(class);
        let n_passes = tokens.len().div_ceil(each);
        for (i, chunk) in tokens.chunks(each).enumerate() {
            let outputs = if i + 1 == n_passes { outputs } else { Outputs::None };
            self.pass(&[self.part(chunk, class, outputs)], stop)?;
        }
        Ok(())
    }

    /// Evaluates the prompt `tokens` with a final hidden state of another model for each, `n_embd` floats: that of the position
    /// before. Only for a model that takes them ([`Model::takes_hidden`]).
    ///
    /// # Errors
    /// As [`Session::eval`].
    ///
    /// # Panics
    /// If there are not as many hidden states as tokens, or more tokens than a pass carries.
    pub fn eval_behind(
        &mut self,
        tokens: &[u32],
        hidden: &[f32],
        outputs: Outputs,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), EngineError> {
        assert!(self.model.takes_hidden() && hidden.len() == tokens.len() * self.n_embd(), "a hidden state for each");
        assert!(tokens.len() <= self.max_batch(), "one pass");
        self.rows_per_block.clear();
        self.rows_per_block.extend(hidden.iter().flat_map(|x| x.to_le_bytes()));
        self.eval(tokens, Class::Bulk, outputs, stop)
    }

    /// Evaluates tokens of several sequences in one pass, generated ones first. [`Session::logits`] has the rows of
    /// outputs in the same order.
    ///
    /// # Errors
    /// As [`Session::eval`]; after an error each sequence has what it had before. [`RequestError`] says what exceeds a
    /// pass.
    pub fn eval_parts(&mut self, parts: &[Part<'_>], stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let of = |class| parts.iter().filter(|p| p.class == class).map(|p| p.tokens.len()).sum::<usize>();
        let (exact, bulk) = (of(Class::Exact), of(Class::Bulk));
        let (tokens, max) = match exact > EXACT_ROWS {
            true => (exact, EXACT_ROWS),
            false => (exact + bulk, self.max_batch()),
        };
        if tokens > max || parts.len() > self.parts_max() {
            return Err(RequestError::TooManyRows { tokens, max, parts: parts.len(), most: self.parts_max() }.into());
        }
        let twice = parts.iter().enumerate().any(|(i, p)| parts[..i].iter().any(|q| q.seq == p.seq));
        let empty = parts.is_empty() || parts.iter().any(|p| p.tokens.is_empty());
        if twice || empty || !parts.iter().is_sorted_by_key(|p| p.class == Class::Bulk) {
            return Err(RequestError::Parts.into());
        }
        self.check(parts)?;
        self.pass(parts, stop)
    }

    /// Evaluates tokens of a prompt behind those of a sequence, in one pass, and returns their final hidden states: tokens ×
    /// `n_embd`, behind the output norm.
    ///
    /// # Errors
    /// As [`Session::eval_parts`], or where the backend does not give them ([`Session::gives_hidden`]).
    pub fn hidden(&mut self, seq: SeqId, tokens: &[u32], stop: &dyn Fn() -> bool) -> Result<&[f32], EngineError> {
        self.wants_hidden = true;
        let part = Part { seq, class: Class::Bulk, tokens, outputs: Outputs::None };
        let evaluated = self.eval_parts(&[part], stop);
        self.wants_hidden = false;
        evaluated?;
        if let Some(e) = self.overflow() {
            self.forget_overflow();
            return Err(e);
        }
        match all_finite(self.scratch.hidden()) {
            true => Ok(self.scratch.hidden()),
            false => Err(self.where_not_finite()),
        }
    }

    /// Whether the backend gives final hidden states.
    pub fn gives_hidden(&self) -> bool {
        self.backend.gives_hidden()
    }

    /// Elements of a hidden state.
    pub fn n_embd(&self) -> usize {
        self.model.hparams.n_embd
    }

    /// Takes the pages that a sequence needs for `n` more positions now.
    ///
    /// # Errors
    /// If they are not free, or the sequence has ended.
    pub fn reserve(&mut self, seq: SeqId, n: usize) -> Result<(), EngineError> {
        self.make_room(seq, n)
    }

    /// Most sequences that a pass may have tokens of; more than one may be of both classes.
    pub fn parts_max(&self) -> usize {
        self.backend.runs_max()
    }

    fn part<'a>(&self, tokens: &'a [u32], class: Class, outputs: Outputs) -> Part<'a> {
        Part { seq: self.seq, class, tokens, outputs }
    }

    /// Most tokens that a pass of this class carries.
    fn rows_of_pass(&self, class: Class) -> usize {
        match class {
            Class::Exact => self.max_batch().min(EXACT_ROWS),
            Class::Bulk => self.max_batch(),
        }
    }

    /// What is computed must be within what was allocated.
    fn check(&self, parts: &[Part<'_>]) -> Result<(), EngineError> {
        let (n_vocab, n_ctx) = (self.model.n_vocab, self.options.n_ctx);
        let mut outputs = 0;
        let max = self.options.outputs;
        for p in parts {
            if let Some(&token) = p.tokens.iter().find(|t| **t as usize >= n_vocab) {
                return Err(RequestError::NoSuchToken { token, n_vocab }.into());
            }
            let (tokens, position) = (p.tokens.len(), self.pages.len(p.seq)?);
            if tokens > n_ctx.saturating_sub(position) {
                return Err(RequestError::ContextFull { tokens, position, n_ctx }.into());
            }
            let at_once = max.min(self.rows_of_pass(p.class));
            if p.outputs == Outputs::All && tokens > at_once {
                return Err(RequestError::TooManyOutputs { tokens, max: at_once }.into());
            }
            outputs += match p.outputs {
                Outputs::None => 0,
                Outputs::Last => 1,
                Outputs::All => tokens,
            };
        }
        if outputs > max {
            return Err(RequestError::TooManyOutputs { tokens: outputs, max }.into());
        }
        Ok(())
    }

    fn pass(&mut self, parts: &[Part<'_>], stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        let began = Instant::now();
        let (stats, fed) = (self.weights.flow.storage(), self.weights.flow.copies());
        let before = self.backend.beside();
        let (bytes, beside_bytes) = (self.weights.bytes, self.weights.beside_bytes);
        let fetched = self.weights.fetched_bytes;
        let used = self.expert_uses();
        let overflowed = self.backend.overflow().is_some();
        // A panic is a fault of this program; it ends its pass, and texts of other passes go on.
        let evaluated = catch_unwind(AssertUnwindSafe(|| self.evaluate(parts, stop)));
        let evaluated =
            evaluated.unwrap_or_else(|panic| Err(EngineError::Panicked { what: bounded::said(panic.as_ref()) }));
        let evaluated = evaluated.and_then(|()| unchanged(&self.watched));
        let flow = &self.weights.flow;
        self.backend.worked(&mut |w| flow.trace(EventKind::Beside, w.unit, 0, w.from, w.to));
        if let Err(e) = evaluated {
            self.backend.abandon();
            self.weights.restart();
            if !overflowed {
                // Rows that are not committed are nobody's.
                self.forget_overflow();
            }
            self.last_parts.clear();
            for p in parts {
                self.pages.keep(p.seq, self.pages.len(p.seq)?)?;
            }
            return Err(e);
        }
        for p in parts {
            self.pages.commit(p.seq, p.tokens.len())?;
        }
        let n = self.last.len();
        if self.options.timeline {
            self.weights.flow.trace(EventKind::Pass, n, 0, began, Instant::now());
        }
        // What is compared with the roofline is passes of one token.
        if self.counting && (!self.measuring || n == 1) {
            let (after, fed_after) = (self.weights.flow.storage(), self.weights.flow.copies());
            let mut used = self.expert_uses().since(&used);
            // Prompts pass caches by: what they read says nothing of these.
            if parts.iter().any(|p| p.class == Class::Bulk) {
                used.caches = CacheStats::default();
            }
            let l = &mut self.links;
            l.passes += 1;
            l.pass_s += began.elapsed().as_secs_f64();
            l.nvme_bytes += after.bytes - stats.bytes;
            l.nvme_busy_s += (after.busy - stats.busy).as_secs_f64();
            l.storage_wait_s += (after.stall - stats.stall).as_secs_f64();
            l.nvme_starts.merge(&after.starts.since(&stats.starts));
            l.gpu_starts.merge(&fed_after.starts.since(&fed.starts));
            let beside = self.backend.beside();
            // What has a slot is not brought.
            let brought = 1.0 - used.slot_hit_rate().unwrap_or(0.0);
            let fetched = ((self.weights.fetched_bytes - fetched) as f64 * brought) as u64;
            l.experts.add(&used);
            l.gpu_bytes += fed_after.bytes - fed.bytes + fetched;
            l.gpu_fetched_bytes += fetched;
            l.gpu_busy_s += (fed_after.busy - fed.busy).as_secs_f64();
            l.link_wait_s += (fed_after.stall - fed.stall).as_secs_f64();
            l.gpu_timed = fed_after.timed;
            l.beside_busy_s += (beside.computed - before.computed).as_secs_f64();
            l.beside_wait_s += (beside.waited - before.waited).as_secs_f64();
            l.beside_bytes += self.weights.beside_bytes - beside_bytes;
            l.ram_bytes += match self.device {
                Some(_) => fed_after.bytes - fed.bytes + fetched + (self.weights.beside_bytes - beside_bytes),
                None => self.weights.bytes - bytes,
            };
        }
        Ok(())
    }

    /// Computes a pass; nothing of it is committed yet.
    fn evaluate(&mut self, parts: &[Part<'_>], stop: &dyn Fn() -> bool) -> Result<(), EngineError> {
        self.last.clear();
        self.last_parts.clear();
        self.wanted.iter_mut().for_each(Vec::clear);
        let mut first = [0; 2];
        for p in parts {
            let (class, rows) = (p.class, p.tokens.len());
            let (first_pos, state) = (self.pages.len(p.seq)?, self.pages.state(p.seq)?);
            self.last_parts.push(Evaluated { seq: p.seq, class, first_pos, rows, state });
            self.last.extend_from_slice(p.tokens);
            let first = &mut first[class as usize];
            self.wanted[class as usize].extend(match p.outputs {
                Outputs::None => 0..0,
                Outputs::Last => *first + rows - 1..*first + rows,
                Outputs::All => *first..*first + rows,
            });
            *first += rows;
        }
        for p in parts {
            self.make_room(p.seq, p.tokens.len())?;
            self.pages.writes(p.seq, p.tokens.len())?;
        }
        self.fetch_last_rows()?;
        let runs = runs(&self.pages, &self.last_parts)?;
        let [exact, bulk] = &self.wanted;
        let (rows, per_block) = (&self.rows, &self.rows_per_block);
        let batch = Batch { runs: &runs, rows, per_block, outputs: [exact, bulk], hidden: self.wants_hidden };
        let (backend, weights) = (self.backend.as_mut(), &mut self.weights);
        // SAFETY: a session is made of one model, its tape, weights that were laid out and loaded from it (`start`), and a backend for its
        // sizes; none is ever replaced.
        unsafe { forward((&self.model, &self.tape), backend, weights, &batch, &mut self.scratch, stop)? };
        Ok(())
    }

    /// Makes room for `n` positions behind a sequence. If that fails, the sequence has what it had before.
    pub(super) fn make_room(&mut self, seq: SeqId, n: usize) -> Result<(), EngineError> {
        self.pages.reserve(seq, n, &mut self.ops)?;
        while let Some(op) = self.ops.first() {
            if let Err(e) = self.backend.apply(op) {
                // What was not copied is not what the sequence reads.
                for op in self.ops.drain(..).rev() {
                    self.pages.undo(seq, &op)?;
                }
                return Err(e.into());
            }
            self.ops.remove(0);
        }
        Ok(())
    }

    /// Brings the embedding rows of the pass's tokens to `rows`.
    fn fetch_last_rows(&mut self) -> Result<(), EngineError> {
        let tokens = std::mem::take(&mut self.last);
        let mut rows = std::mem::take(&mut self.rows);
        rows.resize(tokens.len() * self.embedding.row_bytes, 0);
        let mut fetched = match tokens[..] {
            [token] if self.embedding.resident.is_none() && self.copy_from_head(token as usize, &mut rows) => Ok(()),
            _ => self.fetch_rows(&self.embedding.clone(), &tokens, &mut rows),
        };
        self.rows = rows;
        if let (Some(table), Ok(())) = (self.per_block.clone(), &fetched) {
            let mut rows = std::mem::take(&mut self.rows_per_block);
            rows.resize(tokens.len() * table.row_bytes, 0);
            fetched = self.fetch_rows(&table, &tokens, &mut rows);
            self.rows_per_block = rows;
        }
        self.last = tokens;
        fetched
    }

    /// Brings the rows of `tokens` of a table to `rows`, back to back.
    fn fetch_rows(&mut self, e: &Embedding, tokens: &[u32], rows: &mut [u8]) -> Result<(), EngineError> {
        let Some(turn) = e.turn else { return self.fetch_stored_rows(e, tokens, rows) };
        let mut stored = std::mem::take(&mut self.stored_rows);
        stored.resize(tokens.len() * e.stored_bytes, 0);
        let fetched = self.fetch_stored_rows(e, tokens, &mut stored);
        self.stored_rows = stored;
        fetched?;
        let rows = rows.chunks_exact_mut(e.row_bytes).zip(self.stored_rows.chunks_exact(e.stored_bytes));
        for ((to, from), token) in rows.zip(tokens) {
            let (name, row) = ("token_embd.weight".to_owned(), &mut self.floats);
            let whole = reference::dequantize(turn.from, from, row);
            let turned =
                if whole { quantise(turn.to, row, to).map_err(|e| e.to_string()) } else { Err("is no row".into()) };
            turned.map_err(|why| ModelError::Values {
                name,
                what: format!("row {token} cannot be requantised: {why}"),
            })?;
        }
        Ok(())
    }

    /// Brings the rows of `tokens` of a table to `to`, as the file has them.
    fn fetch_stored_rows(&mut self, e: &Embedding, tokens: &[u32], to: &mut [u8]) -> Result<(), EngineError> {
        if let Some((region, at)) = &e.resident {
            for (t, row) in tokens.iter().zip(to.chunks_exact_mut(e.stored_bytes)) {
                let from = *at as usize + *t as usize * e.stored_bytes;
                // SAFETY: the region holds the whole table from `at` on, the token is below its
                // row count (checked by `eval`), and nobody writes there.
                unsafe { std::ptr::copy_nonoverlapping(region.addr().add(from), row.as_mut_ptr(), e.stored_bytes) };
            }
            return Ok(());
        }
        self.row_offsets.clear();
        self.row_offsets.extend(tokens.iter().map(|&t| e.offset + u64::from(t) * e.stored_bytes as u64));
        self.weights.flow.read_rows(e.file, &self.row_offsets, e.stored_bytes, to).map_err(stream_error)
    }

    /// Copies a row of a tied head from a resident slice; `false` if its slice is streamed, or the head is no embedding.
    fn copy_from_head(&self, token: usize, row: &mut [u8]) -> bool {
        if !self.model.tied {
            return false;
        }
        let slice = self.model.head.iter().rev().find(|s| s.first_row <= token);
        let Some(slice) = slice else { return false };
        let Some(region) = &self.in_ram[slice.weight.unit] else { return false };
        let at = self.weights.layouts[slice.weight.unit].span_offsets[slice.weight.span] as usize;
        let from = at + (token - slice.first_row) * self.embedding.row_bytes;
        assert_eq!(row.len(), self.embedding.row_bytes, "one row");
        // SAFETY: the slice holds rows `first_row..first_row + rows` from `at` on, and the token is one
        // of them; resident units are never written after loading.
        unsafe { std::ptr::copy_nonoverlapping(region.addr().add(from), row.as_mut_ptr(), row.len()) };
        true
    }

    /// Logits of the last pass: outputs × vocabulary.
    ///
    /// # Errors
    /// [`EngineError::NotFinite`] where one is not finite, since no text follows from such.
    pub fn logits(&mut self) -> Result<&[f32], EngineError> {
        self.check_finite()?;
        self.any_logits()
    }

    /// Logits of the last pass, whatever they are: outputs × vocabulary.
    pub fn any_logits(&mut self) -> Result<&[f32], EngineError> {
        Ok(self.backend.logits()?)
    }

    /// Repeats the last pass block by block if its logits are not finite, for an error that says where that
    /// begins.
    ///
    /// # Errors
    /// [`EngineError::NotFinite`], or why the pass could not be repeated.
    pub fn check_finite(&mut self) -> Result<(), EngineError> {
        if let Some(e) = self.overflow() {
            return Err(e);
        }
        if all_finite(self.backend.logits()?) { Ok(()) } else { Err(self.where_not_finite()) }
    }

    /// What is to be said of a key or value that became infinite in the cache, which shows in no logits.
    pub fn overflow(&self) -> Option<EngineError> {
        let ty = self.options.kv_type;
        let block = self.model.cached.get(self.backend.overflow()?).copied().unwrap_or(0);
        let what = format!("keys or values of blk.{block} are larger than {ty} holds");
        Some(EngineError::NotFinite { what, cure: "--kv f32 holds them".into() })
    }

    /// Forgets that a key or value became infinite, with the sequences that have such.
    pub(super) fn forget_overflow(&mut self) {
        self.backend.forget_overflow();
    }

    /// Repeats the last pass block by block, for an error that says where it ceases to be finite.
    pub(super) fn where_not_finite(&mut self) -> EngineError {
        match self.first_not_finite() {
            Ok((what, cure)) => EngineError::NotFinite { what, cure },
            Err(e) => e,
        }
    }

    /// What of the last pass is the first that is not finite, and what may help.
    fn first_not_finite(&mut self) -> Result<(String, String), EngineError> {
        let there = |p: &Evaluated| self.pages.len(p.seq).is_ok_and(|len| p.first_pos + p.rows <= len);
        if self.last_parts.is_empty() || !self.last_parts.iter().all(there) {
            return Ok(("the logits are not".into(), "`nt verify` shows whether the file is damaged".into()));
        }
        self.fetch_last_rows()?;
        let runs = runs(&self.pages, &self.last_parts)?;
        let (rows, per_block) = (&self.rows, &self.rows_per_block);
        let batch = Batch { runs: &runs, rows, per_block, outputs: [&[], &[]], hidden: false };
        let (model, backend, weights) = ((&self.model, &self.tape), self.backend.as_mut(), &mut self.weights);
        // SAFETY: as of `forward`.
        let found = unsafe { first_not_finite(model, backend, weights, &batch) };
        self.backend.abandon();
        self.weights.restart();
        let what = match found? {
            NotFinite::Embedding => "the rows of token_embd.weight for these tokens are not".to_owned(),
            NotFinite::Block(i) => format!("the output of blk.{i} is the first that is not"),
            NotFinite::Head => "the blocks' outputs are, so output_norm or the head is at fault".to_owned(),
        };
        let h = &self.model.hparams;
        let mut cures = vec!["`nt verify` shows whether the file is damaged".to_owned()];
        if self.options.kv_type != TensorType::F32 {
            cures.push(format!("--kv f32 helps where keys or values exceed what {} holds", self.options.kv_type));
        }
        if !(h.rope_base.is_finite() && h.rope_base >= 1.0) {
            cures.push(format!("metadata {}.rope.freq_base is {} (--rope-freq-base)", h.arch.name, h.rope_base));
        }
        Ok((what, cures.join("; ")))
    }

    /// The model as it is computed: requantised where that was asked for.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What requantising did; `None` where it was not asked for.
    pub fn requant(&self) -> Option<&super::requant::RequantReport> {
        self.requant.as_ref()
    }

    /// Tokens in the cache, of the sequence that passes go on with.
    pub fn position(&self) -> usize {
        // That sequence never ends (see `close`).
        self.pages.len(self.seq).unwrap_or(0)
    }

    /// The sequence that passes go on with.
    pub fn sequence(&self) -> SeqId {
        self.seq
    }

    /// A sequence that begins with the first `n` tokens of this one; what they have in common is kept once. The next
    /// pass still goes on with this one.
    ///
    /// # Errors
    /// If this one has fewer tokens, or cannot go back to them (see [`Session::reach`]), or if there is no state for one more.
    pub fn fork_at(&mut self, n: usize) -> Result<SeqId, EngineError> {
        let (fork, copy) = self.pages.fork_at(self.seq, n)?;
        if let Some(copy) = copy
            && let Err(e) = self.backend.apply(&copy)
        {
            self.pages.close(fork)?;
            return Err(e.into());
        }
        Ok(fork)
    }

    /// Whether sequences have a recurrent state each, and cannot go back.
    pub fn recurrent(&self) -> bool {
        self.pages.recurrent()
    }

    /// Whether layers with windows keep the last positions of each sequence alone.
    pub fn keeps_recent(&self) -> bool {
        self.pages.recent().is_some()
    }

    /// How many of the first `n` tokens this sequence can go back to: with a recurrent state all that it has, or none; none, too,
    /// where layers keep recent positions alone and the last tokens before them are gone.
    pub fn reach(&self, n: usize) -> usize {
        self.pages.reach(self.seq, n).unwrap_or(0)
    }

    /// Goes on with another sequence.
    ///
    /// # Errors
    /// If it has ended.
    pub fn switch(&mut self, seq: SeqId) -> Result<(), EngineError> {
        self.pages.len(seq)?;
        self.seq = seq;
        Ok(())
    }

    /// Ends a sequence other than the one that passes go on with.
    ///
    /// # Errors
    /// If it has ended already, or is that one.
    pub fn close(&mut self, seq: SeqId) -> Result<(), EngineError> {
        if seq == self.seq {
            return Err(RequestError::InUse.into());
        }
        Ok(self.pages.close(seq)?)
    }

    /// Forgets all but the first `n` tokens of a sequence.
    ///
    /// # Errors
    /// If it has ended, or has fewer.
    pub fn keep(&mut self, seq: SeqId, n: usize) -> Result<(), EngineError> {
        Ok(self.pages.keep(seq, n)?)
    }

    /// Pages of the cache that no sequence has once these have ended.
    pub fn free_without(&self, seqs: &[SeqId]) -> usize {
        self.pages.free_without(seqs)
    }

    /// Tokens of a sequence.
    ///
    /// # Errors
    /// If it has ended.
    pub fn length(&self, seq: SeqId) -> Result<usize, EngineError> {
        Ok(self.pages.len(seq)?)
    }

    /// Pages of the cache that no sequence has.
    pub fn free_pages(&self) -> usize {
        self.pages.free_pages()
    }

    /// Free pages that a sequence takes until it has `positions` tokens.
    ///
    /// # Errors
    /// If it has ended.
    pub fn pages_needed(&self, seq: SeqId, positions: usize) -> Result<usize, EngineError> {
        Ok(self.pages.needed(seq, positions)?)
    }

    /// Entries of a row of logits.
    pub fn n_vocab(&self) -> usize {
        self.model.n_vocab
    }

    /// Rows of logits that a pass may have.
    pub fn max_outputs(&self) -> usize {
        self.options.outputs
    }

    /// Positions the cache holds.
    pub fn n_ctx(&self) -> usize {
        self.options.n_ctx
    }

    /// Forgets all but the first `n` tokens, or, if it cannot go back to them, all. Returns how many are left.
    pub fn truncate(&mut self, n: usize) -> usize {
        let n = self.reach(n);
        // The sequence is there, and has as many.
        let _ = self.pages.keep(self.seq, n);
        if n == 0 {
            self.backend.forget_overflow();
        }
        n
    }

    /// Which units processors next to a device compute from RAM while tokens are generated; none if there are no such
    /// processors.
    pub fn beside(&self) -> Option<Vec<bool>> {
        let of = |(here, cached): (&Option<u64>, &bool)| here.is_some() || *cached;
        self.weights.beside.as_ref().map(|b| b.units.iter().zip(&b.cached).map(of).collect())
    }

    /// Threads of processors next to a device; 0 without.
    pub fn threads_beside(&self) -> usize {
        self.backend.computes_in_ram().unwrap_or(0)
    }

    /// Caches in RAM of experts that live on storage; none where those have none.
    pub fn caches(&self) -> &[Cache] {
        &self.plan.caches
    }

    /// Slots in VRAM of experts that live in RAM; none where those have none.
    pub fn device_caches(&self) -> &[Cache] {
        &self.plan.device_caches
    }

    /// What processors beside a device did, and how often experts had a slot there, since the session began.
    pub fn beside_work(&self) -> crate::backend::Beside {
        self.backend.beside()
    }

    /// Experts that passes of generated tokens used since the session began. Passes with tokens of prompts among them take time of
    /// [`ExpertUses::caches`], too.
    pub fn expert_uses(&self) -> ExpertUses {
        let beside = self.backend.beside();
        ExpertUses {
            homes: self.weights.uses,
            caches: self.weights.flow.caches(),
            slot_uses: beside.slot_uses,
            slot_hits: beside.slot_hits,
        }
    }

    /// Empties caches and slots of experts, as when the session began. The next tokens have the same logits.
    ///
    /// # Errors
    /// If the device is gone.
    pub fn empty_caches(&mut self) -> Result<(), EngineError> {
        self.weights.flow.empty_caches();
        Ok(self.backend.empty_slots()?)
    }

    /// Keeps what this session has seen of the model's choices of experts, for plans to come.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep_reuse(&self) -> std::io::Result<()> {
        match self.backend.reuse().filter(|_| self.options.routing.is_none()) {
            Some(counted) => reuse::keep(&self.model, counted),
            None => Ok(()),
        }
    }

    /// The routing that is forced, if one is.
    pub fn routing(&self) -> Option<&ForcedRouting> {
        self.options.routing.as_deref()
    }

    /// Home of each unit.
    pub fn homes(&self) -> &[Home] {
        &self.plan.homes
    }

    /// Slots of the ring: those that computation reads from.
    pub fn n_slots(&self) -> usize {
        if self.device.is_some() { self.plan.device_slots } else { self.plan.n_slots }
    }

    /// The device's name and link, if it has memory of its own.
    pub fn device(&self) -> Option<String> {
        self.device.as_ref().map(|d| d.memory.describe())
    }

    /// Bytes of device memory in use by this process, as the driver counts them: 0 without a device,
    /// `None` if the driver does not say.
    pub fn vram_bytes(&self) -> Option<u64> {
        match &self.device {
            Some(d) => d.memory.memory().ok().map(|m| m.used),
            None => Some(0),
        }
    }

    /// Most tokens of a pass.
    pub fn max_batch(&self) -> usize {
        self.options.max_batch.min(self.options.n_ctx)
    }

    /// Most tokens of a pass, also of one for which other texts wait.
    pub fn batch(&self) -> BatchSizes {
        let alone = self.max_batch();
        BatchSizes { alone, shared: self.options.shared_batch.min(alone) }
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.options.threads
    }

    /// The backend's name.
    pub fn backend_name(&self) -> &'static str {
        self.backend.name()
    }

    /// Where operations run: a GPU or processors.
    pub fn backend_kind(&self) -> BackendKind {
        if self.device.is_some() { BackendKind::Cuda } else { BackendKind::Cpu }
    }

    /// The reader's name, if anything streams.
    pub fn reader_name(&self) -> Option<&'static str> {
        self.reader_name
    }

    /// What fell back to something else, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What the links carried.
    pub fn links(&self) -> Links {
        self.links
    }

    /// Why the backend is not the one that was preferred, if it is not.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// Starts counting anew, for one-token passes that are compared with the roofline.
    pub fn start_measuring(&mut self) {
        if !self.measuring {
            self.measuring = true;
            let l = self.links;
            self.links = Links {
                bytes_per_pass: l.bytes_per_pass,
                nvme_bytes_per_pass: l.nvme_bytes_per_pass,
                gpu_bytes_per_pass: l.gpu_bytes_per_pass,
                beside_bytes_per_pass: l.beside_bytes_per_pass,
                on_device: l.on_device,
                storage_copies: l.storage_copies,
                measured_one_token: true,
                ..Links::default()
            };
        }
    }

    /// Counts what links carry from here on (`true`, as at the start), or leaves passes out of [`Session::links`].
    pub fn count(&mut self, counting: bool) {
        self.counting = counting;
    }

    /// The timeline's events so far; none without [`Options::timeline`].
    pub fn events(&self) -> Vec<Event> {
        self.weights.flow.events()
    }

    /// Writes the timeline.
    pub fn write_timeline(&self, path: &Path) -> std::io::Result<()> {
        let mut out = std::io::BufWriter::new(crate::storage::safe::create(path)?);
        self.weights.flow.write_trace(&mut out)?;
        std::io::Write::flush(&mut out)
    }
}

/// Makes sure that files are what they were when they were opened.
///
/// # Errors
/// If one has been written to since.
pub(super) fn unchanged(files: &[Watched]) -> Result<(), EngineError> {
    files.iter().try_for_each(Watched::check).map_err(|e| StorageError::from(e).into())
}

/// What a backend is told of the parts of a pass.
fn runs<'a>(pages: &'a Pages, parts: &[Evaluated]) -> Result<SmallVec<[Run<'a>; 2 * EXACT_ROWS]>, EngineError> {
    let run = |p: &Evaluated| {
        let table = pages.table(p.seq)?;
        Ok(Run { class: p.class, first_pos: p.first_pos, rows: p.rows, table, state: p.state })
    };
    parts.iter().map(run).collect()
}

/// A failure to bring weights, as the engine reports it.
pub(super) fn stream_error(e: StreamError) -> EngineError {
    EngineError::Forward(match e {
        StreamError::Interrupted => ForwardError::Interrupted,
        e => ForwardError::Weights(Box::new(e)),
    })
}
