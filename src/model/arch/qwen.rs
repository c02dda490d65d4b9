//! Qwen 2 and 2.5, with biases on Q, K and V; Qwen 3, with norms on Q and K; Qwen 3 with routed experts.

use super::{Architecture, Family};
use crate::backend::RopeKind;
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, HeadNorms, MIXTURE};

pub(super) const QWEN2: Architecture = Architecture {
    family: Family { name: "qwen2", rope_kind: RopeKind::Neox, ..super::llama::LLAMA.family },
    ..super::llama::LLAMA
};

pub(super) const QWEN3: Architecture =
    Architecture { family: Family { name: "qwen3", ..QWEN2.family }, block: with_head_norms, ..QWEN2 };

pub(super) const QWEN3MOE: Architecture = Architecture {
    family: Family { name: "qwen3moe", ..QWEN3.family },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        if h.n_ff_expert == 0 {
            // As llama.cpp divides where the key is missing.
            h.n_ff_expert = h.n_ff / h.n_experts_used;
        }
        Ok(())
    },
    ..QWEN3
};

pub(super) fn with_head_norms(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    b.attention(i, &Attention { head_norms: HeadNorms::Each, ..ATTENTION })?;
    if b.h.is_routed(i) { b.mixture(i, &MIXTURE) } else { b.feed_forward(i, &FEED_FORWARD) }
}
