//! Layer norms with biases and feed-forward parts without a gate: StarCoder 2, Falcon, GPT-NeoX.

use super::{Architecture, Family, PLAIN, main_rope};
use crate::backend::{Activation, NormKind, RopeKind};
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, FeedForward, Reads};

const EPSILON: &str = "attention.layer_norm_epsilon";

/// Without a gate.
const UNGATED: FeedForward = FeedForward { how: Activation::Gelu, gated: false, ..FEED_FORWARD };

pub(super) const STARCODER2: Architecture = Architecture {
    family: Family {
        name: "starcoder2",
        rope_kind: RopeKind::Neox,
        follows: &[EPSILON],
        norm_eps: EPSILON,
        ..PLAIN.family
    },
    settle: |_, h| {
        (h.norm, h.norm_biases) = (NormKind::Layer, true);
        Ok(())
    },
    block: |b, i| {
        b.attention(i, &ATTENTION)?;
        b.feed_forward(i, &UNGATED)
    },
    ..PLAIN
};

/// Both parts read the same norm, or (40B) one each of the same X.
pub(super) const FALCON: Architecture = Architecture {
    family: Family { name: "falcon", ..STARCODER2.family },
    block: |b, i| {
        if b.has(&format!("blk.{i}.attn_norm_2.weight")) {
            return side_by_side(b, i, "attn_norm_2", "attn_norm");
        }
        b.attention(i, &ATTENTION)?;
        b.feed_forward(i, &FeedForward { reads: Reads::Same, ..UNGATED })
    },
    ..STARCODER2
};

pub(super) const GPTNEOX: Architecture = Architecture {
    family: Family {
        name: "gptneox",
        biases: true,
        own_head: true,
        follows: &[EPSILON, PARALLEL],
        ..STARCODER2.family
    },
    settle: |keys, h| {
        let Some(parallel) = keys.bool(PARALLEL)? else { return Err(keys.error(PARALLEL, "is missing".into())) };
        h.parallel = parallel;
        (STARCODER2.settle)(keys, h)
    },
    block: |b, i| match b.h.parallel {
        true => side_by_side(b, i, "attn_norm", "ffn_norm"),
        false => (STARCODER2.block)(b, i),
    },
    ..STARCODER2
};

/// Embeddings of positions in place of rotation.
pub(super) const GPT2: Architecture = Architecture {
    family: Family { name: "gpt2", biases: true, ..STARCODER2.family },
    settle: |keys, h| {
        h.rotates = false;
        h.positions = Some(h.n_ctx_train);
        (STARCODER2.settle)(keys, h)
    },
    ropes: |b| {
        b.rope(main_rope(b.h));
        b.positions()
    },
    ..STARCODER2
};

const PARALLEL: &str = "use_parallel_residual";

/// The feed-forward part reads X without what attention adds to it.
fn side_by_side(b: &mut Builder<'_>, i: usize, norm: &'static str, ffn_norm: &'static str) -> Result<(), ModelError> {
    b.attention(i, &Attention { norm: Some(norm), deferred: true, ..ATTENTION })?;
    b.feed_forward(i, &FeedForward { reads: Reads::Norm(ffn_norm), adds_attention: true, ..UNGATED })
}
