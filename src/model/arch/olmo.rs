//! Olmo 2 and 3: norms behind each part and none before, norms of all heads together; Olmo 3 with windows.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, plain_betas, windows};
use crate::backend::RopeKind;
use crate::model::RopeScaling;
use crate::model::build::{ATTENTION, Attention, FEED_FORWARD, FeedForward, HeadNorms, Reads};

pub(super) const OLMO2: Architecture = Architecture {
    family: Family {
        name: "olmo2",
        own_head: true,
        rope_kind: RopeKind::Neox,
        // The base of blocks with windows and that factor are not followed, as llama.cpp does not.
        follows: &[WINDOW, PATTERN, WINDOW_BASE, "rope.scaling.yarn_attn_factor"],
        ..PLAIN.family
    },
    settle: |keys, h| {
        plain_betas(h);
        if windows(keys, h, 0, 4)? && h.rope_scaling != RopeScaling::None {
            h.window_rope = Some((h.rope_base, RopeScaling::None));
        }
        Ok(())
    },
    block: |b, i| {
        let post_norm = Some("post_attention_norm");
        b.attention(i, &Attention { norm: None, head_norms: HeadNorms::Whole, post_norm, ..ATTENTION })?;
        b.feed_forward(i, &FeedForward { reads: Reads::X, post_norm: Some("post_ffw_norm"), ..FEED_FORWARD })
    },
    ..PLAIN
};
