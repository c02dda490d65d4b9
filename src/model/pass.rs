//! One forward pass: walks the stages in order, binds their tensors where they have been brought,
//! and calls the backend. It knows nothing of architectures, tiers, files or devices.

use super::program::{Experts, HELD, LinearRef, Model, NormRef, Stage, TensorRef};
use super::routing::ForcedRouting;
use super::tape::{Call, Calls, Tape};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

use crate::backend::{
    Act, Backend, BackendError, Class, Expert, Linear, Norm, Op, Routing, Run, Share, SlotsAt, Weight,
};
use crate::gguf::TensorType;

/// Why weights could not be brought, with its own sources.
pub type WeightError = Box<dyn std::error::Error + Send + Sync>;

/// Lists that passes fill anew, kept so that none of them allocates.
#[derive(Debug, Default)]
pub struct Scratch {
    demanded: Vec<usize>,
    ahead: Vec<usize>,
    /// By stage, how its experts are computed; empty before the first pass.
    resting: Vec<Rest>,
    /// Final hidden states of the last pass that had them.
    hidden: Vec<f32>,
    /// What tokens choose in place of their routers' choices.
    forced: Option<Forced>,
    /// Experts of a block that a device has in slots.
    in_slots: Vec<Option<(u64, u64)>>,
}

/// A routing that is forced.
#[derive(Debug)]
struct Forced {
    routing: Arc<ForcedRouting>,
    /// Tokens of the passes before.
    token: u64,
    /// Choices of the rows at hand.
    ids: Vec<u32>,
}

impl Forced {
    /// The choices of `n` (row, choice) pairs, of which the first row is the pass's `first`; `layer` counts those with experts.
    fn choose(&mut self, layer: usize, first: usize, n: usize) -> &[u32] {
        self.ids.clear();
        self.ids.resize(n, 0);
        for (row, ids) in self.ids.chunks_mut(self.routing.mixture().used).enumerate() {
            self.routing.choose(layer, self.token + (first + row) as u64, ids);
        }
        &self.ids
    }
}

impl Scratch {
    /// With room for every pass of `model`.
    pub fn for_model(model: &Model, max_batch: usize) -> Scratch {
        let demanded = Vec::with_capacity(model.hparams.n_experts_used * max_batch);
        let ahead = Vec::with_capacity(model.hparams.n_experts);
        Scratch { demanded, ahead, ..Scratch::default() }
    }

    /// Forces a routing on all passes to come, of at most so many rows. Routers are computed still; where the backend holds all
    /// experts of a layer, so that none is moved, theirs are taken.
    pub fn force(&mut self, routing: Arc<ForcedRouting>, max_batch: usize) {
        let ids = Vec::with_capacity(routing.mixture().used * max_batch);
        self.forced = Some(Forced { routing, token: 0, ids });
    }

    /// Final hidden states of the last pass of [`Batch::hidden`], tokens × `n_embd`, behind the output norm.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}

/// Where a pass gets its units from: the ring, behind one call a unit.
pub trait WeightSource {
    /// A pass begins whose rows are of this class, or, where it has both, of [`Class::Bulk`].
    fn begin(&mut self, _class: Class) -> Result<(), WeightError> {
        Ok(())
    }

    /// Whether `unit` is computed from RAM by processors next to a device, in the pass at hand.
    fn in_ram(&self, _unit: usize) -> bool {
        false
    }

    /// Waits for `unit` (units come in pass order; experts in the order demanded) and returns, for
    /// span `i` of the unit, the address of its first byte through [`WeightSource::span`].
    fn acquire(&mut self, unit: usize) -> Result<(), WeightError>;

    /// Address of a span of a unit that is held; or, with [`super::HELD`] for the unit, of a vector that is held
    /// apart.
    fn span(&self, unit: usize, span: usize) -> u64;

    /// Gives the unit back, and experts acquired before it; its memory may be reused once the work issued so far has run.
    fn release(&mut self, unit: usize) -> Result<(), WeightError>;

    /// Whether `unit`, an expert that was demanded and comes next, may be acquired at once and held with those before it.
    fn is_ready(&self, _unit: usize) -> bool {
        false
    }

    /// Whether `unit` is brought from RAM for each use.
    fn is_near(&self, _unit: usize) -> bool {
        false
    }

    /// Whether `unit` stays where it is after it was released.
    fn rests(&self, _unit: usize) -> bool {
        false
    }

    /// Address of a span of a unit that stays where it is as long as the backend is; `None` for any other.
    fn at_rest(&self, _unit: usize, _span: usize) -> Option<u64> {
        None
    }

    /// Address in RAM of a span of a unit that processors next to a device compute where it rests, in passes of exact rows; with
    /// [`super::HELD`] of a vector that is held apart.
    fn at_rest_in_ram(&self, _unit: usize, _span: usize) -> Option<u64> {
        None
    }

    /// How many of a row's experts in RAM are for processors, where a device reads the others.
    fn share(&self) -> Option<Share> {
        None
    }

    /// Experts from this unit on that a device has in slots until the next pass of exact rows: the address of each, and the one in RAM of
    /// which its first byte is.
    fn lend(&mut self, _first: usize, _lent: &[Option<(u64, u64)>]) {}

    /// Where a device keeps some of the experts in RAM of this block.
    fn slots(&self, _block: usize) -> Option<SlotsAt> {
        None
    }

    /// As many of the experts in `units` as `chosen` were used where they rest, none of them acquired.
    fn used(&mut self, _units: Range<usize>, _chosen: usize) {}

    /// Announces experts that will be acquired next; reorders them into the order in which they
    /// come fastest.
    fn demand(&mut self, units: &mut [usize]) -> Result<(), WeightError>;

    /// Whether every unit stays where it is computed, so that passes of this class may be repeated without acquiring any.
    fn stays(&self) -> bool {
        false
    }

    /// A pass has used every unit without acquiring any; of experts those that [`WeightSource::used`] says.
    fn repeated(&mut self) {}
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Weights could not be brought.
    #[error(transparent)]
    Weights(WeightError),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The run was asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Which tokens' logits a pass computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// None: the pass only fills the cache.
    None,
    /// The last token's.
    Last,
    /// All tokens'.
    All,
}

/// The rows of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// By sequence, exact ones first.
    pub runs: &'a [Run<'a>],
    /// Embedding rows of their tokens, raw, back to back.
    pub rows: &'a [u8],
    /// The same of what each block is given beside X, or final hidden states of another model; empty where there is nothing of
    /// the kind.
    pub per_block: &'a [u8],
    /// Rows whose logits are computed, ascending, of the exact rows and of the bulk ones; each counts from the first row of
    /// its class.
    pub outputs: [&'a [usize]; 2],
    /// Whether the final hidden states of all rows are wanted in place of logits ([`Scratch::hidden`]).
    pub hidden: bool,
}

impl Batch<'_> {
    /// Tokens of the pass.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|r| r.rows).sum()
    }

    fn has_outputs(&self) -> bool {
        self.outputs.iter().any(|o| !o.is_empty())
    }

    fn class(&self) -> Class {
        if self.runs.iter().all(|r| r.class == Class::Exact) { Class::Exact } else { Class::Bulk }
    }

    /// Whether a pass is made of one token whose logits are wanted: the kind that is repeated most.
    fn is_one_token(&self) -> bool {
        matches!(self.runs, [Run { class: Class::Exact, rows: 1, .. }]) && self.has_outputs()
    }
}

/// A pass over a batch. `stop` is asked between stages. `scratch` is that of earlier passes.
///
/// # Safety
/// `model` is as [`Model::new`] made it, and `tape` was made of it. `source` gives addresses in the memory of `backend` (where it says
/// so, in RAM) that hold the model's spans: while a unit is held, and on a device until the operations called meanwhile have run; for good,
/// if it says that the unit rests. `backend` was opened for the model's sizes, and `scratch` has seen no other of the four.
pub unsafe fn forward(
    (model, tape): (&Model, &Tape),
    backend: &mut dyn Backend,
    source: &mut dyn WeightSource,
    batch: &Batch,
    scratch: &mut Scratch,
    stop: &dyn Fn() -> bool,
) -> Result<(), ForwardError> {
    source.begin(batch.class()).map_err(ForwardError::Weights)?;
    backend.begin(batch.runs)?;
    embed(model, backend, batch)?;
    scratch.hidden.clear();
    if scratch.resting.is_empty() {
        scratch.resting = resting((model, tape), backend, source)?;
    }
    let mut pass = Pass::new((model, tape), backend, source, batch, (&mut scratch.demanded, &mut scratch.ahead));
    pass.keeps = batch.has_outputs();
    pass.hidden = batch.hidden.then_some(&mut scratch.hidden);
    pass.resting = &scratch.resting;
    pass.forced = scratch.forced.as_mut();
    pass.force_shared()?;
    pass.use_slots(&mut scratch.in_slots);
    // The router's answer is waited for in the middle of a pass, except where all experts rest.
    let waits = |(stage, rest): (&Stage, &Rest)| match rest {
        Rest::Here => false,
        Rest::Shared => pass.forced.is_some() && !pass.forces,
        Rest::No => stage.experts.is_some(),
    };
    let waits = model.stages.iter().zip(&scratch.resting).any(waits);
    if batch.is_one_token() && !waits && pass.source.stays() {
        pass.recorded(stop)?;
    } else {
        pass.all(stop)?;
        // Whoever waits for the device next need not know of what was put off.
        pass.backend.catch_up()?;
    }
    if let Some(forced) = &mut pass.forced {
        forced.token += batch.tokens() as u64;
    }
    Ok(())
}

fn embed(model: &Model, backend: &mut dyn Backend, batch: &Batch) -> Result<(), BackendError> {
    backend.embed(batch.rows, model.embedding.ty)?;
    match &model.per_block {
        Some(t) => backend.embed_per_block(batch.per_block, t.ty),
        None if model.takes_hidden() => backend.embed_per_block(batch.per_block, TensorType::F32),
        None => Ok(()),
    }
}

/// How the experts of a stage are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// One by one: some are brought.
    No,
    /// By one call: all rest in the backend's memory.
    Here,
    /// Exact rows by one call: all rest, some of them in RAM, which processors next to a device read.
    Shared,
}

/// Has the backend hold the experts of each stage that all rest, and says of which it does.
fn resting(
    (model, tape): (&Model, &Tape),
    backend: &mut dyn Backend,
    source: &dyn WeightSource,
) -> Result<Vec<Rest>, ForwardError> {
    let here = |t: &TensorRef| match t.unit {
        HELD => Some(source.span(HELD, t.span)),
        unit => source.at_rest(unit, t.span),
    };
    let in_ram = |t: &TensorRef| source.at_rest_in_ram(t.unit, t.span);
    type At<'a> = &'a dyn Fn(&TensorRef) -> Option<u64>;
    let expert = |id: usize, how, l: &[LinearRef; 3], matrices: At<'_>, vectors: At<'_>| {
        let linear = |l: &LinearRef| {
            let bias = match &l.bias {
                Some(bias) => Some(bound(vectors(bias)?, bias)),
                None => None,
            };
            Some(Linear { weight: bound(matrices(&l.weight)?, &l.weight), bias })
        };
        let [gate, up, down] = [linear(&l[0])?, linear(&l[1])?, linear(&l[2])?];
        Some(Expert { id: id as u32, gate, up, down, how })
    };
    let stages = model.stages.iter().zip(&tape.stages);
    let of = |(stage, calls): (&Stage, &Calls)| -> Result<Rest, ForwardError> {
        // One call makes what these would.
        match (router_of(&calls.with), calls.after.first().and_then(sum_of)) {
            (Some((Call::Route { .. }, [])), Some((Act::X, true))) => {}
            (Some((Call::Op(Op::Route { how, .. }), behind)), Some(_))
                if !how.on_input && behind_router(behind).is_some() => {}
            _ => return Ok(Rest::No),
        }
        let (Some(block), Some(experts)) = (stage.block, &stage.experts) else {
            return Ok(Rest::No);
        };
        let all = || experts.list.iter().enumerate();
        let list: Option<Vec<Expert>> = all().map(|(id, l)| expert(id, experts.how, l, &here, &here)).collect();
        if let Some(list) = list {
            return Ok(if backend.hold_experts(block, &list)? { Rest::Here } else { Rest::No });
        }
        let Some(share) = source.share() else { return Ok(Rest::No) };
        let either = |t: &TensorRef| here(t).or_else(|| in_ram(t));
        let list: Option<Vec<Expert>> = all().map(|(id, l)| expert(id, experts.how, l, &either, &here)).collect();
        let Some(list) = list else { return Ok(Rest::No) };
        let of_host: Vec<Option<Expert>> = all().map(|(id, l)| expert(id, experts.how, l, &in_ram, &in_ram)).collect();
        let slots = source.slots(block);
        let first = experts.list[0][0].weight.unit;
        Ok(if backend.share_experts(block, first, &list, &of_host, share, slots)? { Rest::Shared } else { Rest::No })
    };
    stages.map(of).collect()
}

/// What chooses experts among calls, and the calls behind it.
fn router_of(calls: &[Call]) -> Option<(&Call, &[Call])> {
    let at = calls.iter().position(|c| matches!(c, Call::Route { .. } | Call::Op(Op::Route { .. })))?;
    Some((&calls[at], &calls[at + 1..]))
}

/// What is done to weights and to what experts read behind a router; `None` if it is anything else.
fn behind_router(calls: &[Call]) -> Option<(Option<TensorRef>, Option<NormRef>)> {
    let (weigh, rest) = match calls {
        [Call::Op(Op::WeighExperts { by }), rest @ ..] => (Some(*by), rest),
        rest => (None, rest),
    };
    match rest {
        [] => Some((weigh, None)),
        [Call::Op(Op::Norm { to: Act::H, from: Act::X, norm })] => Some((weigh, Some(*norm))),
        _ => None,
    }
}

/// Where a call puts the sum of experts, and whether it is added there.
fn sum_of(call: &Call) -> Option<(Act, bool)> {
    match *call {
        Call::Combine => Some((Act::X, true)),
        Call::Op(Op::Combine { to, add }) => Some((to, add)),
        _ => None,
    }
}

/// A tensor at an address that the source gave.
fn bound(addr: u64, t: &TensorRef) -> Weight {
    // SAFETY: the span holds the tensor's bytes, and shapes fit the backend's sizes (`forward`'s promise, which is all that leads here).
    // Its unit is held, and its operations are called before it is released; or it rests there as long as the backend is (`at_rest`).
    unsafe { Weight::new(addr, t.ty, t.rows, t.cols) }
}

/// Where a pass stops being finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotFinite {
    /// The embedding of a token.
    Embedding,
    /// The output of this block.
    Block(usize),
    /// The head: the output of the last block is finite still.
    Head,
}

/// Repeats a pass whose logits are not finite, block by block, and says which output is the first that is not.
/// The pass ends there: [`WeightSource`] must be restarted afterwards.
///
/// # Safety
/// As [`forward`].
///
/// # Errors
/// As [`forward`].
pub unsafe fn first_not_finite(
    (model, tape): (&Model, &Tape),
    backend: &mut dyn Backend,
    source: &mut dyn WeightSource,
    batch: &Batch,
) -> Result<NotFinite, ForwardError> {
    source.begin(batch.class()).map_err(ForwardError::Weights)?;
    backend.begin(batch.runs)?;
    embed(model, backend, batch)?;
    let (mut demanded, mut ahead) = (Vec::new(), Vec::new());
    let mut pass = Pass::new((model, tape), backend, source, batch, (&mut demanded, &mut ahead));
    if !pass.finite()? {
        return Ok(NotFinite::Embedding);
    }
    for (i, stage) in model.stages.iter().enumerate() {
        let Some(block) = stage.block else { break };
        pass.stage(i)?;
        let ends = model.stages.get(i + 1).is_none_or(|next| next.block != Some(block));
        if ends && !pass.finite()? {
            return Ok(NotFinite::Block(block));
        }
    }
    Ok(NotFinite::Head)
}

/// Experts that are handed to the backend at once.
const BATCH: usize = 16;
/// Choices per expert from which a prompt takes nearly all experts of a block: of random ones one in 3000 is left out.
const ALL_FROM: usize = 8;

/// Whether so many choices take nearly all of a block's experts, so that a prompt has them brought before its router has chosen.
pub fn takes_nearly_all(choices: usize, experts: usize) -> bool {
    choices >= ALL_FROM * experts
}

struct Pass<'a> {
    model: &'a Model,
    tape: &'a Tape,
    backend: &'a mut dyn Backend,
    source: &'a mut dyn WeightSource,
    /// Classes that have rows, in the order of their rows.
    classes: &'static [Class],
    outputs: [&'a [usize]; 2],
    /// Rows of each class.
    rows: [usize; 2],
    /// Whether rows without outputs are dropped where the program says so.
    keeps: bool,
    demanded: &'a mut Vec<usize>,
    /// Experts of the block at hand that were asked for before its router had chosen, in the order in which they come.
    ahead: &'a mut Vec<usize>,
    /// By stage, whether the backend holds its experts; empty for none.
    resting: &'a [Rest],
    /// Where final hidden states go, where they are wanted in place of logits.
    hidden: Option<&'a mut Vec<f32>>,
    /// What tokens choose in place of their routers' choices.
    forced: Option<&'a mut Forced>,
    /// Whether experts that both sites compute are told what rows choose.
    forces: bool,
    /// The stage at hand, of those with experts; and the first row of the class at hand.
    routed: usize,
    first_row: usize,
    /// An expert for processors next to a device that is held until they have computed it, with those before it.
    of_host: Option<usize>,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nothing that is dropped behind this is to wait for the rest.
            self.backend.abandon();
        }
    }
}

impl<'a> Pass<'a> {
    fn new(
        (model, tape): (&'a Model, &'a Tape),
        backend: &'a mut dyn Backend,
        source: &'a mut dyn WeightSource,
        batch: &Batch<'a>,
        (demanded, ahead): (&'a mut Vec<usize>, &'a mut Vec<usize>),
    ) -> Pass<'a> {
        let rows = [Class::Exact, Class::Bulk]
            .map(|class| batch.runs.iter().filter(|r| r.class == class).map(|r| r.rows).sum());
        let classes: &[Class] = match rows {
            [_, 0] => &[Class::Exact],
            [0, _] => &[Class::Bulk],
            _ => &[Class::Exact, Class::Bulk],
        };
        Pass {
            model,
            tape,
            backend,
            source,
            classes,
            outputs: batch.outputs,
            rows,
            keeps: false,
            demanded,
            ahead,
            resting: &[],
            hidden: None,
            forced: None,
            forces: false,
            routed: 0,
            first_row: 0,
            of_host: None,
        }
    }

    fn turn_to(&mut self, class: Class) {
        self.first_row = if class == Class::Bulk { self.rows[Class::Exact as usize] } else { 0 };
        self.backend.turn_to(class);
    }

    /// Whether X is finite, of all rows.
    fn finite(&mut self) -> Result<bool, ForwardError> {
        for &class in self.classes {
            self.turn_to(class);
            if !self.backend.finite()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where rows are a prompt's, experts that a device has in slots are there for all of the pass.
    fn use_slots(&mut self, lent: &mut Vec<Option<(u64, u64)>>) {
        if *self.classes == [Class::Exact] {
            return;
        }
        for (stage, rest) in self.model.stages.iter().zip(self.resting) {
            if let (Some(block), Some(experts), Rest::Shared) = (stage.block, &stage.experts, rest) {
                lent.clear();
                self.backend.in_slots(block, lent);
                self.source.lend(experts.list[0][0].weight.unit, lent);
            }
        }
    }

    /// Tells the backend what exact rows are to choose of experts that both sites compute.
    fn force_shared(&mut self) -> Result<(), ForwardError> {
        let Some(forced) = self.forced.as_mut().filter(|_| *self.classes == [Class::Exact]) else { return Ok(()) };
        let n = self.rows[Class::Exact as usize] * self.model.hparams.n_experts_used;
        let stages = self.model.stages.iter().zip(self.resting).filter(|(stage, _)| stage.experts.is_some());
        for (routed, (stage, rest)) in stages.enumerate() {
            if let (Some(block), Rest::Shared) = (stage.block, rest) {
                self.forces = self.backend.force(block, forced.choose(routed, 0, n))?;
            }
        }
        Ok(())
    }

    /// A pass of one token for which nothing is waited: the recording of one before is repeated, or this one is recorded.
    fn recorded(&mut self, stop: &dyn Fn() -> bool) -> Result<(), ForwardError> {
        if self.backend.begin_stretch()? {
            self.repeated();
            return Ok(());
        }
        let called = self.all(stop);
        let done = self.backend.end_stretch(called.is_ok());
        match (called, done) {
            (Ok(()), Ok(true)) => return Ok(()),
            (Ok(()), Err(e)) => return Err(e.into()),
            // It could not be recorded, and nothing has run.
            (Ok(()) | Err(ForwardError::Backend(_)), Ok(false)) => self.all(stop)?,
            (Err(e), _) => return Err(e),
        }
        Ok(self.backend.catch_up()?)
    }

    /// All stages. Without outputs the slices of the head are still consumed, so that the cycle stays whole.
    fn all(&mut self, stop: &dyn Fn() -> bool) -> Result<(), ForwardError> {
        for (i, stage) in self.model.stages.iter().enumerate() {
            if stop() {
                return Err(ForwardError::Interrupted);
            }
            if stage.block.is_none() && !self.keeps {
                if let Some(out) = self.hidden.take() {
                    self.hidden(i, out)?;
                    self.classes = &[];
                    continue;
                }
                self.classes = &[];
            }
            self.stage(i)?;
        }
        Ok(())
    }

    /// Stage `i`, the first of the head, up to its product: gives the final hidden states.
    fn hidden(&mut self, i: usize, out: &mut Vec<f32>) -> Result<(), ForwardError> {
        let unit = self.model.stages[i].unit;
        self.acquire(unit)?;
        for &class in self.classes {
            self.turn_to(class);
            let mut norm = None;
            for call in &self.tape.stages[i].with {
                match call {
                    Call::OutputNorm { norm: fused } => norm = Some(self.norm(fused)),
                    Call::Head { .. } | Call::Op(Op::Head { .. } | Op::Outputs) => {}
                    other => self.call(other, None)?,
                }
            }
            self.backend.hidden(norm.as_ref(), out)?;
        }
        self.release(unit)
    }

    fn acquire(&mut self, unit: usize) -> Result<(), ForwardError> {
        if !self.source.rests(unit) {
            // It may have to be waited for.
            self.backend.catch_up()?;
        }
        self.source.acquire(unit).map_err(ForwardError::Weights)
    }

    fn release(&mut self, unit: usize) -> Result<(), ForwardError> {
        self.source.release(unit).map_err(ForwardError::Weights)
    }

    fn weight(&self, t: &TensorRef) -> Weight {
        bound(self.source.span(t.unit, t.span), t)
    }

    fn linear(&self, l: &LinearRef) -> Linear {
        l.map(&mut |t| self.weight(&t))
    }

    /// A norm of a fused call.
    fn norm(&self, n: &NormRef) -> Norm {
        let Some(weight) = &n.weight else { unreachable!("a fused norm has a weight") };
        Norm { weight: self.weight(weight), eps: n.eps }
    }

    /// A stage: the calls with its unit, then those with the experts that they chose.
    fn stage(&mut self, i: usize) -> Result<(), ForwardError> {
        let (stage, calls) = (&self.model.stages[i], &self.tape.stages[i]);
        let rest = match self.resting.get(i).copied().unwrap_or(Rest::No) {
            // Who chooses by itself cannot be told what to choose.
            Rest::Shared if *self.classes != [Class::Exact] || self.forced.is_some() && !self.forces => Rest::No,
            rest => rest,
        };
        if self.forced.is_some() {
            self.routed = self.model.stages[..i].iter().filter(|s| s.experts.is_some()).count();
        }
        self.acquire(stage.unit)?;
        self.demanded.clear();
        if let (Rest::No, Some(experts)) = (rest, &stage.experts) {
            self.bring_ahead(experts, calls)?;
        }
        let in_ram = self.source.in_ram(stage.unit);
        if in_ram {
            self.backend.begin_part(stage.unit)?;
        }
        let of_host = |l: &[LinearRef; 3]| self.source.in_ram(l[0].weight.unit);
        if rest == Rest::No && stage.experts.as_ref().is_some_and(|e| e.list.iter().any(of_host)) {
            self.backend.expect_experts_in_ram();
        }
        let mut left = [true; 2];
        for &class in self.classes {
            self.turn_to(class);
            for call in &calls.with {
                if let (Call::Keep, true) = (call, self.keeps) {
                    let outputs = self.outputs[class as usize];
                    if outputs.is_empty() {
                        // The rest of the pass is not for this class.
                        left[class as usize] = false;
                        break;
                    }
                    if outputs.len() < self.rows[class as usize] {
                        self.backend.keep(outputs)?;
                        self.rows[class as usize] = outputs.len();
                    }
                }
                let routing = if rest == Rest::No { None } else { self.routing(call, calls) };
                let (Some(block), Some(routing)) = (stage.block, routing) else {
                    self.call(call, stage.experts.as_ref())?;
                    continue;
                };
                match rest {
                    Rest::Here => self.backend.mixture(block, &routing)?,
                    _ => self.backend.shared_mixture(block, &routing)?,
                }
                // What comes behind a router is part of its call.
                break;
            }
        }
        if in_ram {
            self.backend.end_part()?;
        }
        self.classes = match (left, self.classes) {
            ([true, false], [Class::Exact, Class::Bulk]) => &[Class::Exact],
            ([false, true], [Class::Exact, Class::Bulk]) => &[Class::Bulk],
            _ => self.classes,
        };
        match &stage.experts {
            None => self.release(stage.unit),
            Some(experts) => {
                self.release(stage.unit)?;
                if rest != Rest::No {
                    // A hole that others fill is closed without any.
                    self.source.demand(&mut []).map_err(ForwardError::Weights)?;
                    let rows = self.classes.iter().map(|c| self.rows[*c as usize]).sum();
                    self.used(experts, rows);
                } else {
                    self.experts(experts)?;
                }
                for &class in self.classes {
                    self.turn_to(class);
                    // Where experts rest, their sum has been made.
                    for call in calls.after.iter().skip(usize::from(rest != Rest::No)) {
                        self.call(call, None)?;
                    }
                }
                if let Some(unit) = self.of_host.take() {
                    self.backend.catch_up()?;
                    self.release(unit)?;
                }
                Ok(())
            }
        }
    }

    /// What chooses experts, if `call` does.
    fn routing(&self, call: &Call, calls: &Calls) -> Option<Routing> {
        match call {
            Call::Route { norm, router, params } => {
                Some(Routing::Softmax { norm: self.norm(norm), router: self.weight(router), params: *params })
            }
            Call::Op(Op::Route { w, choose, how }) => {
                let (weigh, reads) = behind_router(router_of(&calls.with)?.1)?;
                Some(Routing::By {
                    w: self.linear(w),
                    choose: choose.map(|t| self.weight(&t)),
                    how: *how,
                    weigh: weigh.map(|t| self.weight(&t)),
                    reads: reads.map(|norm| norm.map(&mut |t| self.weight(&t))),
                    sum: calls.after.first().and_then(sum_of)?,
                })
            }
            _ => None,
        }
    }

    fn call(&mut self, call: &Call, experts: Option<&Experts>) -> Result<(), ForwardError> {
        match call {
            Call::Qkv { layer, norm, w: [q, k, v], head_norms } => {
                let head_norms = head_norms.as_ref().map(|[q, k]| [self.norm(q), self.norm(k)]);
                let [q_norm, k_norm] = [0, 1].map(|i| head_norms.as_ref().map(|n| &n[i]));
                let (norm, q, k, v) = (self.norm(norm), self.linear(q), self.linear(k), self.linear(v));
                self.backend.qkv(*layer, &norm, &q, &k, &v, q_norm, k_norm)?;
            }
            Call::Attend { layer } => self.backend.attend(*layer)?,
            Call::Keep => {}
            Call::AttnOutput { w } => {
                let w = self.linear(w);
                self.backend.attn_output(&w)?;
            }
            Call::FeedForward { norm, gate, up, down } => {
                let (norm, gate, up, down) = (self.norm(norm), self.linear(gate), self.linear(up), self.linear(down));
                self.backend.ffn(&norm, &gate, &up, &down)?;
            }
            Call::Slice { norm, gate, up, down } => {
                let (norm, gate, up, down) = (self.norm(norm), self.linear(gate), self.linear(up), self.linear(down));
                self.backend.slice(&norm, &gate, &up, &down)?;
            }
            Call::AddSlice => self.backend.add_slice()?,
            Call::Route { norm, router, params } => {
                let (norm, router) = (self.norm(norm), self.weight(router));
                let ids = self.backend.route(&norm, &router, params)?;
                let n = ids.len();
                if self.forced.is_none() {
                    demand(self.demanded, experts, ids);
                }
                self.choose_instead(experts, n)?;
            }
            Call::Combine => self.backend.combine_experts()?,
            Call::OutputNorm { norm } => {
                let norm = self.norm(norm);
                self.backend.output_norm(&norm)?;
            }
            Call::Head { w, first_row } => {
                let w = self.linear(w);
                self.backend.head(&w, *first_row)?;
            }
            Call::Op(op) => {
                let bound = op.map(&mut |t| self.weight(&t));
                self.backend.op(&bound)?;
                if let Op::Route { .. } = op {
                    let ids = self.backend.chosen();
                    let n = ids.len();
                    if self.forced.is_none() {
                        demand(self.demanded, experts, ids);
                    }
                    self.choose_instead(experts, n)?;
                }
            }
        }
        Ok(())
    }

    /// Where a routing is forced, its choices for `n` (row, choice) pairs are wanted in place of the router's.
    fn choose_instead(&mut self, experts: Option<&Experts>, n: usize) -> Result<(), ForwardError> {
        if let Some(forced) = &mut self.forced {
            let ids = forced.choose(self.routed, self.first_row, n);
            self.backend.choose_instead(ids)?;
            demand(self.demanded, experts, ids);
        }
        Ok(())
    }

    /// A pass of one token was repeated.
    fn repeated(&mut self) {
        self.source.repeated();
        for experts in self.model.stages.iter().filter_map(|s| s.experts.as_ref()) {
            self.used(experts, 1);
        }
    }

    /// Experts that rest were used by so many rows.
    fn used(&mut self, experts: &Experts, rows: usize) {
        let (first, n) = (experts.list[0][0].weight.unit, experts.list.len());
        let chosen = rows.saturating_mul(self.model.hparams.n_experts_used).min(n);
        self.source.used(first..first + n, chosen);
    }

    /// The experts that a stage's routers have chosen. An expert is brought once for all rows of the pass.
    fn experts(&mut self, experts: &Experts) -> Result<(), ForwardError> {
        self.demanded.sort_unstable();
        self.demanded.dedup();
        // Put back below; after an error the next pass makes do with an empty list.
        let mut demanded = std::mem::take(self.demanded);
        let first_unit = experts.list[0][0].weight.unit;
        if !self.ahead.is_empty() {
            self.experts_ahead(experts, &demanded)?;
            *self.demanded = demanded;
            return Ok(());
        }
        self.source.demand(&mut demanded).map_err(ForwardError::Weights)?;
        for &unit in &demanded {
            if self.source.in_ram(unit) {
                self.expert_in_ram(experts, unit, first_unit)?;
            }
        }
        // Experts that are there and stay need not be computed before the next one is looked at.
        let mut batch = SmallVec::<[(usize, Expert); BATCH]>::new();
        for &unit in &demanded {
            if self.source.in_ram(unit) {
                continue;
            }
            let there = self.source.rests(unit) || self.source.is_ready(unit);
            if batch.len() == BATCH || !there {
                self.compute(&mut batch)?;
            }
            batch.push((unit, self.expert(experts, unit, first_unit)?));
        }
        self.compute(&mut batch)?;
        *self.demanded = demanded;
        Ok(())
    }

    /// Has all experts of a block brought before its router has chosen, where a prompt is so long that it takes nearly all of them:
    /// the link need not wait for attention then.
    fn bring_ahead(&mut self, experts: &Experts, calls: &Calls) -> Result<(), ForwardError> {
        self.ahead.clear();
        let units = || experts.list.iter().map(|l| l[0].weight.unit);
        let drops = self.keeps && calls.with.iter().any(|call| matches!(call, Call::Keep));
        let rows = if drops { self.outputs[Class::Bulk as usize].len() } else { self.rows[Class::Bulk as usize] };
        let choices = rows * self.model.hparams.n_experts_used;
        let near = |unit| self.source.rests(unit) || self.source.is_near(unit);
        if !takes_nearly_all(choices, experts.list.len())
            || !units().all(near)
            || !units().any(|u| self.source.is_near(u))
        {
            return Ok(());
        }
        self.ahead.extend(units());
        self.source.demand(self.ahead).map_err(ForwardError::Weights)
    }

    /// Computes those of the experts that were brought ahead that are among `chosen`, which is in ascending order.
    fn experts_ahead(&mut self, experts: &Experts, chosen: &[usize]) -> Result<(), ForwardError> {
        let first_unit = experts.list[0][0].weight.unit;
        let ahead = std::mem::take(self.ahead);
        let mut batch = SmallVec::<[(usize, Expert); BATCH]>::new();
        for &unit in &ahead {
            let (rests, wanted) = (self.source.rests(unit), chosen.binary_search(&unit).is_ok());
            // A unit that is given back takes those before it along.
            let joins = rests || wanted && self.source.is_ready(unit);
            if batch.len() == BATCH || !joins {
                self.compute(&mut batch)?;
            }
            match (rests, wanted) {
                (_, true) => batch.push((unit, self.expert(experts, unit, first_unit)?)),
                (false, false) => {
                    self.acquire(unit)?;
                    self.release(unit)?;
                }
                (true, false) => {}
            }
        }
        self.compute(&mut batch)?;
        *self.ahead = ahead;
        Ok(())
    }

    /// Hands an expert to processors next to a device.
    fn expert_in_ram(&mut self, experts: &Experts, unit: usize, first_unit: usize) -> Result<(), ForwardError> {
        let rests = self.source.rests(unit);
        if !rests && !self.source.is_ready(unit) {
            // It is waited for, maybe until a frame of those that are held is free.
            self.backend.experts_so_far()?;
            if let Some(held) = self.of_host.take() {
                self.release(held)?;
            }
        }
        self.source.acquire(unit).map_err(ForwardError::Weights)?;
        let expert = self.bind(experts, unit, first_unit);
        self.backend.expert_in_ram(unit, &expert)?;
        if rests {
            return self.release(unit);
        }
        self.of_host = Some(unit);
        Ok(())
    }

    /// An expert whose unit is acquired now.
    fn expert(&mut self, experts: &Experts, unit: usize, first_unit: usize) -> Result<Expert, ForwardError> {
        self.acquire(unit)?;
        Ok(self.bind(experts, unit, first_unit))
    }

    /// An expert whose unit was acquired last.
    fn bind(&self, experts: &Experts, unit: usize, first_unit: usize) -> Expert {
        let id = unit - first_unit;
        let [gate, up, down] = experts.list[id].each_ref().map(|l| self.linear(l));
        Expert { id: id as u32, gate, up, down, how: experts.how }
    }

    /// Computes experts and gives them back.
    fn compute(&mut self, batch: &mut SmallVec<[(usize, Expert); BATCH]>) -> Result<(), ForwardError> {
        if batch.is_empty() {
            return Ok(());
        }
        let experts: SmallVec<[Expert; BATCH]> = batch.iter().map(|(_, e)| *e).collect();
        for &class in self.classes {
            self.turn_to(class);
            self.backend.experts(&experts)?;
        }
        for (unit, _) in batch.drain(..).rev() {
            self.release(unit)?;
        }
        Ok(())
    }
}

/// Adds the units of the experts with these ids.
fn demand(demanded: &mut Vec<usize>, experts: Option<&Experts>, ids: &[u32]) {
    if let Some(experts) = experts {
        demanded.extend(ids.iter().map(|&e| experts.list[e as usize][0].weight.unit));
    }
}
