//! Qwen 3.5 to 3.8 and Qwen 3 Next: gated delta nets in three blocks of four, attention with gates in the fourth; dense, or
//! with routed experts beside a gated shared one.

use super::{Architecture, Family, PLAIN, set_blocks_apart};
use crate::backend::{DELTA_DIM_MAX, Recurrent, RopeKind, Router, TAPS_MAX};
use crate::model::build::{
    ATTENTION, Attention, Builder, FEED_FORWARD, FeedForward, HeadNorms, MIXTURE, Mixture, Reads,
};
use crate::model::hparams::{Keys, limit};
use crate::model::{HParams, ModelError};

const INTERVAL: &str = "full_attention_interval";
const NEXT: &str = "nextn_predict_layers";

/// Keys of the recurrences.
const KEYS: [&str; 9] = [
    INTERVAL,
    NEXT,
    "expert_shared_feed_forward_length",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
    "ssm.group_count",
    "rope.dimension_sections",
];

pub(super) const QWEN35: Architecture = Architecture {
    family: Family { name: "qwen35", rope_kind: RopeKind::Neox, follows: &KEYS, ..PLAIN.family },
    settle,
    block: |b, i| block(b, i, true),
    ..PLAIN
};

pub(super) const QWEN35MOE: Architecture =
    Architecture { family: Family { name: "qwen35moe", ..QWEN35.family }, settle: with_experts, ..QWEN35 };

pub(super) const QWEN3NEXT: Architecture = Architecture {
    family: Family { name: "qwen3next", ..QWEN35.family },
    settle: with_experts,
    block: |b, i| block(b, i, false),
    ..QWEN35
};

fn settle(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    keys.sections_of_text()?;
    // The blocks that the file counts include those that predict further tokens.
    set_blocks_apart(keys, h)?;
    if h.n_experts == 0 {
        h.n_dense = h.n_layers;
    }
    let interval = keys.size(INTERVAL, limit::LAYERS)?.unwrap_or(4);
    h.attends = (0..h.n_layers).map(|i| (i + 1).is_multiple_of(interval)).collect();
    let dim = keys.required("ssm.state_size", DELTA_DIM_MAX)?;
    let r = Recurrent {
        layers: 0,
        sequences: 0,
        taps: keys.required("ssm.conv_kernel", TAPS_MAX)?,
        channels: 0,
        n_keys: keys.required("ssm.group_count", limit::HEADS)?,
        n_values: keys.required("ssm.time_step_rank", limit::HEADS)?,
        dim,
        state: dim,
        scans: false,
    };
    let r = Recurrent { channels: (2 * r.n_keys + r.n_values) * dim, ..r };
    if !r.n_values.is_multiple_of(r.n_keys) {
        let what = format!("{} is no multiple of the {} groups", r.n_values, r.n_keys);
        return Err(keys.error("ssm.time_step_rank", what));
    }
    if let Some(inner) = keys.size("ssm.inner_size", limit::WIDTH)?.filter(|n| *n != r.n_values * dim) {
        let what = format!("{inner} is not {} heads of {dim}", r.n_values);
        return Err(keys.error("ssm.inner_size", what));
    }
    h.recurrent = Some(r);
    Ok(())
}

fn with_experts(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    if h.n_experts == 0 {
        return Err(keys.error("expert_count", "is missing".into()));
    }
    settle(keys, h)?;
    h.n_ff_shared = keys.count("expert_shared_feed_forward_length", limit::FF)?;
    h.router = Router::softmax(true, 1.0);
    Ok(())
}

fn block(b: &mut Builder<'_>, i: usize, tiled: bool) -> Result<(), ModelError> {
    match b.h.recurrent.filter(|_| !b.h.attends(i)) {
        Some(r) => b.delta_net(i, &r, tiled)?,
        None => b.attention(i, &Attention { head_norms: HeadNorms::Each, gated: true, ..ATTENTION })?,
    }
    let norm = "post_attention_norm";
    if !b.h.is_routed(i) {
        return b.feed_forward(i, &FeedForward { reads: Reads::Norm(norm), ..FEED_FORWARD });
    }
    let shared = (b.h.n_ff_shared > 0).then_some("_shexp");
    b.mixture(i, &Mixture { norm, shared, gated_shared: shared.is_some(), ..MIXTURE })
}
