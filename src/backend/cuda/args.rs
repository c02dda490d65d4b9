//! The structures that kernels take, as `kernels/*.cu` declares them. Addresses are device
//! addresses; 0 is null.

/// Bytes of `XBlk`: 32 quantised activations with their scale and sum.
pub(super) const XBLK_BYTES: usize = 40;

/// Products store (0), add (1), or compute SwiGLU of two segments (2).
pub(super) const STORE: i32 = 0;
pub(super) const ADD: i32 = 1;
pub(super) const SWIGLU: i32 = 2;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GemvArgs {
    pub w: [u64; 3],
    pub bias: [u64; 3],
    pub out: [u64; 3],
    pub rows: [i32; 3],
    pub stride: [i32; 3],
    pub segments: i32,
    pub cols: i32,
    pub tokens: i32,
    pub mode: i32,
    pub x: u64,
    pub in_idx: u64,
    pub out_idx: u64,
    pub hidden_q: u64,
    pub raw: u64,
    pub norm: u64,
    pub eps: f32,
    pub row_warps: i32,
    pub piece: i32,
    pub stages: i32,
    pub run_pitch: i32,
    pub row_bytes: i32,
    pub x_blocks: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PlainArgs {
    pub w: u64,
    pub bias: u64,
    pub out: u64,
    pub x: u64,
    pub in_idx: u64,
    pub out_idx: u64,
    pub rows: i32,
    pub cols: i32,
    pub stride: i32,
    pub tokens: i32,
    pub mode: i32,
    pub vector: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DequantArgs {
    pub w: u64,
    pub out: u64,
    pub rows: i32,
    pub cols: i32,
    pub pitch: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GemmArgs {
    pub x: u64,
    pub w: u64,
    pub scale: u64,
    pub bias: u64,
    pub out: u64,
    pub out_idx: u64,
    pub tokens: i32,
    pub rows: i32,
    pub pitch: i32,
    pub stride: i32,
    pub mode: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AttnArgs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub ml: u64,
    pub n_heads: i32,
    pub n_kv_heads: i32,
    pub n_ctx: i32,
    pub tokens: i32,
    pub ranges: i32,
    pub first_pos: u64,
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MergeArgs {
    pub part: u64,
    pub ml: u64,
    pub out: u64,
    pub q: u64,
    pub tokens: i32,
    pub width: i32,
    pub head_dim: i32,
    pub ranges: i32,
    pub first_pos: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PrepArgs {
    pub x: u64,
    pub up: u64,
    pub w: u64,
    pub idx: u64,
    pub f: u64,
    pub q: u64,
    pub h: u64,
    pub scale: u64,
    pub n: i32,
    pub pitch: i32,
    pub eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RopeArgs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub freqs: u64,
    pub first_pos: u64,
    pub k_cache: u64,
    pub v_cache: u64,
    pub n_heads: i32,
    pub n_kv_heads: i32,
    pub head_dim: i32,
    pub n_rot: i32,
    pub n_ctx: i32,
    pub tokens: i32,
    pub neox: i32,
    pub cache_f32: i32,
    pub magnitude: f32,
    pub q_eps: f32,
    pub k_eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RouteArgs {
    pub scores: u64,
    pub ids: u64,
    pub weights: u64,
    pub tokens: i32,
    pub experts: i32,
    pub used: i32,
    pub normalize: i32,
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CombineArgs {
    pub x: u64,
    pub out: u64,
    pub weights: u64,
    pub tokens: i32,
    pub used: i32,
    pub n: i32,
}
