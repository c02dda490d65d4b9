//! Granite 3 and 4: llama's block with four factors.

use super::{Architecture, Family, PLAIN, SHARED_WIDTH, experts_as_wide_as_ff, ropes};
use crate::backend::Router;
use crate::model::build::{ATTENTION, Builder, FEED_FORWARD, MIXTURE, Mixture};
use crate::model::hparams::{Keys, limit};
use crate::model::{HParams, ModelError};

pub(super) const GRANITE: Architecture = Architecture {
    ropes,
    family: Family {
        name: "granite",
        follows: &["attention.scale", "logit_scale", "residual_scale", "embedding_scale", "rope.scaling.finetuned"],
        ..PLAIN.family
    },
    settle: |keys, h| {
        h.rotates = keys.bool("rope.scaling.finetuned")?.unwrap_or(true);
        factors(keys, h)
    },
    ..PLAIN
};

pub(super) const GRANITEMOE: Architecture = Architecture {
    ropes,
    family: Family {
        name: "granitemoe",
        follows: &["attention.scale", "logit_scale", "residual_scale", "embedding_scale", SHARED_WIDTH],
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        experts_as_wide_as_ff(keys, h)?;
        h.n_ff_shared = keys.count("expert_shared_feed_forward_length", limit::FF)?;
        h.router = Router::softmax(true, 1.0);
        factors(keys, h)
    },
    block,
};

fn factors(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    h.embedding_scale = keys.factor("embedding_scale")?;
    h.residual_scale = keys.factor("residual_scale")?;
    h.logit_scale = 1.0 / keys.factor("logit_scale")?;
    h.scores.scale = keys.or_none("attention.scale")?;
    Ok(())
}

fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    b.attention(i, &ATTENTION)?;
    if !b.h.is_routed(i) {
        return b.feed_forward(i, &FEED_FORWARD);
    }
    let shared = (b.h.n_ff_shared > 0).then_some("_shexp");
    b.mixture(i, &Mixture { shared, ..MIXTURE })
}
