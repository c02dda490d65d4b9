//! What stands in place of ordinary attention in a block: recurrences, and attention to latent vectors.

use super::Builder;
use crate::backend::{Act, DeltaNet, Latent, NormOf, Op, Recurrent, Scan};
use crate::model::program::{LinearRef, TensorRef};
use crate::model::{LatentSizes, ModelError};

impl Builder<'_> {
    /// A gated delta net in place of attention in block `i`. `tiled`: see [`DeltaNet`].
    pub fn delta_net(&mut self, i: usize, r: &Recurrent, tiled: bool) -> Result<(), ModelError> {
        let d = self.h.n_embd;
        let (u, p) = self.begin_mixer(i)?;
        let (inner, heads) = (r.n_values * r.dim, r.n_values);
        let packed = format!("{p}.ssm_in");
        if !tiled && self.has(&format!("{packed}.weight")) {
            let all = self.linear(u, &packed, r.channels + inner, d)?;
            self.products(Act::H, [(Act::Mix, all)]);
            self.op(Op::SplitGroups);
        } else {
            let mix = self.linear(u, &format!("{p}.attn_qkv"), r.channels, d)?;
            let gates = self.linear(u, &format!("{p}.attn_gate"), inner, d)?;
            self.products(Act::H, [(Act::Mix, mix), (Act::Gates, gates)]);
        }
        if tiled {
            let beta = self.linear(u, &format!("{p}.ssm_beta"), heads, d)?;
            let alpha = self.linear(u, &format!("{p}.ssm_alpha"), heads, d)?;
            self.products(Act::H, [(Act::Beta, beta), (Act::Alpha, alpha)]);
        } else {
            let both = self.linear(u, &format!("{p}.ssm_ba"), 2 * heads, d)?;
            self.products(Act::H, [(Act::Beta, both)]);
        }
        let (state, w) = self.taps(u, &format!("{p}.ssm_conv1d"), r.taps, r.channels)?;
        self.op(Op::Conv { state, w, bias: None });
        let decay = self.vector(u, &format!("{p}.ssm_a"), heads)?;
        let bias = self.vector(u, &format!("{p}.ssm_dt.bias"), heads)?;
        let norm = self.norm(u, &format!("{p}.ssm_norm"), r.dim)?;
        self.op(Op::DeltaNet(DeltaNet { state, decay, bias, norm, tiled }));
        self.end_mixer(i, u, &format!("{p}.ssm_out"), inner)
    }

    /// A state space in place of attention in block `i`, of so many groups.
    pub fn state_space(&mut self, i: usize, r: &Recurrent, groups: usize) -> Result<(), ModelError> {
        let d = self.h.n_embd;
        let (u, p) = self.begin_mixer(i)?;
        let (inner, heads) = (r.n_values * r.dim, r.n_values);
        let name = format!("{p}.ssm_in.weight");
        let all = (inner + r.channels + heads) as u64;
        let t = self.computable(self.check(self.find(&name)?, &[d as u64, all])?)?;
        let parts = [(0, inner), (inner, r.channels), (inner + r.channels, heads)];
        let [gates, mix, rates] =
            parts.map(|(first, rows)| LinearRef { weight: self.put(u, t, first, rows), bias: None });
        self.products(Act::H, [(Act::Gates, gates), (Act::Mix, mix), (Act::Alpha, rates)]);
        let (state, w) = self.taps(u, &format!("{p}.ssm_conv1d"), r.taps, r.channels)?;
        let bias = Some(self.vector(u, &format!("{p}.ssm_conv1d.bias"), r.channels)?);
        self.op(Op::Conv { state, w, bias });
        let [decay, skip] = ["ssm_a", "ssm_d"].map(|name| self.column(u, &format!("{p}.{name}"), heads));
        let (decay, skip) = (decay?, skip?);
        let bias = self.vector(u, &format!("{p}.ssm_dt.bias"), heads)?;
        let t = self.find(&format!("{p}.ssm_norm.weight"))?;
        let t = self.check(t, &[(inner / groups) as u64, groups as u64])?;
        let weight = Some(self.put_vector(u, t, 0, inner)?);
        let norm = NormOf { kind: self.h.norm, weight, bias: None, eps: self.h.norm_eps };
        self.op(Op::Scan(Scan { state, groups, decay, bias, skip, norm }));
        self.end_mixer(i, u, &format!("{p}.ssm_out"), inner)
    }

    /// Begins block `i` with the norm of X; gives its unit, and what its tensors' names begin with.
    fn begin_mixer(&mut self, i: usize) -> Result<(usize, String), ModelError> {
        let p = format!("blk.{i}");
        let u = self.begin(i)?;
        let norm = self.norm(u, &format!("{p}.attn_norm"), self.h.n_embd)?;
        self.op(Op::Norm { to: Act::H, from: Act::X, norm });
        Ok((u, p))
    }

    /// Ends block `i` with the product that adds to X, of `cols` columns.
    fn end_mixer(&mut self, i: usize, unit: usize, name: &str, cols: usize) -> Result<(), ModelError> {
        let w = self.linear(unit, name, self.h.n_embd, cols)?;
        self.output(Act::Attn, w, None, false)?;
        if i + 1 == self.h.n_layers {
            self.op(Op::Keep);
        }
        Ok(())
    }

    /// The weights of a convolution, (channels, taps), and the state that it keeps.
    fn taps(
        &mut self,
        unit: usize,
        name: &str,
        taps: usize,
        channels: usize,
    ) -> Result<(usize, TensorRef), ModelError> {
        let state = self.states;
        self.states += 1;
        let t = self.check(self.find(&format!("{name}.weight"))?, &[taps as u64, channels as u64])?;
        Ok((state, self.put_vector(unit, t, 0, taps * channels)?))
    }

    /// A vector that files have as a matrix of one column.
    fn column(&mut self, unit: usize, name: &str, len: usize) -> Result<TensorRef, ModelError> {
        let t = self.check(self.find(name)?, &[1, len as u64])?;
        self.put_vector(unit, t, 0, len)
    }

    /// A short convolution in place of attention in block `i`.
    pub fn short_conv(&mut self, i: usize, r: &Recurrent) -> Result<(), ModelError> {
        let d = self.h.n_embd;
        let (u, p) = self.begin_mixer(i)?;
        let mix = self.linear(u, &format!("{p}.shortconv.in_proj"), 3 * d, d)?;
        self.products(Act::H, [(Act::Mix, mix)]);
        let (state, w) = self.taps(u, &format!("{p}.shortconv.conv"), r.taps, d)?;
        self.op(Op::ShortConv { state, w });
        self.end_mixer(i, u, &format!("{p}.shortconv.out_proj"), d)
    }

    /// Attention of block `i` to latent vectors.
    pub fn latent_attention(&mut self, i: usize, l: &LatentSizes) -> Result<(), ModelError> {
        let h = self.h;
        let (d, heads, rot) = (h.n_embd, h.n_heads, h.n_rot);
        let (u, p) = self.begin_mixer(i)?;
        let query = heads * (l.nope + rot);
        if l.query_rank > 0 {
            let w = self.linear(u, &format!("{p}.attn_q_a"), l.query_rank, d)?;
            self.products(Act::H, [(Act::Hidden, w)]);
            let norm = self.norm(u, &format!("{p}.attn_q_a_norm"), l.query_rank)?;
            self.op(Op::Norm { to: Act::Hidden, from: Act::Hidden, norm });
            let w = self.linear(u, &format!("{p}.attn_q_b"), query, l.query_rank)?;
            self.products(Act::Hidden, [(Act::Mix, w)]);
        } else {
            let w = self.linear(u, &format!("{p}.attn_q"), query, d)?;
            self.products(Act::H, [(Act::Mix, w)]);
        }
        let name = format!("{p}.attn_kv_a_mqa.weight");
        let both = self.computable(self.check(self.find(&name)?, &[d as u64, (l.rank + rot) as u64])?)?;
        let latent = LinearRef { weight: self.put(u, both, 0, l.rank), bias: None };
        let turning = LinearRef { weight: self.put(u, both, l.rank, rot), bias: None };
        self.products(Act::H, [(Act::Up, latent), (Act::Hidden, turning)]);
        let norm = self.norm(u, &format!("{p}.attn_kv_a_norm"), l.rank)?;
        self.op(Op::Norm { to: Act::Up, from: Act::Up, norm });
        let (absorbed, w) = if l.absorbed {
            let keys = self.of_heads(u, &format!("{p}.attn_k_b.weight"), l.rank, l.nope)?;
            (Some(keys), Some(self.of_heads(u, &format!("{p}.attn_v_b.weight"), l.value, l.rank)?))
        } else {
            let w = self.linear(u, &format!("{p}.attn_kv_b"), heads * (l.nope + l.value), l.rank)?;
            self.products(Act::Up, [(Act::Gates, w)]);
            (None, None)
        };
        self.op(Op::Latent(Latent { rank: l.rank, nope: l.nope, rope: h.rope_of(i), absorbed }));
        let layer = self.cached.len();
        self.cached.push(i - self.first);
        self.op(Op::Store { layer });
        self.op(Op::Attend { layer, scores: h.scores, sinks: None });
        if i + 1 == h.n_layers {
            self.op(Op::Keep);
        }
        self.op(Op::OfLatent { width: l.value, w });
        let w = self.linear(u, &format!("{p}.attn_output"), d, heads * l.value)?;
        self.output(Act::Mix, w, None, false)
    }

    /// A matrix for each head, one behind the other.
    fn of_heads(&mut self, unit: usize, name: &str, rows: usize, cols: usize) -> Result<TensorRef, ModelError> {
        let heads = self.h.n_heads;
        let t = self.computable(self.check(self.find(name)?, &[cols as u64, rows as u64, heads as u64])?)?;
        Ok(self.put(unit, t, 0, heads * rows))
    }
}
