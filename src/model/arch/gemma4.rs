//! Gemma 4: heads of two sizes, normed values, keys that are values, keys that later blocks share, embeddings for each block,
//! and experts beside a dense part.

use super::{Architecture, Family, PATTERN, PLAIN, WINDOW, WINDOW_BASE, main_rope, window_base, windows};
use crate::backend::{Act, Activation, KvShape, Mask, NormOf, Op, RopeKind, Router, Scores};
use crate::model::build::{ATTENTION, Attention, Builder, FEED_FORWARD, FeedForward, HeadNorms};
use crate::model::hparams::{Keys, limit};
use crate::model::{HParams, ModelError, RopeScaling, RopeSpec};

const HEADS: &str = "attention.head_count_kv";
const WINDOW_HEAD: &str = "attention.key_length_swa";
const WINDOW_VALUE: &str = "attention.value_length_swa";
const WINDOW_ROT: &str = "rope.dimension_count_swa";
const SHARING: &str = "attention.shared_kv_layers";
const PER_BLOCK: &str = "embedding_length_per_layer_input";
const CAP: &str = "final_logit_softcapping";

pub(super) const GEMMA4: Architecture = Architecture {
    family: Family {
        name: "gemma4",
        rope_kind: RopeKind::Neox,
        follows: &[WINDOW, PATTERN, WINDOW_BASE, WINDOW_HEAD, WINDOW_VALUE, WINDOW_ROT, SHARING, PER_BLOCK, CAP],
        varies: true,
        ..PLAIN.family
    },
    settle,
    ropes,
    block,
};

fn settle(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    for key in [WINDOW, PATTERN, PER_BLOCK] {
        if !keys.has(key) {
            return Err(keys.error(key, "is missing".into()));
        }
    }
    if !windows(keys, h, 0, 1)? {
        return Err(keys.error(WINDOW, "is 0, but some blocks have windows".into()));
    }
    if h.n_ff == 0 {
        return Err(keys.error("feed_forward_length", "is missing".into()));
    }
    h.window_rope = Some((window_base(keys, 10_000.0)?, RopeScaling::None));
    shapes(keys, h)?;
    h.widths = keys.each("feed_forward_length", h.n_ff, limit::FF, h.n_layers)?;
    h.n_per_block = keys.count(PER_BLOCK, limit::WIDTH)?;
    if h.n_per_block > 0 && h.n_experts > 0 {
        return Err(keys.error(PER_BLOCK, format!("is {}, which is not supported beside experts", h.n_per_block)));
    }
    h.embedding_scale = (h.n_embd as f32).sqrt();
    h.scores = Scores { scale: Some(1.0), ..Scores::PLAIN };
    h.logit_cap = keys.cap(CAP, 0.0)?;
    h.router = Router::softmax(true, 1.0);
    Ok(())
}

/// Heads of each block, and which blocks have keys of their own.
fn shapes(keys: &Keys<'_>, h: &mut HParams) -> Result<(), ModelError> {
    let full = h.head_dim;
    let windowed = keys.size(WINDOW_HEAD, limit::HEAD_DIM)?.unwrap_or(full);
    if let Some(v) = keys.size(WINDOW_VALUE, limit::HEAD_DIM)?.filter(|v| *v != windowed) {
        let what = format!("{v} differs from the key length {windowed}, which is not supported");
        return Err(keys.error(WINDOW_VALUE, what));
    }
    h.window_rot = keys.required(WINDOW_ROT, limit::HEAD_DIM)?;
    if h.window_rot > windowed || !h.window_rot.is_multiple_of(2) {
        let what = format!("{} is odd or larger than a head of {windowed}", h.window_rot);
        return Err(keys.error(WINDOW_ROT, what));
    }
    let heads = keys.each(HEADS, h.n_heads, limit::HEADS, h.n_layers)?;
    if let Some(n) = heads.iter().find(|n| **n == 0 || !h.n_heads.is_multiple_of(**n)) {
        return Err(keys.error(HEADS, format!("{n} does not divide the {} query heads", h.n_heads)));
    }
    let dim = |i: usize| if h.mask(i) == Mask::Full { full } else { windowed };
    let mut shapes: Vec<KvShape> =
        heads.into_iter().enumerate().map(|(i, heads)| KvShape::new(heads, dim(i))).collect();
    h.n_sharing = keys.count(SHARING, limit::LAYERS)?;
    for i in h.n_layers.saturating_sub(h.n_sharing)..h.n_layers {
        let from = h.shares(i).filter(|from| h.rope_of(*from) == h.rope_of(i));
        let Some(from) = from else {
            let what = format!("{} leaves block {i} without one of its kind whose keys it could share", h.n_sharing);
            return Err(keys.error(SHARING, what));
        };
        shapes[i] = shapes[from];
    }
    (h.head_dim, h.shapes) = (full.max(windowed), shapes);
    Ok(())
}

impl HParams {
    /// The block whose keys and values block `i` attends to, where it has none: the last one that has any if it sees all, the
    /// one before if it has a window.
    fn shares(&self, i: usize) -> Option<usize> {
        let own = self.n_layers.saturating_sub(self.n_sharing);
        let back = if self.mask(i) == Mask::Full { 1 } else { 2 };
        if i < own { None } else { own.checked_sub(back) }
    }
}

fn ropes(b: &mut Builder<'_>) -> Result<(), ModelError> {
    let main = main_rope(b.h);
    let divisors = match (0..b.h.n_layers).any(|i| b.h.mask(i) == Mask::Full) {
        true => Some(b.needed_divisors("rope_freqs.weight")?),
        false => None,
    };
    b.rope(RopeSpec { divisors, ..main });
    if let Some((base, scaling)) = b.h.window_rope {
        b.rope(RopeSpec { n_rot: b.h.window_rot, base, scaling, ..main });
    }
    Ok(())
}

fn block(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    let shared = b.h.shares(i);
    let post_norm = Some("post_attention_norm");
    b.attention(i, &Attention { head_norms: HeadNorms::Each, norms_values: true, shared, post_norm, ..ATTENTION })?;
    if b.h.is_routed(i) {
        return experts_beside_dense(b, i);
    }
    b.feed_forward(i, &FeedForward { post_norm: Some("post_ffw_norm"), ..GELU })?;
    let (p, u) = (format!("blk.{i}"), b.ffn_unit());
    if b.h.n_per_block > 0 {
        own_input(b, i, u)?;
    }
    if let Some(by) = b.optional_vector(u, &format!("{p}.layer_output_scale.weight"), 1)? {
        b.op(Op::Multiply { act: Act::X, by });
    }
    Ok(())
}

const GELU: FeedForward = FeedForward { how: Activation::Gelu, ..FEED_FORWARD };

/// Adds to X what a block makes of its part of the token's second embedding.
fn own_input(b: &mut Builder<'_>, i: usize, u: usize) -> Result<(), ModelError> {
    let (d, width) = (b.h.n_embd, b.h.n_per_block);
    let p = format!("blk.{i}");
    let w = b.linear(u, &format!("{p}.inp_gate"), width, d)?;
    b.op(Op::Linear { to: Act::Hidden, from: Act::X, w, add: false });
    b.op(Op::TakePart { part: i, width });
    b.op(Op::Activate { how: Activation::Gelu, gated: true, width });
    let w = b.linear(u, &format!("{p}.proj"), d, width)?;
    b.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
    let norm = b.norm(u, &format!("{p}.post_norm"), d)?;
    b.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
    b.op(Op::Add { to: Act::X, from: Act::Out });
    Ok(())
}

/// A dense part and routed experts that both read X, and whose outputs are normed each by itself and then together. The router
/// reads X through a norm of its own.
fn experts_beside_dense(b: &mut Builder<'_>, i: usize) -> Result<(), ModelError> {
    let h = b.h;
    let (d, width) = (h.n_embd, h.width(i));
    let p = format!("blk.{i}");
    let u = b.ffn_unit();
    let norm = b.norm(u, &format!("{p}.ffn_norm"), d)?;
    b.op(Op::Norm { to: Act::H, from: Act::X, norm });
    b.hidden(u, &p, "", Act::H, width, &GELU)?;
    let w = b.linear(u, &format!("{p}.ffn_down"), d, width)?;
    b.op(Op::Linear { to: Act::Out, from: Act::Hidden, w, add: false });
    let norm = b.norm(u, &format!("{p}.post_ffw_norm_1"), d)?;
    b.op(Op::Norm { to: Act::Out, from: Act::Out, norm });
    let scale = Some(b.vector(u, &format!("{p}.ffn_gate_inp.scale"), d)?);
    let norm = NormOf { kind: h.norm, weight: scale, bias: None, eps: h.norm_eps };
    b.op(Op::Norm { to: Act::H, from: Act::X, norm });
    b.op(Op::Scale { act: Act::H, by: 1.0 / (d as f32).sqrt() });
    let w = b.linear(u, &format!("{p}.ffn_gate_inp"), h.n_experts, d)?;
    b.op(Op::Route { w, choose: None, how: h.router });
    if let Some(by) = b.optional_vector(u, &format!("{p}.ffn_down_exps.scale"), h.n_experts)? {
        b.op(Op::WeighExperts { by });
    }
    let norm = b.norm(u, &format!("{p}.pre_ffw_norm_2"), d)?;
    b.op(Op::Norm { to: Act::H, from: Act::X, norm });
    // H has been read by then.
    let of_experts = b.held_norm(&format!("{p}.post_ffw_norm_2"), d)?;
    let of_both = b.held_norm(&format!("{p}.post_ffw_norm"), d)?;
    let mut after = vec![
        Op::Combine { to: Act::H, add: false },
        Op::Norm { to: Act::H, from: Act::H, norm: of_experts },
        Op::Add { to: Act::Out, from: Act::H },
        Op::Norm { to: Act::Out, from: Act::Out, norm: of_both },
        Op::Add { to: Act::X, from: Act::Out },
    ];
    if let Some(by) = b.held_vector(&format!("{p}.layer_output_scale.weight"), 1)? {
        after.push(Op::Multiply { act: Act::X, by });
    }
    b.end_with_experts(i, Activation::Gelu, after)
}
