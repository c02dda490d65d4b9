//! Heads of keys and values on their way to the cache, and attention over those that `attn.cu` has no kernels for: of other sizes,
//! with values that are the beginning of keys, or in a cache of Q8_0.

use super::CudaBackend;
use super::args::{AttnArgs, HeadsArgs, RopeArgs, WideArgs};
use super::driver::device_error;
use super::modules::HEAD_DIMS;
use super::ops::{HeadNorm, Heads};
use crate::backend::{BackendError, Dims, KvShape, RopeKind};
use crate::gguf::TensorType;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// Elements of the largest heads of keys and of values, and what divides both, in `kernels/wide.cu`.
const WIDE: (usize, usize) = (576, 512);
const WIDE_STEP: usize = 16;
/// Its rows and keys of a block, its threads, and floats from row to row of scores.
pub(super) const WIDE_ROWS: usize = 32;
const WIDE_KEYS: usize = 32;
const WIDE_THREADS: u32 = 256;
const SCORE_PITCH: usize = 40;
/// The largest heads that `rope_store` of `kernels/ops.cu` has room for.
const STORE_DIM: usize = 256;

/// Types of the cache, in the order of the numbers of `kernels/cache.cuh`.
pub(super) const CACHES: [TensorType; 3] = [TensorType::F16, TensorType::F32, TensorType::Q8_0];
const CACHE_Q8_0: usize = 2;

/// Heads that no kernel takes.
const OTHER_HEADS: &str = "heads of more than 512 elements, or of a number of them that 16 does not divide";

/// Why no kernel takes the heads of some layer; `None` if there are for all.
pub(super) fn refuses(d: &Dims) -> Option<&'static str> {
    let fits = |s: KvShape| {
        let (k, v) = (s.dim, s.value_dim());
        k.is_multiple_of(WIDE_STEP) && v.is_multiple_of(WIDE_STEP) && v <= k && k <= WIDE.0 && v <= WIDE.1
    };
    (d.n_layers > 0 && !d.all_shapes().all(fits)).then_some(OTHER_HEADS)
}

/// Whether `attn.cu` has kernels for such heads in such a cache.
pub(super) fn narrow(s: KvShape, kind: usize) -> bool {
    s.of_keys == 0 && kind != CACHE_Q8_0 && HEAD_DIMS.contains(&s.dim)
}

/// Shared memory of a block of `wide.cu`, where values of their own have room beside keys or come to theirs.
fn wide_bytes(s: KvShape, apart: bool) -> usize {
    let pitch = |n: usize| (n + 8) * 2;
    let keys = pitch(s.dim.next_multiple_of(32));
    let values = if apart { pitch(s.value_dim()) } else { 0 };
    (WIDE_ROWS + WIDE_KEYS) * keys + WIDE_KEYS * values + WIDE_ROWS * SCORE_PITCH * 6
}

impl CudaBackend {
    /// Where keys and values of a layer lie.
    pub(super) fn cache_of(&self, layer: usize) -> [u64; 2] {
        let (d, ws) = (&self.dims, &self.engine.ws);
        let [k, v] = d.cache_before(layer).map(|bytes| bytes as u64);
        [ws.k_cache.addr() + k, ws.v_cache.addr() + v]
    }

    /// Norms and rotates queries, and with a layer keys, which are stored there with values.
    pub(super) fn rope_store(&self, layer: Option<usize>, heads: &Heads) -> Result {
        let (d, ws, shape) = (&self.dims, &self.engine.ws, self.shape);
        let [k_cache, v_cache] = layer.map_or([0; 2], |layer| self.cache_of(layer));
        let [rope, of_keys] = heads.ropes;
        if layer.is_some() && rope != of_keys {
            return Err(device_error("queries and keys rotate differently"));
        }
        let (rope, before) = (rope.map(|i| &d.ropes[i]), self.freqs_before(rope.unwrap_or(0)));
        let [q_norm, k_norm] = heads.norms;
        let when = |n: Option<HeadNorm>| n.map_or(0, |n| 1 + i32::from(n.behind));
        let (by, every, offset_by) = heads.scale.unwrap_or((0.0, 1.0, 0.0));
        let kv_heads = if layer.is_some() { shape.heads } else { 0 };
        let a = RopeArgs {
            q: ws.q.addr(),
            k: ws.k.addr(),
            v: ws.v.addr(),
            q_norm: q_norm.map_or(0, |n| n.weight),
            k_norm: k_norm.map_or(0, |n| n.weight),
            freqs: before,
            pass: layer.map_or(ws.pass.addr(), |layer| self.pass_of(layer)),
            k_cache,
            v_cache,
            n_heads: d.n_heads as i32,
            n_kv_heads: kv_heads as i32,
            head_dim: shape.dim as i32,
            n_rot: rope.map_or(0, |r| 2 * r.freqs.len() as i32),
            n_places: layer.map_or(0, |layer| d.places(layer)) as i32,
            tokens: self.tokens as i32,
            neox: i32::from(rope.is_some_and(|r| r.kind == RopeKind::Neox)),
            cache_f32: self.cache_kind() as i32,
            magnitude: rope.map_or(1.0, |r| r.magnitude),
            q_eps: q_norm.map_or(0.0, |n| n.eps),
            k_eps: k_norm.map_or(0.0, |n| n.eps),
            q_when: when(q_norm),
            k_when: when(k_norm),
            by,
            every,
            offset: offset_by,
        };
        let v_heads = if shape.of_keys > 0 { 0 } else { kv_heads };
        let grid = |heads: usize| ((self.tokens * heads).div_ceil(4) as u32, 1, 1);
        let all = d.n_heads + kv_heads + v_heads;
        if heads.values.is_none() && v_heads == shape.heads && shape.dim <= STORE_DIM && self.cache_kind() != CACHE_Q8_0
        {
            // SAFETY: RopeArgs is what rope_store declares; `begin` checked the positions against the cache.
            return unsafe { self.engine.launch(self.engine.kernels.rope_store, grid(all), 128, 0, &a) };
        }
        // Queries that nothing is done to need no copy.
        let q_heads = if heads.is_empty() { 0 } else { d.n_heads };
        let grid = grid(q_heads + kv_heads + v_heads);
        let a = HeadsArgs {
            of: RopeArgs { n_heads: q_heads as i32, ..a },
            v_heads: v_heads as i32,
            v_normed: i32::from(heads.values.is_some()),
            v_eps: heads.values.unwrap_or(0.0),
        };
        // SAFETY: HeadsArgs is what rope_heads declares, with room for a head a warp; as above.
        unsafe { self.engine.launch(self.engine.kernels.rope_heads, grid, 128, 4 * shape.dim * 4, &a) }
    }

    /// Where the frequencies of a rotary embedding begin.
    pub(super) fn freqs_before(&self, rope: usize) -> u64 {
        let before: usize = self.dims.ropes[..rope].iter().map(|r| r.freqs.len()).sum();
        self.engine.ws.freqs.addr() + 4 * before as u64
    }

    /// Launches the kernel for heads of any size, of decoding (0) or of prompts (1).
    pub(super) fn attend_wide(&self, a: &AttnArgs, shape: KvShape, which: usize, grid: (u32, u32, u32)) -> Result {
        let own = shape.of_keys == 0;
        let apart = own && wide_bytes(shape, true) <= self.engine.device.info.shared_bytes as usize - 4 * WIDE_ROWS;
        let a = WideArgs {
            q: a.q,
            k: a.k,
            v: if own { a.v } else { 0 },
            out: a.out,
            ml: a.ml,
            pass: a.pass,
            sinks: a.sinks,
            n_heads: a.n_heads,
            n_kv_heads: a.n_kv_heads,
            n_places: a.n_places,
            tokens: a.tokens,
            dk: shape.dim as i32,
            dv: shape.value_dim() as i32,
            scale: a.scale,
            cap: a.cap,
            window: a.window,
            chunk: a.chunk,
            apart: i32::from(apart),
        };
        let f = self.engine.kernels.wide[self.cache_kind()][which];
        // SAFETY: WideArgs is what wide_* declare, with their shared memory; `refuses` has checked the sizes. The rest is as for the
        // kernels of `attention.rs`.
        unsafe { self.engine.launch(f, grid, WIDE_THREADS, wide_bytes(shape, apart), &a) }
    }

    pub(super) fn cache_kind(&self) -> usize {
        CACHES.iter().position(|ty| *ty == self.dims.kv_type).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::selftest::sizes;

    /// Guards against a type of the cache that the two sides number differently.
    #[test]
    fn kernels_have_the_same_numbers() {
        let source = include_str!("../../../kernels/cache.cuh");
        for (i, name) in ["F16", "F32", "Q8_0"].into_iter().enumerate() {
            assert!(source.contains(&format!("#define CACHE_{name} {i}\n")), "no CACHE_{name} {i}");
            assert_eq!(CACHES[i].name(), name);
        }
        assert_eq!(CACHES[CACHE_Q8_0], TensorType::Q8_0);
        let source = include_str!("../../../kernels/wide.cu");
        let warps = WIDE_THREADS as usize / 32;
        let numbers = [("ROWS", WIDE_ROWS), ("KEYS", WIDE_KEYS), ("WARPS", warps), ("SCORE_PITCH", SCORE_PITCH)];
        for (name, number) in numbers.into_iter().chain([("PAIRS", WIDE.1 / 16 / warps)]) {
            assert!(
                source.contains(&format!("#define {name} {number} "))
                    || source.contains(&format!("#define {name} {number}\n"))
            );
        }
    }

    #[test]
    fn heads_without_kernels_are_refused() {
        let of = |dim: usize, of_keys: usize| Dims { shapes: vec![KvShape { heads: 1, dim, of_keys }], ..sizes() };
        for (dim, of_keys) in [(16, 0), (112, 0), (512, 0), (576, 512), (48, 32)] {
            assert_eq!(refuses(&of(dim, of_keys)), None, "{dim} {of_keys}");
        }
        for (dim, of_keys) in [(24, 0), (528, 0), (592, 512), (576, 520)] {
            assert!(refuses(&of(dim, of_keys)).is_some(), "{dim} {of_keys}");
        }
        // Nothing attends.
        assert_eq!(refuses(&Dims { n_layers: 0, head_dim: 1, ..sizes() }), None);
    }
}
