// What the products of bulk rows share (gemm.cu, thin.cu): their arguments, and how sums leave.
#pragma once
#include "common.cuh"

struct GemmArgs {
    const u16* x;
    const u16* w;
    const float* scale;  // of each row of x
    const float* bias;   // one a row of w, or null
    float* out;          // row of token t at out + t * stride (out_idx[t] instead of t if given)
    const int* out_idx;
    int tokens, rows, pitch, stride;
    int mode;  // 0 store, 1 add
    int cols;  // for thin_*, whose w are rows of so many quantised weights, back to back
};
ARGS_SIZE(GemmArgs, 72); ARGS_FIELD(GemmArgs, x, 0); ARGS_FIELD(GemmArgs, w, 8);
ARGS_FIELD(GemmArgs, scale, 16); ARGS_FIELD(GemmArgs, bias, 24); ARGS_FIELD(GemmArgs, out, 32);
ARGS_FIELD(GemmArgs, out_idx, 40); ARGS_FIELD(GemmArgs, tokens, 48); ARGS_FIELD(GemmArgs, rows, 52);
ARGS_FIELD(GemmArgs, pitch, 56); ARGS_FIELD(GemmArgs, stride, 60); ARGS_FIELD(GemmArgs, mode, 64);
ARGS_FIELD(GemmArgs, cols, 68);

// Sums of one token with rows r and r + 1 to its row of results at o; `wide`: both at once, if there are both.
__device__ __forceinline__ void store_two(const GemmArgs& a, float* o, float scale, bool wide, int r, float s0, float s1) {
    if (r >= a.rows) return;
    const bool two = r + 1 < a.rows;
    float v0 = __fmul_rn(s0, scale), v1 = __fmul_rn(s1, scale);
    if (a.bias) {
        v0 = __fadd_rn(v0, a.bias[r]);
        if (two) v1 = __fadd_rn(v1, a.bias[r + 1]);
    }
    if (wide && two) {
        float2 v = make_float2(v0, v1);
        if (a.mode == 1) {
            const float2 old = *(const float2*)(o + r);
            v.x = __fadd_rn(v.x, old.x);
            v.y = __fadd_rn(v.y, old.y);
        }
        *(float2*)(o + r) = v;
    } else {
        o[r] = a.mode == 1 ? __fadd_rn(o[r], v0) : v0;
        if (two) o[r + 1] = a.mode == 1 ? __fadd_rn(o[r + 1], v1) : v1;
    }
}

__device__ __forceinline__ bool stores_wide(const GemmArgs& a) { return ((size_t)a.out & 7) == 0 && (a.stride & 1) == 0; }
