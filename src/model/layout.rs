//! Which tensors a model has, checked against its hyper-parameters, and how they fall into units.
//!
//! A unit is what is fetched and used together: the attention part of a block and its feed-forward part; in a mixture
//! of experts the part that all tokens share, attention and router, and each expert; a slice of rows of the output head.
//! The embedding is no unit: a pass needs one row of it per token.

use std::cell::RefCell;
use std::collections::HashSet;

use super::{Arch, HParams, ModelError};
use crate::backend::{computable, reference};
use crate::gguf::{Gguf, TensorInfo, TensorType};

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// The attention part of a dense block.
    Attention(usize),
    /// The feed-forward part of a dense block.
    FeedForward(usize),
    /// What all tokens share of a block with routed experts: its attention part and its router.
    Shared(usize),
    /// One routed expert.
    Expert {
        /// Its block.
        layer: usize,
        /// Its number in the block.
        expert: usize,
    },
    /// A slice of the output head.
    Head(usize),
}

/// Some bytes of one of the model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of the shard.
    pub shard: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A unit: its kind and the bytes it consists of, by tensor.
#[derive(Clone, Debug)]
pub struct UnitSpec {
    /// What it is.
    pub kind: UnitKind,
    /// A name for messages, for example `blk.3 attention` or `blk.3 expert 17`.
    pub name: String,
    /// The tensors' bytes. A [`TensorRef`] names one by its index here.
    pub spans: Vec<Span>,
}

impl UnitSpec {
    /// Payload: bytes of all spans.
    pub fn bytes(&self) -> u64 {
        self.spans.iter().map(|s| s.bytes).sum()
    }
}

/// A tensor (or a slice of one) within a unit, or held apart.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef {
    /// Index into [`Model::units`]; [`HELD`] for a vector that is held apart.
    pub unit: usize,
    /// Index into that unit's spans, or into [`Model::held`].
    pub span: usize,
    /// Element type.
    pub ty: TensorType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

/// In place of a unit's number: the vector is one of [`Model::held`].
pub const HELD: usize = usize::MAX;

/// Elements of a vector that the file stores in another type than F32. Backends read vectors as F32, so
/// these are widened when they are loaded, and stay in memory apart from the units.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Index into [`Model::widened`].
    pub tensor: usize,
    /// Number of the first element.
    pub first: usize,
}

/// A matrix with its optional bias.
#[derive(Clone, Copy, Debug)]
pub struct LinearRef {
    /// The matrix.
    pub weight: TensorRef,
    /// The bias.
    pub bias: Option<TensorRef>,
}

/// The feed-forward part of a block.
#[derive(Clone, Debug)]
pub enum Ffn {
    /// SwiGLU.
    Dense {
        /// Gate.
        gate: LinearRef,
        /// Up.
        up: LinearRef,
        /// Down.
        down: LinearRef,
    },
    /// Routed experts.
    Experts {
        /// `n_experts` × `n_embd`.
        router: TensorRef,
        /// Gate, up and down of each expert, each set in a unit of its own.
        experts: Vec<[TensorRef; 3]>,
    },
}

/// One block's tensors.
#[derive(Clone, Debug)]
pub struct Block {
    /// Unit of the attention part, or of what all tokens share.
    pub unit: usize,
    /// Unit of the feed-forward part, its norm included; the same one where all tokens share it. It stands for the
    /// block where one home is shown: most of a dense block's bytes are in it, and experts have homes of their own.
    pub ffn_unit: usize,
    /// Norm before attention.
    pub attn_norm: TensorRef,
    /// Query projection.
    pub q: LinearRef,
    /// Key projection.
    pub k: LinearRef,
    /// Value projection.
    pub v: LinearRef,
    /// Per-head norm of queries.
    pub q_norm: Option<TensorRef>,
    /// Per-head norm of keys.
    pub k_norm: Option<TensorRef>,
    /// Output projection.
    pub output: LinearRef,
    /// Norm before the feed-forward part.
    pub ffn_norm: TensorRef,
    /// The feed-forward part.
    pub ffn: Ffn,
}

/// Some rows of the output head.
#[derive(Clone, Copy, Debug)]
pub struct HeadSlice {
    /// The rows.
    pub weight: TensorRef,
    /// One float per row, where the head has a bias.
    pub bias: Option<TensorRef>,
    /// Number of the first one.
    pub first_row: usize,
}

/// A model's structure: everything but the weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Hyper-parameters.
    pub hparams: HParams,
    /// Rows of the head and of the embedding.
    pub n_vocab: usize,
    /// All units in pass order: the parts of each block in turn (experts last), then the head's slices.
    pub units: Vec<UnitSpec>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// The head's slices, in row order. The first one's unit also holds `output_norm`.
    pub head: Vec<HeadSlice>,
    /// Norm before the head.
    pub output_norm: TensorRef,
    /// `token_embd.weight`.
    pub embedding: TensorInfo,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// `rope_freqs.weight`, which the loader reads once.
    pub rope_freqs: Option<TensorInfo>,
    /// Vectors that are not F32 in the file, widened when they are loaded.
    pub widened: Vec<TensorInfo>,
    /// What is used of them.
    pub held: Vec<Held>,
    /// Tensors of the file that the computation does not use, in file order, each with the reason why that
    /// does no harm; `None` where it changes the result.
    pub unused: Vec<(String, Option<&'static str>)>,
}

/// What a matrix does: mixes of tensor types choose by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Queries, keys or the output of attention.
    Attention,
    /// Values.
    Value,
    /// Gate or up of a feed-forward part.
    Up,
    /// Down.
    Down,
    /// Scores of experts.
    Router,
    /// The output head.
    Head,
    /// The embedding, of which a token needs one row.
    Embedding,
}

/// Head slices are no larger than this, nor than the largest other unit.
const HEAD_SLICE_BYTES_MAX: u64 = 64 << 20;

impl Model {
    /// Finds and checks every tensor of `gguf`.
    ///
    /// # Errors
    /// If a tensor or key is missing, of the wrong shape or of a type without kernels, or if the file has
    /// tensors that the architecture's computation here leaves out.
    pub fn new(gguf: &Gguf) -> Result<Model, ModelError> {
        let model = Model::read(gguf)?;
        let mut left_out = model.unused.iter().filter(|(_, harmless)| harmless.is_none());
        match left_out.next() {
            None => Ok(model),
            Some((first, _)) => Err(ModelError::UnusedTensors {
                first: first.clone(),
                more: left_out.count(),
                arch: model.hparams.arch.name(),
                n_layers: model.hparams.n_layers,
            }),
        }
    }

    /// As [`Model::new`], with the tensors that would be left out listed in [`Model::unused`].
    ///
    /// # Errors
    /// As [`Model::new`], those tensors apart.
    pub fn read(gguf: &Gguf) -> Result<Model, ModelError> {
        let hparams = HParams::from_metadata(&gguf.metadata)?;
        let mut b = Builder {
            gguf,
            h: &hparams,
            units: Vec::new(),
            widened: Vec::new(),
            held: Vec::new(),
            taken: RefCell::default(),
        };
        let embedding = b.computable(b.find("token_embd.weight")?)?.clone();
        let n_vocab = match embedding.shape[..] {
            [cols, rows] if cols == hparams.n_embd as u64 && rows < 1 << 31 => rows as usize,
            _ => {
                return Err(ModelError::Shape {
                    name: embedding.name,
                    found: embedding.shape,
                    expected: vec![
                        hparams.n_embd as u64,
                        gguf.metadata.strings("tokenizer.ggml.tokens").map_or(0, |t| t.len() as u64),
                    ],
                });
            }
        };
        let blocks = (0..hparams.n_layers).map(|i| b.block(i)).collect::<Result<Vec<_>, _>>()?;
        let (head, output_norm, tied) = b.head(n_vocab)?;
        let rope_freqs = match b.optional("rope_freqs.weight") {
            Some(t) => Some(b.widenable(b.check(t, &[hparams.n_rot as u64 / 2])?)?.clone()),
            None => None,
        };
        let unused = b.unused();
        let Builder { units, widened, held, .. } = b;
        Ok(Model {
            hparams,
            n_vocab,
            units,
            blocks,
            head,
            output_norm,
            embedding,
            tied,
            rope_freqs,
            widened,
            held,
            unused,
        })
    }

    /// Bytes of the vectors that are held apart, as F32.
    pub fn held_bytes(&self) -> u64 {
        self.widened.iter().map(|t| t.shape.iter().product::<u64>() * 4).sum()
    }

    /// Units in the order in which a pass consumes them, routed experts apart.
    pub fn pass_order(&self) -> impl Iterator<Item = usize> {
        self.units.iter().enumerate().filter(|(_, u)| !matches!(u.kind, UnitKind::Expert { .. })).map(|(i, _)| i)
    }

    /// Every matrix that a pass multiplies with, with the block it belongs to.
    pub fn matrices(&self) -> Vec<(Role, Option<usize>, TensorRef)> {
        let mut all = Vec::new();
        let (mut blocks, mut head) = (self.blocks.clone(), self.head.clone());
        visit(&mut blocks, &mut head, &mut |role, block, t| all.push((role, block, *t)));
        all
    }

    /// The same model with other types of its matrices: sizes are exact, places in the file are not. A
    /// type whose blocks do not divide a matrix's rows is not taken.
    pub fn retyped(&self, choose: impl Fn(Role, Option<usize>) -> TensorType) -> Model {
        let mut model = self.clone();
        let units = &mut model.units;
        visit(&mut model.blocks, &mut model.head, &mut |role, block, t| {
            let ty = choose(role, block);
            if let (Some(row_bytes), false) = (ty.row_bytes(t.cols), role == Role::Router) {
                units[t.unit].spans[t.span].bytes = (t.rows * row_bytes) as u64;
                t.ty = ty;
            }
        });
        let role = if self.tied { Role::Head } else { Role::Embedding };
        let ty = choose(role, None);
        if let Some(row_bytes) = ty.row_bytes(self.hparams.n_embd) {
            model.embedding.bytes = (self.n_vocab * row_bytes) as u64;
            model.embedding.ty = ty;
        }
        model
    }

    /// The largest feed-forward width of a dense block.
    pub fn n_ff(&self) -> usize {
        if self.hparams.n_experts == 0 { self.hparams.n_ff } else { 0 }
    }
}

/// Shows every matrix that a pass multiplies with, with the block it belongs to.
fn visit(blocks: &mut [Block], head: &mut [HeadSlice], f: &mut dyn FnMut(Role, Option<usize>, &mut TensorRef)) {
    for (i, b) in blocks.iter_mut().enumerate() {
        let mut show = |role, t: &mut TensorRef| f(role, Some(i), t);
        for l in [&mut b.q, &mut b.k, &mut b.output] {
            show(Role::Attention, &mut l.weight);
        }
        show(Role::Value, &mut b.v.weight);
        match &mut b.ffn {
            Ffn::Dense { gate, up, down } => {
                show(Role::Up, &mut gate.weight);
                show(Role::Up, &mut up.weight);
                show(Role::Down, &mut down.weight);
            }
            Ffn::Experts { router, experts } => {
                show(Role::Router, router);
                for [gate, up, down] in experts {
                    show(Role::Up, gate);
                    show(Role::Up, up);
                    show(Role::Down, down);
                }
            }
        }
    }
    for slice in head {
        f(Role::Head, None, &mut slice.weight);
    }
}

/// Why a tensor that is not used does no harm; `None` if it is not known to do none.
fn harmless(name: &str) -> Option<&'static str> {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).map(|(_, what)| what);
    if block == Some("attn_rot_embd.weight") {
        Some("a table of rotary frequencies, which follow from the metadata")
    } else if name.ends_with(".input_scale") {
        Some("a scale of activations for engines that quantise them to 4 bits")
    } else if name.starts_with("cls.") {
        Some("a classifier's head, which takes no part in the next token's logits")
    } else {
        None
    }
}

struct Builder<'a> {
    gguf: &'a Gguf,
    h: &'a HParams,
    units: Vec<UnitSpec>,
    widened: Vec<TensorInfo>,
    held: Vec<Held>,
    /// Names of the tensors that the structure uses.
    taken: RefCell<HashSet<&'a str>>,
}

impl<'a> Builder<'a> {
    /// The tensor called `name`, which counts as used from here on.
    fn optional(&self, name: &str) -> Option<&'a TensorInfo> {
        let t = self.gguf.tensor(name)?;
        self.taken.borrow_mut().insert(&t.name);
        Some(t)
    }

    fn find(&self, name: &str) -> Result<&'a TensorInfo, ModelError> {
        self.optional(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), arch: self.h.arch.name() })
    }

    fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// The tensors that were not taken, in file order.
    fn unused(&self) -> Vec<(String, Option<&'static str>)> {
        let taken = self.taken.borrow();
        let left = self.gguf.tensors.iter().filter(|t| !taken.contains(t.name.as_str()));
        left.map(|t| (t.name.clone(), harmless(&t.name))).collect()
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
        });
        TensorRef { unit, span: spans.len() - 1, ty: t.ty, rows, cols }
    }

    /// `len` elements from `first` of a vector: in the unit where they are F32, else held apart.
    fn put_vector(
        &mut self,
        unit: usize,
        t: &'a TensorInfo,
        first: usize,
        len: usize,
    ) -> Result<TensorRef, ModelError> {
        let f32 = TensorType::F32;
        if t.ty == f32 {
            let spans = &mut self.units[unit].spans;
            spans.push(Span { shard: t.shard, offset: t.offset + 4 * first as u64, bytes: 4 * len as u64 });
            return Ok(TensorRef { unit, span: spans.len() - 1, ty: f32, rows: 1, cols: len });
        }
        self.widenable(t)?;
        let tensor = self.widened.iter().position(|w| w.name == t.name).unwrap_or_else(|| {
            self.widened.push(t.clone());
            self.widened.len() - 1
        });
        self.held.push(Held { tensor, first });
        Ok(TensorRef { unit: HELD, span: self.held.len() - 1, ty: f32, rows: 1, cols: len })
    }

    fn vector(&mut self, unit: usize, name: &str, len: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[len as u64])?;
        self.put_vector(unit, t, 0, len)
    }

    fn optional_vector(&mut self, unit: usize, name: &str, len: usize) -> Result<Option<TensorRef>, ModelError> {
        if self.has(name) { self.vector(unit, name, len).map(Some) } else { Ok(None) }
    }

    fn matrix(&mut self, unit: usize, name: &str, rows: usize, cols: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[cols as u64, rows as u64])?;
        self.computable(t)?;
        Ok(self.put(unit, t, 0, rows))
    }

    fn linear(&mut self, unit: usize, prefix: &str, rows: usize, cols: usize) -> Result<LinearRef, ModelError> {
        let weight = self.matrix(unit, &format!("{prefix}.weight"), rows, cols)?;
        let bias = self.optional_vector(unit, &format!("{prefix}.bias"), rows)?;
        Ok(LinearRef { weight, bias })
    }

    /// The projections of queries, keys and values: three tensors, or the rows of one after the other in
    /// `attn_qkv`. One matrix may come with three biases, as llama.cpp allows.
    fn qkv(&mut self, unit: usize, p: &str) -> Result<[LinearRef; 3], ModelError> {
        let h = self.h;
        let (d, q_dim, kv_dim) = (h.n_embd, h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim);
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

    fn block(&mut self, i: usize) -> Result<Block, ModelError> {
        let h = self.h;
        let (d, q_dim) = (h.n_embd, h.n_heads * h.head_dim);
        let p = format!("blk.{i}");
        let dense = h.n_experts == 0;
        let u = match dense {
            true => self.unit(UnitKind::Attention(i), format!("{p} attention")),
            false => self.unit(UnitKind::Shared(i), p.clone()),
        };
        let attn_norm = self.vector(u, &format!("{p}.attn_norm.weight"), d)?;
        let [q, k, v] = self.qkv(u, &p)?;
        let head_norm = |b: &mut Self, name: String| match h.arch {
            Arch::Qwen3 | Arch::Qwen3Moe => b.vector(u, &name, h.head_dim).map(Some),
            Arch::Llama | Arch::Qwen2 => Ok(None),
        };
        let q_norm = head_norm(self, format!("{p}.attn_q_norm.weight"))?;
        let k_norm = head_norm(self, format!("{p}.attn_k_norm.weight"))?;
        let output = self.linear(u, &format!("{p}.attn_output"), d, q_dim)?;
        let ffn_unit = if dense { self.unit(UnitKind::FeedForward(i), format!("{p} feed-forward")) } else { u };
        let ffn_norm = self.vector(ffn_unit, &format!("{p}.ffn_norm.weight"), d)?;
        let ffn = if dense {
            Ffn::Dense {
                gate: self.linear(ffn_unit, &format!("{p}.ffn_gate"), h.n_ff, d)?,
                up: self.linear(ffn_unit, &format!("{p}.ffn_up"), h.n_ff, d)?,
                down: self.linear(ffn_unit, &format!("{p}.ffn_down"), d, h.n_ff)?,
            }
        } else {
            self.experts(i, ffn_unit)?
        };
        Ok(Block { unit: u, ffn_unit, attn_norm, q, k, v, q_norm, k_norm, output, ffn_norm, ffn })
    }

    fn experts(&mut self, i: usize, shared: usize) -> Result<Ffn, ModelError> {
        let h = self.h;
        let (d, f, n) = (h.n_embd, h.n_ff_expert, h.n_experts);
        let p = format!("blk.{i}");
        let router = self.matrix(shared, &format!("{p}.ffn_gate_inp.weight"), n, d)?;
        let gate = self.stack(&p, "gate", n, f, d)?;
        let up = self.stack(&p, "up", n, f, d)?;
        let down = self.stack(&p, "down", n, d, f)?;
        let experts = (0..n)
            .map(|e| {
                let u = self.unit(UnitKind::Expert { layer: i, expert: e }, format!("{p} expert {e}"));
                [&gate, &up, &down].map(|s| self.put(u, s.tensors[e % s.tensors.len()], s.first(e), s.rows))
            })
            .collect();
        Ok(Ffn::Experts { router, experts })
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

    fn head(&mut self, n_vocab: usize) -> Result<(Vec<HeadSlice>, TensorRef, bool), ModelError> {
        let tied = !self.has("output.weight");
        let t = self.find(if tied { "token_embd.weight" } else { "output.weight" })?;
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
        let mut output_norm = None;
        let mut slices = Vec::with_capacity(n_slices);
        for (i, first_row) in (0..n_vocab).step_by(rows_each).enumerate() {
            let u = self.unit(UnitKind::Head(i), format!("output rows from {first_row}"));
            if i == 0 {
                output_norm = Some(self.vector(u, "output_norm.weight", self.h.n_embd)?);
            }
            let rows = rows_each.min(n_vocab - first_row);
            let weight = self.put(u, t, first_row, rows);
            let bias = match bias {
                Some(b) => Some(self.put_vector(u, b, first_row, rows)?),
                None => None,
            };
            slices.push(HeadSlice { weight, bias, first_row });
        }
        let Some(output_norm) = output_norm else {
            return Err(ModelError::Shape {
                name: t.name.clone(),
                found: t.shape.clone(),
                expected: vec![self.h.n_embd as u64, 1],
            });
        };
        Ok((slices, output_norm, tied))
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
