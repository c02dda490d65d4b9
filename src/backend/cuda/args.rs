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
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QuantiseArgs {
    pub x: u64,
    pub norm: u64,
    pub q: u64,
    pub eps: f32,
    pub cols: i32,
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
    pub cols: i32,
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
    pub n_places: i32,
    pub tokens: i32,
    pub pass: u64,
    pub scale: f32,
    pub cap: f32,
    pub sinks: u64,
    pub window: i32,
    pub chunk: i32,
    pub skip: i32,
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
    pub pass: u64,
    pub sinks: u64,
    pub window: i32,
    pub chunk: i32,
    pub skip: i32,
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
    pub limit: f32,
    pub b: u64,
    pub by: u64,
    pub by_idx: u64,
    pub how: i32,
    pub layer: i32,
    pub add: i32,
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
    pub pass: u64,
    pub k_cache: u64,
    pub v_cache: u64,
    pub n_heads: i32,
    pub n_kv_heads: i32,
    pub head_dim: i32,
    pub n_rot: i32,
    pub n_places: i32,
    pub tokens: i32,
    pub neox: i32,
    pub cache_f32: i32,
    pub magnitude: f32,
    pub q_eps: f32,
    pub k_eps: f32,
    pub q_when: i32,
    pub k_when: i32,
    pub by: f32,
    pub every: f32,
    pub offset: f32,
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

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HandArgs {
    pub from: u64,
    pub to: u64,
    pub n: i32,
    pub rows: i32,
    pub listed: i32,
    pub only: [u32; 8],
    pub add: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ChoicesArgs {
    pub ids: u64,
    pub to: u64,
    pub forced: u64,
    pub slots: u64,
    pub kept: u64,
    pub landed: u64,
    pub uses: u32,
    pub n: i32,
    pub first: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BesideArgs {
    pub table: u64,
    pub ids: u64,
    pub weights: u64,
    pub out: u64,
    pub answers: u64,
    pub x: u64,
    pub used: i32,
    pub n: i32,
    pub share: i32,
    pub add: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ActArgs {
    pub x: u64,
    pub y: u64,
    pub z: u64,
    pub pass: u64,
    pub rows: i32,
    pub n: i32,
    pub each: i32,
    pub by: f32,
    pub cap: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RouteByArgs {
    pub scores: u64,
    pub bias: u64,
    pub ids: u64,
    pub weights: u64,
    pub tokens: i32,
    pub experts: i32,
    pub used: i32,
    pub gating: i32,
    pub normalize: i32,
    pub groups: i32,
    pub kept: i32,
    pub scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SumArgs {
    pub x: u64,
    pub out: u64,
    pub weights: u64,
    pub tokens: i32,
    pub used: i32,
    pub n: i32,
    pub add: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct States {
    pub all: u64,
    pub pass: u64,
    pub state: u64,
    pub floats: i32,
    pub offset: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConvArgs {
    pub states: States,
    pub mix: u64,
    pub out: u64,
    pub w: u64,
    pub rows: i32,
    pub channels: i32,
    pub taps: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeltaArgs {
    pub states: States,
    pub mix: u64,
    pub beta: u64,
    pub alpha: u64,
    pub gates: u64,
    pub out: u64,
    pub decay: u64,
    pub bias: u64,
    pub norm: u64,
    pub rows: i32,
    pub channels: i32,
    pub n_keys: i32,
    pub n_values: i32,
    pub each: i32,
    pub tiled: i32,
    pub eps: f32,
    pub dim: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WideArgs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub out: u64,
    pub ml: u64,
    pub pass: u64,
    pub sinks: u64,
    pub n_heads: i32,
    pub n_kv_heads: i32,
    pub n_places: i32,
    pub tokens: i32,
    pub dk: i32,
    pub dv: i32,
    pub scale: f32,
    pub cap: f32,
    pub window: i32,
    pub chunk: i32,
    pub apart: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeadsArgs {
    pub of: RopeArgs,
    pub v_heads: i32,
    pub v_normed: i32,
    pub v_eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BiasedConvArgs {
    pub of: ConvArgs,
    pub bias: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupsArgs {
    pub mix: u64,
    pub gates: u64,
    pub from: u64,
    pub rows: i32,
    pub n_keys: i32,
    pub keys: i32,
    pub values: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LatentArgs {
    pub mix: u64,
    pub up: u64,
    pub turning: u64,
    pub gates: u64,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub still: u64,
    pub freqs: u64,
    pub pass: u64,
    pub rows: i32,
    pub heads: i32,
    pub dim: i32,
    pub rank: i32,
    pub nope: i32,
    pub rot: i32,
    pub value: i32,
    pub neox: i32,
    pub magnitude: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OfHeadsArgs {
    pub table: u64,
    pub tiles: u64,
    pub list: u64,
    pub w: u64,
    pub bytes: u64,
    pub heads: i32,
    pub rows: i32,
    pub each: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ScanArgs {
    pub states: States,
    pub mix: u64,
    pub rates: u64,
    pub gates: u64,
    pub out: u64,
    pub decay: u64,
    pub bias: u64,
    pub skip: u64,
    pub rows: i32,
    pub channels: i32,
    pub heads: i32,
    pub groups: i32,
    pub dim: i32,
    pub n: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PartNormArgs {
    pub x: u64,
    pub w: u64,
    pub n: i32,
    pub parts: i32,
    pub eps: f32,
}

/// Asserts size and offsets of each structure, as `ARGS_SIZE` and `ARGS_FIELD` do in `kernels/`; the table is
/// compared with those lines by a test.
macro_rules! layouts {
    ($($args:ident $size:literal { $($field:ident $at:literal),+ })+) => {
        $(const _: () = {
            assert!(size_of::<$args>() == $size);
            $(assert!(std::mem::offset_of!($args, $field) == $at);)+
        };)+
        #[cfg(test)]
        const LAYOUTS: &[(&str, usize, &[(&str, usize)])] =
            &[$((stringify!($args), $size, &[$((stringify!($field), $at)),+])),+];
    };
}

/// The router's product of exact rows, with their norm.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RouterArgs {
    pub x: u64,
    pub norm: u64,
    pub w: u64,
    pub f: u64,
    pub q: u64,
    pub scores: u64,
    pub n: i32,
    pub experts: i32,
    pub eps: f32,
}

/// Experts of exact rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ExpertsArgs {
    pub table: u64,
    pub scores: u64,
    pub q: u64,
    pub f: u64,
    pub hidden: u64,
    pub x: u64,
    pub ids: u64,
    pub weights: u64,
    pub experts: i32,
    pub used: i32,
    pub n: i32,
    pub ff: i32,
    pub row_warps: i32,
    pub piece: i32,
    pub each: i32,
    pub row_room: i32,
    pub normalize: i32,
    pub scale: f32,
    pub how: i32,
    pub limit: f32,
    pub add: i32,
    pub share: i32,
    pub landing: u64,
    pub slot: u64,
    pub which: i32,
    pub kept: u64,
    pub slots: u64,
}

/// Bulk rows by expert.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SortArgs {
    pub ids: u64,
    pub lists: u64,
    pub tiles: u64,
    pub pairs: i32,
    pub used: i32,
    pub experts: i32,
    pub each: i32,
    pub most: i32,
}

/// Experts of bulk rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupedArgs {
    pub table: u64,
    pub tiles: u64,
    pub x: u64,
    pub scale: u64,
    pub from: u64,
    pub to: u64,
    pub out: [u64; 2],
    pub rows: i32,
    pub cols: i32,
    pub pitch: i32,
    pub stride: i32,
    pub first: i32,
}

layouts! {
    RouterArgs 64 { x 0, norm 8, w 16, f 24, q 32, scores 40, n 48, experts 52, eps 56 }
    ExpertsArgs 160 { table 0, scores 8, q 16, f 24, hidden 32, x 40, ids 48, weights 56, experts 64, used 68, n 72, ff 76, row_warps 80, piece 84, each 88, row_room 92, normalize 96, scale 100, how 104, limit 108, add 112, share 116, landing 120, slot 128, which 136, kept 144, slots 152 }
    SortArgs 48 { ids 0, lists 8, tiles 16, pairs 24, used 28, experts 32, each 36, most 40 }
    GroupedArgs 88 { table 0, tiles 8, x 16, scale 24, from 32, to 40, out 48, rows 64, cols 68, pitch 72, stride 76, first 80 }
    GemvArgs 184 { w 0, bias 24, out 48, rows 72, stride 84, segments 96, cols 100, tokens 104, mode 108, x 112, in_idx 120, out_idx 128, hidden_q 136, raw 144, norm 152, eps 160, row_warps 164, piece 168, stages 172, run_pitch 176 }
    QuantiseArgs 32 { x 0, norm 8, q 16, eps 24, cols 28 }
    PlainArgs 72 { w 0, bias 8, out 16, x 24, in_idx 32, out_idx 40, rows 48, cols 52, stride 56, tokens 60, mode 64, vector 68 }
    DequantArgs 32 { w 0, out 8, rows 16, cols 20, pitch 24 }
    GemmArgs 72 { x 0, w 8, scale 16, bias 24, out 32, out_idx 40, tokens 48, rows 52, pitch 56, stride 60, mode 64, cols 68 }
    AttnArgs 96 { q 0, k 8, v 16, out 24, ml 32, n_heads 40, n_kv_heads 44, n_places 48, tokens 52, pass 56, scale 64, cap 68, sinks 72, window 80, chunk 84, skip 88 }
    MergeArgs 80 { part 0, ml 8, out 16, q 24, tokens 32, width 36, head_dim 40, pass 48, sinks 56, window 64, chunk 68, skip 72 }
    PrepArgs 120 { x 0, up 8, w 16, idx 24, f 32, q 40, h 48, scale 56, n 64, pitch 68, eps 72, limit 76, b 80, by 88, by_idx 96, how 104, layer 108, add 112 }
    RopeArgs 136 { q 0, k 8, v 16, q_norm 24, k_norm 32, freqs 40, pass 48, k_cache 56, v_cache 64, n_heads 72, n_kv_heads 76, head_dim 80, n_rot 84, n_places 88, tokens 92, neox 96, cache_f32 100, magnitude 104, q_eps 108, k_eps 112, q_when 116, k_when 120, by 124, every 128, offset 132 }
    RouteArgs 48 { scores 0, ids 8, weights 16, tokens 24, experts 28, used 32, normalize 36, scale 40 }
    HandArgs 64 { from 0, to 8, n 16, rows 20, listed 24, only 28, add 60 }
    ChoicesArgs 64 { ids 0, to 8, forced 16, slots 24, kept 32, landed 40, uses 48, n 52, first 56 }
    BesideArgs 64 { table 0, ids 8, weights 16, out 24, answers 32, x 40, used 48, n 52, share 56, add 60 }
    CombineArgs 40 { x 0, out 8, weights 16, tokens 24, used 28, n 32 }
    ActArgs 56 { x 0, y 8, z 16, pass 24, rows 32, n 36, each 40, by 44, cap 48 }
    RouteByArgs 64 { scores 0, bias 8, ids 16, weights 24, tokens 32, experts 36, used 40, gating 44, normalize 48, groups 52, kept 56, scale 60 }
    States 32 { all 0, pass 8, state 16, floats 24, offset 28 }
    ConvArgs 72 { states 0, mix 32, out 40, w 48, rows 56, channels 60, taps 64 }
    DeltaArgs 128 { states 0, mix 32, beta 40, alpha 48, gates 56, out 64, decay 72, bias 80, norm 88, rows 96, channels 100, n_keys 104, n_values 108, each 112, tiled 116, eps 120, dim 124 }
    WideArgs 104 { q 0, k 8, v 16, out 24, ml 32, pass 40, sinks 48, n_heads 56, n_kv_heads 60, n_places 64, tokens 68, dk 72, dv 76, scale 80, cap 84, window 88, chunk 92, apart 96 }
    HeadsArgs 152 { of 0, v_heads 136, v_normed 140, v_eps 144 }
    BiasedConvArgs 80 { of 0, bias 72 }
    GroupsArgs 40 { mix 0, gates 8, from 16, rows 24, n_keys 28, keys 32, values 36 }
    LatentArgs 120 { mix 0, up 8, turning 16, gates 24, q 32, k 40, v 48, still 56, freqs 64, pass 72, rows 80, heads 84, dim 88, rank 92, nope 96, rot 100, value 104, neox 108, magnitude 112 }
    OfHeadsArgs 56 { table 0, tiles 8, list 16, w 24, bytes 32, heads 40, rows 44, each 48 }
    ScanArgs 112 { states 0, mix 32, rates 40, gates 48, out 56, decay 64, bias 72, skip 80, rows 88, channels 92, heads 96, groups 100, dim 104, n 108 }
    PartNormArgs 32 { x 0, w 8, n 16, parts 20, eps 24 }
    SumArgs 40 { x 0, out 8, weights 16, tokens 24, used 28, n 32, add 36 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against an argument structure that the two sides lay out differently: silent corruption.
    #[test]
    fn kernels_assert_the_same_places() {
        let sources = [
            include_str!("../../../kernels/common.cuh"),
            include_str!("../../../kernels/gemv.cuh"),
            include_str!("../../../kernels/bulk.cu"),
            include_str!("../../../kernels/plain.cu"),
            include_str!("../../../kernels/hand.cu"),
            include_str!("../../../kernels/dequant.cu"),
            include_str!("../../../kernels/gemm.cuh"),
            include_str!("../../../kernels/attn.cu"),
            include_str!("../../../kernels/wide.cu"),
            include_str!("../../../kernels/states.cuh"),
            include_str!("../../../kernels/mixers.cu"),
            include_str!("../../../kernels/ops.cu"),
            include_str!("../../../kernels/acts.cu"),
            include_str!("../../../kernels/delta.cu"),
            include_str!("../../../kernels/moe.cu"),
        ]
        .concat();
        let has = |line: String| assert!(sources.contains(&line), "no {line} in kernels/");
        has(format!("ARGS_SIZE(XBlk, {XBLK_BYTES});"));
        let mut places = 0;
        for (args, size, fields) in LAYOUTS {
            has(format!("ARGS_SIZE({args}, {size});"));
            fields.iter().for_each(|(field, at)| has(format!("ARGS_FIELD({args}, {field}, {at});")));
            places += fields.len();
        }
        assert_eq!(sources.matches("ARGS_FIELD(").count(), places + 1, "a field that the host does not know");
    }
}
