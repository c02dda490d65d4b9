//! DeepSeek V2 and V3, and who took them over: attention to latent vectors, dense blocks first, then routed experts beside shared
//! ones.

use super::{Architecture, Family, PLAIN, ROUTER_KEYS, deepseek_router, joined, plain_betas, set_blocks_apart};
use crate::backend::{Gating, KvShape, Scores};
use crate::model::build::{Builder, Choose, FEED_FORWARD, MIXTURE, Mixture};
use crate::model::hparams::{Keys, LatentSizes, limit};
use crate::model::{HParams, ModelError, RopeScaling};

const RANK: &str = "attention.kv_lora_rank";
const QUERY_RANK: &str = "attention.q_lora_rank";
const VALUE: &str = "attention.value_length";
const KEY_OF_HEAD: &str = "attention.key_length_mla";
const VALUE_OF_HEAD: &str = "attention.value_length_mla";
const MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
/// Tokens of GLM 4.7 Flash, which is told by them.
const GLM_FLASH: usize = 154_880;

pub(super) const DEEPSEEK2: Architecture = Architecture {
    family: Family {
        name: "deepseek2",
        follows: &joined::<12>(
            &ROUTER_KEYS,
            &["nextn_predict_layers", RANK, QUERY_RANK, VALUE, KEY_OF_HEAD, VALUE_OF_HEAD, MULTIPLIER],
        ),
        ..PLAIN.family
    },
    settle,
    block,
    ..PLAIN
};

fn settle(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    set_blocks_apart(keys, h)?;
    let gating = if keys.vocabulary() == GLM_FLASH { Gating::Sigmoid } else { Gating::Softmax };
    deepseek_router(keys, h, Some(gating))?;
    if h.n_experts == 0 {
        h.n_dense = h.n_layers;
    }
    h.n_ff_shared = h.n_ff_expert * keys.count("expert_shared_count", limit::EXPERTS)?;
    plain_betas(h);
    let (rank, absorbed) = (keys.required(RANK, limit::HEAD_DIM)?, keys.has(KEY_OF_HEAD));
    // Files whose keys are not of one head say how wide each is.
    let (key, value) = match absorbed {
        true => (keys.required(KEY_OF_HEAD, limit::HEAD_DIM)?, keys.required(VALUE_OF_HEAD, limit::HEAD_DIM)?),
        false => (h.head_dim, keys.required(VALUE, limit::HEAD_DIM)?),
    };
    if h.n_rot == 0 || h.n_rot >= key || value > key {
        let what = format!("{key} has no room for {} elements that rotate, or for a value of {value}", h.n_rot);
        return Err(keys.error(if absorbed { KEY_OF_HEAD } else { "attention.key_length" }, what));
    }
    let one = absorbed && h.n_kv_heads == 1 && h.head_dim == rank + h.n_rot;
    if !one && (absorbed || h.n_kv_heads != h.n_heads) {
        let what = format!("{} with heads of {} fit no latent vectors of {rank}", h.n_kv_heads, h.head_dim);
        return Err(keys.error("attention.head_count_kv", what));
    }
    let query_rank = keys.count(QUERY_RANK, limit::WIDTH)?;
    h.latent = Some(LatentSizes { rank, query_rank, nope: key - h.n_rot, value, absorbed });
    let shape = KvShape { of_keys: if absorbed { rank } else { 0 }, ..KvShape::new(h.n_kv_heads, h.head_dim) };
    h.shapes = vec![shape; h.n_layers];
    h.scores = Scores { scale: Some(scale(keys, h, key)?), ..Scores::PLAIN };
    Ok(())
}

/// Scale of scores, in which YaRN's magnitude is, squared; and that of rotated elements, which files with a multiplier have not.
fn scale(keys: &Keys<'_>, h: &mut HParams, key: usize) -> Result<f32, ModelError> {
    let mut magnitude = 1.0;
    if let RopeScaling::Yarn { factor, .. } = h.rope_scaling {
        let log = factor.max(1.0).ln();
        // Files hold a tenth of the multiplier.
        let multiplier = keys.or_none(MULTIPLIER)?;
        magnitude = 1.0 + multiplier.unwrap_or(0.1) * log;
        if multiplier.is_some() {
            h.rope_magnitude = 1.0 / (1.0 + 0.1 * log);
        }
    }
    Ok(magnitude * magnitude / (key as f32).sqrt())
}

fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    if let Some(latent) = b.h.latent {
        b.latent_attention(i, &latent)?;
    }
    if !b.h.is_routed(i) {
        return b.feed_forward(i, &FEED_FORWARD);
    }
    let shared = (b.h.n_ff_shared > 0).then_some("_shexp");
    b.mixture(i, &Mixture { choose: Choose::IfThere, shared, ..MIXTURE })
}
