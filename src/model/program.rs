//! What a model consists of: units of bytes, and the operations of a pass over them, as data.
//!
//! A unit is what is fetched and used together: the attention part of a block and its feed-forward part; in a mixture
//! of experts the part that all tokens share, attention and router, and each expert; a slice of rows of the output head.
//! The embedding is no unit: a pass needs one row of it per token.

use super::{HParams, RopeSpec};
use crate::backend::{Act, Activation, KvShape, LinearOf, Mask, NormOf, Op};
use crate::gguf::{TensorInfo, TensorType};

/// What a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// The attention part of a dense block.
    Attention(usize),
    /// The feed-forward part of a dense block.
    FeedForward(usize),
    /// The columns of such a part's hidden state that processors next to a device compute, where it is cut ([`Model::sliced`]).
    Slice(usize),
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
    /// First byte; of columns, the first of the whole matrix.
    pub offset: u64,
    /// Bytes that are used.
    pub bytes: u64,
    /// Which columns of a matrix they are, where they are not all of its rows.
    pub columns: Option<Columns>,
}

/// Some columns of a matrix that lies by rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Bytes of a whole row.
    pub row_bytes: u64,
    /// Bytes of a row before them.
    pub before: u64,
    /// Bytes of a row that are theirs.
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
    /// Whether it is a routed expert.
    pub fn is_expert(&self) -> bool {
        matches!(self.kind, UnitKind::Expert { .. })
    }

    /// Bytes of the file that are read for it: of columns, all of their rows.
    pub fn read_bytes(&self) -> u64 {
        let of = |s: &Span| s.columns.map_or(s.bytes, |c| s.bytes / c.bytes.max(1) * c.row_bytes);
        self.spans.iter().map(of).sum()
    }

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

/// Elements of a vector that is no part of a unit: backends read vectors as F32, so those of other types are widened when
/// they are loaded, and stay in memory. So do the biases of experts, which would make three reads more of each.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Index into [`Model::widened`].
    pub tensor: usize,
    /// Number of the first element.
    pub first: usize,
}

/// A matrix with its optional bias.
pub type LinearRef = LinearOf<TensorRef>;
/// A norm.
pub type NormRef = NormOf<TensorRef>;

/// The operations with one unit, and those with the experts that they choose.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The unit.
    pub unit: usize,
    /// The block it belongs to; none for slices of the head.
    pub block: Option<usize>,
    /// What is done while the unit is held.
    pub ops: Vec<Op<TensorRef>>,
    /// What is done afterwards with the experts that [`Op::Route`], the last of `ops`, has chosen.
    pub experts: Option<Experts>,
}

impl Stage {
    /// Whether its operations could be computed elsewhere with X alone: they read nothing else that others have left, and
    /// leave nothing else.
    pub fn takes_x_alone(&self) -> bool {
        if self.experts.is_some() {
            return false;
        }
        let (mut own, mut kept) = (Vec::new(), true);
        for op in &self.ops {
            let (reads, writes) = match *op {
                Op::Norm { to, from, .. } => ([Some(from), None], to),
                Op::Linear { to, from, add, .. } => ([Some(from), add.then_some(to)], to),
                Op::Activate { gated, .. } => ([Some(Act::Hidden), gated.then_some(Act::Up)], Act::Hidden),
                Op::Add { to, from } => ([Some(from), Some(to)], to),
                Op::Scale { act, .. } | Op::Multiply { act, .. } => ([Some(act), None], act),
                _ => return false,
            };
            kept &= reads.iter().flatten().all(|act| *act == Act::X || own.contains(act));
            own.push(writes);
        }
        kept && own.contains(&Act::X)
    }
}

/// The routed experts of a block.
#[derive(Clone, Debug)]
pub struct Experts {
    /// Gate, up and down of each expert, each set in a unit of its own.
    pub list: Vec<[LinearRef; 3]>,
    /// What makes their hidden states.
    pub how: Activation,
    /// What becomes of their outputs, with no weights of a unit.
    pub after: Vec<Op<TensorRef>>,
}

/// The units of a block that stand for it where one home is shown.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Unit of the attention part, or of what all tokens share.
    pub unit: usize,
    /// Unit of the feed-forward part, its norm included; the same one where all tokens share it. Most of a dense block's
    /// bytes are in it, and experts have homes of their own.
    pub ffn_unit: usize,
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
    /// All units in pass order: the parts of each block in turn (experts last), then the head's slices.
    pub units: Vec<UnitSpec>,
    /// What a pass does, unit by unit.
    pub stages: Vec<Stage>,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// Blocks that have a cache of keys and values, by its number.
    pub cached: Vec<usize>,
    /// `per_layer_token_embd.weight`, where each block is given an embedding of the token: a row of a part for each block.
    pub per_block: Option<TensorInfo>,
    /// Blocks that have a recurrent state.
    pub states: usize,
    /// The head's slices, in row order. The first one's unit also holds the norm before the head.
    pub head: Vec<HeadSlice>,
    /// `token_embd.weight`.
    pub embedding: TensorInfo,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Rotary embeddings, by the number that [`Op::Rope`] names.
    pub ropes: Vec<RopeSpec>,
    /// Divisors of rotary frequencies, which the loader reads once.
    pub divisors: Vec<TensorInfo>,
    /// Vectors that are held apart, as F32.
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

impl Model {
    /// Bytes of the vectors that are held apart, as F32.
    pub fn held_bytes(&self) -> u64 {
        self.widened.iter().map(|t| t.shape.iter().product::<u64>() * 4).sum()
    }

    /// Heads of each cache of keys and values, by its number.
    pub fn cache_shapes(&self) -> impl Iterator<Item = KvShape> {
        self.cached.iter().map(|i| self.hparams.shape(*i))
    }

    /// Positions that each cache of keys and values shows at most to a token, itself among them; `None` where it shows all.
    pub fn windows(&self) -> Vec<Option<usize>> {
        let mut windows = vec![Some(1); self.cached.len()];
        for op in self.stages.iter().flat_map(|s| &s.ops) {
            if let Op::Attend { layer, scores, .. } = op
                && let Some(window) = windows.get_mut(*layer)
            {
                *window = match scores.mask {
                    Mask::Full => None,
                    Mask::Window(n) | Mask::Chunk(n) => window.map(|w| w.max(n)),
                };
            }
        }
        windows
    }

    /// Whether a pass needs final hidden states of another model for each token, as one that predicts further tokens does.
    pub fn takes_hidden(&self) -> bool {
        self.hparams.n_per_block > 0 && self.per_block.is_none()
    }

    /// Units in the order in which a pass consumes them, routed experts apart.
    pub fn pass_order(&self) -> impl Iterator<Item = usize> {
        self.units.iter().enumerate().filter(|(_, u)| !matches!(u.kind, UnitKind::Expert { .. })).map(|(i, _)| i)
    }

    /// Every matrix that a pass multiplies with, with the block it belongs to.
    pub fn matrices(&self) -> Vec<(Role, Option<usize>, TensorRef)> {
        let mut all = Vec::new();
        visit(&mut self.stages.clone(), &mut |role, block, t| all.push((role, block, *t)));
        all
    }

    /// The same model with other types of its matrices: sizes are exact, places in the file are not. A
    /// type whose blocks do not divide a matrix's rows is not taken.
    pub fn retyped(&self, choose: impl Fn(Role, Option<usize>) -> TensorType) -> Model {
        let mut model = self.clone();
        let units = &mut model.units;
        visit(&mut model.stages, &mut |role, block, t| {
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

    /// Shows every matrix that a pass multiplies with wherever the model names it, the head's slices included.
    pub(super) fn for_each_matrix(&mut self, f: &mut dyn FnMut(&mut TensorRef)) {
        visit(&mut self.stages, &mut |_, _, t| f(t));
        self.head.iter_mut().for_each(|h| f(&mut h.weight));
    }

    /// The widest hidden state of a feed-forward part that is no expert; 0 if there is none.
    pub fn n_ff(&self) -> usize {
        self.width(Act::Hidden).max(self.width(Act::Up))
    }

    /// Bytes of the largest routed expert; 0 if there is none.
    pub fn largest_expert(&self) -> u64 {
        let routed = self.units.iter().filter(|u| matches!(u.kind, UnitKind::Expert { .. }));
        routed.map(UnitSpec::bytes).max().unwrap_or(0)
    }

    /// The widest rows that a product writes to a buffer; 0 if none does.
    pub fn width(&self, act: Act) -> usize {
        let ops = self.stages.iter().flat_map(|s| &s.ops);
        let widths = ops.map(|op| match op {
            Op::Linear { to, w, .. } if *to == act => w.weight.rows,
            // Half of the heads' rows are gates.
            Op::SplitHeads if act == Act::Gates => self.hparams.n_heads * self.hparams.head_dim,
            Op::OfLatent { width, .. } if act == Act::Mix => self.hparams.n_heads * width,
            Op::Join if act == Act::Mix => 2 * self.hparams.n_embd,
            Op::SplitGroups if act == Act::Gates => self.hparams.recurrent.map_or(0, |r| r.n_values * r.dim),
            Op::ShortConv { .. } if act == Act::Gates => self.hparams.n_embd,
            _ => 0,
        });
        widths.max().unwrap_or(0)
    }
}

/// Shows every matrix that a pass multiplies with, with the block it belongs to.
fn visit(stages: &mut [Stage], f: &mut dyn FnMut(Role, Option<usize>, &mut TensorRef)) {
    for stage in stages {
        let block = stage.block;
        for op in &mut stage.ops {
            match op {
                Op::Linear { to, from, w, .. } => f(role(*to, *from), block, &mut w.weight),
                Op::Route { w, .. } => f(Role::Router, block, &mut w.weight),
                Op::Head { w, .. } => f(Role::Head, None, &mut w.weight),
                _ => {}
            }
        }
        for [gate, up, down] in stage.experts.iter_mut().flat_map(|e| &mut e.list) {
            f(Role::Up, block, &mut gate.weight);
            f(Role::Up, block, &mut up.weight);
            f(Role::Down, block, &mut down.weight);
        }
    }
}

fn role(to: Act, from: Act) -> Role {
    match (to, from) {
        (Act::V, _) => Role::Value,
        (Act::Hidden | Act::Up, _) => Role::Up,
        (_, Act::Hidden) => Role::Down,
        _ => Role::Attention,
    }
}
