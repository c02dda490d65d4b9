//! Gemma 2 and 3: windows, norms before and behind each part, GELU, scaled embeddings, caps.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, window_base, windows};
use crate::backend::{Activation, RopeKind, Scores};
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, FeedForward, HeadNorms};
use crate::model::{HParams, ModelError, RopeScaling};

pub(super) const GEMMA2: Architecture = Architecture {
    family: Family {
        name: "gemma2",
        rope_kind: RopeKind::Neox,
        follows: &[WINDOW, PATTERN, WINDOW_BASE, "attn_logit_softcapping", "final_logit_softcapping"],
        tied: true,
        ..PLAIN.family
    },
    settle: |keys, h| {
        windows(keys, h, 4096, 2)?;
        let base = window_base(keys, h.rope_base)?;
        h.window_rope = (base != h.rope_base).then_some((base, h.rope_scaling));
        scale(h, 46);
        h.scores.cap = keys.cap("attn_logit_softcapping", 50.0)?;
        h.logit_cap = keys.cap("final_logit_softcapping", 30.0)?;
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::No),
    ..PLAIN
};

pub(super) const GEMMA3: Architecture = Architecture {
    family: Family {
        name: "gemma3",
        follows: &[WINDOW, PATTERN, WINDOW_BASE, "final_logit_softcapping"],
        tied: false,
        ..GEMMA2.family
    },
    settle: |keys, h| {
        if windows(keys, h, 0, 6)? {
            h.window_rope = Some((window_base(keys, 10_000.0)?, RopeScaling::None));
        }
        scale(h, 62);
        h.logit_cap = keys.cap("final_logit_softcapping", 0.0)?;
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::Each),
    ..GEMMA2
};

/// Scales of embeddings and scores. The largest model, told by its blocks, has heads narrower than its width says.
fn scale(h: &mut HParams, blocks_of_largest: usize) {
    h.embedding_scale = (h.n_embd as f32).sqrt();
    let width = if h.n_layers == blocks_of_largest { h.n_embd / h.n_heads } else { h.head_dim };
    h.scores = Scores { scale: Some(1.0 / (width as f32).sqrt()), ..Scores::PLAIN };
}

fn block(b: &mut Builder<'_>, i: usize, head_norms: HeadNorms) -> Result<(), ModelError> {
    b.attention(i, &Attention { head_norms, post_norm: Some("post_attention_norm"), ..ATTENTION })?;
    b.feed_forward(i, &FeedForward { how: Activation::Gelu, post_norm: Some("post_ffw_norm"), ..FEED_FORWARD })
}
