//! Llama 2 and 3, Mistral; with experts, Mixtral. Llama 4.

use super::{Architecture, Family, PLAIN, WINDOW, ropes};
use crate::backend::{Gating, Mask, Router};
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, HeadNorms, MIXTURE, Mixture};
use crate::model::hparams::limit;

pub(super) const LLAMA: Architecture = Architecture {
    ropes,
    settle: |_, h| {
        if h.n_ff_expert == 0 {
            h.n_ff_expert = h.n_ff;
        }
        Ok(())
    },
    ..PLAIN
};

pub(super) fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    b.attention(i, &ATTENTION)?;
    if b.h.is_routed(i) { b.mixture(i, &MIXTURE) } else { b.feed_forward(i, &FEED_FORWARD) }
}

/// Tokens that see each other in blocks that rotate, and positions of a step of the others' scale: fixed, whatever the
/// file says.
const CHUNK: usize = 8192;

/// Llama 4: every fourth block sees all and does not rotate, the others see a chunk; one expert beside a shared one, whose
/// weight multiplies what it reads.
pub(super) const LLAMA4: Architecture = Architecture {
    ropes,
    family: Family { name: "llama4", follows: &[WINDOW, STEP, "attention.chunk_size"], ..PLAIN.family },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        if keys.has(WINDOW) && keys.count(WINDOW, limit::CTX)? == 0 {
            return Err(keys.error(WINDOW, "is 0, for which llama.cpp has no result to compare with".into()));
        }
        if h.n_rot != h.head_dim {
            return Err(
                keys.error("rope.dimension_count", format!("{} is not the size of a head, {}", h.n_rot, h.head_dim))
            );
        }
        h.masks = (0..h.n_layers).map(|i| if rotates(i) { Mask::Chunk(CHUNK) } else { Mask::Full }).collect();
        h.expert_step = keys.required(STEP, h.n_layers)?;
        h.n_dense = if h.expert_step > 1 { 1 } else { 0 };
        h.n_ff_shared = h.n_ff_expert;
        h.router = Router { gating: Gating::SigmoidOfChosen, on_input: true, ..Router::softmax(false, 1.0) };
        h.by_position = Some((0.1, CHUNK as f32, 1.0));
        Ok(())
    },
    block: |b, i| {
        // Maverick, told by its experts, has no such norms.
        let normed = rotates(i) && b.h.n_experts != 128;
        let head_norms = if normed { HeadNorms::PlainAfterRope } else { HeadNorms::No };
        b.attention(i, &Attention { head_norms, rotates: rotates(i), by_position: !rotates(i), ..ATTENTION })?;
        if b.h.is_routed(i) {
            b.mixture(i, &Mixture { shared: Some("_shexp"), ..MIXTURE })
        } else {
            b.feed_forward(i, &FEED_FORWARD)
        }
    },
};

const STEP: &str = "interleave_moe_layer_step";

fn rotates(i: usize) -> bool {
    !(i + 1).is_multiple_of(4)
}
