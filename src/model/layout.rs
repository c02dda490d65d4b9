//! Which tensors a model has, checked against its hyper-parameters, and how they fall into units.
//!
//! A unit is what is fetched and used together: a dense block; in a mixture of experts the shared
//! part of a block and each expert; a slice of rows of the output head. The embedding is no unit:
//! a pass needs one row of it a token.

use super::{Arch, HParams, ModelError};
use crate::gguf::{Gguf, TensorInfo, TensorType};

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// A dense block, or the shared part of a mixture-of-experts block.
    Block(usize),
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
    /// A name for messages, for example `blk.3` or `blk.3 expert 17`.
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

/// A tensor (or a slice of one) within a unit.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef {
    /// Index into [`Model::units`].
    pub unit: usize,
    /// Index into that unit's spans.
    pub span: usize,
    /// Element type.
    pub ty: TensorType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
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
    /// All units: blocks in order (each followed by its experts), then the head's slices.
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
    pub fn new(gguf: &Gguf) -> Result<Model, ModelError> {
        let hparams = HParams::from_metadata(&gguf.metadata)?;
        let mut b = Builder { gguf, h: &hparams, units: Vec::new() };
        let embedding = b.find("token_embd.weight")?.clone();
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
        let rope_freqs = match gguf.tensor("rope_freqs.weight") {
            Some(t) => Some(b.check(t, &[hparams.n_rot as u64 / 2], true)?.clone()),
            None => None,
        };
        let units = b.units;
        Ok(Model { hparams, n_vocab, units, blocks, head, output_norm, embedding, tied, rope_freqs })
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

struct Builder<'a> {
    gguf: &'a Gguf,
    h: &'a HParams,
    units: Vec<UnitSpec>,
}

impl<'a> Builder<'a> {
    fn find(&self, name: &str) -> Result<&'a TensorInfo, ModelError> {
        self.gguf
            .tensor(name)
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), arch: self.h.arch.name() })
    }

    fn check(&self, t: &'a TensorInfo, shape: &[u64], f32_only: bool) -> Result<&'a TensorInfo, ModelError> {
        if t.shape != shape {
            return Err(ModelError::Shape { name: t.name.clone(), found: t.shape.clone(), expected: shape.to_vec() });
        }
        if f32_only && t.ty != TensorType::F32 {
            return Err(ModelError::Type { name: t.name.clone(), found: t.ty, expected: "F32".into() });
        }
        Ok(t)
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

    fn vector(&mut self, unit: usize, name: &str, len: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[len as u64], true)?;
        Ok(self.put(unit, t, 0, 1))
    }

    fn optional_vector(&mut self, unit: usize, name: &str, len: usize) -> Result<Option<TensorRef>, ModelError> {
        if self.gguf.tensor(name).is_none() { Ok(None) } else { self.vector(unit, name, len).map(Some) }
    }

    fn matrix(&mut self, unit: usize, name: &str, rows: usize, cols: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[cols as u64, rows as u64], false)?;
        Ok(self.put(unit, t, 0, rows))
    }

    fn linear(&mut self, unit: usize, prefix: &str, rows: usize, cols: usize) -> Result<LinearRef, ModelError> {
        let weight = self.matrix(unit, &format!("{prefix}.weight"), rows, cols)?;
        let bias = self.optional_vector(unit, &format!("{prefix}.bias"), rows)?;
        Ok(LinearRef { weight, bias })
    }

    fn block(&mut self, i: usize) -> Result<Block, ModelError> {
        let h = self.h;
        let (d, q_dim, kv_dim) = (h.n_embd, h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim);
        let p = format!("blk.{i}");
        let u = self.unit(UnitKind::Block(i), p.clone());
        let attn_norm = self.vector(u, &format!("{p}.attn_norm.weight"), d)?;
        let q = self.linear(u, &format!("{p}.attn_q"), q_dim, d)?;
        let k = self.linear(u, &format!("{p}.attn_k"), kv_dim, d)?;
        let v = self.linear(u, &format!("{p}.attn_v"), kv_dim, d)?;
        let head_norm = |b: &mut Self, name: String| match h.arch {
            Arch::Qwen3 | Arch::Qwen3Moe => b.vector(u, &name, h.head_dim).map(Some),
            Arch::Llama | Arch::Qwen2 => Ok(None),
        };
        let q_norm = head_norm(self, format!("{p}.attn_q_norm.weight"))?;
        let k_norm = head_norm(self, format!("{p}.attn_k_norm.weight"))?;
        let output = self.linear(u, &format!("{p}.attn_output"), d, q_dim)?;
        let ffn_norm = self.vector(u, &format!("{p}.ffn_norm.weight"), d)?;
        let ffn = if h.n_experts == 0 {
            Ffn::Dense {
                gate: self.linear(u, &format!("{p}.ffn_gate"), h.n_ff, d)?,
                up: self.linear(u, &format!("{p}.ffn_up"), h.n_ff, d)?,
                down: self.linear(u, &format!("{p}.ffn_down"), d, h.n_ff)?,
            }
        } else {
            self.experts(i, u)?
        };
        Ok(Block { attn_norm, q, k, v, q_norm, k_norm, output, ffn_norm, ffn })
    }

    fn experts(&mut self, i: usize, shared: usize) -> Result<Ffn, ModelError> {
        let h = self.h;
        let (d, f, n) = (h.n_embd, h.n_ff_expert, h.n_experts);
        let p = format!("blk.{i}");
        let t = self.check(self.find(&format!("{p}.ffn_gate_inp.weight"))?, &[d as u64, n as u64], true)?;
        let router = self.put(shared, t, 0, n);
        let stack = |what: &str, rows: usize, cols: usize| {
            let t = self.find(&format!("{p}.ffn_{what}_exps.weight"))?;
            self.check(t, &[cols as u64, rows as u64, n as u64], false)
        };
        let (gate, up, down) = (stack("gate", f, d)?, stack("up", f, d)?, stack("down", d, f)?);
        let experts = (0..n)
            .map(|e| {
                let u = self.unit(UnitKind::Expert { layer: i, expert: e }, format!("{p} expert {e}"));
                [self.put(u, gate, e * f, f), self.put(u, up, e * f, f), self.put(u, down, e * d, d)]
            })
            .collect();
        Ok(Ffn::Experts { router, experts })
    }

    fn head(&mut self, n_vocab: usize) -> Result<(Vec<HeadSlice>, TensorRef, bool), ModelError> {
        let tied = self.gguf.tensor("output.weight").is_none();
        let t = self.find(if tied { "token_embd.weight" } else { "output.weight" })?;
        let t = self.check(t, &[self.h.n_embd as u64, n_vocab as u64], false)?;
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
            let weight = self.put(u, t, first_row, rows_each.min(n_vocab - first_row));
            slices.push(HeadSlice { weight, first_row });
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
