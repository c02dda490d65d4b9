//! Exaone 4: norms behind each part and none before; the largest with windows, and no rotation where there is none.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, ropes, windows};
use crate::backend::{Mask, RopeKind};
use crate::model::build::{ATTENTION, Attention, FEED_FORWARD, FeedForward, HeadNorms, Reads};

/// Blocks of the model that has windows.
const BLOCKS_WITH_WINDOWS: usize = 64;

pub(super) const EXAONE4: Architecture = Architecture {
    ropes,
    family: Family {
        name: "exaone4",
        rope_kind: RopeKind::Neox,
        // With other numbers of blocks, and for rotary frequencies, these are not followed, as llama.cpp does not.
        follows: &[WINDOW, PATTERN, WINDOW_BASE],
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_layers == BLOCKS_WITH_WINDOWS {
            windows(keys, h, 4096, 4)?;
        }
        Ok(())
    },
    block: |b, i| {
        let rotates = b.h.masks.is_empty() || b.h.mask(i) != Mask::Full;
        let post_norm = Some("post_attention_norm");
        b.attention(i, &Attention { norm: None, head_norms: HeadNorms::Each, rotates, post_norm, ..ATTENTION })?;
        b.feed_forward(i, &FeedForward { reads: Reads::X, post_norm: Some("post_ffw_norm"), ..FEED_FORWARD })
    },
};
