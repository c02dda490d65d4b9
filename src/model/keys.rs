//! Metadata keys that change what a model computes and that nt does not follow: such a file is refused, unless
//! the value says that nothing changes. Keys that are in no list here or in `hparams` are listed by
//! `nt inspect` as not used.

use super::family::Family;
use crate::gguf::{Array, Metadata, Value};

/// A key below the architecture's prefix, the values with which it changes nothing, and what it does.
struct Rule {
    key: &'static str,
    neutral: &'static [f64],
    does: &'static str,
}

const fn rule(key: &'static str, neutral: &'static [f64], does: &'static str) -> Rule {
    Rule { key, neutral, does }
}

/// Source: the keys of llama.cpp's `llama-arch.cpp` and what its graphs do with them.
const RULES: &[Rule] = &[
    rule("attention.causal", &[1.0], "lets tokens see later ones"),
    rule("attention.clamp_kqv", &[0.0], "clamps queries, keys and values"),
    rule("attention.max_alibi_bias", &[0.0], "biases attention by distance"),
    rule("attention.output_scale", &[0.0, 1.0], "scales the attention output"),
    rule("attention.value_scale", &[0.0, 1.0], "scales values"),
    rule("attention.temperature_scale", &[0.0], "scales queries by position"),
    rule("attention.kv_lora_rank", &[0.0], "compresses keys and values"),
    rule("attention.q_lora_rank", &[0.0], "compresses queries"),
    rule("attention.shared_kv_layers", &[0.0], "shares keys and values between blocks"),
    rule("attention.recurrent_layers", &[0.0], "replaces attention by a recurrence"),
    rule("attention.relative_buckets_count", &[0.0], "biases attention by distance"),
    rule("attention.indexer.top_k", &[0.0], "limits attention to chosen keys"),
    rule("attn_logit_softcapping", &[0.0], "caps attention scores"),
    rule("final_logit_softcapping", &[0.0], "caps logits"),
    rule("router_logit_softcapping", &[0.0], "caps router scores"),
    rule("logit_scale", &[0.0, 1.0], "scales logits"),
    rule("residual_scale", &[0.0, 1.0], "scales each block's output"),
    rule("embedding_scale", &[0.0, 1.0], "scales embeddings"),
    rule("embedding_length_per_layer_input", &[0.0], "adds an embedding to each block"),
    rule("swiglu_clamp_exp", &[0.0], "clamps the experts' activations"),
    rule("swiglu_clamp_shexp", &[0.0], "clamps the shared expert's activations"),
    rule("use_parallel_residual", &[0.0], "computes attention and feed-forward side by side"),
    rule("leading_dense_block_count", &[0.0], "makes the first blocks dense"),
    rule("interleave_moe_layer_step", &[0.0, 1.0], "makes some blocks dense"),
    rule("moe_every_n_layers", &[0.0, 1.0], "makes some blocks dense"),
    rule("expert_shared_count", &[0.0], "adds shared experts"),
    rule("expert_shared_feed_forward_length", &[0.0], "adds a shared expert"),
    rule("expert_chunk_feed_forward_length", &[0.0], "adds chunked experts"),
    rule("expert_group_count", &[0.0, 1.0], "routes by groups of experts"),
    rule("expert_group_scale", &[0.0, 1.0], "scales groups of experts"),
    rule("expert_latent_length", &[0.0], "projects the experts' inputs"),
    rule("moe_latent_size", &[0.0], "projects the experts' inputs"),
    // 1 is softmax over all experts, 0 is none given.
    rule("expert_gating_func", &[0.0, 1.0], "weighs experts by another function than softmax"),
    rule("nextn_predict_layers", &[0.0], "counts blocks that predict further tokens among the others"),
    rule("full_attention_interval", &[0.0, 1.0], "replaces attention by a recurrence in some blocks"),
    rule("rope.dimension_sections", &[0.0], "rotates by sections of a head"),
    rule("num_loops", &[0.0, 1.0], "runs the blocks several times"),
    rule("n_deepstack_layers", &[0.0], "adds parts of images to the blocks' inputs"),
    rule("swin_norm", &[0.0], "moves the norms behind each part"),
    rule("rescale_every_n_layers", &[0.0], "halves the stream every so many blocks"),
    rule("activation_sparsity_scale", &[0.0], "leaves out the smaller activations"),
    rule("altup.num_inputs", &[0.0, 1.0], "runs several streams of each token"),
    rule("experts_per_group", &[0.0], "routes by groups of experts"),
    rule("token_shift_count", &[0.0], "mixes tokens with earlier ones"),
    rule("rope.scaling.alpha", &[0.0, 1.0], "scales rotary frequencies"),
    rule("rope.scaling.yarn_log_multiplier", &[0.0], "changes YaRN's magnitude"),
    rule("rope.scaling.yarn_attn_factor", &[0.0, 1.0], "changes YaRN's magnitude"),
    // Means and last tokens are what `nt serve` makes vectors of.
    rule("pooling_type", &[0.0, 1.0, 3.0], "makes vectors of texts by another way than their mean or last token"),
];

/// Keys that are read, by `hparams` or by the checks of this file.
const READ: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_ext_factor",
    // The vocabulary's size is the embedding's.
    "vocab_size",
    // Where they differ from what all blocks have, the file is refused.
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count_swa",
    "ssm.v_head_reordered",
];

/// Whether every number of a value satisfies `is`; `false` for texts.
fn all(value: &Value, is: &dyn Fn(f64) -> bool) -> bool {
    let number = match value {
        Value::Int(v) => *v as f64,
        Value::BigUint(v) => *v as f64,
        Value::Float(v) => *v,
        Value::Bool(v) => f64::from(u8::from(*v)),
        Value::Array(Array::Int(v)) => return v.iter().all(|&x| is(x as f64)),
        Value::Array(Array::Float(v)) => return v.iter().all(|&x| is(f64::from(x))),
        Value::Array(Array::Bool(v)) => return v.iter().all(|&x| is(f64::from(u8::from(x)))),
        Value::Str(_) | Value::Array(_) => return false,
    };
    is(number)
}

/// The first key that changes the computation in a way that nt does not follow, with a sentence on it.
pub(super) fn not_followed(m: &Metadata, arch: &Family, head_dim: usize) -> Option<(String, String)> {
    let found = |name: &str| {
        let key = format!("{}.{name}", arch.name);
        m.get(&key).filter(|_| !arch.follows.contains(&name)).map(|v| (key, v))
    };
    let what = |key: String, v: &Value, does: &str, kind: &str| {
        let text = format!(
            "is {v}, which {does}; nt does not compute that, and without it the text would be wrong (--override-kv {key}={kind} leaves it out)"
        );
        (key, text)
    };
    // Heads of blocks with windows: those of the others, or not computed.
    let rotating = m.uint(&format!("{}.rope.dimension_count", arch.name)).map_or(head_dim as f64, |n| n as f64);
    let of_windows = [
        ("attention.key_length_swa", head_dim as f64, "gives heads of blocks with a window another size"),
        ("attention.value_length_swa", head_dim as f64, "gives values of blocks with a window another size"),
        ("rope.dimension_count_swa", rotating, "rotates other parts of heads in blocks with a window"),
    ];
    for (name, same, does) in of_windows {
        if let Some((key, v)) = found(name)
            && !all(v, &|x| x == same || x == 0.0)
        {
            return Some(what(key, v, does, &format!("int:{same}")));
        }
    }
    // The order that the architecture's own conversion has.
    let reordered = arch.name != "qwen3next";
    if let Some((key, v)) = found("ssm.v_head_reordered")
        && !all(v, &|x| (x != 0.0) == reordered)
    {
        return Some(what(key, v, "orders the heads of values otherwise", &format!("bool:{reordered}")));
    }
    let own = 1.0 / (head_dim as f64).sqrt();
    if let Some((key, v)) = found("attention.scale")
        && !all(v, &|x| x == 0.0 || (x / own - 1.0).abs() < 1e-5)
    {
        return Some(what(key, v, "scales attention scores", "float:0"));
    }
    RULES.iter().find_map(|r| {
        let (key, v) = found(r.key)?;
        let kind = match v {
            Value::Bool(_) => format!("bool:{}", r.neutral[0] != 0.0),
            Value::Float(_) => format!("float:{}", r.neutral[0]),
            _ => format!("int:{}", r.neutral[0]),
        };
        (!all(v, &|x| r.neutral.contains(&x))).then(|| what(key, v, r.does, &kind))
    })
}

/// Keys of the architecture that nothing reads, in file order. `follows` are those that it reads in addition to what all do.
pub(super) fn unused(m: &Metadata, arch: &str, follows: &[&str]) -> Vec<String> {
    let own = |key: &&str| {
        let name = key.strip_prefix(arch).and_then(|k| k.strip_prefix('.'));
        name.is_some_and(|n| !READ.contains(&n) && !follows.contains(&n) && !RULES.iter().any(|r| r.key == n))
    };
    m.iter().map(|(key, _)| key).filter(own).map(str::to_owned).collect()
}
