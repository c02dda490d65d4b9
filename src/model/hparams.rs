//! Hyper-parameters from GGUF metadata, each checked against stated limits.

use super::family::Family;
use super::{ModelError, RopeScaling};
use crate::backend::{KvShape, Mask, NormKind, Recurrent, Router, Scores};
use crate::gguf::{Array, Metadata, TensorType, Value};

/// What the metadata say of a model.
#[derive(Clone, Debug)]
pub struct HParams {
    /// The architecture.
    pub arch: &'static Family,
    /// Blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Heads of keys by block, where blocks differ; `n_kv_heads` and `head_dim` are the largest then.
    pub shapes: Vec<KvShape>,
    /// Sizes of latent vectors that keys and values are made of, where they are.
    pub latent: Option<LatentSizes>,
    /// FFN width of a dense block.
    pub n_ff: usize,
    /// The same by block, where blocks differ; `n_ff` is the largest then.
    pub widths: Vec<usize>,
    /// Blocks at the end that have no keys and values, but attend to those of earlier ones.
    pub n_sharing: usize,
    /// Elements that each block is given beside X; 0 for none.
    pub n_per_block: usize,
    /// Experts a block; 0 if dense.
    pub n_experts: usize,
    /// Experts a token is routed to.
    pub n_experts_used: usize,
    /// FFN width of one expert.
    pub n_ff_expert: usize,
    /// Blocks that are dense before those with experts; all of a dense model.
    pub n_dense: usize,
    /// FFN width of what all tokens pass in addition to the experts; 0 if there is nothing of the kind.
    pub n_ff_shared: usize,
    /// How experts are chosen and weighed.
    pub router: Router,
    /// Positions the model was trained on.
    pub n_ctx_train: usize,
    /// Positions up to which text keeps its quality: those of the training, or more where rotary scaling
    /// stretches them.
    pub n_ctx_reach: usize,
    /// Tokens that see each other, where fewer than the model was trained on: attention is computed in full, so
    /// no context may be longer.
    pub window: Option<usize>,
    /// Blocks behind the others that predict further tokens, for speculation.
    pub n_next: usize,
    /// Base and scaling of the rotary frequencies of blocks with windows, where they have their own.
    pub window_rope: Option<(f32, RopeScaling)>,
    /// Elements of a head that rotate in such blocks, where an architecture tells them apart.
    pub window_rot: usize,
    /// Multiplies sine and cosine, beside what scaling does.
    pub rope_magnitude: f32,
    /// Whether queries and keys rotate.
    pub rotates: bool,
    /// Positions of the training before it was stretched, where divisors of rotary frequencies depend on them.
    pub n_ctx_original: usize,
    /// Positions that have an embedding, where positions have one.
    pub positions: Option<usize>,
    /// Which blocks have experts: each so many-th, behind the dense ones.
    pub expert_step: usize,
    /// Sizes of recurrences, their number and that of sequences apart.
    pub recurrent: Option<Recurrent>,
    /// Which blocks attend, by block, where some do not; the others have a recurrence.
    pub attends: Vec<bool>,
    /// Whether attention and feed-forward part read the same X.
    pub parallel: bool,
    /// Scores of attention, masks apart.
    pub scores: Scores,
    /// What queries are scaled by, as of [`crate::backend::Op::ScaleByPosition`].
    pub by_position: Option<(f32, f32, f32)>,
    /// Who sees whom, by block; all see all earlier ones where there is no entry.
    pub masks: Vec<Mask>,
    /// What norms divide by.
    pub norm: NormKind,
    /// Whether norms may have biases.
    pub norm_biases: bool,
    /// Epsilon of all norms.
    pub norm_eps: f32,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies the output of each part of a block.
    pub residual_scale: f32,
    /// Multiplies logits.
    pub logit_scale: f32,
    /// Caps logits; 0 for none.
    pub logit_cap: f32,
    /// Elements of a head that rotate.
    pub n_rot: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
}

/// Sizes of keys and values that are made of latent vectors.
#[derive(Clone, Copy, Debug)]
pub struct LatentSizes {
    /// Elements of a latent vector.
    pub rank: usize,
    /// The same of queries; 0 where these are made of X alone.
    pub query_rank: usize,
    /// Elements of a query head that do not rotate.
    pub nope: usize,
    /// Elements of a value.
    pub value: usize,
    /// Whether queries are taken to latent vectors, so that these alone are kept.
    pub absorbed: bool,
}

/// Upper limits; real models stay far below each.
pub(super) mod limit {
    pub const LAYERS: usize = 1024;
    pub const WIDTH: usize = 1 << 18;
    pub const HEADS: usize = 4096;
    pub const HEAD_DIM: usize = 1024;
    pub const EXPERTS: usize = 1024;
    pub const FF: usize = 1 << 20;
    pub const CTX: usize = 1 << 30;
}

/// The keys of an architecture.
pub(super) struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'static Family,
}

impl Keys<'_> {
    fn follows(&self, name: &str) -> bool {
        self.arch.follows.contains(&name)
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch.name)
    }

    pub fn error(&self, name: &str, what: String) -> ModelError {
        ModelError::Metadata { key: self.key(name), what }
    }

    /// An integer in `1..=max`; an array of equal integers counts as one.
    pub fn size(&self, name: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let value = match self.metadata.get(&self.key(name)) {
            None => return Ok(None),
            Some(Value::Array(Array::Int(v))) if self.arch.varies => {
                v.iter().max().and_then(|n| u64::try_from(*n).ok())
            }
            Some(Value::Array(Array::Int(v))) => match v.split_first() {
                Some((first, rest)) if rest.iter().all(|x| x == first) => u64::try_from(*first).ok(),
                _ => return Err(self.error(name, "differs from block to block, which is not supported".into())),
            },
            Some(_) => self.metadata.uint(&self.key(name)),
        };
        match value.and_then(|v| usize::try_from(v).ok()) {
            Some(v) if (1..=max).contains(&v) => Ok(Some(v)),
            _ => Err(self.error(
                name,
                match self.metadata.get(&self.key(name)) {
                    Some(Value::Float(v)) => format!("an integer from 1 to {max} was expected, found the float {v}"),
                    Some(found) => format!("an integer from 1 to {max} was expected, found {found}"),
                    None => format!("an integer from 1 to {max} was expected"),
                },
            )),
        }
    }

    pub fn required(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        self.size(name, max)?.ok_or_else(|| self.error(name, "is missing".into()))
    }

    pub fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
        let key = self.key(name);
        match self.metadata.get(&key) {
            None => Ok(None),
            Some(v) => match self.metadata.float(&key).filter(|f| f.is_finite()) {
                Some(f) => Ok(Some(f)),
                None => Err(self.error(name, format!("a finite number was expected, found {v}"))),
            },
        }
    }
}

/// What a number has to be where the computation divides by it or takes its root or logarithm.
pub(super) struct Bounds {
    holds: fn(f32) -> bool,
    words: &'static str,
}

/// Epsilons of norms.
const EPSILON: Bounds = Bounds { holds: |v| v > 0.0 && v <= 1.0, words: "a number above 0 and up to 1" };
/// Bases of rotary frequencies: YaRN divides by their logarithm.
pub(super) const BASE: Bounds = Bounds { holds: |v| v > 1.0, words: "a number above 1" };
/// Factors by which contexts are stretched.
const FACTOR: Bounds =
    Bounds { holds: |v| (1e-3..=1e6).contains(&v), words: "0 for none, or a number from 0.001 to 1000000" };
/// Factors of YaRN's magnitude, and its rotations.
const POSITIVE: Bounds = Bounds { holds: |v| (1e-6..=1e6).contains(&v), words: "a number from 0.000001 to 1000000" };
/// Factors and caps that may be left out.
const OR_NONE: Bounds = Bounds {
    holds: |v| v == 0.0 || (1e-6..=1e6).contains(&v),
    words: "0 for none, or a number from 0.000001 to 1000000",
};
/// YaRN's share of extrapolation.
const SHARE: Bounds = Bounds { holds: |v| v <= 1.0, words: "a number from 0 to 1, or a negative one for 1" };

impl Keys<'_> {
    /// Heads of keys and values, and which blocks have any, where an architecture has blocks without.
    fn heads(&self, name: &str) -> Result<(Option<usize>, Vec<bool>), ModelError> {
        let Some(Value::Array(Array::Int(v))) = self.metadata.get(&self.key(name)).filter(|_| self.follows(name))
        else {
            return Ok((self.size(name, limit::HEADS)?, Vec::new()));
        };
        let mut some = v.iter().filter(|n| **n != 0);
        match some.next() {
            Some(n) if (1..=limit::HEADS as i64).contains(n) && some.all(|other| other == n) => {
                Ok((Some(*n as usize), v.iter().map(|n| *n != 0).collect()))
            }
            _ => {
                Err(self
                    .error(name, "differs between blocks that have any, or none has, which is not supported".into()))
            }
        }
    }

    /// A number for each of `n` blocks, from 0 to `max`: by an array, or the same for all; `default` where there is none.
    ///
    /// # Errors
    /// Where the array has fewer, more than the file counts blocks, or one is out of bounds.
    pub fn each(&self, name: &str, default: usize, max: usize, n: usize) -> Result<Vec<usize>, ModelError> {
        let Some(Value::Array(Array::Int(v))) = self.metadata.get(&self.key(name)) else {
            return Ok(vec![self.size(name, max)?.unwrap_or(default); n]);
        };
        let all: Option<Vec<usize>> = v.iter().map(|x| usize::try_from(*x).ok().filter(|x| *x <= max)).collect();
        match all {
            Some(mut all) if self.is_each(all.len(), n) => {
                all.truncate(n);
                Ok(all)
            }
            _ => Err(self.error(name, format!("{n} integers from 0 to {max} were expected, one for each block"))),
        }
    }

    /// Whether so many values are one for each of `n` blocks, or one for each that the file counts, of which `n` are computed.
    fn is_each(&self, values: usize, n: usize) -> bool {
        let counted = self.metadata.uint(&self.key("block_count")).and_then(|v| usize::try_from(v).ok());
        (n..=counted.unwrap_or(n).max(n)).contains(&values)
    }

    /// Makes sure that sections of a head, which rotate by a position each, all rotate by the one that a token of a text has: of a
    /// fourth section llama.cpp says that its position is 0.
    ///
    /// # Errors
    /// Where there are others.
    pub fn sections_of_text(&self) -> Result<(), ModelError> {
        let name = "rope.dimension_sections";
        let of_text =
            |v: &[i64]| v.len() <= 4 && v.iter().all(|n| (0..=1 << 16).contains(n)) && v.get(3).is_none_or(|n| *n == 0);
        match self.metadata.get(&self.key(name)) {
            None => Ok(()),
            Some(Value::Array(Array::Int(v))) if of_text(v) => Ok(()),
            Some(found) => {
                Err(self.error(name, format!("three integers, and a fourth that is 0, were expected, found {found}")))
            }
        }
    }

    /// Tokens of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.metadata.strings("tokenizer.ggml.tokens").map_or(0, |t| t.len())
    }

    /// Whether the file has the key.
    pub fn has(&self, name: &str) -> bool {
        self.metadata.get(&self.key(name)).is_some()
    }

    /// A bool, and no other value.
    pub fn bool(&self, name: &str) -> Result<Option<bool>, ModelError> {
        match self.metadata.get(&self.key(name)) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(found) => Err(self.error(name, format!("true or false was expected, found {found}"))),
        }
    }

    /// An integer, 0 among them.
    pub fn count(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        match self.metadata.uint(&self.key(name)) {
            Some(0) => Ok(0),
            _ => Ok(self.size(name, max)?.unwrap_or(0)),
        }
    }

    /// A factor; 0 and no key stand for 1.
    ///
    /// # Errors
    /// Below 0, and so small or large that products with it are none.
    pub fn factor(&self, name: &str) -> Result<f32, ModelError> {
        Ok(self.or_none(name)?.unwrap_or(1.0))
    }

    /// A number that is multiplied with or divided by; 0 stands for none.
    ///
    /// # Errors
    /// As [`Keys::factor`].
    pub fn or_none(&self, name: &str) -> Result<Option<f32>, ModelError> {
        Ok(self.bounded(name, &OR_NONE)?.filter(|v| *v != 0.0))
    }

    /// What a cap multiplies a hyperbolic tangent with; 0 for none, `default` without the key.
    ///
    /// # Errors
    /// As [`Keys::factor`].
    pub fn cap(&self, name: &str, default: f32) -> Result<f32, ModelError> {
        Ok(self.bounded(name, &OR_NONE)?.unwrap_or(default))
    }

    /// Which of `n` blocks see no more than a window: by an array of bools, or all but each `n`th.
    ///
    /// # Errors
    /// Where the value is neither, or of another length.
    pub fn windowed(&self, name: &str, default: usize, n: usize) -> Result<Vec<bool>, ModelError> {
        let every = match self.metadata.get(&self.key(name)) {
            None => default,
            Some(Value::Array(Array::Bool(v))) if self.is_each(v.len(), n) => return Ok(v[..n].to_vec()),
            Some(Value::Array(Array::Int(v))) if self.is_each(v.len(), n) => {
                return Ok(v[..n].iter().map(|x| *x != 0).collect());
            }
            Some(found) => match self.metadata.uint(&self.key(name)).and_then(|v| usize::try_from(v).ok()) {
                Some(every) => every,
                None => {
                    let what = format!("a number or an array of {n} bools was expected, found {found}");
                    return Err(self.error(name, what));
                }
            },
        };
        Ok((0..n).map(|i| every == 0 || i % every + 1 < every).collect())
    }

    /// A number within bounds.
    pub fn bounded(&self, name: &str, bounds: &Bounds) -> Result<Option<f32>, ModelError> {
        match self.float(name)? {
            Some(v) if !(bounds.holds)(v) => Err(self.error(name, format!("{} was expected, found {v}", bounds.words))),
            other => Ok(other),
        }
    }
}

impl HParams {
    /// Whether block `i` attends.
    pub fn attends(&self, i: usize) -> bool {
        self.attends.get(i).copied().unwrap_or(true)
    }

    /// Whether block `i` has routed experts.
    pub fn is_routed(&self, i: usize) -> bool {
        self.n_experts > 0 && i >= self.n_dense && (i + 1).is_multiple_of(self.expert_step)
    }

    /// Heads of the keys and values of block `i`.
    pub fn shape(&self, i: usize) -> KvShape {
        self.shapes.get(i).copied().unwrap_or(KvShape::new(self.n_kv_heads, self.head_dim))
    }

    /// FFN width of block `i`, which is dense.
    pub fn width(&self, i: usize) -> usize {
        self.widths.get(i).copied().unwrap_or(self.n_ff)
    }

    /// Number of the rotary embedding of block `i`.
    pub fn rope_of(&self, i: usize) -> usize {
        usize::from(self.window_rope.is_some() && self.mask(i) != Mask::Full)
    }

    /// Who sees whom in block `i`.
    pub fn mask(&self, i: usize) -> Mask {
        self.masks.get(i).copied().unwrap_or(Mask::Full)
    }

    /// Refuses a context of `n_ctx` tokens that is longer than the window in which they should see each other, or than
    /// there are embeddings of positions.
    ///
    /// # Errors
    /// With the key and a context that is possible.
    pub fn check_window(&self, n_ctx: usize) -> Result<(), ModelError> {
        if let Some(n) = self.positions.filter(|&n| n_ctx > n) {
            let key = format!("{}.context_length", self.arch.name);
            let what = format!(
                "is {n}, and later positions have no embedding, but the context is {n_ctx}; give --ctx {n} or less"
            );
            return Err(ModelError::Metadata { key, what });
        }
        let Some(w) = self.window.filter(|&w| n_ctx > w) else { return Ok(()) };
        let key = format!("{}.attention.sliding_window", self.arch.name);
        let what = format!(
            "is {w}, but nt computes attention over the whole context of {n_ctx}; give --ctx {w} or less, or --override-kv {key}=int:0 to attend to all tokens as llama.cpp does"
        );
        Err(ModelError::Metadata { key, what })
    }

    /// That heads are whole blocks of the KV cache's type.
    ///
    /// # Errors
    /// With the key and a type that is possible.
    pub fn check_cache(&self, ty: TensorType) -> Result<(), ModelError> {
        let others = self.shapes.iter().map(|s| s.dim);
        let Some(head) = others.chain([self.head_dim]).find(|dim| ty.row_bytes(*dim).is_none()) else {
            return Ok(());
        };
        let key = format!("{}.attention.key_length", self.arch.name);
        let block = ty.block_elems();
        let what = format!("makes heads of {head}, but a KV cache of {ty} has blocks of {block}; give --kv f16");
        Err(ModelError::Metadata { key, what })
    }

    /// What all architectures read of the metadata, and the keys for what this one reads in addition.
    pub(super) fn common<'a>(metadata: &'a Metadata, arch: &'static Family) -> Result<(Keys<'a>, HParams), ModelError> {
        let keys = Keys { metadata, arch };
        let n_embd = keys.required("embedding_length", limit::WIDTH)?;
        // Buffers of one head cost little where none attends.
        let n_heads = if arch.attends { keys.required("attention.head_count", limit::HEADS)? } else { 1 };
        let (n_kv_heads, attends) = match arch.attends {
            true => keys.heads("attention.head_count_kv")?,
            false => (Some(1), Vec::new()),
        };
        let n_kv_heads = n_kv_heads.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            return Err(keys
                .error("attention.head_count_kv", format!("{n_kv_heads} does not divide the {n_heads} query heads")));
        }
        let head_dim = match keys.size("attention.key_length", limit::HEAD_DIM)? {
            Some(d) => d,
            None if n_embd % n_heads == 0 => n_embd / n_heads,
            None => {
                return Err(keys.error(
                    "attention.key_length",
                    format!("is missing, and {n_heads} heads do not divide a width of {n_embd}"),
                ));
            }
        };
        let value = keys.size("attention.value_length", limit::HEAD_DIM)?;
        if let Some(v) = value.filter(|&v| v != head_dim && !keys.follows("attention.value_length")) {
            return Err(keys.error(
                "attention.value_length",
                format!("{v} differs from the key length {head_dim}, which is not supported"),
            ));
        }
        let n_rot = keys.size("rope.dimension_count", limit::HEAD_DIM)?.unwrap_or(head_dim);
        if n_rot > head_dim || n_rot % 2 != 0 {
            return Err(
                keys.error("rope.dimension_count", format!("{n_rot} is odd or larger than a head of {head_dim}"))
            );
        }
        let n_experts = keys.count("expert_count", limit::EXPERTS)?;
        let n_experts_used = if n_experts == 0 { 0 } else { keys.required("expert_used_count", n_experts)? };
        let n_ff = match arch.varies {
            true => Some(keys.count("feed_forward_length", limit::FF)?),
            false => keys.size("feed_forward_length", limit::FF)?,
        };
        let n_ff_expert = keys.size("expert_feed_forward_length", limit::FF)?.unwrap_or(0);
        let n_ctx_train = keys.required("context_length", limit::CTX)?;
        let norm_eps =
            keys.bounded(arch.norm_eps, &EPSILON)?.ok_or_else(|| keys.error(arch.norm_eps, "is missing".into()))?;
        if let Some((key, what)) = super::keys::not_followed(metadata, arch, head_dim) {
            return Err(ModelError::Metadata { key, what });
        }
        let rope_scaling = scaling(&keys, n_ctx_train)?;
        let n_layers = keys.required("block_count", limit::LAYERS)?;
        let scale = keys.factor("expert_weights_scale")?;
        let h = HParams {
            arch,
            n_layers,
            n_embd,
            n_heads,
            n_kv_heads,
            head_dim,
            shapes: Vec::new(),
            latent: None,
            n_ff: n_ff.unwrap_or(0),
            widths: Vec::new(),
            n_sharing: 0,
            n_per_block: 0,
            n_experts,
            n_experts_used,
            n_ff_expert,
            n_dense: if n_experts == 0 { n_layers } else { 0 },
            n_ff_shared: 0,
            router: Router::softmax(keys.bool("expert_weights_norm")?.unwrap_or(true), scale),
            n_ctx_train,
            n_ctx_reach: reach(&keys, n_ctx_train, rope_scaling)?,
            window: if keys.follows(WINDOW) { None } else { window(&keys, n_ctx_train)? },
            n_next: 0,
            window_rope: None,
            window_rot: n_rot,
            rope_magnitude: 1.0,
            rotates: true,
            n_ctx_original: n_ctx_train,
            positions: None,
            expert_step: 1,
            recurrent: None,
            attends,
            parallel: false,
            scores: Scores::PLAIN,
            by_position: None,
            masks: Vec::new(),
            norm: NormKind::Rms,
            norm_biases: false,
            norm_eps,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_cap: 0.0,
            n_rot,
            rope_base: keys.bounded("rope.freq_base", &BASE)?.unwrap_or(10_000.0),
            rope_scaling,
        };
        Ok((keys, h))
    }

    /// Refuses what no architecture can do without.
    pub(super) fn check(&self, keys: &Keys<'_>) -> Result<(), ModelError> {
        if self.n_ff == 0 && self.n_dense > 0 {
            return Err(keys.error("feed_forward_length", "is missing".into()));
        }
        if self.n_experts > 0 && self.n_ff_expert == 0 {
            return Err(keys.error("expert_feed_forward_length", "is missing".into()));
        }
        Ok(())
    }
}

/// The key of attention's window.
pub(super) const WINDOW: &str = "attention.sliding_window";

/// Positions that the training and the scaling of rotary frequencies cover together.
fn reach(keys: &Keys<'_>, n_ctx_train: usize, scaling: RopeScaling) -> Result<usize, ModelError> {
    let (RopeScaling::Linear { factor } | RopeScaling::Yarn { factor, .. }) = scaling else { return Ok(n_ctx_train) };
    // Without the key, the context length is the scaled one.
    let original = keys.size("rope.scaling.original_context_length", limit::CTX)?;
    Ok(original.map_or(n_ctx_train, |n| n_ctx_train.max((n as f64 * f64::from(factor)) as usize)))
}

fn window(keys: &Keys<'_>, n_ctx_train: usize) -> Result<Option<usize>, ModelError> {
    match keys.metadata.uint(&keys.key(WINDOW)) {
        Some(0) => Ok(None),
        _ => Ok(keys.size(WINDOW, usize::MAX >> 1)?.filter(|&w| w < n_ctx_train)),
    }
}

fn scaling(keys: &Keys<'_>, n_ctx_train: usize) -> Result<RopeScaling, ModelError> {
    let factor = |name: &str| {
        // 0 stands for none.
        match keys.float(name)? {
            Some(0.0) => Ok(Some(1.0)),
            _ => keys.bounded(name, &FACTOR),
        }
    };
    let factor = match factor("rope.scaling.factor")? {
        Some(f) => f,
        None => factor("rope.scale_linear")?.unwrap_or(1.0),
    };
    let kind = match keys.metadata.get(&keys.key("rope.scaling.type")) {
        None => "linear",
        Some(Value::Str(s)) => s,
        Some(other) => return Err(keys.error("rope.scaling.type", format!("a string was expected, found {other}"))),
    };
    if kind != "yarn"
        && !keys.follows("rope.scaling.attn_factor")
        && let Some(factor) = keys.float("rope.scaling.attn_factor")?.filter(|&f| f != 1.0)
    {
        let what = format!("{factor} changes attention, and is supported with rope.scaling.type yarn only");
        return Err(keys.error("rope.scaling.attn_factor", what));
    }
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" if factor == 1.0 => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor,
            original_ctx: keys.size("rope.scaling.original_context_length", limit::CTX)?.unwrap_or(n_ctx_train),
            attn_factor: keys.bounded("rope.scaling.attn_factor", &POSITIVE)?.unwrap_or(1.0),
            ext_factor: keys.bounded("rope.scaling.yarn_ext_factor", &SHARE)?.filter(|&f| f >= 0.0).unwrap_or(1.0),
            beta_fast: keys.bounded("rope.scaling.yarn_beta_fast", &POSITIVE)?.unwrap_or(32.0),
            beta_slow: keys.bounded("rope.scaling.yarn_beta_slow", &POSITIVE)?.unwrap_or(1.0),
        }),
        other => Err(keys.error("rope.scaling.type", format!("{other} is not supported; none, linear and yarn are"))),
    }
}
