//! The architectures: for each, what of its metadata counts and what its blocks are made of.
//!
//! Sources: the forward passes of llama.cpp (`src/models`), with whose logits each is compared.

mod cohere;
mod deepseek2;
mod exaone;
mod gemma;
mod gemma4;
mod glm;
mod gpt;
mod gpt_oss;
mod granite;
mod lfm2;
mod llama;
mod mamba;
mod mistral;
mod mixtures;
mod olmo;
mod phi;
mod qwen;
mod qwen35;
mod small;

use super::build::Builder;
use super::family::{Family, LLAMA};
use super::hparams::{BASE, Keys, WINDOW, limit};
use super::{HParams, ModelError, RopeScaling, RopeSpec};
use crate::backend::{Gating, Mask, Router};

/// An architecture that can be computed.
pub(super) struct Architecture {
    /// Its name and keys.
    pub family: Family,
    /// Completes what all architectures read of the metadata.
    pub settle: fn(&Keys<'_>, &mut HParams) -> Result<(), ModelError>,
    /// Says what rotary embeddings there are.
    pub ropes: fn(&mut Builder<'_>) -> Result<(), ModelError>,
    /// Puts a block together.
    pub block: fn(&mut Builder<'_>, usize) -> Result<(), ModelError>,
}

/// Llama without experts; others say what differs.
const PLAIN: Architecture =
    Architecture { family: LLAMA, settle: |_, _| Ok(()), ropes: ropes_alone, block: llama::block };

/// All of them.
pub(super) static ALL: &[&Architecture] = &[
    &llama::LLAMA,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &qwen::QWEN3MOE,
    &gpt_oss::GPT_OSS,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gemma4::GEMMA4,
    &glm::GLM4,
    &glm::GLM4MOE,
    &deepseek2::DEEPSEEK2,
    &mistral::MISTRAL3,
    &mixtures::MINIMAX_M2,
    &mixtures::ERNIE,
    &mixtures::HUNYUAN,
    &mixtures::BAILING,
    &mixtures::DOTS1,
    &granite::GRANITE,
    &granite::GRANITEMOE,
    &phi::PHI3,
    &olmo::OLMO2,
    &exaone::EXAONE4,
    &cohere::COHERE2,
    &small::SMOLLM3,
    &small::SEED_OSS,
    &gpt::STARCODER2,
    &gpt::FALCON,
    &gpt::GPTNEOX,
    &gpt::GPT2,
    &llama::LLAMA4,
    &qwen35::QWEN35,
    &qwen35::QWEN35MOE,
    &qwen35::QWEN3NEXT,
    &lfm2::LFM2,
    &lfm2::LFM2MOE,
    &mamba::MAMBA2,
    &mamba::NEMOTRON_H,
];

/// The rotary embedding that the metadata describe, with the divisors of `rope_freqs.weight` if there are any; and that
/// of blocks with windows, where it is another.
fn ropes(b: &mut Builder<'_>) -> Result<(), ModelError> {
    let divisors = b.divisors("rope_freqs.weight")?;
    b.rope(RopeSpec { divisors, ..main_rope(b.h) });
    if let Some((base, scaling)) = b.h.window_rope {
        b.rope(RopeSpec { base, scaling, ..main_rope(b.h) });
    }
    Ok(())
}

/// The rotary embedding that the metadata describe.
fn main_rope(h: &HParams) -> RopeSpec {
    RopeSpec {
        n_rot: h.n_rot,
        base: h.rope_base,
        scaling: h.rope_scaling,
        divisors: None,
        long: None,
        magnitude: h.rope_magnitude,
    }
}

/// The same without divisors, which the architecture has not.
fn ropes_alone(b: &mut Builder<'_>) -> Result<(), ModelError> {
    b.rope(main_rope(b.h));
    if let Some((base, scaling)) = b.h.window_rope {
        b.rope(RopeSpec { base, scaling, ..main_rope(b.h) });
    }
    Ok(())
}

/// The blocks that the file counts include those that predict further tokens, which come last.
fn set_blocks_apart(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    const KEY: &str = "nextn_predict_layers";
    h.n_next = keys.count(KEY, limit::LAYERS)?;
    if h.n_next >= h.n_layers {
        return Err(keys.error(KEY, format!("is {}, but there are {} blocks in all", h.n_next, h.n_layers)));
    }
    h.n_layers -= h.n_next;
    Ok(())
}

/// The key of which blocks have windows.
const PATTERN: &str = "attention.sliding_window_pattern";
/// The key of the base of their rotary frequencies.
const WINDOW_BASE: &str = "rope.freq_base_swa";

/// Blocks with a window: which ones the file says, or all but each `every`th. `false` if the file names no window and
/// there is none by default.
fn windows(keys: &Keys<'_>, h: &mut HParams, default: usize, every: usize) -> Result<bool, ModelError> {
    let window = if keys.has(WINDOW) { keys.count(WINDOW, limit::CTX)? } else { default };
    if window == 0 {
        return Ok(false);
    }
    let windowed = keys.windowed(PATTERN, every, h.n_layers)?;
    h.masks = windowed.into_iter().map(|w| if w { Mask::Window(window) } else { Mask::Full }).collect();
    Ok(true)
}

/// Base of the rotary frequencies of blocks with windows.
fn window_base(keys: &Keys<'_>, default: f32) -> Result<f32, ModelError> {
    Ok(keys.bounded(WINDOW_BASE, &BASE)?.unwrap_or(default))
}

/// The router's function by `expert_gating_func`.
fn gating(keys: &Keys<'_>, default: Option<Gating>) -> Result<Gating, ModelError> {
    const KEY: &str = "expert_gating_func";
    match (keys.count(KEY, 255)?, default) {
        (0, Some(default)) => Ok(default),
        (0, None) => Err(keys.error(KEY, "is missing".into())),
        (1, _) => Ok(Gating::Softmax),
        (2, _) => Ok(Gating::Sigmoid),
        (3, _) => Ok(Gating::SoftmaxOfChosen),
        (other, _) => {
            let what = format!("{other} is not supported; 1 (softmax), 2 (sigmoid) and 3 (softmax of the chosen) are");
            Err(keys.error(KEY, what))
        }
    }
}

/// Keys of [`deepseek_router`].
const ROUTER_KEYS: [&str; 5] = [
    "expert_gating_func",
    "expert_group_count",
    "expert_group_used_count",
    "expert_shared_count",
    "leading_dense_block_count",
];
/// The width of experts that all tokens share.
const SHARED_WIDTH: &str = "expert_shared_feed_forward_length";

/// Two lists of keys as one, of `N`.
const fn joined<const N: usize>(a: &[&'static str], b: &[&'static str]) -> [&'static str; N] {
    assert!(a.len() + b.len() == N);
    let mut all = [""; N];
    let mut i = 0;
    while i < N {
        all[i] = if i < a.len() { a[i] } else { b[i - a.len()] };
        i += 1;
    }
    all
}

/// The router of DeepSeek and those who took it over: function, normalisation, scale and groups by keys, dense blocks
/// before the others.
fn deepseek_router(keys: &Keys<'_>, h: &mut HParams, default: Option<Gating>) -> Result<(), ModelError> {
    h.n_dense = keys.count("leading_dense_block_count", limit::LAYERS)?.min(h.n_layers);
    let groups = match keys.count("expert_group_count", limit::EXPERTS)? {
        0 | 1 => (1, 1),
        n if h.n_experts.is_multiple_of(n) => (n, keys.required("expert_group_used_count", n)?),
        n => return Err(keys.error("expert_group_count", format!("{n} does not divide the {} experts", h.n_experts))),
    };
    let each = groups.1 * (h.n_experts / groups.0);
    if each < h.n_experts_used {
        let what = format!("{} groups have {each} experts, but {} are used", groups.1, h.n_experts_used);
        return Err(keys.error("expert_group_used_count", what));
    }
    h.router = Router {
        gating: gating(keys, default)?,
        normalize: keys.bool("expert_weights_norm")?.unwrap_or(false),
        scale: keys.factor("expert_weights_scale")?,
        groups,
        on_input: false,
    };
    Ok(())
}

/// YaRN's rotations are those of its authors, whatever the file says.
fn plain_betas(h: &mut HParams) {
    if let RopeScaling::Yarn { beta_fast, beta_slow, .. } = &mut h.rope_scaling {
        (*beta_fast, *beta_slow) = (32.0, 1.0);
    }
}

/// The experts are as wide as `feed_forward_length`.
fn experts_as_wide_as_ff(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    if h.n_ff_expert != 0 && h.n_ff_expert != h.n_ff {
        let what =
            format!("{} differs from feed_forward_length {}, which is the experts' width here", h.n_ff_expert, h.n_ff);
        return Err(keys.error("expert_feed_forward_length", what));
    }
    h.n_ff_expert = h.n_ff;
    Ok(())
}
