//! Keys and values of latent vectors (MLA, DeepSeek V2: arXiv 2405.04434): one head of keys for all queries, whose beginning
//! is the value; or, of older files, expanded to heads.

use super::kernel::Then;
use super::{CpuBackend, Shared, rotate};
use crate::backend::{Latent, Linear, Weight};

/// Rows of all heads: where the first head's first row begins, floats from one row to the next and from head to head.
#[derive(Clone, Copy)]
struct Strided {
    at: Shared<f32>,
    row: usize,
    head: usize,
}

impl CpuBackend {
    /// Q, K and V of the rows at hand.
    pub(super) fn latent(&mut self, l: &Latent<Weight>) {
        let (heads, shape) = (self.dims.n_heads, self.shape);
        let rope = &self.dims.ropes[l.rope];
        let (kind, pairs) = (rope.kind, rope.freqs.len());
        let (rot, first) = (2 * pairs, self.first());
        let before: usize = self.dims.ropes[..l.rope].iter().map(|r| r.freqs.len()).sum();
        let tables = self.dims.max_batch.max(1) * before + first * pairs;
        let query = l.nope + rot;
        // What Gates holds of a head: the rest are values.
        let expanded = l.nope + self.dims.value_of_latent;
        for t in 0..self.n_tokens() {
            let at = tables + t * pairs..tables + (t + 1) * pairs;
            let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
            let shared = &mut self.hidden[t * rot..(t + 1) * rot];
            rotate(shared, kind, cos, sin);
            for h in 0..heads {
                let from = &self.mix[(t * heads + h) * query..][..query];
                let q = &mut self.q[(t * heads + h) * shape.dim..][..shape.dim];
                let (still, turning) = q.split_at_mut(shape.dim - rot);
                turning.copy_from_slice(&from[l.nope..]);
                rotate(turning, kind, cos, sin);
                if l.absorbed.is_none() {
                    still.copy_from_slice(&from[..l.nope]);
                    let from = &self.gates[(t * heads + h) * expanded..][..expanded];
                    let k = &mut self.k[(t * heads + h) * shape.dim..][..shape.dim];
                    k[..l.nope].copy_from_slice(&from[..l.nope]);
                    k[l.nope..].copy_from_slice(shared);
                    let v = &mut self.v[(t * heads + h) * shape.dim..][..shape.dim];
                    v[..expanded - l.nope].copy_from_slice(&from[l.nope..]);
                    v[expanded - l.nope..].fill(0.0);
                }
            }
            if l.absorbed.is_some() {
                let k = &mut self.k[t * shape.dim..(t + 1) * shape.dim];
                k[..l.rank].copy_from_slice(&self.up[t * l.rank..(t + 1) * l.rank]);
                k[l.rank..].copy_from_slice(shared);
            }
        }
        if let Some(w) = l.absorbed {
            let from = Strided { at: Shared(self.mix.ptr()), row: heads * query, head: query };
            let to = Strided { at: Shared(self.q.ptr()), row: heads * shape.dim, head: shape.dim };
            self.by_head(w, from, to);
        }
    }

    /// Mix = the values that attention has mixed, `width` of each head.
    pub(super) fn of_latent(&mut self, width: usize, w: Option<Weight>) {
        let (heads, value) = (self.dims.n_heads, self.shape.value_dim());
        let from = Strided { at: Shared(self.attn.ptr()), row: heads * value, head: value };
        if let Some(w) = w {
            let to = Strided { at: Shared(self.mix.ptr()), row: heads * width, head: width };
            return self.by_head(w, from, to);
        }
        for i in 0..self.n_tokens() * heads {
            self.mix[i * width..(i + 1) * width].copy_from_slice(&self.attn[i * value..i * value + width]);
        }
    }

    /// Products of each head's rows with its part of the rows of `w`.
    fn by_head(&mut self, w: Weight, from: Strided, to: Strided) {
        let (heads, n, cols) = (self.dims.n_heads, self.n_tokens(), w.cols);
        let rows = w.rows / heads;
        let bytes = rows * w.ty.row_bytes(cols).unwrap_or(0);
        for head in 0..heads {
            // Values are of the keys here, so that V is free, and as wide as these.
            for (t, row) in self.v.chunks_exact_mut(cols).take(n).enumerate() {
                // SAFETY: the caller's rows, in another buffer than V.
                let x = unsafe { std::slice::from_raw_parts(from.at.get().add(t * from.row + head * from.head), cols) };
                row.copy_from_slice(x);
            }
            let x = Shared(self.v.ptr());
            self.prepare(x, x, cols, n, None);
            let weight = Weight { addr: w.addr + (head * bytes) as u64, rows, ..w };
            let out = to.at.get().wrapping_add(head * to.head);
            let (job, rows) = self.job(&Linear { weight, bias: None }, x.get(), out, Then::Store);
            self.jobs(&[(super::Job { stride: to.row, ..job }, rows)], None);
        }
    }
}
