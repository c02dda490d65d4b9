//! LFM 2: short convolutions in most blocks, attention in the others; dense, or with routed experts behind dense blocks.

use super::{Architecture, Family, PLAIN, ROUTER_KEYS, WINDOW, gating};
use crate::backend::{Mask, Recurrent, RopeKind, Router, TAPS_MAX};
use crate::model::build::{ATTENTION, Attention, Builder, Choose, FEED_FORWARD, HeadNorms, MIXTURE, Mixture};
use crate::model::hparams::{Keys, limit};
use crate::model::{HParams, ModelError};

const TAPS: &str = "shortconv.l_cache";
const HEADS: &str = "attention.head_count_kv";

pub(super) const LFM2: Architecture = Architecture {
    family: Family {
        name: "lfm2",
        rope_kind: RopeKind::Neox,
        follows: &[TAPS, HEADS, WINDOW],
        output_norm: "token_embd_norm",
        ..PLAIN.family
    },
    settle: |keys, h| {
        settle(keys, h)?;
        let window = keys.count(WINDOW, limit::CTX)?;
        if window > 0 {
            h.masks = vec![Mask::Window(window); h.n_layers];
        }
        Ok(())
    },
    block,
    ..PLAIN
};

pub(super) const LFM2MOE: Architecture = Architecture {
    // The window is not followed, as llama.cpp does not.
    family: Family { name: "lfm2moe", follows: &[TAPS, HEADS, WINDOW, ROUTER_KEYS[0], ROUTER_KEYS[4]], ..LFM2.family },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        h.n_dense = keys.count("leading_dense_block_count", limit::LAYERS)?.min(h.n_layers);
        h.router = Router { gating: gating(keys, None)?, ..Router::softmax(true, 1.0) };
        settle(keys, h)
    },
    ..LFM2
};

fn settle(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    if h.attends.len() != h.n_layers {
        let what = format!("an array of {} numbers was expected, 0 for blocks with a convolution", h.n_layers);
        return Err(keys.error(HEADS, what));
    }
    let taps = keys.required(TAPS, TAPS_MAX)?;
    let channels = h.n_embd;
    h.recurrent = Some(Recurrent {
        layers: 0,
        sequences: 0,
        taps,
        channels,
        n_keys: 0,
        n_values: 0,
        dim: 0,
        state: 0,
        scans: false,
    });
    Ok(())
}

fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    match b.h.recurrent.filter(|_| !b.h.attends(i)) {
        Some(r) => b.short_conv(i, &r)?,
        None => b.attention(i, &Attention { head_norms: HeadNorms::Each, ..ATTENTION })?,
    }
    match b.h.is_routed(i) {
        true => b.mixture(i, &Mixture { choose: Choose::ByBias, ..MIXTURE }),
        false => b.feed_forward(i, &FEED_FORWARD),
    }
}
