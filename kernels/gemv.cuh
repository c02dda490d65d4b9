// What the two forms of the matrix-times-vectors kernels share: their arguments, the dot product of a
// block, and how each block prepares the activations for itself.
#pragma once
#include "blocks.cuh"

// How results leave. SWIGLU: segment 0 is gate, segment 1 is up, of equal shape.
#define MODE_STORE 0
#define MODE_ADD 1
#define MODE_SWIGLU 2

struct GemvArgs {
    const u8* w[3];        // matrices of one type and one width, computed as one
    const float* bias[3];  // one float a row, or null
    float* out[3];         // row of token t at out + t * stride (out_idx[t] instead of t if given)
    int rows[3];
    int stride[3];
    int segments;
    int cols;
    int tokens;
    int mode;
    const XBlk* x;       // tokens × cols / 32 (row in_idx[t] instead of t if given)
    const int* in_idx;
    const int* out_idx;
    XBlk* hidden_q;      // SWIGLU in gemv_*: tokens × rows / 32, or null
    const float* raw;    // instead of x: tokens × cols floats, to be normed and quantised here
    const float* norm;   // weight of that norm; null for none
    float eps;
    // For bulk_*: how rows are cut into tiles; chosen by the host, and the same for every number of tokens, since
    // sums follow from it.
    int row_warps;       // warps that share a row, a divisor of WARPS
    int piece;           // steps of a row that a stage holds; all of them: whole rows, in one copy
    int stages;
    int run_pitch;       // bytes between copies in a stage
};
ARGS_SIZE(GemvArgs, 184); ARGS_FIELD(GemvArgs, w, 0); ARGS_FIELD(GemvArgs, bias, 24);
ARGS_FIELD(GemvArgs, out, 48); ARGS_FIELD(GemvArgs, rows, 72); ARGS_FIELD(GemvArgs, stride, 84);
ARGS_FIELD(GemvArgs, segments, 96); ARGS_FIELD(GemvArgs, cols, 100); ARGS_FIELD(GemvArgs, tokens, 104);
ARGS_FIELD(GemvArgs, mode, 108); ARGS_FIELD(GemvArgs, x, 112); ARGS_FIELD(GemvArgs, in_idx, 120);
ARGS_FIELD(GemvArgs, out_idx, 128); ARGS_FIELD(GemvArgs, hidden_q, 136); ARGS_FIELD(GemvArgs, raw, 144);
ARGS_FIELD(GemvArgs, norm, 152); ARGS_FIELD(GemvArgs, eps, 160); ARGS_FIELD(GemvArgs, row_warps, 164);
ARGS_FIELD(GemvArgs, piece, 168); ARGS_FIELD(GemvArgs, stages, 172); ARGS_FIELD(GemvArgs, run_pitch, 176);

#define WARPS 8

// Waits for the warps that compute; bulk_* have others besides, which never come here.
__device__ __forceinline__ void compute_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// A block of activations, brought to registers.
struct Activations {
    u32 q[8];
    float d, s;
    __device__ __forceinline__ explicit Activations(const XBlk* from) {
        const u64* p = (const u64*)from;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u64 v = p[i];
            q[2 * i] = (u32)v;
            q[2 * i + 1] = (u32)(v >> 32);
        }
        u64 ds = p[4];
        d = __uint_as_float((u32)ds);
        s = __uint_as_float((u32)(ds >> 32));
    }
};

// Factors and sums of a block, in one order of operations, whatever kernel this becomes part of.
template <class B>
__device__ __forceinline__ float dot(const Quants& w, const u32* x, float d, float s, float acc) {
    int i0 = 0, i1 = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        i0 = __dp4a((int)w.q[i], (int)x[i], i0);
        i1 = __dp4a((int)w.q[i + 4], (int)x[i + 4], i1);
    }
    float r;
    if (B::HALVES) {
        r = __fmaf_rn(w.a1, (float)i1, __fmul_rn(w.a0, (float)i0));
        if (B::MINS) {
            int s0 = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) s0 = __dp4a(0x01010101, (int)x[i], s0);
            r = __fmaf_rn(-w.m0, (float)s0, r);
            r = __fmaf_rn(-w.m1, s - (float)s0, r);
        }
    } else {
        r = __fmul_rn(w.a0, (float)(i0 + i1));
        if (B::MINS) r = __fmaf_rn(-w.m0, s, r);
    }
    return __fmaf_rn(r, d, acc);
}

#define CHUNK 8  // groups of four values that a thread keeps in registers

__device__ __forceinline__ void load_chunk(float4 (&v)[CHUNK], const float* row, int first, int n) {
#pragma unroll
    for (int k = 0; k < CHUNK; k++) {
        const int i = first + k * WARPS * 32 + threadIdx.x;
        // Past L1, which may hold what lay there before.
        v[k] = i < n ? __ldcg((const float4*)row + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

__device__ __forceinline__ float sum_squares(const float4 (&v)[CHUNK], float sum) {
#pragma unroll
    for (int k = 0; k < CHUNK; k++) {
        sum = __fmaf_rn(v[k].x, v[k].x, sum);
        sum = __fmaf_rn(v[k].y, v[k].y, sum);
        sum = __fmaf_rn(v[k].z, v[k].z, sum);
        sum = __fmaf_rn(v[k].w, v[k].w, sum);
    }
    return sum;
}

// Rows of floats, `cols` wide, and the weight of their norm, or null.
struct Floats {
    const float* rows;
    const float* norm;
    float eps;
    int cols;
};

// RMS norm (where there is one) and quantisation of `tokens` rows to `xs`, by the first 256 threads of a block.
// All loads of a chunk are in flight at once, and those of the norm's weight before the predecessor has ended.
__device__ __forceinline__ void norm_rows(const Floats& a, int tokens, XBlk* xs, int nb) {
    __shared__ float part[WARPS];
    const int tid = threadIdx.x, warp = tid >> 5;
    const int n = a.cols / 4, step = CHUNK * WARPS * 32;
    float4 w[CHUNK], v[CHUNK];
    if (a.norm) load_chunk(w, a.norm, 0, n);
    pdl_wait();
    for (int t = 0; t < tokens; t++) {
        const float* x = a.rows + (size_t)t * a.cols;
        float rs = 1.0f;
        load_chunk(v, x, 0, n);
        if (a.norm) {
            float sum = sum_squares(v, 0.0f);
            for (int first = step; first < n; first += step) {
                load_chunk(v, x, first, n);
                sum = sum_squares(v, sum);
            }
            if (n > step) load_chunk(v, x, 0, n);
            sum = warp_sum(sum);
            if ((tid & 31) == 0) part[warp] = sum;
            compute_sync();
            sum = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += part[i];
            rs = norm_scale(sum, a.cols, a.eps);
        }
        for (int first = 0; first < n; first += step) {
            if (first > 0) load_chunk(v, x, first, n);
            if (a.norm && (first > 0 || (t > 0 && n > step))) load_chunk(w, a.norm, first, n);
#pragma unroll
            for (int k = 0; k < CHUNK; k++) {
                const int i = first + k * WARPS * 32 + tid;
                if (i - tid >= n) break;
                float4 y = v[k];
                if (a.norm) y = make_float4(y.x * rs * w[k].x, y.y * rs * w[k].y, y.z * rs * w[k].z, y.w * rs * w[k].w);
                quantise_four(y, xs + (size_t)t * nb, i, i < n);
            }
        }
        compute_sync();
    }
}

// Brings the activations to shared memory, quantised.
__device__ __forceinline__ void load_activations(const GemvArgs& a, XBlk* xs, int nb) {
    if (a.raw) {
        // By every block for itself: cheaper than a kernel of its own, which would have to end before this one begins.
        norm_rows({a.raw, a.norm, a.eps, a.cols}, a.tokens, xs, nb);
        return;
    }
    pdl_wait();
    const int words = nb * 5;
    for (int t = 0; t < a.tokens; t++) {
        int row = a.in_idx ? a.in_idx[t] : t;
        const u64* src = (const u64*)(a.x + (size_t)row * nb);
        u64* dst = (u64*)(xs + (size_t)t * nb);
        for (int i = threadIdx.x; i < words; i += WARPS * 32) dst[i] = src[i];
    }
    compute_sync();
}
