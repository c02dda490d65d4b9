//! Operations of a pass one by one, for what no fused call of [`super::Backend`] covers.
//!
//! `W` is how a weight is named: by its place in a model, or where it has been brought.

/// An activation buffer: rows of F32, one a token of the class at hand. `X` and `H` last from one unit to the next; the
/// others may be overwritten by rows of the other class in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The residual stream, `n_embd` wide.
    X,
    /// What products read, `n_embd` wide: X normed.
    H,
    /// Queries, `n_heads * head_dim` wide.
    Q,
    /// Keys, `n_kv_heads * head_dim` wide.
    K,
    /// Values, `n_kv_heads * head_dim` wide.
    V,
    /// The output of attention, `n_heads * head_dim` wide.
    Attn,
    /// Gate and then hidden state of a feed-forward part, at most `n_ff` wide.
    Hidden,
    /// What the gate is multiplied with, at most `n_ff` wide.
    Up,
    /// The output of a part before it is added to X, `n_embd` wide.
    Out,
    /// What a recurrence takes in, or queries with their gates, [`super::Dims::n_mix`] wide.
    Mix,
    /// Gates of the output of attention or of a recurrence, [`super::Dims::n_attn`] wide.
    Gates,
    /// A few numbers a row: how much of what is new a recurrence takes, by head; or one gate.
    Beta,
    /// How fast a recurrence forgets, by head.
    Alpha,
    /// What each block is given beside X, [`super::Dims::n_per_block`] wide: a part for each. As X, it lasts from one unit
    /// to the next.
    PerBlock,
}

/// Heads of the keys and values of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// How many; divides the query heads.
    pub heads: usize,
    /// Elements of each, and of a query head.
    pub dim: usize,
    /// Elements at the beginning of keys that are the values, of which none are stored then; 0 where values are of their own.
    pub of_keys: usize,
}

impl KvShape {
    /// Values are as wide as keys, and stored like them.
    pub const fn new(heads: usize, dim: usize) -> KvShape {
        KvShape { heads, dim, of_keys: 0 }
    }

    /// Elements of a value.
    pub fn value_dim(self) -> usize {
        if self.of_keys > 0 { self.of_keys } else { self.dim }
    }
}

/// Keys and values that are made of one latent vector a token, in Up, and of elements that rotate and all heads share, in
/// Hidden. Of each query head in Mix the first `nope` elements do not rotate, and the others do.
#[derive(Clone, Copy, Debug)]
pub struct Latent<W> {
    /// Elements of the latent vector.
    pub rank: usize,
    /// Elements of a query head that do not rotate.
    pub nope: usize,
    /// Which of [`super::Dims::ropes`].
    pub rope: usize,
    /// A matrix for each head, one behind the other, `rank` × `nope`, that takes queries to latent vectors: `K = [latent |
    /// rotated]`, `Q = [matrix · first elements | rotated]`. Where there is none, Gates holds the expanded keys and values of
    /// each head, and `K = [its first nope elements | rotated]`, `V = [the others | zeros]`.
    pub absorbed: Option<W>,
}

/// What a norm divides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// The root of the mean of squares.
    Rms,
    /// The standard deviation, after the mean was subtracted.
    Layer,
}

/// A norm: `x / sqrt(mean(x²) + eps) * weight + bias`, or with the mean subtracted first.
#[derive(Clone, Copy, Debug)]
pub struct NormOf<W> {
    /// What it divides by.
    pub kind: NormKind,
    /// One F32 row; ones where there is none.
    pub weight: Option<W>,
    /// One F32 row; zeros where there is none.
    pub bias: Option<W>,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// A matrix with its optional bias, one F32 row.
#[derive(Clone, Copy, Debug)]
pub struct LinearOf<W> {
    /// The matrix.
    pub weight: W,
    /// The bias.
    pub bias: Option<W>,
}

/// Which earlier positions a token attends to, itself among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    Full,
    /// The last so many.
    Window(usize),
    /// Those since the last multiple of so many.
    Chunk(usize),
}

/// How scores of attention come about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Multiplies queries and keys' products; `None` for `1 / sqrt(head_dim)`.
    pub scale: Option<f32>,
    /// `cap * tanh(score / cap)`; 0 for none.
    pub cap: f32,
    /// Who is attended to.
    pub mask: Mask,
}

impl Scores {
    /// Those of llama.
    pub const PLAIN: Scores = Scores { scale: None, cap: 0.0, mask: Mask::Full };
}

/// What makes a hidden state of gate and up: `f(gate) * up`, or `f(gate)` where there is no up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// The form with tanh.
    Gelu,
    /// `max(x, 0)²`.
    ReluSquared,
    /// gpt-oss: gate up to a limit, up within it, `g * sigmoid(1.702 g) * (u + 1)`.
    ClampedSwiglu {
        /// The limit.
        limit: f32,
    },
}

/// How scores of a router become choices and weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// What makes probabilities of scores.
    pub gating: Gating,
    /// Divide the chosen weights by their sum.
    pub normalize: bool,
    /// Multiply the chosen weights by this (1 for none).
    pub scale: f32,
    /// Groups of experts, of which only the best are chosen from: how many, and how many are kept. 1 and 1 for none.
    pub groups: (usize, usize),
    /// Whether weights multiply what experts read, in place of their outputs.
    pub on_input: bool,
}

impl Router {
    /// Softmax over all experts.
    pub const fn softmax(normalize: bool, scale: f32) -> Router {
        Router { gating: Gating::Softmax, normalize, scale, groups: (1, 1), on_input: false }
    }
}

/// What makes probabilities of a router's scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// Each expert by itself.
    Sigmoid,
    /// Softmax over the chosen ones.
    SoftmaxOfChosen,
    /// Each of the chosen ones by itself.
    SigmoidOfChosen,
}

/// A gated delta net: for each value head, with queries and keys of length 1, `S ← g S; S ← S + k (β (v − Sᵀ k))ᵀ;
/// out = Sᵀ q / sqrt(dim)`, then `out = norm(out) * silu(gate)`.
#[derive(Clone, Copy, Debug)]
pub struct DeltaNet<W> {
    /// Which of the model's states.
    pub state: usize,
    /// `g = exp(decay * softplus(alpha + bias))`: one F32 a head.
    pub decay: W,
    /// One F32 a head.
    pub bias: W,
    /// RMS norm of each head, `dim` wide.
    pub norm: NormOf<W>,
    /// Whether a value head reads the key head of its number modulo theirs, rather than divided by its share; and whether
    /// Beta and Alpha come apart, rather than by key head in Beta.
    pub tiled: bool,
}

/// A selective state space (Mamba 2, arXiv 2405.21060): for each head, `S ← exp(rate decay) S + rate x Bᵀ; y = S C + skip x` with
/// `rate = softplus(Alpha + bias)`, then `y * silu(Gates)`, then the norm of each group by itself. Mix holds x of all heads, B and
/// C of all groups.
#[derive(Clone, Copy, Debug)]
pub struct Scan<W> {
    /// Which of the model's states.
    pub state: usize,
    /// Groups of heads, which share B and C.
    pub groups: usize,
    /// One F32 a head, negative.
    pub decay: W,
    /// One F32 a head.
    pub bias: W,
    /// One F32 a head.
    pub skip: W,
    /// Weights for all heads.
    pub norm: NormOf<W>,
}

/// An operation. Weights are rows back to back; vectors are F32.
#[derive(Clone, Copy, Debug)]
pub enum Op<W> {
    /// `to = norm(from)`, which are as wide.
    Norm {
        /// Written.
        to: Act,
        /// Read; may be `to`.
        from: Act,
        /// The norm.
        norm: NormOf<W>,
    },
    /// From here on heads have this shape, where a model has several.
    Shape(KvShape),
    /// The norm of each head of Q, K or V by itself, or of each part of Mix that is as wide as the norm.
    HeadNorm {
        /// What is normed.
        act: Act,
        /// The norm; `head_dim` wide where it has no weight.
        norm: NormOf<W>,
    },
    /// `to = from`, which are as wide.
    Copy {
        /// Written.
        to: Act,
        /// Read.
        from: Act,
    },
    /// `Mix = [H | PerBlock]`, both `n_embd` wide.
    Join,
    /// `act *= by`, a vector as wide or one number.
    Multiply {
        /// What is multiplied.
        act: Act,
        /// One F32 row.
        by: W,
    },
    /// `Up` = the part of PerBlock that a block is given.
    TakePart {
        /// Which one, in parts of `width`.
        part: usize,
        /// Columns.
        width: usize,
    },
    /// `to = weight · from + bias`, or added to `to`.
    Linear {
        /// Written, `weight`'s rows wide.
        to: Act,
        /// Read, `weight`'s columns wide.
        from: Act,
        /// The matrix.
        w: LinearOf<W>,
        /// Whether it is added.
        add: bool,
    },
    /// Rotary embedding of each head.
    Rope {
        /// Q or K.
        act: Act,
        /// Which of [`super::Dims::ropes`].
        rope: usize,
    },
    /// `act *= 1 + by * ln(1 + floor((position + offset) / every))`.
    ScaleByPosition {
        /// What is scaled.
        act: Act,
        /// Weight of the logarithm.
        by: f32,
        /// Positions of a step.
        every: f32,
        /// Added to positions.
        offset: f32,
    },
    /// `X += table[position]`.
    AddPosition {
        /// Rows of `n_embd` F32, one a position.
        table: W,
    },
    /// Of each head of Mix, the first half becomes Q and the second one Gates.
    SplitHeads,
    /// Mix holds the parts of each key head of a delta net in turn, which are its queries, keys, values and gates: becomes
    /// the queries, keys and values of all heads, and Gates the gates.
    SplitGroups,
    /// `Attn *= sigmoid(Gates)`.
    GateAttn,
    /// `Out *= sigmoid(Beta)`, which is one number a row.
    GateOut,
    /// A causal convolution of each channel of Mix with its last inputs, in place, then SiLU.
    Conv {
        /// Which of the model's states.
        state: usize,
        /// So many F32 of each channel, the newest input's last.
        w: W,
        /// One F32 a channel.
        bias: Option<W>,
    },
    /// `Attn = c * conv(b * x)` of the three parts b, c and x of Mix, channel by channel.
    ShortConv {
        /// Which of the model's states.
        state: usize,
        /// So many F32 of each channel, the newest input's last.
        w: W,
    },
    /// `Attn = scan of Mix, Alpha and Gates`.
    Scan(Scan<W>),
    /// `Attn = delta net of Mix (queries, keys, values), Beta, Alpha and Gates`, of which Gates alone are left as they were.
    DeltaNet(DeltaNet<W>),
    /// Q, K and V of latent vectors.
    Latent(Latent<W>),
    /// `Mix` = the values that attention has mixed, of each head: a matrix for each, one behind the other, times Attn; or the
    /// first elements of Attn.
    OfLatent {
        /// Elements of a value.
        width: usize,
        /// The matrices, `width` × `rank`.
        w: Option<W>,
    },
    /// Stores K and V to the cache of a layer.
    Store {
        /// The layer.
        layer: usize,
    },
    /// `Attn = softmax(scores of Q and the cache's keys) · values`.
    Attend {
        /// The layer.
        layer: usize,
        /// The scores.
        scores: Scores,
        /// A score of each query head that takes part in the sum and has no value.
        sinks: Option<W>,
    },
    /// From here on only the rows of outputs matter.
    Keep,
    /// `to += from`.
    Add {
        /// Written.
        to: Act,
        /// Read.
        from: Act,
    },
    /// `X += norm(Out)`: a norm and a sum that follow each other.
    AddNormed {
        /// The norm, `n_embd` wide.
        norm: NormOf<W>,
    },
    /// `act *= by`.
    Scale {
        /// What is scaled.
        act: Act,
        /// The factor.
        by: f32,
    },
    /// `Hidden = f(Hidden) * Up`, or `f(Hidden)`.
    Activate {
        /// The function.
        how: Activation,
        /// Whether there is Up.
        gated: bool,
        /// Columns.
        width: usize,
    },
    /// Scores of H choose experts for each row.
    Route {
        /// Scores.
        w: LinearOf<W>,
        /// Added to probabilities where experts are chosen, not where they are weighed: one F32 an expert.
        choose: Option<W>,
        /// The rest.
        how: Router,
    },
    /// The weights of the experts that [`Op::Route`] has chosen are multiplied by these.
    WeighExperts {
        /// One F32 an expert.
        by: W,
    },
    /// `to = Σ weight * output` of the experts, or added to it, in the order of choices.
    Combine {
        /// X, Out or H.
        to: Act,
        /// Whether it is added.
        add: bool,
    },
    /// The rows at hand are outputs from here on.
    Outputs,
    /// Rows of logits: `scale * (w · H + bias)`.
    Head {
        /// Rows of the head.
        w: LinearOf<W>,
        /// Number of the first one.
        first_row: usize,
        /// Multiplies.
        scale: f32,
        /// `cap * tanh(logit / cap)`; 0 for none.
        cap: f32,
    },
}

impl<W: Copy> NormOf<W> {
    /// With other names of its weights.
    pub fn map<V>(&self, f: &mut impl FnMut(W) -> V) -> NormOf<V> {
        NormOf { kind: self.kind, weight: self.weight.map(&mut *f), bias: self.bias.map(&mut *f), eps: self.eps }
    }
}

impl<W: Copy> LinearOf<W> {
    /// With other names of its weights.
    pub fn map<V>(&self, f: &mut impl FnMut(W) -> V) -> LinearOf<V> {
        LinearOf { weight: f(self.weight), bias: self.bias.map(f) }
    }
}

impl<W: Copy> Op<W> {
    /// With other names of its weights.
    pub fn map<V>(&self, f: &mut impl FnMut(W) -> V) -> Op<V> {
        match *self {
            Op::Norm { to, from, ref norm } => Op::Norm { to, from, norm: norm.map(f) },
            Op::Shape(shape) => Op::Shape(shape),
            Op::HeadNorm { act, ref norm } => Op::HeadNorm { act, norm: norm.map(f) },
            Op::Copy { to, from } => Op::Copy { to, from },
            Op::Join => Op::Join,
            Op::Multiply { act, by } => Op::Multiply { act, by: f(by) },
            Op::TakePart { part, width } => Op::TakePart { part, width },
            Op::Linear { to, from, ref w, add } => Op::Linear { to, from, w: w.map(f), add },
            Op::Rope { act, rope } => Op::Rope { act, rope },
            Op::ScaleByPosition { act, by, every, offset } => Op::ScaleByPosition { act, by, every, offset },
            Op::AddPosition { table } => Op::AddPosition { table: f(table) },
            Op::SplitHeads => Op::SplitHeads,
            Op::SplitGroups => Op::SplitGroups,
            Op::GateAttn => Op::GateAttn,
            Op::GateOut => Op::GateOut,
            Op::Conv { state, w, bias } => {
                let w = f(w);
                Op::Conv { state, w, bias: bias.map(f) }
            }
            Op::Scan(Scan { state, groups, decay, bias, skip, ref norm }) => {
                let (decay, bias, skip) = (f(decay), f(bias), f(skip));
                Op::Scan(Scan { state, groups, decay, bias, skip, norm: norm.map(f) })
            }
            Op::ShortConv { state, w } => Op::ShortConv { state, w: f(w) },
            Op::DeltaNet(DeltaNet { state, decay, bias, ref norm, tiled }) => {
                let (decay, bias) = (f(decay), f(bias));
                Op::DeltaNet(DeltaNet { state, decay, bias, norm: norm.map(f), tiled })
            }
            Op::Latent(Latent { rank, nope, rope, absorbed }) => {
                Op::Latent(Latent { rank, nope, rope, absorbed: absorbed.map(f) })
            }
            Op::OfLatent { width, w } => Op::OfLatent { width, w: w.map(f) },
            Op::Store { layer } => Op::Store { layer },
            Op::Attend { layer, scores, sinks } => Op::Attend { layer, scores, sinks: sinks.map(f) },
            Op::Keep => Op::Keep,
            Op::Add { to, from } => Op::Add { to, from },
            Op::AddNormed { ref norm } => Op::AddNormed { norm: norm.map(f) },
            Op::Scale { act, by } => Op::Scale { act, by },
            Op::Activate { how, gated, width } => Op::Activate { how, gated, width },
            Op::Route { ref w, choose, how } => {
                let w = w.map(&mut *f);
                Op::Route { w, choose: choose.map(f), how }
            }
            Op::WeighExperts { by } => Op::WeighExperts { by: f(by) },
            Op::Combine { to, add } => Op::Combine { to, add },
            Op::Outputs => Op::Outputs,
            Op::Head { ref w, first_row, scale, cap } => Op::Head { w: w.map(f), first_row, scale, cap },
        }
    }

    /// A few words on what it does, for a backend that cannot.
    pub fn what(&self) -> &'static str {
        match self {
            Op::Norm { norm: NormOf { kind: NormKind::Layer, .. }, .. } => "layer norms",
            Op::Norm { to: Act::Q | Act::K, .. } => "norms of all heads together",
            Op::Norm { to: Act::Out, .. } | Op::AddNormed { .. } => "norms behind the parts of a block",
            Op::Norm { .. } => "parts without a norm before them, or side by side",
            Op::Shape(_) => "heads of several sizes",
            Op::HeadNorm { act: Act::V, .. } => "norms of values",
            Op::HeadNorm { act: Act::Mix, .. } => "embeddings for each block",
            Op::HeadNorm { .. } => "norms of heads behind the rotary embedding",
            Op::Copy { .. } => "keys that are values",
            Op::Latent(_) | Op::OfLatent { .. } => "keys and values of latent vectors (MLA)",
            Op::Join => "blocks that predict further tokens",
            Op::Multiply { .. } => "outputs of blocks that are scaled by tensors",
            Op::TakePart { .. } => "embeddings for each block",
            Op::Linear { .. } => "parts of blocks of this make",
            Op::Rope { rope: 0, .. } | Op::Store { .. } => "blocks without rotary embedding",
            Op::Rope { .. } => "rotary embeddings that differ between blocks",
            Op::ScaleByPosition { .. } => "queries scaled by position",
            Op::AddPosition { .. } => "embeddings of positions",
            Op::SplitGroups => "delta nets with one projection",
            Op::SplitHeads | Op::GateAttn | Op::GateOut => "gates of attention and of shared experts",
            Op::Scan(_) | Op::Conv { bias: Some(_), .. } => "state spaces (Mamba 2)",
            Op::Conv { .. } | Op::DeltaNet(_) => "delta nets",
            Op::ShortConv { .. } => "short convolutions",
            Op::Attend { sinks: Some(_), .. } => "attention sinks",
            Op::Attend { .. } => "attention windows or capped scores",
            Op::Keep | Op::Outputs => "norms before the head other than RMS norms",
            Op::Add { .. } | Op::Scale { .. } => "scaled outputs of parts",
            Op::Activate { .. } => "activations other than SwiGLU",
            Op::Route { choose: Some(_), .. } => "routers with biases",
            Op::Route { how, .. } if how.gating == Gating::Softmax => "experts that all tokens pass",
            Op::Route { .. } => "routers other than softmax",
            Op::WeighExperts { .. } => "experts with scales of their own",
            Op::Combine { .. } => "sums of experts' outputs before they are added",
            Op::Head { .. } => "scaled or capped logits",
        }
    }
}
