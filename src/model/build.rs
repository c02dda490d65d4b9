//! Finds and checks every tensor of a file, cuts them into units and writes down what a pass does with them.
//!
//! The parts that blocks are made of, for the architectures in `arch` to put together. Each tensor that is taken is
//! marked; what is left over is an error.

mod mixers;

use std::cell::RefCell;
use std::collections::HashSet;

use super::program::{Block, Experts, HELD, HeadSlice, Held, LinearRef, Model, NormRef, Span, Stage, TensorRef};
use super::program::{UnitKind, UnitSpec};
use super::{HParams, ModelError, RopeSpec};
use crate::backend::{Act, Activation, NormOf, Op, Scores, computable, reference};
use crate::gguf::{Gguf, TensorInfo, TensorType};

/// Head slices are no larger than this, nor than the largest other unit.
const HEAD_SLICE_BYTES_MAX: u64 = 64 << 20;

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadNorms {
    /// None.
    No,
    /// Of each head by itself, without weights and behind the rotary embedding.
    PlainAfterRope,
    /// Of each head by itself.
    Each,
    /// As `Each`, if the file has them.
    EachIfThere,
    /// As `Each`, behind the rotary embedding.
    EachAfterRope,
    /// Of all heads together.
    Whole,
}

/// How the attention part of a block differs from llama's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    /// Name of the norm before it; none where it reads X as it is.
    pub norm: Option<&'static str>,
    pub head_norms: HeadNorms,
    /// Whether queries and keys rotate.
    pub rotates: bool,
    /// Whether queries are scaled by position, where the model has such a scale.
    pub by_position: bool,
    pub sinks: bool,
    /// Whether queries come with gates of the output, in each head of `attn_q`.
    pub gated: bool,
    /// Whether values are normed, without weights, and are the keys as they come where the file has no others.
    pub norms_values: bool,
    /// Block whose keys and values it attends to, in place of its own.
    pub shared: Option<usize>,
    /// Name of the norm of its output.
    pub post_norm: Option<&'static str>,
    /// Whether its output is added to X by the feed-forward part, which reads X without it.
    pub deferred: bool,
}

/// llama's.
pub(super) const ATTENTION: Attention = Attention {
    norm: Some("attn_norm"),
    head_norms: HeadNorms::No,
    rotates: true,
    by_position: true,
    sinks: false,
    gated: false,
    norms_values: false,
    shared: None,
    post_norm: None,
    deferred: false,
};

/// What a feed-forward part reads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reads {
    /// X through the norm of that name.
    Norm(&'static str),
    /// X as it is.
    X,
    /// What attention has read.
    Same,
}

/// How the feed-forward part of a block differs from llama's.
#[derive(Clone, Copy, Debug)]
pub(super) struct FeedForward {
    pub reads: Reads,
    pub how: Activation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Whether gate and up are the rows of `ffn_up`, one after the other.
    pub fused: bool,
    /// Name of the norm of its output.
    pub post_norm: Option<&'static str>,
    /// Whether the output of attention is added here.
    pub adds_attention: bool,
}

/// llama's.
pub(super) const FEED_FORWARD: FeedForward = FeedForward {
    reads: Reads::Norm("ffn_norm"),
    how: Activation::Silu,
    gated: true,
    fused: false,
    post_norm: None,
    adds_attention: false,
};

/// How the routed part of a block differs from that of qwen3moe.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixture {
    pub norm: &'static str,
    pub how: Activation,
    /// Whether router and experts have biases.
    pub biases: bool,
    pub choose: Choose,
    /// Whether the feed-forward part that all tokens pass has a gate, `ffn_gate_inp_shexp`.
    pub gated_shared: bool,
    /// Ending of the names of a feed-forward part that all tokens pass, `_shexp` or nothing; none where there is none.
    pub shared: Option<&'static str>,
}

/// Whether the vector `exp_probs_b` is added to the scores that choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choose {
    /// No.
    ByScore,
    /// If the file has one.
    IfThere,
    /// Yes.
    ByBias,
}

/// Mixtral's.
pub(super) const MIXTURE: Mixture = Mixture {
    norm: "ffn_norm",
    how: Activation::Silu,
    biases: false,
    choose: Choose::ByScore,
    gated_shared: false,
    shared: None,
};

/// Why a tensor that is not used does no harm; `None` if it is not known to do none.
fn harmless(name: &str, h: &HParams) -> Option<&'static str> {
    let of_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let block = of_block.map(|(_, what)| what);
    let number = of_block.and_then(|(i, _)| i.parse::<usize>().ok());
    if number.is_some_and(|i| (h.n_layers..h.n_layers + h.n_next).contains(&i)) {
        Some("a block that predicts further tokens, which takes no part in the next one's logits")
    } else if number.is_some_and(|i| i < h.n_layers && i + h.n_sharing >= h.n_layers)
        && block.is_some_and(|b| ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight"].contains(&b))
    {
        Some("keys and values of a block that attends to those of another one")
    } else if block == Some("attn_rot_embd.weight") {
        Some("a table of rotary frequencies, which follow from the metadata")
    } else if name.ends_with(".input_scale") {
        Some("a scale of activations for engines that quantise them to 4 bits")
    } else if ["v.", "mm.", "a."].iter().any(|part| name.starts_with(part)) {
        Some("a part for images or sounds, which no text passes")
    } else if name.starts_with("mtp.") {
        Some("a part that predicts further tokens, which takes no part in the next one's logits")
    } else if name.starts_with("cls.") {
        Some("a classifier's head, which takes no part in the next token's logits")
    } else {
        None
    }
}

/// A file on its way to a [`Model`].
pub(super) struct Builder<'a> {
    gguf: &'a Gguf,
    pub h: &'a HParams,
    units: Vec<UnitSpec>,
    stages: Vec<Stage>,
    blocks: Vec<Block>,
    cached: Vec<usize>,
    states: usize,
    ropes: Vec<RopeSpec>,
    divisors: Vec<TensorInfo>,
    widened: Vec<TensorInfo>,
    held: Vec<Held>,
    per_block: Option<TensorInfo>,
    /// Number in the file of the first block.
    first: usize,
    /// What is done with embeddings before the first stage's own operations.
    start: Vec<Op<TensorRef>>,
    /// Names of the tensors that the structure uses.
    taken: RefCell<HashSet<&'a str>>,
}

/// The whole.
impl<'a> Builder<'a> {
    pub fn new(gguf: &'a Gguf, h: &'a HParams) -> Builder<'a> {
        let mut b = Builder {
            gguf,
            h,
            units: Vec::new(),
            stages: Vec::new(),
            blocks: Vec::new(),
            cached: Vec::new(),
            states: 0,
            ropes: Vec::new(),
            divisors: Vec::new(),
            widened: Vec::new(),
            held: Vec::new(),
            per_block: None,
            first: 0,
            start: Vec::new(),
            taken: RefCell::default(),
        };
        if h.embedding_scale != 1.0 {
            b.start.push(Op::Scale { act: Act::X, by: h.embedding_scale });
        }
        b
    }

    /// A builder of the block that predicts the token behind the next one, which comes behind the others.
    ///
    /// # Errors
    /// If there is none.
    pub fn next(gguf: &'a Gguf, h: &'a HParams) -> Result<Builder<'a>, ModelError> {
        let b = Builder { first: h.n_layers, start: Vec::new(), ..Builder::new(gguf, h) };
        b.find(&b.of_next("eh_proj"))?;
        Ok(b)
    }

    /// A tensor of the block that predicts further tokens.
    fn of_next(&self, name: &str) -> String {
        format!("blk.{}.nextn.{name}.weight", self.first)
    }

    /// Name of one that the block may share with the model.
    fn or_shared(&self, name: &str, shared: &str) -> String {
        let own = self.of_next(name);
        if self.first > 0 && self.has(&own) { own } else { format!("{shared}.weight") }
    }

    /// The embedding and its rows.
    pub fn embedding(&self) -> Result<(TensorInfo, usize), ModelError> {
        let t = self.computable(self.find(&self.or_shared("embed_tokens", "token_embd"))?)?;
        let n_embd = self.h.n_embd as u64;
        match t.shape[..] {
            [cols, rows] if cols == n_embd && rows < 1 << 31 => Ok((t.clone(), rows as usize)),
            _ => {
                let tokens = self.gguf.metadata.strings("tokenizer.ggml.tokens").map_or(0, |t| t.len() as u64);
                Err(ModelError::Shape { name: t.name.clone(), found: t.shape.clone(), expected: vec![n_embd, tokens] })
            }
        }
    }

    /// The model, once its blocks are built: the head is added.
    pub fn finish(mut self, embedding: TensorInfo, n_vocab: usize) -> Result<Model, ModelError> {
        let start = std::mem::take(&mut self.start);
        if let Some(first) = self.stages.first_mut() {
            first.ops.splice(0..0, start);
        }
        let (head, tied) = self.head(&embedding, n_vocab)?;
        self.check_next()?;
        let unused = self.unused();
        let Builder { h, first, units, stages, blocks, cached, states, ropes, divisors, widened, .. } = self;
        let (held, per_block) = (self.held, self.per_block);
        let hparams = match first {
            0 => h.clone(),
            first => {
                let n_dense = usize::from(!h.is_routed(first));
                let (attends, masks) = (Vec::new(), Vec::new());
                let (n_layers, n_next, n_per_block) = (1, 0, h.n_embd);
                HParams { n_layers, n_next, n_per_block, n_dense, attends, masks, expert_step: 1, ..h.clone() }
            }
        };
        Ok(Model {
            hparams,
            n_vocab,
            units,
            stages,
            blocks,
            cached,
            per_block,
            states,
            head,
            embedding,
            tied,
            ropes,
            divisors,
            widened,
            held,
            unused,
        })
    }
}

/// Tensors.
impl<'a> Builder<'a> {
    /// The tensor called `name`, which counts as used from here on.
    fn optional(&self, name: &str) -> Option<&'a TensorInfo> {
        let t = self.gguf.tensor(name)?;
        self.taken.borrow_mut().insert(&t.name);
        Some(t)
    }

    fn find(&self, name: &str) -> Result<&'a TensorInfo, ModelError> {
        self.optional(name).ok_or_else(|| self.missing(name))
    }

    /// Makes sure that a tensor which other architectures may lack is there; it is taken by whatever reads it.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`] if it is not.
    pub fn needs(&self, name: &str) -> Result<(), ModelError> {
        if self.has(name) { Ok(()) } else { Err(self.missing(name)) }
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::MissingTensor { name: name.to_owned(), arch: self.h.arch.name }
    }

    pub fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// The tensors that were not taken, in file order.
    fn unused(&self) -> Vec<(String, Option<&'static str>)> {
        let taken = self.taken.borrow();
        let left = self.gguf.tensors.iter().filter(|t| !taken.contains(t.name.as_str()));
        left.map(|t| (t.name.clone(), harmless(&t.name, self.h))).collect()
    }

    fn check(&self, t: &'a TensorInfo, shape: &[u64]) -> Result<&'a TensorInfo, ModelError> {
        if t.shape != shape {
            return Err(ModelError::Shape { name: t.name.clone(), found: t.shape.clone(), expected: shape.to_vec() });
        }
        Ok(t)
    }

    /// A matrix that some backend has kernels for.
    fn computable(&self, t: &'a TensorInfo) -> Result<&'a TensorInfo, ModelError> {
        if computable(t.ty) {
            return Ok(t);
        }
        let all = TensorType::ALL.iter().filter(|&&ty| computable(ty)).map(|ty| ty.name()).collect::<Vec<_>>();
        Err(ModelError::Type { name: t.name.clone(), found: t.ty, expected: all.join(", ") })
    }

    /// A vector that can be turned to F32.
    fn widenable(&self, t: &'a TensorInfo) -> Result<&'a TensorInfo, ModelError> {
        if reference::TYPES.contains(&t.ty) {
            return Ok(t);
        }
        let all = reference::TYPES.iter().map(|ty| ty.name()).collect::<Vec<_>>();
        Err(ModelError::Type { name: t.name.clone(), found: t.ty, expected: all.join(", ") })
    }

    fn unit(&mut self, kind: UnitKind, name: String) -> usize {
        self.units.push(UnitSpec { kind, name, spans: Vec::new() });
        self.units.len() - 1
    }

    /// Adds `rows` rows from `first` of a tensor to a unit.
    fn put(&mut self, unit: usize, t: &TensorInfo, first: usize, rows: usize) -> TensorRef {
        let cols = t.shape[0] as usize;
        // Whole rows were checked when the header was read.
        let row_bytes = t.ty.row_bytes(cols).unwrap_or(0) as u64;
        let spans = &mut self.units[unit].spans;
        spans.push(Span {
            shard: t.shard,
            offset: t.offset + first as u64 * row_bytes,
            bytes: rows as u64 * row_bytes,
            columns: None,
        });
        TensorRef { unit, span: spans.len() - 1, ty: t.ty, rows, cols }
    }

    /// A vector that is the one row of a matrix.
    fn put_row(&mut self, unit: usize, t: &TensorInfo) -> TensorRef {
        self.put(unit, t, 0, 1)
    }

    /// `len` elements from `first` of a vector: in the unit where they are F32, else held apart.
    fn put_vector(
        &mut self,
        unit: usize,
        t: &'a TensorInfo,
        first: usize,
        len: usize,
    ) -> Result<TensorRef, ModelError> {
        if t.ty != TensorType::F32 {
            return self.hold(t, first, len);
        }
        let spans = &mut self.units[unit].spans;
        spans.push(Span { shard: t.shard, offset: t.offset + 4 * first as u64, bytes: 4 * len as u64, columns: None });
        Ok(TensorRef { unit, span: spans.len() - 1, ty: t.ty, rows: 1, cols: len })
    }

    /// `len` elements from `first` of a vector, held apart.
    fn hold(&mut self, t: &'a TensorInfo, first: usize, len: usize) -> Result<TensorRef, ModelError> {
        self.widenable(t)?;
        let tensor = self.widened.iter().position(|w| w.name == t.name).unwrap_or_else(|| {
            self.widened.push(t.clone());
            self.widened.len() - 1
        });
        self.held.push(Held { tensor, first });
        Ok(TensorRef { unit: HELD, span: self.held.len() - 1, ty: TensorType::F32, rows: 1, cols: len })
    }

    pub fn vector(&mut self, unit: usize, name: &str, len: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[len as u64])?;
        self.put_vector(unit, t, 0, len)
    }

    pub fn optional_vector(&mut self, unit: usize, name: &str, len: usize) -> Result<Option<TensorRef>, ModelError> {
        if self.has(name) { self.vector(unit, name, len).map(Some) } else { Ok(None) }
    }

    /// A vector that is held apart, for what is done when its unit has been given back; `None` if the file has none.
    pub fn held_vector(&mut self, name: &str, len: usize) -> Result<Option<TensorRef>, ModelError> {
        if !self.has(name) {
            return Ok(None);
        }
        let t = self.check(self.find(name)?, &[len as u64])?;
        self.hold(t, 0, len).map(Some)
    }

    /// The same of a norm without bias, which the file must have.
    pub fn held_norm(&mut self, prefix: &str, len: usize) -> Result<NormRef, ModelError> {
        let t = self.check(self.find(&format!("{prefix}.weight"))?, &[len as u64])?;
        let weight = Some(self.hold(t, 0, len)?);
        Ok(NormOf { kind: self.h.norm, weight, bias: None, eps: self.h.norm_eps })
    }

    /// A norm of the architecture's kind: a weight, and a bias if the file has one.
    pub fn norm(&mut self, unit: usize, prefix: &str, len: usize) -> Result<NormRef, ModelError> {
        let weight = Some(self.vector(unit, &format!("{prefix}.weight"), len)?);
        let name = format!("{prefix}.bias");
        let bias = match self.h.norm_biases {
            // Falcon's second norm may have none.
            true if prefix.ends_with("_2") => self.optional_vector(unit, &name, len)?,
            true => Some(self.vector(unit, &name, len)?),
            false => None,
        };
        Ok(NormOf { kind: self.h.norm, weight, bias, eps: self.h.norm_eps })
    }

    fn matrix(&mut self, unit: usize, name: &str, rows: usize, cols: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[cols as u64, rows as u64])?;
        self.computable(t)?;
        Ok(self.put(unit, t, 0, rows))
    }

    pub fn linear(&mut self, unit: usize, prefix: &str, rows: usize, cols: usize) -> Result<LinearRef, ModelError> {
        let weight = self.matrix(unit, &format!("{prefix}.weight"), rows, cols)?;
        let name = format!("{prefix}.bias");
        let bias = match self.h.arch.biases {
            true => Some(self.vector(unit, &name, rows)?),
            false => self.optional_vector(unit, &name, rows)?,
        };
        Ok(LinearRef { weight, bias })
    }

    /// Adds an embedding of its position to each token's, from `position_embd.weight`; behind the first stage's beginning.
    pub fn positions(&mut self) -> Result<(), ModelError> {
        let (d, n) = (self.h.n_embd, self.h.n_ctx_train);
        let t = self.check(self.find("position_embd.weight")?, &[d as u64, n as u64])?;
        let table = self.hold(t, 0, d * n)?;
        self.start.push(Op::AddPosition { table });
        Ok(())
    }

    /// A rotary embedding; its number follows from the order.
    pub fn rope(&mut self, rope: RopeSpec) {
        self.ropes.push(rope);
    }

    /// Divisors of rotary frequencies, one a pair, if the file has them: their number.
    pub fn divisors(&mut self, name: &str) -> Result<Option<usize>, ModelError> {
        if !self.has(name) {
            return Ok(None);
        }
        self.needed_divisors(name).map(Some)
    }

    /// As [`Builder::divisors`], of a file that must have them.
    pub fn needed_divisors(&mut self, name: &str) -> Result<usize, ModelError> {
        let t = self.find(name)?;
        self.widenable(self.check(t, &[self.h.n_rot as u64 / 2])?)?;
        self.divisors.push(t.clone());
        Ok(self.divisors.len() - 1)
    }
}

/// Parts of blocks.
impl<'a> Builder<'a> {
    /// Begins the operations with another unit.
    fn stage(&mut self, unit: usize, block: Option<usize>) {
        self.stages.push(Stage { unit, block, ops: Vec::new(), experts: None });
    }

    pub fn op(&mut self, op: Op<TensorRef>) {
        if let Some(stage) = self.stages.last_mut() {
            stage.ops.push(op);
        }
    }

    /// Products of one input; none of them reads what another writes.
    fn products<const N: usize>(&mut self, from: Act, products: [(Act, LinearRef); N]) {
        products.into_iter().for_each(|(to, w)| self.op(Op::Linear { to, from, w, add: false }));
    }

    /// Brings the output of a part to X: at once, or through its norm and the model's scale.
    fn output(
        &mut self,
        from: Act,
        w: LinearRef,
        post_norm: Option<(usize, String)>,
        deferred: bool,
    ) -> Result<(), ModelError> {
        let scale = self.h.residual_scale;
        if post_norm.is_none() && !deferred && scale == 1.0 {
            self.op(Op::Linear { to: Act::X, from, w, add: true });
            return Ok(());
        }
        self.op(Op::Linear { to: Act::Out, from, w, add: false });
        if let Some((unit, name)) = post_norm {
            let norm = self.norm(unit, &name, self.h.n_embd)?;
            self.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
        }
        if scale != 1.0 {
            self.op(Op::Scale { act: Act::Out, by: scale });
        }
        if !deferred {
            self.op(Op::Add { to: Act::X, from: Act::Out });
        }
        Ok(())
    }

    /// The projections of queries, keys and values: three tensors, or the rows of one after the other in
    /// `attn_qkv`. One matrix may come with three biases, as llama.cpp allows.
    fn qkv(&mut self, unit: usize, i: usize, p: &str) -> Result<[LinearRef; 3], ModelError> {
        let (h, shape) = (self.h, self.h.shape(i));
        let (d, q_dim, kv_dim) = (h.n_embd, h.n_heads * shape.dim, shape.heads * shape.dim);
        let parts = [("attn_q", 0, q_dim), ("attn_k", q_dim, kv_dim), ("attn_v", q_dim + kv_dim, kv_dim)];
        let all = q_dim + 2 * kv_dim;
        let fused = format!("{p}.attn_qkv.weight");
        let one = if self.has(&fused) {
            Some(self.computable(self.check(self.find(&fused)?, &[d as u64, all as u64])?)?)
        } else {
            None
        };
        let bias = match one.and_then(|_| self.optional(&format!("{p}.attn_qkv.bias"))) {
            Some(t) => Some(self.check(t, &[all as u64])?),
            None if h.arch.biases => Some(self.find(&format!("{p}.attn_qkv.bias"))?),
            None => None,
        };
        let mut part = |(name, first, rows): (&str, usize, usize)| {
            let Some(t) = one else { return self.linear(unit, &format!("{p}.{name}"), rows, d) };
            let weight = self.put(unit, t, first, rows);
            let bias = match bias {
                Some(t) => Some(self.put_vector(unit, t, first, rows)?),
                None => self.optional_vector(unit, &format!("{p}.{name}.bias"), rows)?,
            };
            Ok(LinearRef { weight, bias })
        };
        Ok([part(parts[0])?, part(parts[1])?, part(parts[2])?])
    }

    /// Begins block `i`: the unit of its attention part, or of what all tokens share.
    fn begin(&mut self, i: usize) -> Result<usize, ModelError> {
        let block = i - self.first;
        let u = match self.h.is_routed(i) {
            false => self.unit(UnitKind::Attention(block), format!("blk.{i} attention")),
            true => self.unit(UnitKind::Shared(block), format!("blk.{i}")),
        };
        self.stage(u, Some(block));
        self.blocks.push(Block { unit: u, ffn_unit: u });
        match (block, self.first) {
            (0, 0) if self.h.n_per_block > 0 => self.inputs_of_blocks(u)?,
            (0, first) if first > 0 => self.input_of_next(u)?,
            _ => {}
        }
        Ok(u)
    }

    /// X becomes a projection of the token's embedding and the final hidden state of the model at the position before.
    fn input_of_next(&mut self, unit: usize) -> Result<(), ModelError> {
        let d = self.h.n_embd;
        let p = format!("blk.{}.nextn", self.first);
        let norm = self.norm(unit, &format!("{p}.enorm"), d)?;
        self.op(Op::Norm { to: Act::H, from: Act::X, norm });
        let norm = self.norm(unit, &format!("{p}.hnorm"), d)?;
        self.op(Op::Norm { to: Act::PerBlock, from: Act::PerBlock, norm });
        self.op(Op::Join);
        let w = self.linear(unit, &format!("{p}.eh_proj"), d, 2 * d)?;
        self.op(Op::Linear { to: Act::X, from: Act::Mix, w, add: false });
        Ok(())
    }

    /// The attention part of block `i`, in a unit of its own, or in that of what all tokens share.
    pub fn attention(&mut self, i: usize, a: &Attention) -> Result<(), ModelError> {
        let (h, shape) = (self.h, self.h.shape(i));
        let (d, q_dim, kv_dim) = (h.n_embd, h.n_heads * shape.dim, shape.heads * shape.dim);
        let p = format!("blk.{i}");
        let u = self.begin(i)?;
        let from = match a.norm {
            Some(name) => {
                let norm = self.norm(u, &format!("{p}.{name}"), d)?;
                self.op(Op::Norm { to: Act::H, from: Act::X, norm });
                Act::H
            }
            None => Act::X,
        };
        if !h.shapes.is_empty() {
            self.op(Op::Shape(shape));
        }
        if a.shared.is_some() {
            let q = self.linear(u, &format!("{p}.attn_q"), q_dim, d)?;
            self.products(from, [(Act::Q, q)]);
        } else if a.norms_values && [".attn_v", ".attn_qkv"].iter().all(|t| !self.has(&format!("{p}{t}.weight"))) {
            let q = self.linear(u, &format!("{p}.attn_q"), q_dim, d)?;
            let k = self.linear(u, &format!("{p}.attn_k"), kv_dim, d)?;
            self.products(from, [(Act::Q, q), (Act::K, k)]);
            self.op(Op::Copy { to: Act::V, from: Act::K });
        } else if a.gated {
            let both = self.linear(u, &format!("{p}.attn_q"), 2 * q_dim, d)?;
            let k = self.linear(u, &format!("{p}.attn_k"), kv_dim, d)?;
            let v = self.linear(u, &format!("{p}.attn_v"), kv_dim, d)?;
            self.products(from, [(Act::Mix, both), (Act::K, k), (Act::V, v)]);
            self.op(Op::SplitHeads);
        } else {
            let [q, k, v] = self.qkv(u, i, &p)?;
            self.products(from, [(Act::Q, q), (Act::K, k), (Act::V, v)]);
        }
        // Keys that others have made are normed and rotated already.
        let own = 2 - usize::from(a.shared.is_some());
        let names = [(Act::Q, format!("{p}.attn_q_norm"), q_dim), (Act::K, format!("{p}.attn_k_norm"), kv_dim)];
        let norms = match a.head_norms {
            HeadNorms::EachIfThere if !self.has(&format!("{}.weight", names[0].1)) => HeadNorms::No,
            other => other,
        };
        let mut each = Vec::new();
        for (act, name, width) in names.into_iter().take(own) {
            match norms {
                HeadNorms::No => {}
                HeadNorms::PlainAfterRope => {
                    let norm = NormOf { kind: h.norm, weight: None, bias: None, eps: h.norm_eps };
                    each.push(Op::HeadNorm { act, norm });
                }
                HeadNorms::Whole => {
                    let norm = self.norm(u, &name, width)?;
                    each.push(Op::Norm { to: act, from: act, norm });
                }
                HeadNorms::Each | HeadNorms::EachIfThere | HeadNorms::EachAfterRope => {
                    let norm = self.norm(u, &name, shape.dim)?;
                    each.push(Op::HeadNorm { act, norm });
                }
            }
        }
        if a.norms_values && a.shared.is_none() {
            let norm = NormOf { kind: h.norm, weight: None, bias: None, eps: h.norm_eps };
            each.push(Op::HeadNorm { act: Act::V, norm });
        }
        let rope = h.rope_of(i);
        let mut turn = Vec::new();
        if a.rotates && h.rotates {
            turn.extend([Act::Q, Act::K].into_iter().take(own).map(|act| Op::Rope { act, rope }));
        }
        if matches!(norms, HeadNorms::EachAfterRope | HeadNorms::PlainAfterRope) {
            std::mem::swap(&mut each, &mut turn);
        }
        each.into_iter().chain(turn).for_each(|op| self.op(op));
        if let Some((by, every, offset)) = h.by_position.filter(|_| a.by_position) {
            self.op(Op::ScaleByPosition { act: Act::Q, by, every, offset });
        }
        let layer = match a.shared.and_then(|block| self.cached.iter().position(|c| *c == block)) {
            Some(layer) => layer,
            None => {
                self.cached.push(i - self.first);
                let layer = self.cached.len() - 1;
                self.op(Op::Store { layer });
                layer
            }
        };
        let sinks = if a.sinks { Some(self.vector(u, &format!("{p}.attn_sinks.weight"), h.n_heads)?) } else { None };
        let scores = Scores { mask: h.mask(i), ..h.scores };
        self.op(Op::Attend { layer, scores, sinks });
        if a.gated {
            self.op(Op::GateAttn);
        }
        if i + 1 == h.n_layers {
            self.op(Op::Keep);
        }
        let output = self.linear(u, &format!("{p}.attn_output"), d, q_dim)?;
        self.output(Act::Attn, output, a.post_norm.map(|n| (u, format!("{p}.{n}"))), a.deferred)
    }

    /// The feed-forward part of a dense block, in a unit of its own.
    pub fn feed_forward(&mut self, i: usize, f: &FeedForward) -> Result<(), ModelError> {
        let p = format!("blk.{i}");
        let u = self.unit(UnitKind::FeedForward(i - self.first), format!("{p} feed-forward"));
        self.stage(u, Some(i - self.first));
        match self.blocks.get_mut(i - self.first) {
            Some(block) => block.ffn_unit = u,
            // A block without any other part.
            None => {
                self.blocks.push(Block { unit: u, ffn_unit: u });
                if i + 1 == self.h.n_layers {
                    self.op(Op::Keep);
                }
            }
        }
        let from = match f.reads {
            Reads::Norm(name) => {
                let norm = self.norm(u, &format!("{p}.{name}"), self.h.n_embd)?;
                self.op(Op::Norm { to: Act::H, from: Act::X, norm });
                Act::H
            }
            Reads::X => Act::X,
            Reads::Same => Act::H,
        };
        if f.adds_attention {
            self.op(Op::Add { to: Act::X, from: Act::Out });
        }
        let width = self.h.width(i);
        self.hidden(u, &p, "", from, width, f)?;
        let down = self.linear(u, &format!("{p}.ffn_down"), self.h.n_embd, width)?;
        self.output(Act::Hidden, down, f.post_norm.map(|n| (u, format!("{p}.{n}"))), false)
    }

    /// The hidden state of a feed-forward part whose tensors end in `ending`.
    pub fn hidden(
        &mut self,
        unit: usize,
        p: &str,
        ending: &str,
        from: Act,
        width: usize,
        f: &FeedForward,
    ) -> Result<(), ModelError> {
        let d = self.h.n_embd;
        let name = |what: &str| format!("{p}.ffn_{what}{ending}");
        match (f.gated, f.fused) {
            (false, _) => {
                let up = self.linear(unit, &name("up"), width, d)?;
                self.products(from, [(Act::Hidden, up)]);
            }
            (true, false) => {
                let gate = self.linear(unit, &name("gate"), width, d)?;
                let up = self.linear(unit, &name("up"), width, d)?;
                self.products(from, [(Act::Hidden, gate), (Act::Up, up)]);
            }
            (true, true) => {
                let both = format!("{}.weight", name("up"));
                let t = self.computable(self.check(self.find(&both)?, &[d as u64, 2 * width as u64])?)?;
                let [gate, up] =
                    [0, width].map(|first| LinearRef { weight: self.put(unit, t, first, width), bias: None });
                self.products(from, [(Act::Hidden, gate), (Act::Up, up)]);
            }
        }
        self.op(Op::Activate { how: f.how, gated: f.gated, width });
        Ok(())
    }

    /// The routed part of block `i`, whose router is in the unit of what all tokens share.
    pub fn mixture(&mut self, i: usize, m: &Mixture) -> Result<(), ModelError> {
        let h = self.h;
        let (d, n) = (h.n_embd, h.n_experts);
        let p = format!("blk.{i}");
        let Some(u) = self.blocks.last().map(|b| b.unit) else { return Ok(()) };
        let norm = self.norm(u, &format!("{p}.{}", m.norm), d)?;
        self.op(Op::Norm { to: Act::H, from: Act::X, norm });
        let scaled = h.residual_scale != 1.0;
        if let Some(ending) = m.shared {
            self.hidden(u, &p, ending, Act::H, h.n_ff_shared, &FeedForward { how: m.how, ..FEED_FORWARD })?;
            let w = self.linear(u, &format!("{p}.ffn_down{ending}"), d, h.n_ff_shared)?;
            if m.gated_shared {
                let t = self.find(&format!("{p}.ffn_gate_inp{ending}.weight"))?;
                let gate = self.put_row(u, self.computable(self.check(t, &[d as u64])?)?);
                self.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
                self.products(Act::H, [(Act::Beta, LinearRef { weight: gate, bias: None })]);
                self.op(Op::GateOut);
                self.op(Op::Add { to: Act::X, from: Act::Out });
            } else {
                let to = if scaled { Act::Out } else { Act::X };
                self.op(Op::Linear { to, from: Act::Hidden, w, add: !scaled });
            }
        }
        let w = match m.biases {
            true => self.linear(u, &format!("{p}.ffn_gate_inp"), n, d)?,
            false => LinearRef { weight: self.matrix(u, &format!("{p}.ffn_gate_inp.weight"), n, d)?, bias: None },
        };
        let name = format!("{p}.exp_probs_b.bias");
        let choose = match m.choose {
            Choose::ByScore => None,
            Choose::IfThere => self.optional_vector(u, &name, n)?,
            Choose::ByBias => Some(self.vector(u, &name, n)?),
        };
        self.op(Op::Route { w, choose, how: h.router });
        let mut after =
            vec![Op::Combine { to: if scaled { Act::Out } else { Act::X }, add: !scaled || m.shared.is_some() }];
        if scaled {
            after.push(Op::Scale { act: Act::Out, by: h.residual_scale });
            after.push(Op::Add { to: Act::X, from: Act::Out });
        }
        let list = self.experts(i, m.biases)?;
        self.end_stage(Experts { list, how: m.how, after });
        Ok(())
    }

    fn end_stage(&mut self, experts: Experts) {
        if let Some(stage) = self.stages.last_mut() {
            stage.experts = Some(experts);
        }
    }

    /// Ends the operations with a unit by the experts of block `i`, which it has routed to, and what becomes of them.
    pub fn end_with_experts(&mut self, i: usize, how: Activation, after: Vec<Op<TensorRef>>) -> Result<(), ModelError> {
        let list = self.experts(i, false)?;
        self.end_stage(Experts { list, how, after });
        Ok(())
    }

    /// The unit of the feed-forward part of the block that was begun last, or of what all tokens share of it.
    pub fn ffn_unit(&self) -> usize {
        self.blocks.last().map_or(0, |b| b.ffn_unit)
    }

    /// What each block is given beside X: a projection of the token's embedding, and a row of a second one.
    fn inputs_of_blocks(&mut self, unit: usize) -> Result<(), ModelError> {
        let (d, each, all) = (self.h.n_embd, self.h.n_per_block, self.h.n_per_block * self.h.n_layers);
        let table = self.find("per_layer_token_embd.weight")?;
        let rows = self.find("token_embd.weight")?.shape[1];
        self.per_block = Some(self.widenable(self.check(table, &[all as u64, rows])?)?.clone());
        let w = self.linear(unit, "per_layer_model_proj", all, d)?;
        self.op(Op::Linear { to: Act::Mix, from: Act::X, w, add: false });
        self.op(Op::Scale { act: Act::Mix, by: 1.0 / (d as f32).sqrt() });
        let norm = self.norm(unit, "per_layer_proj_norm", each)?;
        self.op(Op::HeadNorm { act: Act::Mix, norm });
        self.op(Op::Scale { act: Act::PerBlock, by: (each as f32).sqrt() });
        self.op(Op::Add { to: Act::PerBlock, from: Act::Mix });
        self.op(Op::Scale { act: Act::PerBlock, by: std::f32::consts::FRAC_1_SQRT_2 });
        Ok(())
    }

    fn experts(&mut self, i: usize, biases: bool) -> Result<Vec<[LinearRef; 3]>, ModelError> {
        let h = self.h;
        let (d, f, n) = (h.n_embd, h.n_ff_expert, h.n_experts);
        let p = format!("blk.{i}");
        let parts = [("gate", f, d), ("up", f, d), ("down", d, f)];
        let mut stacks = Vec::with_capacity(3);
        for (what, rows, cols) in parts {
            let bias = match biases {
                true => Some(self.check(self.find(&format!("{p}.ffn_{what}_exps.bias"))?, &[rows as u64, n as u64])?),
                false => None,
            };
            stacks.push((self.stack(&p, what, n, rows, cols)?, bias));
        }
        let mut list = Vec::with_capacity(n);
        for e in 0..n {
            let u = self.unit(UnitKind::Expert { layer: i - self.first, expert: e }, format!("{p} expert {e}"));
            let mut each = Vec::with_capacity(3);
            for (s, bias) in &stacks {
                let weight = self.put(u, s.tensors[e % s.tensors.len()], s.first(e), s.rows);
                let bias = match bias {
                    Some(t) => Some(self.hold(t, e * s.rows, s.rows)?),
                    None => None,
                };
                each.push(LinearRef { weight, bias });
            }
            list.push([each[0], each[1], each[2]]);
        }
        Ok(list)
    }

    /// One matrix of every expert: all in one tensor; or, as before April 2024, a tensor each; or gate and
    /// up of each expert one after the other.
    fn stack(&self, p: &str, what: &str, n: usize, rows: usize, cols: usize) -> Result<Stack<'a>, ModelError> {
        let shape = [cols as u64, rows as u64, n as u64];
        let (one, pair) = (format!("{p}.ffn_{what}_exps.weight"), format!("{p}.ffn_gate_up_exps.weight"));
        let each = |e: usize| format!("{p}.ffn_{what}.{e}.weight");
        if !self.has(&one) && self.has(&each(0)) {
            let tensors = (0..n).map(|e| self.computable(self.check(self.find(&each(e))?, &shape[..2])?));
            return Ok(Stack { tensors: tensors.collect::<Result<_, _>>()?, pitch: 0, offset: 0, rows });
        }
        if !self.has(&one) && what != "down" && self.has(&pair) {
            let t = self.computable(self.check(self.find(&pair)?, &[shape[0], 2 * shape[1], shape[2]])?)?;
            return Ok(Stack { tensors: vec![t], pitch: 2 * rows, offset: if what == "up" { rows } else { 0 }, rows });
        }
        let t = self.computable(self.check(self.find(&one)?, &shape)?)?;
        Ok(Stack { tensors: vec![t], pitch: rows, offset: 0, rows })
    }

    /// Blocks that are set apart as predicting further tokens must be such, as far as the file has them.
    fn check_next(&self) -> Result<(), ModelError> {
        for i in self.h.n_layers..self.h.n_layers + self.h.n_next {
            let prefix = format!("blk.{i}.");
            if self.gguf.tensors.iter().any(|t| t.name.starts_with(&prefix)) {
                self.find(&format!("{prefix}nextn.eh_proj.weight"))?;
            }
        }
        Ok(())
    }

    /// The norm before the head, and the head in slices of rows.
    fn head(&mut self, embedding: &TensorInfo, n_vocab: usize) -> Result<(Vec<HeadSlice>, bool), ModelError> {
        let tied = self.h.arch.tied || !self.has("output.weight") && !self.h.arch.own_head;
        let name = self.or_shared("shared_head_head", if tied { "token_embd" } else { "output" });
        let t = self.find(&name)?;
        let tied = t.name == embedding.name;
        let output_norm = self.or_shared("shared_head_norm", self.h.arch.output_norm);
        let output_norm = output_norm.trim_end_matches(".weight");
        let t = self.computable(self.check(t, &[self.h.n_embd as u64, n_vocab as u64])?)?;
        let bias = match self.optional("output.bias") {
            Some(b) => Some(self.check(b, &[n_vocab as u64])?),
            None => None,
        };
        let largest = self.units.iter().map(UnitSpec::bytes).max().unwrap_or(0);
        let row_bytes = (t.bytes / n_vocab as u64).max(1);
        let rows_max = (largest.min(HEAD_SLICE_BYTES_MAX) / row_bytes).max(1) as usize;
        let n_slices = n_vocab.div_ceil(rows_max);
        let rows_each = n_vocab.div_ceil(n_slices);
        let mut slices = Vec::with_capacity(n_slices);
        for (i, first_row) in (0..n_vocab).step_by(rows_each).enumerate() {
            let u = self.unit(UnitKind::Head(i), format!("output rows from {first_row}"));
            self.stage(u, None);
            if i == 0 {
                let norm = self.norm(u, output_norm, self.h.n_embd)?;
                if self.first > 0 {
                    self.op(Op::Keep);
                }
                self.op(Op::Outputs);
                self.op(Op::Norm { to: Act::H, from: Act::X, norm });
            }
            let rows = rows_each.min(n_vocab - first_row);
            let weight = self.put(u, t, first_row, rows);
            let bias = match bias {
                Some(b) => Some(self.put_vector(u, b, first_row, rows)?),
                None => None,
            };
            let (scale, cap) = (self.h.logit_scale, self.h.logit_cap);
            self.op(Op::Head { w: LinearRef { weight, bias }, first_row, scale, cap });
            slices.push(HeadSlice { weight, first_row });
        }
        Ok((slices, tied))
    }
}

/// Where the rows of one matrix of each expert lie.
struct Stack<'a> {
    /// One tensor for all experts, or one each.
    tensors: Vec<&'a TensorInfo>,
    /// Rows from one expert to the next.
    pitch: usize,
    /// Rows before the matrix among those of its expert.
    offset: usize,
    rows: usize,
}

impl Stack<'_> {
    fn first(&self, expert: usize) -> usize {
        expert * self.pitch + self.offset
    }
}
