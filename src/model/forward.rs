//! One forward pass: walks the units in order, binds their tensors where they have been brought,
//! and calls the backend. It knows nothing of tiers, files or devices.

use super::layout::{Block, Ffn, LinearRef, Model, TensorRef};
use crate::backend::{Backend, BackendError, Class, Expert, Linear, Norm, RouterParams, Run, Weight};

/// Why weights could not be brought, with its own sources.
pub type WeightError = Box<dyn std::error::Error + Send + Sync>;

/// Lists that passes fill anew, kept so that none of them allocates.
#[derive(Debug, Default)]
pub struct Scratch {
    demanded: Vec<usize>,
}

impl Scratch {
    /// With room for every pass of `model`.
    pub fn for_model(model: &Model, max_batch: usize) -> Scratch {
        Scratch { demanded: Vec::with_capacity(model.hparams.n_experts_used * max_batch) }
    }
}

/// Where a pass gets its units from: the ring, behind one call a unit.
pub trait WeightSource {
    /// Waits for `unit` (units come in pass order; experts in the order demanded) and returns, for
    /// span `i` of the unit, the address of its first byte through [`WeightSource::span`].
    fn acquire(&mut self, unit: usize) -> Result<(), WeightError>;

    /// Address of a span of a unit that is held; or, with [`super::HELD`] for the unit, of a vector that is held
    /// apart.
    fn span(&self, unit: usize, span: usize) -> u64;

    /// Gives the unit back; its memory may be reused once the work issued so far has run.
    fn release(&mut self, unit: usize) -> Result<(), WeightError>;

    /// Whether `unit` stays where it is after it was released.
    fn rests(&self, _unit: usize) -> bool {
        false
    }

    /// Announces experts that will be acquired next; reorders them into the order in which they
    /// come fastest.
    fn demand(&mut self, units: &mut [usize]) -> Result<(), WeightError>;

    /// Whether every unit stays where it is, so that passes may be repeated without acquiring any.
    fn stays(&self) -> bool {
        false
    }

    /// A pass has used every unit without acquiring any.
    fn repeated(&mut self) {}
}

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Weights could not be brought.
    #[error("{0}")]
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
    /// Rows whose logits are computed, ascending, of the exact rows and of the bulk ones; each counts from the first row of
    /// its class.
    pub outputs: [&'a [usize]; 2],
}

impl Batch<'_> {
    /// Tokens of the pass.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|r| r.rows).sum()
    }

    fn has_outputs(&self) -> bool {
        self.outputs.iter().any(|o| !o.is_empty())
    }

    /// Whether a pass is made of one token whose logits are wanted: the kind that is repeated most.
    fn is_one_token(&self) -> bool {
        matches!(self.runs, [Run { class: Class::Exact, rows: 1, .. }]) && self.has_outputs()
    }
}

/// A pass over a batch. `stop` is asked between units. `scratch` is that of earlier passes.
pub fn forward(
    model: &Model,
    backend: &mut dyn Backend,
    source: &mut dyn WeightSource,
    batch: &Batch,
    scratch: &mut Scratch,
    stop: &dyn Fn() -> bool,
) -> Result<(), ForwardError> {
    backend.begin(batch.runs)?;
    backend.embed(batch.rows, model.embedding.ty)?;
    let mut pass = Pass::new(model, backend, source, batch, &mut scratch.demanded);
    // The router's answer is waited for in the middle of a pass.
    let dense = model.blocks.iter().all(|b| matches!(b.ffn, Ffn::Dense { .. }));
    if !batch.is_one_token() || !dense || !pass.source.stays() {
        return pass.all(stop);
    }
    if pass.backend.begin_stretch()? {
        pass.source.repeated();
        return Ok(());
    }
    let called = pass.all(stop);
    let done = pass.backend.end_stretch(called.is_ok());
    called?;
    if done? { Ok(()) } else { pass.all(stop) }
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
/// # Errors
/// As [`forward`].
pub fn first_not_finite(
    model: &Model,
    backend: &mut dyn Backend,
    source: &mut dyn WeightSource,
    batch: &Batch,
) -> Result<NotFinite, ForwardError> {
    backend.begin(batch.runs)?;
    backend.embed(batch.rows, model.embedding.ty)?;
    let mut demanded = Vec::new();
    let mut pass = Pass::new(model, backend, source, batch, &mut demanded);
    if !pass.finite()? {
        return Ok(NotFinite::Embedding);
    }
    for (i, block) in model.blocks.iter().enumerate() {
        pass.block(i, block, false)?;
        if !pass.finite()? {
            return Ok(NotFinite::Block(i));
        }
    }
    Ok(NotFinite::Head)
}
/// Experts that are handed to the backend at once.
const BATCH: usize = 16;

struct Pass<'a> {
    model: &'a Model,
    backend: &'a mut dyn Backend,
    source: &'a mut dyn WeightSource,
    /// Classes that have rows, in the order of their rows.
    classes: &'static [Class],
    outputs: [&'a [usize]; 2],
    /// Rows of each class.
    rows: [usize; 2],
    demanded: &'a mut Vec<usize>,
}

impl<'a> Pass<'a> {
    fn new(
        model: &'a Model,
        backend: &'a mut dyn Backend,
        source: &'a mut dyn WeightSource,
        batch: &Batch<'a>,
        demanded: &'a mut Vec<usize>,
    ) -> Pass<'a> {
        let rows = [Class::Exact, Class::Bulk]
            .map(|class| batch.runs.iter().filter(|r| r.class == class).map(|r| r.rows).sum());
        let classes: &[Class] = match rows {
            [_, 0] => &[Class::Exact],
            [0, _] => &[Class::Bulk],
            _ => &[Class::Exact, Class::Bulk],
        };
        Pass { model, backend, source, classes, outputs: batch.outputs, rows, demanded }
    }

    fn turn_to(&mut self, class: Class) {
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

    /// All blocks and the head.
    fn all(&mut self, stop: &dyn Fn() -> bool) -> Result<(), ForwardError> {
        let last = self.model.blocks.len() - 1;
        let wanted = self.outputs.iter().any(|o| !o.is_empty());
        for (i, block) in self.model.blocks.iter().enumerate() {
            if stop() {
                return Err(ForwardError::Interrupted);
            }
            self.block(i, block, i == last && wanted)?;
        }
        self.head()
    }

    fn acquire(&mut self, unit: usize) -> Result<(), ForwardError> {
        self.source.acquire(unit).map_err(ForwardError::Weights)
    }

    fn release(&mut self, unit: usize) -> Result<(), ForwardError> {
        self.source.release(unit).map_err(ForwardError::Weights)
    }

    fn weight(&self, t: &TensorRef) -> Weight {
        let addr = self.source.span(t.unit, t.span);
        // SAFETY: the unit is held (`span` asserts it), its operations are called before it is released, and the
        // loader has checked that the span holds the tensor's bytes.
        unsafe { Weight::new(addr, t.ty, t.rows, t.cols) }
    }

    fn linear(&self, l: &LinearRef) -> Linear {
        Linear { weight: self.weight(&l.weight), bias: l.bias.as_ref().map(|b| self.weight(b)) }
    }

    fn norm(&self, t: &TensorRef) -> Norm {
        Norm { weight: self.weight(t), eps: self.model.hparams.norm_eps }
    }

    /// A block. Behind the attention of the `last` one, only the rows of outputs are kept, and classes without any are
    /// done with.
    fn block(&mut self, i: usize, b: &Block, last: bool) -> Result<(), ForwardError> {
        let unit = b.unit;
        self.acquire(unit)?;
        for &class in self.classes {
            self.turn_to(class);
            self.attention(i, b, class, last)?;
        }
        if last {
            self.classes = match self.outputs {
                [_, []] => &[Class::Exact],
                [[], _] => &[Class::Bulk],
                _ => self.classes,
            };
        }
        if b.ffn_unit != unit {
            self.release(unit)?;
            self.acquire(b.ffn_unit)?;
        }
        let norm = self.norm(&b.ffn_norm);
        match &b.ffn {
            Ffn::Dense { gate, up, down } => {
                let (gate, up, down) = (self.linear(gate), self.linear(up), self.linear(down));
                for &class in self.classes {
                    self.turn_to(class);
                    self.backend.ffn(&norm, &gate, &up, &down)?;
                }
                self.release(b.ffn_unit)
            }
            Ffn::Experts { router, experts } => {
                let router = self.weight(router);
                self.experts(b.ffn_unit, &norm, &router, experts)
            }
        }
    }

    fn attention(&mut self, i: usize, b: &Block, class: Class, last: bool) -> Result<(), ForwardError> {
        let (q_norm, k_norm) = (b.q_norm.as_ref().map(|n| self.norm(n)), b.k_norm.as_ref().map(|n| self.norm(n)));
        let (norm, q, k, v) = (self.norm(&b.attn_norm), self.linear(&b.q), self.linear(&b.k), self.linear(&b.v));
        self.backend.qkv(i, &norm, &q, &k, &v, q_norm.as_ref(), k_norm.as_ref())?;
        self.backend.attend(i)?;
        if last {
            let (of, outputs) = (class as usize, self.outputs[class as usize]);
            if outputs.is_empty() {
                return Ok(());
            }
            if outputs.len() < self.rows[of] {
                self.backend.keep(outputs)?;
            }
        }
        let output = self.linear(&b.output);
        Ok(self.backend.attn_output(&output)?)
    }

    /// The experts of a block, with the unit of its router held. An expert is brought once for all rows of the pass.
    fn experts(
        &mut self,
        shared: usize,
        norm: &Norm,
        router: &Weight,
        experts: &[[TensorRef; 3]],
    ) -> Result<(), ForwardError> {
        let params = RouterParams {
            normalize: self.model.hparams.expert_weights_norm,
            scale: self.model.hparams.expert_weights_scale,
        };
        self.demanded.clear();
        for &class in self.classes {
            self.turn_to(class);
            let ids = self.backend.route(norm, router, &params)?;
            self.demanded.extend(ids.iter().map(|&e| experts[e as usize][0].unit));
        }
        self.demanded.sort_unstable();
        self.demanded.dedup();
        self.release(shared)?;
        // Put back below; after an error the next pass makes do with an empty list.
        let mut demanded = std::mem::take(self.demanded);
        self.source.demand(&mut demanded).map_err(ForwardError::Weights)?;
        let first_unit = experts[0][0].unit;
        // Experts that stay where they are need not be computed before the next one is looked at.
        let mut batch = [Expert { id: 0, gate: *router, up: *router, down: *router }; BATCH];
        let mut n = 0;
        for &unit in &demanded {
            self.acquire(unit)?;
            let id = unit - first_unit;
            let [gate, up, down] = experts[id].each_ref().map(|t| self.weight(t));
            batch[n] = Expert { id: id as u32, gate, up, down };
            n += 1;
            if n == BATCH || !self.source.rests(unit) {
                self.compute(&batch[..n])?;
                n = 0;
            }
            self.release(unit)?;
        }
        if n > 0 {
            self.compute(&batch[..n])?;
        }
        *self.demanded = demanded;
        for &class in self.classes {
            self.turn_to(class);
            self.backend.combine_experts()?;
        }
        Ok(())
    }

    fn compute(&mut self, experts: &[Expert]) -> Result<(), ForwardError> {
        for &class in self.classes {
            self.turn_to(class);
            self.backend.experts(experts)?;
        }
        Ok(())
    }

    fn head(&mut self) -> Result<(), ForwardError> {
        let wanted = self.outputs.iter().any(|o| !o.is_empty());
        for (i, slice) in self.model.head.iter().enumerate() {
            // Without outputs the slices are still consumed, so that the cycle stays whole.
            self.acquire(slice.weight.unit)?;
            let classes = if wanted { self.classes } else { &[] };
            for &class in classes {
                self.turn_to(class);
                if i == 0 {
                    let norm = self.norm(&self.model.output_norm);
                    self.backend.output_norm(&norm)?;
                }
                let w = self.linear(&LinearRef { weight: slice.weight, bias: slice.bias });
                self.backend.head(&w, slice.first_row)?;
            }
            self.release(slice.weight.unit)?;
        }
        Ok(())
    }
}
