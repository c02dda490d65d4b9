//! Llama 2 and 3, Mistral; with experts, Mixtral.

use super::{Architecture, PLAIN};
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Builder, FEED_FORWARD, MIXTURE};

pub(super) const LLAMA: Architecture = Architecture {
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
