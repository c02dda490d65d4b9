//! Mixtures of experts that differ in their routers and in what all tokens pass.

use super::{
    Architecture, Family, PLAIN, ROUTER_KEYS, SHARED_WIDTH, deepseek_router, experts_as_wide_as_ff, gating, joined,
};
use crate::backend::{Gating, RopeKind, Router};
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Attention, Builder, Choose, FEED_FORWARD, HeadNorms, MIXTURE, Mixture};
use crate::model::hparams::{Keys, limit};

/// MiniMax M2: norms of all heads together.
pub(super) const MINIMAX_M2: Architecture = Architecture {
    family: Family {
        name: "minimax-m2",
        own_head: true,
        rope_kind: RopeKind::Neox,
        follows: &[ROUTER_KEYS[0]],
        ..PLAIN.family
    },
    settle: |keys, h| {
        some_experts(keys, h.n_experts)?;
        experts_as_wide_as_ff(keys, h)?;
        h.router = Router { gating: gating(keys, None)?, ..Router::softmax(true, 1.0) };
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::Whole, Choose::ByBias),
    ..PLAIN
};

/// Ernie 4.5 with experts: dense blocks first.
pub(super) const ERNIE: Architecture = Architecture {
    family: Family { name: "ernie4_5-moe", follows: &[ROUTER_KEYS[3], ROUTER_KEYS[4], SHARED_WIDTH], ..PLAIN.family },
    settle: |keys, h| {
        some_experts(keys, h.n_experts)?;
        h.n_dense = keys.count("leading_dense_block_count", limit::LAYERS)?.min(h.n_layers);
        h.n_ff_shared = keys.count("expert_shared_feed_forward_length", limit::FF)?;
        h.router = Router::softmax(true, 1.0);
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::No, Choose::IfThere),
    ..PLAIN
};

/// Hunyuan with experts: norms of queries and keys behind the rotary embedding.
pub(super) const HUNYUAN: Architecture = Architecture {
    family: Family {
        name: "hunyuan-moe",
        rope_kind: RopeKind::Neox,
        follows: &[ROUTER_KEYS[3], SHARED_WIDTH],
        ..PLAIN.family
    },
    settle: |keys, h| {
        some_experts(keys, h.n_experts)?;
        h.n_ff_shared = keys.required("expert_shared_feed_forward_length", limit::FF)?;
        experts_as_wide_as_ff(keys, h)?;
        h.router = Router::softmax(true, 1.0);
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::EachAfterRope, Choose::ByScore),
    ..PLAIN
};

/// Ling and Ring 2: groups of experts.
pub(super) const BAILING: Architecture = Architecture {
    family: Family {
        name: "bailingmoe2",
        own_head: true,
        rope_kind: RopeKind::Neox,
        follows: &joined::<6>(&ROUTER_KEYS, &[SHARED_WIDTH]),
        ..PLAIN.family
    },
    settle: |keys, h| {
        some_experts(keys, h.n_experts)?;
        deepseek_router(keys, h, None)?;
        let each = match keys.count("expert_shared_feed_forward_length", limit::FF)? {
            0 => h.n_ff_expert,
            each => each,
        };
        h.n_ff_shared = each * keys.required("expert_shared_count", h.n_experts)?;
        Ok(())
    },
    block: |b, i| block(b, i, HeadNorms::Each, Choose::IfThere),
    ..PLAIN
};

/// dots.llm1.
pub(super) const DOTS1: Architecture = Architecture {
    family: Family { name: "dots1", ..BAILING.family },
    settle: |keys, h| {
        some_experts(keys, h.n_experts)?;
        deepseek_router(keys, h, None)?;
        if h.router.gating == Gating::SoftmaxOfChosen {
            return Err(keys.error("expert_gating_func", "3 is none of this architecture's functions".into()));
        }
        h.n_ff_shared = h.n_ff_expert * keys.required("expert_shared_count", h.n_experts)?;
        Ok(())
    },
    ..BAILING
};

fn some_experts(keys: &Keys<'_>, n: usize) -> Result<(), ModelError> {
    if n == 0 { Err(keys.error("expert_count", "is missing".into())) } else { Ok(()) }
}

fn block(b: &mut Builder<'_>, i: usize, head_norms: HeadNorms, choose: Choose) -> Result<(), ModelError> {
    b.attention(i, &Attention { head_norms, ..ATTENTION })?;
    if !b.h.is_routed(i) {
        return b.feed_forward(i, &FEED_FORWARD);
    }
    let shared = (b.h.n_ff_shared > 0).then_some("_shexp");
    b.mixture(i, &Mixture { choose, shared, ..MIXTURE })
}
