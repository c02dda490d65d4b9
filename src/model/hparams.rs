//! Hyper-parameters from GGUF metadata, each checked against stated limits.

use super::{ModelError, RopeScaling};
use crate::backend::RopeKind;
use crate::gguf::{Array, Metadata, Value};

/// A supported architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Llama 2 and 3, Mistral; with experts, Mixtral.
    Llama,
    /// Qwen 2 and 2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen 3: norms on Q and K.
    Qwen3,
    /// Qwen 3 with routed experts.
    Qwen3Moe,
}

impl Arch {
    /// All of them.
    pub const ALL: [Arch; 4] = [Arch::Llama, Arch::Qwen2, Arch::Qwen3, Arch::Qwen3Moe];

    /// `general.architecture`, which also prefixes the architecture's keys.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Llama => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Qwen3Moe => "qwen3moe",
        }
    }

    /// How rotary embedding pairs elements: fixed by the architecture, not by metadata.
    pub const fn rope_kind(self) -> RopeKind {
        match self {
            Arch::Llama => RopeKind::Norm,
            Arch::Qwen2 | Arch::Qwen3 | Arch::Qwen3Moe => RopeKind::Neox,
        }
    }
}

/// What the metadata say of a model.
#[derive(Clone, Debug)]
pub struct HParams {
    /// The architecture.
    pub arch: Arch,
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
    /// FFN width of a dense block.
    pub n_ff: usize,
    /// Experts a block; 0 if dense.
    pub n_experts: usize,
    /// Experts a token is routed to.
    pub n_experts_used: usize,
    /// FFN width of one expert.
    pub n_ff_expert: usize,
    /// Divide the routed experts' weights by their sum.
    pub expert_weights_norm: bool,
    /// Multiplies the routed experts' weights.
    pub expert_weights_scale: f32,
    /// Positions the model was trained on.
    pub n_ctx_train: usize,
    /// Positions up to which text keeps its quality: those of the training, or more where rotary scaling
    /// stretches them.
    pub n_ctx_reach: usize,
    /// Tokens that see each other, where fewer than the model was trained on: attention is computed in full, so
    /// no context may be longer.
    pub window: Option<usize>,
    /// Epsilon of all RMS norms.
    pub norm_eps: f32,
    /// Elements of a head that rotate.
    pub n_rot: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
}

/// Upper limits; real models stay far below each.
mod limit {
    pub const LAYERS: usize = 1024;
    pub const WIDTH: usize = 1 << 18;
    pub const HEADS: usize = 4096;
    pub const HEAD_DIM: usize = 1024;
    pub const EXPERTS: usize = 1024;
    pub const FF: usize = 1 << 20;
    pub const CTX: usize = 1 << 30;
}

struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn error(&self, name: &str, what: String) -> ModelError {
        ModelError::Metadata { key: self.key(name), what }
    }

    /// An integer in `1..=max`; an array of equal integers counts as one.
    fn size(&self, name: &str, max: usize) -> Result<Option<usize>, ModelError> {
        let value = match self.metadata.get(&self.key(name)) {
            None => return Ok(None),
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
                    Some(found) => format!("an integer from 1 to {max} was expected, found {found}"),
                    None => format!("an integer from 1 to {max} was expected"),
                },
            )),
        }
    }

    fn required(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        self.size(name, max)?.ok_or_else(|| self.error(name, "is missing".into()))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
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
struct Bounds {
    holds: fn(f32) -> bool,
    words: &'static str,
}

/// Epsilons of norms.
const EPSILON: Bounds = Bounds { holds: |v| v > 0.0 && v <= 1.0, words: "a number above 0 and up to 1" };
/// Bases of rotary frequencies: YaRN divides by their logarithm.
const BASE: Bounds = Bounds { holds: |v| v > 1.0, words: "a number above 1" };
/// Factors by which contexts are stretched.
const FACTOR: Bounds =
    Bounds { holds: |v| (1e-3..=1e6).contains(&v), words: "0 for none, or a number from 0.001 to 1000000" };
/// Factors of YaRN's magnitude, and its rotations.
const POSITIVE: Bounds = Bounds { holds: |v| (1e-6..=1e6).contains(&v), words: "a number from 0.000001 to 1000000" };
/// YaRN's share of extrapolation.
const SHARE: Bounds = Bounds { holds: |v| v <= 1.0, words: "a number from 0 to 1, or a negative one for 1" };

impl Keys<'_> {
    /// A number within bounds.
    fn bounded(&self, name: &str, bounds: &Bounds) -> Result<Option<f32>, ModelError> {
        match self.float(name)? {
            Some(v) if !(bounds.holds)(v) => Err(self.error(name, format!("{} was expected, found {v}", bounds.words))),
            other => Ok(other),
        }
    }
}

impl HParams {
    /// Refuses a context of `n_ctx` tokens that is longer than the window in which they should see each other.
    ///
    /// # Errors
    /// With the key and a context that is possible.
    pub fn check_window(&self, n_ctx: usize) -> Result<(), ModelError> {
        let Some(w) = self.window.filter(|&w| n_ctx > w) else { return Ok(()) };
        let key = format!("{}.attention.sliding_window", self.arch.name());
        let what = format!(
            "is {w}, but nt computes attention over the whole context of {n_ctx}; give --ctx {w} or less, or --override-kv {key}=int:0 to attend to all tokens as llama.cpp does"
        );
        Err(ModelError::Metadata { key, what })
    }

    /// Reads and checks the hyper-parameters.
    pub fn from_metadata(metadata: &Metadata) -> Result<HParams, ModelError> {
        let found = metadata.str("general.architecture").ok_or_else(|| ModelError::Metadata {
            key: "general.architecture".into(),
            what: "is missing; is this a language model?".into(),
        })?;
        let arch = Arch::ALL.into_iter().find(|a| a.name() == found).ok_or_else(|| ModelError::Architecture {
            found: found.to_owned(),
            supported: Arch::ALL.map(Arch::name).join(", "),
        })?;
        let keys = Keys { metadata, arch: arch.name() };

        let n_embd = keys.required("embedding_length", limit::WIDTH)?;
        let n_heads = keys.required("attention.head_count", limit::HEADS)?;
        let n_kv_heads = keys.size("attention.head_count_kv", limit::HEADS)?.unwrap_or(n_heads);
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
        if let Some(v) = keys.size("attention.value_length", limit::HEAD_DIM)?.filter(|&v| v != head_dim) {
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
        let n_experts = match metadata.uint(&keys.key("expert_count")) {
            Some(0) => 0,
            _ => keys.size("expert_count", limit::EXPERTS)?.unwrap_or(0),
        };
        let n_experts_used = if n_experts == 0 { 0 } else { keys.required("expert_used_count", n_experts)? };
        if arch == Arch::Qwen3Moe && n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        let n_ff = if n_experts == 0 {
            keys.required("feed_forward_length", limit::FF)?
        } else {
            keys.size("feed_forward_length", limit::FF)?.unwrap_or(0)
        };
        let n_ff_expert = match keys.size("expert_feed_forward_length", limit::FF)? {
            Some(f) => f,
            // As llama.cpp divides where the key is missing.
            None if arch == Arch::Qwen3Moe => n_ff / n_experts_used,
            None if n_experts > 0 => n_ff,
            None => 0,
        };
        if n_experts > 0 && n_ff_expert == 0 {
            return Err(keys.error("expert_feed_forward_length", "is missing".into()));
        }
        let n_ctx_train = keys.required("context_length", limit::CTX)?;
        let norm_eps = keys
            .bounded("attention.layer_norm_rms_epsilon", &EPSILON)?
            .ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "is missing".into()))?;
        if let Some((key, what)) = super::keys::not_followed(metadata, arch.name(), head_dim) {
            return Err(ModelError::Metadata { key, what });
        }
        let rope_scaling = scaling(&keys, n_ctx_train)?;
        Ok(HParams {
            arch,
            n_layers: keys.required("block_count", limit::LAYERS)?,
            n_embd,
            n_heads,
            n_kv_heads,
            head_dim,
            n_ff,
            n_experts,
            n_experts_used,
            n_ff_expert,
            expert_weights_norm: metadata.bool(&keys.key("expert_weights_norm")).unwrap_or(true),
            expert_weights_scale: keys.float("expert_weights_scale")?.filter(|&s| s != 0.0).unwrap_or(1.0),
            n_ctx_train,
            n_ctx_reach: reach(&keys, n_ctx_train, rope_scaling)?,
            window: window(&keys, n_ctx_train)?,
            norm_eps,
            n_rot,
            rope_base: keys.bounded("rope.freq_base", &BASE)?.unwrap_or(10_000.0),
            rope_scaling,
        })
    }
}

/// Positions that the training and the scaling of rotary frequencies cover together.
fn reach(keys: &Keys<'_>, n_ctx_train: usize, scaling: RopeScaling) -> Result<usize, ModelError> {
    let (RopeScaling::Linear { factor } | RopeScaling::Yarn { factor, .. }) = scaling else { return Ok(n_ctx_train) };
    // Without the key, the context length is the scaled one.
    let original = keys.size("rope.scaling.original_context_length", limit::CTX)?;
    Ok(original.map_or(n_ctx_train, |n| n_ctx_train.max((n as f64 * f64::from(factor)) as usize)))
}

fn window(keys: &Keys<'_>, n_ctx_train: usize) -> Result<Option<usize>, ModelError> {
    match keys.metadata.uint(&keys.key("attention.sliding_window")) {
        Some(0) => Ok(None),
        _ => Ok(keys.size("attention.sliding_window", usize::MAX >> 1)?.filter(|&w| w < n_ctx_train)),
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
