//! GLM 4: norms before and behind each part, gate and up in one matrix. GLM 4.5 to 4.7: routed experts beside a shared
//! one, dense blocks first.

use super::{Architecture, Family, PLAIN, ROUTER_KEYS, deepseek_router, joined, set_blocks_apart};
use crate::backend::{Gating, RopeKind};
use crate::model::ModelError;
use crate::model::build::{
    ATTENTION, Attention, Builder, Choose, FEED_FORWARD, FeedForward, HeadNorms, MIXTURE, Mixture, Reads,
};

pub(super) const GLM4: Architecture = Architecture {
    family: Family { name: "glm4", ..PLAIN.family },
    block: |b, i| {
        b.attention(i, &Attention { post_norm: Some("post_attention_norm"), ..ATTENTION })?;
        b.feed_forward(i, &FeedForward { fused: true, post_norm: Some("post_ffw_norm"), ..FEED_FORWARD })
    },
    ..PLAIN
};

pub(super) const GLM4MOE: Architecture = Architecture {
    family: Family {
        name: "glm4moe",
        rope_kind: RopeKind::Neox,
        follows: &joined::<7>(&ROUTER_KEYS, &["nextn_predict_layers", "rope.dimension_sections"]),
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        // The blocks that the file counts include those that predict further tokens.
        set_blocks_apart(keys, h)?;
        keys.sections_of_text()?;
        deepseek_router(keys, h, Some(Gating::Sigmoid))?;
        h.n_ff_shared = h.n_ff_expert * keys.count("expert_shared_count", h.n_experts)?;
        Ok(())
    },
    block: mixture_block,
    ..PLAIN
};

fn mixture_block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    b.attention(i, &Attention { head_norms: HeadNorms::EachIfThere, ..ATTENTION })?;
    let norm = "post_attention_norm";
    if !b.h.is_routed(i) {
        return b.feed_forward(i, &FeedForward { reads: Reads::Norm(norm), ..FEED_FORWARD });
    }
    let shared = (b.h.n_ff_shared > 0).then_some("_shexp");
    b.mixture(i, &Mixture { norm, choose: Choose::ByBias, shared, ..MIXTURE })
}
