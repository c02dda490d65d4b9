//! Phi 3 and 4: projections in one matrix each, rotary frequencies by the length of the context.

use super::{Architecture, Family, PLAIN, WINDOW, main_rope};
use crate::backend::RopeKind;
use crate::model::build::{ATTENTION, Builder, FEED_FORWARD, FeedForward};
use crate::model::{ModelError, RopeScaling, RopeSpec};

pub(super) const PHI3: Architecture = Architecture {
    family: Family {
        name: "phi3",
        rope_kind: RopeKind::Neox,
        // The window is not followed, as llama.cpp does not.
        follows: &[WINDOW, "rope.scaling.attn_factor"],
        ..PLAIN.family
    },
    settle: |keys, h| {
        if !matches!(h.rope_scaling, RopeScaling::Yarn { .. }) {
            h.rope_magnitude = keys.factor("rope.scaling.attn_factor")?;
        }
        h.n_ctx_original = keys.size("rope.scaling.original_context_length", usize::MAX >> 1)?.unwrap_or(h.n_ctx_train);
        Ok(())
    },
    ropes,
    block: |b, i| {
        b.attention(i, &ATTENTION)?;
        b.feed_forward(i, &FeedForward { fused: true, ..FEED_FORWARD })
    },
};

fn ropes(b: &mut Builder<'_>) -> Result<(), ModelError> {
    let short = b.divisors("rope_factors_short.weight")?;
    let long = b.divisors("rope_factors_long.weight")?;
    let divisors = match short {
        Some(short) => Some(short),
        None => b.divisors("rope_freqs.weight")?,
    };
    let long = long.map(|long| (b.h.n_ctx_original, long));
    b.rope(RopeSpec { divisors, long, ..main_rope(b.h) });
    Ok(())
}
