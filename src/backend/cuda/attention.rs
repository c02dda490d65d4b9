//! Attention over the KV cache: its kernels' launches.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::args::{AttnArgs, MergeArgs};
use super::ops::lengths;
use super::workspace::{key_ranges, prompt_ranges};
use super::{CudaBackend, modules};
use crate::backend::op::Act;
use crate::backend::{BackendError, Class, EXACT_ROWS, Scores};
use crate::gguf::TensorType;

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
        let offset = self.cache_offset(layer);
        AttnArgs {
            q: ws.q.addr(),
            k: ws.k_cache.addr() + offset,
            v: ws.v_cache.addr() + offset,
            out: ws.attn.addr(),
            ml: ws.partial_ml.addr(),
            n_heads: d.n_heads as i32,
            n_kv_heads: d.n_kv_heads as i32,
            n_places: d.places() as i32,
            tokens: self.tokens as i32,
            pass: ws.pass.addr(),
            scale: scores.scale.map_or(LOG2_E / (d.head_dim as f32).sqrt(), |s| LOG2_E * s),
            cap: LOG2_E * scores.cap,
            sinks,
            window,
            chunk,
            skip: 0,
        }
    }

    /// The kernel of this cache, of decoding (0) or of prompts (1).
    fn attn_kernel(&self, a: &AttnArgs, which: usize) -> modules::Func {
        let k = &self.engine.kernels;
        let plain = a.cap == 0.0 && a.sinks == 0 && a.window == 0 && a.chunk == 0;
        (if plain { &k.attn } else { &k.attn_by })[self.cache_kind()][which]
    }

    fn attend_prefill(&self, layer: usize, scores: &Scores, sinks: u64) -> Result<(), BackendError> {
        let d = &self.dims;
        let a = self.attn_args(layer, scores, sinks);
        let keys = if d.head_dim == 256 { 32 } else { 64 };
        let shared = (64 + 2 * keys) * (d.head_dim + 8) * 2;
        let f = self.attn_kernel(&a, 1);
        let grid = |tokens: usize, ranges: usize| {
            ((tokens * (d.n_heads / d.n_kv_heads)).div_ceil(64) as u32, d.n_kv_heads as u32, ranges as u32)
        };
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
                head_dim: d.head_dim as i32,
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
        let d = &self.dims;
        let tiles = (self.tokens * (d.n_heads / d.n_kv_heads)).div_ceil(16);
        let ranges = key_ranges(d.n_ctx);
        let ws = &self.engine.ws;
        let a = AttnArgs { out: ws.partial.addr(), ..self.attn_args(layer, scores, sinks) };
        let shared = (16 + 2 * 64) * (d.head_dim + 8) * 2;
        let f = self.attn_kernel(&a, 0);
        let grid = (tiles as u32, d.n_kv_heads as u32, ranges as u32);
        // SAFETY: AttnArgs is what attn_decode_* declare; partial results have room for all ranges of up to
        // EXACT_ROWS tokens, and `begin` has checked their number.
        unsafe { self.engine.launch(f, grid, 128, shared, &a)? };
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
            head_dim: d.head_dim as i32,
            pass: ws.pass.addr(),
            sinks,
            window: a.window,
            chunk: a.chunk,
            skip: 0,
        };
        let warps = self.tokens * width.div_ceil(32);
        let f = self.engine.kernels.attn_merge;
        // SAFETY: MergeArgs is what attn_merge declares.
        unsafe { self.engine.launch(f, (warps.div_ceil(4) as u32, 1, 1), 128, 0, &m) }
    }

    /// Where the kernels of this session's cache stand in their lists.
    fn cache_kind(&self) -> usize {
        usize::from(self.dims.kv_type == TensorType::F32)
    }
}
