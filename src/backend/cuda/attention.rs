//! Attention over the KV cache: its kernels' launches.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::args::{AttnArgs, MergeArgs};
use super::driver::device_error;
use super::heads::{WIDE_ROWS, narrow};
use super::ops::lengths;
use super::workspace::{key_ranges, prompt_ranges};
use super::{CudaBackend, modules};
use crate::backend::op::Act;
use crate::backend::{BackendError, Class, EXACT_ROWS, Scores};

impl CudaBackend {
    /// Attention of the pass's rows over what they see of the cache of a layer.
    pub(super) fn attend_scores(&mut self, layer: usize, scores: &Scores, sinks: u64) -> Result<(), BackendError> {
        match self.engine.class {
            Class::Exact => self.attend_decode(layer, scores, sinks),
            Class::Bulk => self.attend_prefill(layer, scores, sinks),
        }
    }

    fn attn_args(&self, layer: usize, scores: &Scores, sinks: u64) -> AttnArgs {
        let (d, ws) = (&self.dims, &self.engine.ws);
        let (window, chunk) = lengths(scores.mask);
        let (shape, [k, v]) = (d.shape(layer), self.cache_of(layer));
        AttnArgs {
            q: ws.q.addr(),
            k,
            v,
            out: ws.attn.addr(),
            ml: ws.partial_ml.addr(),
            n_heads: d.n_heads as i32,
            n_kv_heads: shape.heads as i32,
            n_places: d.places(layer) as i32,
            tokens: self.tokens as i32,
            pass: self.pass_of(layer),
            scale: scores.scale.map_or(LOG2_E / (shape.dim as f32).sqrt(), |s| LOG2_E * s),
            cap: LOG2_E * scores.cap,
            sinks,
            window,
            chunk,
            skip: 0,
        }
    }

    /// The kernel of this cache for heads of this size, of decoding (0) or of prompts (1).
    fn attn_kernel(&self, a: &AttnArgs, head_dim: usize, which: usize) -> Result<modules::Func, BackendError> {
        let kernels = self.engine.kernels.attn.iter().find(|k| k.head_dim == head_dim);
        let k = kernels.ok_or_else(|| device_error("heads whose kernels were not loaded"))?;
        let plain = a.cap == 0.0 && a.sinks == 0 && a.window == 0 && a.chunk == 0;
        Ok((if plain { &k.plain } else { &k.by })[self.cache_kind()][which])
    }

    fn attend_prefill(&self, layer: usize, scores: &Scores, sinks: u64) -> Result<(), BackendError> {
        let (d, shape) = (&self.dims, self.dims.shape(layer));
        let a = self.attn_args(layer, scores, sinks);
        let grid_of = |each: usize, tokens: usize, ranges: usize| {
            ((tokens * (d.n_heads / shape.heads)).div_ceil(each) as u32, shape.heads as u32, ranges as u32)
        };
        if !narrow(shape, self.cache_kind()) {
            return self.attend_wide(&a, shape, 1, grid_of(WIDE_ROWS, self.tokens, 1));
        }
        let keys = if shape.dim == 256 { 32 } else { 64 };
        let shared = (64 + 2 * keys) * (shape.dim + 8) * 2;
        let f = self.attn_kernel(&a, shape.dim, 1)?;
        let grid = |tokens: usize, ranges: usize| grid_of(64, tokens, ranges);
        let whole = grid(self.tokens, 1);
        let few_blocks = (whole.0 * whole.1) < self.engine.device.info.multiprocessors;
        // A recording is repeated at other positions.
        if !few_blocks || !self.divide_keys || self.recorder.records() || self.ranges_seen(0..self.tokens, &a) == 1 {
            // SAFETY: AttnArgs is what attn_prefill_* declare; the cache holds all positions.
            return unsafe { self.engine.launch(f, whole, 128, shared, &a) };
        }
        // As many tokens at once as partial results have room for; ranges that none of them sees end at once.
        let room = d.max_batch.min(EXACT_ROWS) * key_ranges(d.n_ctx);
        let each = (room / prompt_ranges(d.n_ctx)).min(self.tokens);
        let width = self.heads_width();
        for first in (0..self.tokens).step_by(each) {
            let tokens = each.min(self.tokens - first);
            let ranges = prompt_ranges(self.first_pos + first + tokens);
            let ws = &self.engine.ws;
            let from = (first * width * 4) as u64;
            let part =
                AttnArgs { q: a.q + from, out: ws.partial.addr(), tokens: tokens as i32, skip: first as i32, ..a };
            let join = MergeArgs {
                part: part.out,
                ml: part.ml,
                out: a.out + from,
                tokens: part.tokens,
                width: width as i32,
                head_dim: shape.dim as i32,
                pass: a.pass,
                sinks,
                window: a.window,
                chunk: a.chunk,
                skip: part.skip,
                ..MergeArgs::default()
            };
            // SAFETY: AttnArgs is what attn_prefill_* declare, MergeArgs what attn_join does; the cache holds all
            // positions, and partial results have room for all ranges of so many tokens (`each`).
            unsafe {
                self.engine.launch(f, grid(tokens, ranges.max(2)), 128, shared, &part)?;
                let blocks = (tokens * width).div_ceil(128) as u32;
                self.engine.launch(self.engine.kernels.attn_join, (blocks, 1, 1), 128, 0, &join)?;
            }
        }
        Ok(())
    }

    /// Ranges of keys from the first one that the first of these rows sees to the last one.
    fn ranges_seen(&self, rows: Range<usize>, a: &AttnArgs) -> usize {
        let (first, last) = (self.first_pos + rows.start, self.first_pos + rows.end);
        let hidden = match (a.window as usize, a.chunk as usize) {
            (0, 0) => 0,
            (0, chunk) => first / chunk * chunk,
            (window, _) => (first + 1).saturating_sub(window),
        };
        prompt_ranges(last) - prompt_ranges(hidden + 1) + 1
    }

    /// Keys are divided into ranges at fixed positions, a block each; those beyond the pass's keys end at once.
    fn attend_decode(&mut self, layer: usize, scores: &Scores, sinks: u64) -> Result<(), BackendError> {
        let (d, shape) = (&self.dims, self.dims.shape(layer));
        let rows = self.tokens * (d.n_heads / shape.heads);
        let ranges = key_ranges(d.n_ctx) as u32;
        let ws = &self.engine.ws;
        let a = AttnArgs { out: ws.partial.addr(), ..self.attn_args(layer, scores, sinks) };
        let grid = |each: usize| (rows.div_ceil(each) as u32, shape.heads as u32, ranges);
        if narrow(shape, self.cache_kind()) {
            let shared = (16 + 2 * 64) * (shape.dim + 8) * 2;
            let f = self.attn_kernel(&a, shape.dim, 0)?;
            // SAFETY: AttnArgs is what attn_decode_* declare; partial results have room for all ranges of up to
            // EXACT_ROWS tokens, and `begin` has checked their number.
            unsafe { self.engine.launch(f, grid(16), 128, shared, &a)? };
        } else {
            self.attend_wide(&a, shape, 0, grid(WIDE_ROWS))?;
        }
        let width = self.heads_width();
        let quantises = width.is_multiple_of(32);
        self.waiting.quantised = quantises.then_some(Act::Attn);
        let m = MergeArgs {
            part: ws.partial.addr(),
            ml: ws.partial_ml.addr(),
            out: ws.attn.addr(),
            q: if quantises { ws.input_q.addr() } else { 0 },
            tokens: self.tokens as i32,
            width: width as i32,
            head_dim: shape.value_dim() as i32,
            pass: a.pass,
            sinks,
            window: a.window,
            chunk: a.chunk,
            skip: 0,
        };
        let blocks = self.tokens * width.div_ceil(32);
        let f = self.engine.kernels.attn_merge;
        // SAFETY: MergeArgs is what attn_merge declares.
        unsafe { self.engine.launch(f, (blocks as u32, 1, 1), 256, 0, &m) }
    }
}
