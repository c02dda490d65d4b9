//! gpt-oss: windows in every second block, attention sinks, biases everywhere, softmax over the chosen experts, clamped
//! SwiGLU.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, plain_betas, window_base, windows};
use crate::backend::{Activation, Gating, RopeKind, Router};
use crate::model::ModelError;
use crate::model::build::{ATTENTION, Attention, Builder, MIXTURE, Mixture};

pub(super) const GPT_OSS: Architecture = Architecture {
    family: Family {
        name: "gpt-oss",
        own_head: true,
        rope_kind: RopeKind::Neox,
        follows: &[WINDOW, PATTERN, WINDOW_BASE],
        ..PLAIN.family
    },
    settle: |keys, h| {
        if h.n_experts == 0 {
            return Err(keys.error("expert_count", "is missing".into()));
        }
        plain_betas(h);
        keys.required(WINDOW, usize::MAX >> 1)?;
        windows(keys, h, 0, 2)?;
        let base = window_base(keys, h.rope_base)?;
        h.window_rope = (base != h.rope_base).then_some((base, h.rope_scaling));
        h.router = Router { gating: Gating::SoftmaxOfChosen, ..Router::softmax(false, 1.0) };
        Ok(())
    },
    block,
    ..PLAIN
};

fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    // One matrix of all three may come with one bias of all, or three.
    let apart = if b.has(&format!("blk.{i}.attn_qkv.weight")) { &[][..] } else { &["attn_q", "attn_k", "attn_v"] };
    for name in apart.iter().chain(&["attn_output", "ffn_gate_inp"]) {
        b.needs(&format!("blk.{i}.{name}.bias"))?;
    }
    b.attention(i, &Attention { sinks: true, ..ATTENTION })?;
    let how = Activation::ClampedSwiglu { limit: 7.0 };
    b.mixture(i, &Mixture { norm: "post_attention_norm", how, biases: true, ..MIXTURE })
}
