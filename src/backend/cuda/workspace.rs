//! Every buffer of a session, allocated once from its sizes.

use std::sync::Arc;

use super::args::XBLK_BYTES;
use super::driver::{Device, DeviceBuffer, PinnedBuffer};
use crate::backend::{BackendError, Dims};
use crate::gguf::TensorType;

/// Largest batch that goes through the matrix-times-vectors kernels (in groups of eight); larger
/// ones go through tensor cores.
pub(super) const GEMV_TOKENS: usize = 32;

/// Largest batch of the decoding kernels of attention.
pub(super) const DECODE_TOKENS: usize = 8;

/// Rows of partial results of attention: tokens × ranges of keys.
pub(super) const PARTIAL_ROWS: usize = 128;

/// Room for weights as halves, the unit of the tensor-core products: at least the first, and up to
/// the second if the widest matrix needs it for one tile a multiprocessor.
const SCRATCH_BYTES: (u64, u64) = (64 << 20, 256 << 20);

/// Halves from row to row of a matrix with `cols` columns, as the products want it.
pub(super) fn pitch(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

pub(super) struct Workspace {
    pub x: DeviceBuffer,
    pub q: DeviceBuffer,
    pub k: DeviceBuffer,
    pub v: DeviceBuffer,
    pub attn: DeviceBuffer,
    /// Gate, and after SwiGLU the hidden state, where it is wanted in F32.
    pub gate: DeviceBuffer,
    pub up: DeviceBuffer,
    /// Normed input in F32.
    pub norm_f: DeviceBuffer,
    /// Inputs quantised.
    pub input_q: DeviceBuffer,
    /// Hidden state quantised.
    pub hidden_q: DeviceBuffer,
    /// Inputs as halves, with a factor a row.
    pub halves: DeviceBuffer,
    pub halves_scale: DeviceBuffer,
    pub scratch: DeviceBuffer,
    pub partial: DeviceBuffer,
    pub partial_ml: DeviceBuffer,
    pub k_cache: DeviceBuffer,
    pub v_cache: DeviceBuffer,
    pub freqs: DeviceBuffer,
    pub logits: DeviceBuffer,
    pub logits_host: PinnedBuffer<f32>,
    /// Raw rows of the embedding on their way in.
    pub rows: DeviceBuffer,
    pub rows_host: PinnedBuffer<u8>,
    pub moe: Option<MoeBuffers>,
}

pub(super) struct MoeBuffers {
    pub scores: DeviceBuffer,
    pub ids: DeviceBuffer,
    pub ids_host: PinnedBuffer<u32>,
    pub weights: DeviceBuffer,
    /// Token of each (token, choice), grouped by expert; then the pair's own number.
    pub lists: DeviceBuffer,
    pub lists_host: PinnedBuffer<u32>,
    /// One row a (token, choice).
    pub out: DeviceBuffer,
}

impl Workspace {
    pub fn new(device: &Arc<Device>, d: &Dims) -> Result<Workspace, BackendError> {
        let batch = d.max_batch;
        let heads = d.n_heads * d.head_dim;
        let kv = d.n_kv_heads * d.head_dim;
        let ff = d.n_ff.max(d.n_ff_expert).max(1);
        let wide = d.n_embd.max(heads).max(ff);
        let few = batch.min(GEMV_TOKENS);
        let floats = |n: usize, what| device.alloc(n as u64 * 4, what);
        let quants = |what| device.alloc((few * wide.div_ceil(32) * XBLK_BYTES) as u64, what);
        let cache_bytes = (d.n_layers * d.n_ctx * kv) as u64 * cache_elem_bytes(d);
        let tiles = device.info.multiprocessors as usize;
        let rows = tiles.div_ceil(batch.div_ceil(128)) * 128;
        let (least, most) = SCRATCH_BYTES;
        let scratch = ((rows * 2 * pitch(wide)) as u64).clamp(least, most);
        let scratch = scratch.max(128 * 2 * pitch(wide) as u64);
        let freqs = floats(d.rope.freqs.len().max(1), "rotary frequencies")?;
        freqs.write(0, &d.rope.freqs)?;
        let row_bytes = batch * d.n_embd * 4;
        Ok(Workspace {
            x: floats(batch * d.n_embd, "residual stream")?,
            q: floats(batch * heads, "queries")?,
            k: floats(batch * kv, "keys")?,
            v: floats(batch * kv, "values")?,
            attn: floats(batch * heads, "attention output")?,
            gate: floats(batch * ff, "hidden state")?,
            up: floats(batch * ff, "hidden state")?,
            norm_f: floats((batch * d.n_embd).max(few * wide), "normed input")?,
            input_q: quants("quantised input")?,
            hidden_q: quants("quantised hidden state")?,
            halves: device.alloc((batch * pitch(wide) * 2) as u64, "input as halves")?,
            halves_scale: floats(batch, "factors of the input")?,
            scratch: device.alloc(scratch, "weights as halves")?,
            partial: floats(PARTIAL_ROWS * heads, "attention partial sums")?,
            partial_ml: floats(PARTIAL_ROWS * d.n_heads * 2, "attention partial sums")?,
            k_cache: device.alloc(cache_bytes, "KV cache")?,
            v_cache: device.alloc(cache_bytes, "KV cache")?,
            freqs,
            logits: floats(d.max_outputs * d.n_vocab, "logits")?,
            logits_host: device.alloc_pinned(d.max_outputs * d.n_vocab, "logits")?,
            rows: device.alloc(row_bytes as u64, "embedding rows")?,
            rows_host: device.alloc_pinned(row_bytes, "embedding rows")?,
            moe: if d.n_experts > 0 { Some(MoeBuffers::new(device, d)?) } else { None },
        })
    }

    pub fn bytes(&self) -> u64 {
        let moe = self
            .moe
            .as_ref()
            .map_or(0, |m| m.scores.bytes() + m.ids.bytes() + m.weights.bytes() + m.lists.bytes() + m.out.bytes());
        [
            &self.x,
            &self.q,
            &self.k,
            &self.v,
            &self.attn,
            &self.gate,
            &self.up,
            &self.norm_f,
            &self.input_q,
            &self.hidden_q,
            &self.halves,
            &self.halves_scale,
            &self.scratch,
            &self.partial,
            &self.partial_ml,
            &self.k_cache,
            &self.v_cache,
            &self.freqs,
            &self.logits,
            &self.rows,
        ]
        .iter()
        .map(|b| b.bytes())
        .sum::<u64>()
            + moe
    }
}

/// Bytes of one element of the KV cache.
pub(super) fn cache_elem_bytes(d: &Dims) -> u64 {
    if d.kv_type == TensorType::F32 { 4 } else { 2 }
}

impl MoeBuffers {
    fn new(device: &Arc<Device>, d: &Dims) -> Result<MoeBuffers, BackendError> {
        let pairs = d.max_batch * d.n_experts_used;
        let words = |n: usize, what| device.alloc(n as u64 * 4, what);
        Ok(MoeBuffers {
            scores: words(d.max_batch * d.n_experts, "router scores")?,
            ids: words(pairs, "routed experts")?,
            ids_host: device.alloc_pinned(pairs, "routed experts")?,
            weights: words(pairs, "router weights")?,
            lists: words(2 * pairs, "tokens of experts")?,
            lists_host: device.alloc_pinned(2 * pairs, "tokens of experts")?,
            out: words(pairs * d.n_embd, "outputs of experts")?,
        })
    }
}
