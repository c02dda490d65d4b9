//! Mamba 2, and Nemotron H, whose blocks are a state space, attention or a feed-forward part each.

use super::{Architecture, Family, PLAIN};
use crate::backend::{Activation, Recurrent, TAPS_MAX};
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, FeedForward, Reads};
use crate::model::hparams::{Keys, limit};
use crate::model::{HParams, ModelError};

const TAPS: &str = "ssm.conv_kernel";
const INNER: &str = "ssm.inner_size";
const STATE: &str = "ssm.state_size";
const HEADS: &str = "ssm.time_step_rank";
const GROUPS: &str = "ssm.group_count";
const KV_HEADS: &str = "attention.head_count_kv";

pub(super) const MAMBA2: Architecture = Architecture {
    family: Family {
        name: "mamba2",
        follows: &[TAPS, INNER, STATE, HEADS, GROUPS],
        attends: false,
        varies: true,
        ..PLAIN.family
    },
    settle: |keys, h| {
        h.n_dense = 0;
        h.attends = vec![false; h.n_layers];
        settle(keys, h)
    },
    block: state_space,
    ..PLAIN
};

pub(super) const NEMOTRON_H: Architecture = Architecture {
    family: Family {
        name: "nemotron_h",
        follows: &[TAPS, INNER, STATE, HEADS, GROUPS, KV_HEADS, "attention.layer_norm_epsilon"],
        varies: true,
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_experts > 0 {
            return Err(keys.error("expert_count", format!("is {}, and experts are not supported here", h.n_experts)));
        }
        if h.attends.len() != h.n_layers {
            let what = format!("an array of {} numbers was expected, 0 for blocks without attention", h.n_layers);
            return Err(keys.error(KV_HEADS, what));
        }
        h.rotates = false;
        h.widths = keys.each("feed_forward_length", h.n_ff, limit::FF, h.n_layers)?;
        settle(keys, h)
    },
    block: |b, i| match (b.h.width(i), b.h.attends(i)) {
        (0, false) => state_space(b, i),
        (0, true) => b.attention(i, &Attention { rotates: false, ..ATTENTION }),
        _ => b.feed_forward(i, &FEED_FORWARD_ALONE),
    },
    ..PLAIN
};

const FEED_FORWARD_ALONE: FeedForward =
    FeedForward { reads: Reads::Norm("attn_norm"), how: Activation::ReluSquared, gated: false, ..FEED_FORWARD };

fn settle(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    let inner = keys.required(INNER, limit::WIDTH)?;
    let (n_values, n_keys) = (keys.required(HEADS, limit::HEADS)?, keys.required(GROUPS, limit::HEADS)?);
    if !inner.is_multiple_of(n_values) || !n_values.is_multiple_of(n_keys) {
        let what = format!("{n_values} does not divide {inner} elements, or is no multiple of {n_keys} groups");
        return Err(keys.error(HEADS, what));
    }
    let state = keys.required(STATE, limit::HEAD_DIM)?;
    let (taps, channels) = (keys.required(TAPS, TAPS_MAX)?, inner + 2 * n_keys * state);
    let dim = inner / n_values;
    h.recurrent =
        Some(Recurrent { layers: 0, sequences: 0, taps, channels, n_keys, n_values, dim, state, scans: true });
    Ok(())
}

fn state_space(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    match b.h.recurrent {
        Some(r) => b.state_space(i, &r, r.n_keys),
        None => Ok(()),
    }
}
