//! Parts of passes that another backend hands over: feed-forward parts and experts of exact rows, from weights in RAM.

use super::{Class, CpuBackend, Shared};
use crate::backend::{BackendError, Dims, EXACT_ROWS};
use crate::state::PAGE;

impl CpuBackend {
    /// A backend that computes parts of passes of a model with these sizes: without a cache, for exact rows.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn for_parts(dims: &Dims, threads: usize) -> Result<CpuBackend, BackendError> {
        let small = Dims {
            n_layers: 0,
            n_blocks: 0,
            expert_bytes: 0,
            n_vocab: 1,
            max_batch: dims.max_batch.min(EXACT_ROWS),
            max_outputs: 1,
            n_ctx: PAGE,
            recent: None,
            bfloat: false,
            recurrent: None,
            ..dims.clone()
        };
        CpuBackend::new(small, threads)
    }

    /// Threads that compute.
    pub(in crate::backend) fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Begins a part: X is `rows`, `T` × `n_embd`, of class [`Class::Exact`].
    pub(in crate::backend) fn begin_part(&mut self, rows: &[f32]) {
        let n = self.begin_rows(rows.len());
        self.x[..rows.len()].copy_from_slice(rows);
        debug_assert!(n <= EXACT_ROWS, "{n} rows of a part");
    }

    /// X of the part.
    pub(in crate::backend) fn part(&self) -> &[f32] {
        &self.x[..self.parts[0] * self.dims.n_embd]
    }

    /// Begins a part of routed experts: what they read is `rows`, `T` × `n_embd`, and each row has chosen as many of `ids`.
    pub(in crate::backend) fn begin_experts(&mut self, rows: &[f32], ids: &[u32]) {
        let n = self.begin_rows(rows.len());
        self.input[..rows.len()].copy_from_slice(rows);
        self.experts.ids[..ids.len()].copy_from_slice(ids);
        self.experts.on_input = false;
        let input = Shared(self.input_here());
        self.prepare(input, input, self.dims.n_embd, n, None);
    }

    /// Outputs of the experts that were computed, `T` × choices × `n_embd`; those of others are what they were.
    pub(in crate::backend) fn expert_rows(&self) -> &[f32] {
        &self.experts.out[..self.choices().len() * self.dims.n_embd]
    }

    /// X of the rows at hand, `T` × `n_embd`: for a backend that is made of this one and hands rows over.
    pub fn rows(&self) -> &[f32] {
        let (d, first) = (self.dims.n_embd, self.first());
        &self.x[first * d..(first + self.n_tokens()) * d]
    }

    /// X of the rows at hand becomes `rows`.
    pub fn set_rows(&mut self, rows: &[f32]) {
        let at = self.first() * self.dims.n_embd;
        self.x[at..at + rows.len()].copy_from_slice(rows);
    }

    /// What the experts of the rows at hand read, `T` × `n_embd`.
    pub fn routed_rows(&self) -> &[f32] {
        let (d, first) = (self.dims.n_embd, self.first());
        &self.input[first * d..(first + self.n_tokens()) * d]
    }

    /// The outputs of these (row, choice) pairs of the rows at hand become those of `rows`, which has a row for each pair.
    pub fn set_expert_rows(&mut self, pairs: &[u32], rows: &[f32]) {
        let (d, first) = (self.dims.n_embd, self.choices().start);
        for pair in pairs.iter().map(|p| *p as usize) {
            let to = (first + pair) * d;
            self.experts.out[to..to + d].copy_from_slice(&rows[pair * d..(pair + 1) * d]);
        }
    }

    /// The pass at hand is of so many floats of X.
    fn begin_rows(&mut self, floats: usize) -> usize {
        let n = floats / self.dims.n_embd;
        (self.parts, self.first_bulk) = ([n, 0], n);
        (self.class, self.outputs) = (Class::Exact, 0);
        (self.attn_ready, self.ready, self.rotation) = (false, None, None);
        n
    }
}
