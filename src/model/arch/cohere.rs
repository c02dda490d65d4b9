//! Command R 7B: layer norms, attention and feed-forward part side by side, rotation where there is a window.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, windows};
use crate::backend::{Mask, NormKind};
use crate::model::build::{ATTENTION, Attention, FEED_FORWARD, FeedForward, Reads};

pub(super) const COHERE2: Architecture = Architecture {
    family: Family {
        name: "cohere2",
        // The base of blocks with windows is not followed, as llama.cpp does not.
        follows: &[WINDOW, PATTERN, WINDOW_BASE, "logit_scale", "attention.layer_norm_epsilon"],
        norm_eps: "attention.layer_norm_epsilon",
        tied: true,
        ..PLAIN.family
    },
    settle: |keys, h| {
        keys.required(WINDOW, usize::MAX >> 1)?;
        windows(keys, h, 0, 4)?;
        h.norm = NormKind::Layer;
        h.logit_scale = keys.factor("logit_scale")?;
        Ok(())
    },
    block: |b, i| {
        b.attention(i, &Attention { rotates: b.h.mask(i) != Mask::Full, ..ATTENTION })?;
        b.feed_forward(i, &FeedForward { reads: Reads::Same, ..FEED_FORWARD })
    },
    ..PLAIN
};
