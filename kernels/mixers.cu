// What stands in place of ordinary attention: queries, keys and values of latent vectors, and state spaces.
#include "states.cuh"

struct LatentArgs {
    const float* mix;      // rows × heads × (nope + rot): queries
    const float* up;       // rows × rank: latent vectors
    const float* turning;  // rows × rot: elements of keys that rotate
    const float* gates;    // rows × heads × (nope + value): expanded keys and values; null where keys are latent vectors
    float* q;              // rows × heads × dim, of which the last `rot` elements are written, or all where keys are expanded
    float* k;              // rows × dim: latent vector and rotated elements; or rows × heads × dim
    float* v;              // rows × heads × dim, filled up with zeros, where keys are expanded
    float* still;          // rows × heads × nope: what does not rotate of queries, where keys are latent vectors
    const float* freqs;    // rot / 2
    const int* pass;       // see first_position
    int rows, heads, dim, rank, nope, rot, value;
    int neox;              // pairs (i, i + rot / 2) instead of (2i, 2i + 1)
    float magnitude;
};
ARGS_SIZE(LatentArgs, 120); ARGS_FIELD(LatentArgs, mix, 0); ARGS_FIELD(LatentArgs, up, 8); ARGS_FIELD(LatentArgs, turning, 16);
ARGS_FIELD(LatentArgs, gates, 24); ARGS_FIELD(LatentArgs, q, 32); ARGS_FIELD(LatentArgs, k, 40); ARGS_FIELD(LatentArgs, v, 48);
ARGS_FIELD(LatentArgs, still, 56); ARGS_FIELD(LatentArgs, freqs, 64); ARGS_FIELD(LatentArgs, pass, 72);
ARGS_FIELD(LatentArgs, rows, 80); ARGS_FIELD(LatentArgs, heads, 84); ARGS_FIELD(LatentArgs, dim, 88);
ARGS_FIELD(LatentArgs, rank, 92); ARGS_FIELD(LatentArgs, nope, 96); ARGS_FIELD(LatentArgs, rot, 100);
ARGS_FIELD(LatentArgs, value, 104); ARGS_FIELD(LatentArgs, neox, 108); ARGS_FIELD(LatentArgs, magnitude, 112);

// `rot` elements of x rotated to `to`, by a warp.
__device__ __forceinline__ void rotated(const LatentArgs& a, const float* x, float* to, int pos, int lane) {
    for (int i = lane; i < a.rot / 2; i += 32) {
        const int i0 = a.neox ? i : 2 * i, i1 = a.neox ? i + a.rot / 2 : 2 * i + 1;
        float sn, cs;
        sincosf((float)pos * a.freqs[i], &sn, &cs);
        sn *= a.magnitude;
        cs *= a.magnitude;
        const float u = x[i0], v = x[i1];
        to[i0] = u * cs - v * sn;
        to[i1] = u * sn + v * cs;
    }
}

__device__ __forceinline__ void copied(const float* x, float* to, int n, int lane) {
    for (int i = lane; i < n; i += 32) to[i] = x[i];
}

// One warp a head of a row; where keys are latent vectors, one more for the key that all heads share.
extern "C" __global__ void __launch_bounds__(128) latent(const __grid_constant__ LatentArgs a) {
    const int lane = threadIdx.x & 31, item = blockIdx.x * 4 + (threadIdx.x >> 5);
    const int each = a.gates ? a.heads : a.heads + 1;
    pdl_launch();
    pdl_wait();
    if (item >= a.rows * each) return;
    const int t = item / each, h = item % each, pos = first_position(a.pass) + t;
    const float* turning = a.turning + (size_t)t * a.rot;
    if (h == a.heads) {
        float* k = a.k + (size_t)t * a.dim;
        copied(a.up + (size_t)t * a.rank, k, a.rank, lane);
        rotated(a, turning, k + a.rank, pos, lane);
        return;
    }
    const size_t head = (size_t)t * a.heads + h;
    const float* from = a.mix + head * (a.nope + a.rot);
    float* q = a.q + head * a.dim;
    rotated(a, from + a.nope, q + a.dim - a.rot, pos, lane);
    if (!a.gates) {
        copied(from, a.still + head * a.nope, a.nope, lane);
        return;
    }
    copied(from, q, a.nope, lane);
    const float* expanded = a.gates + head * (a.nope + a.value);
    float *k = a.k + head * a.dim, *v = a.v + head * a.dim;
    copied(expanded, k, a.nope, lane);
    rotated(a, turning, k + a.nope, pos, lane);
    for (int i = lane; i < a.dim; i += 32) v[i] = i < a.value ? expanded[a.nope + i] : 0.0f;
}

struct OfHeadsArgs {
    u64* table;  // six addresses a head, as moe.cu's of experts
    int* tiles;  // head, first place in the lists, rows of each tile
    int* list;   // by head, the number of each of its rows among all
    u64 w;       // the first head's matrix
    u64 bytes;   // of a head's matrix
    int heads, rows;
    int each;    // rows of a tile
};
ARGS_SIZE(OfHeadsArgs, 56); ARGS_FIELD(OfHeadsArgs, table, 0); ARGS_FIELD(OfHeadsArgs, tiles, 8); ARGS_FIELD(OfHeadsArgs, list, 16);
ARGS_FIELD(OfHeadsArgs, w, 24); ARGS_FIELD(OfHeadsArgs, bytes, 32); ARGS_FIELD(OfHeadsArgs, heads, 40);
ARGS_FIELD(OfHeadsArgs, rows, 44); ARGS_FIELD(OfHeadsArgs, each, 48);

// Heads in the place of experts, for the kernels of moe.cu: each has a matrix of its own, and every row. One block a head.
extern "C" __global__ void __launch_bounds__(128) of_heads(const __grid_constant__ OfHeadsArgs a) {
    const int h = blockIdx.x, tiles = (a.rows + a.each - 1) / a.each;
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < 6; i += 128) a.table[h * 6 + i] = i == 0 ? a.w + (u64)h * a.bytes : 0;
    for (int i = threadIdx.x; i < tiles; i += 128) {
        int* tile = a.tiles + 3 * (h * tiles + i);
        tile[0] = h;
        tile[1] = h * a.rows + i * a.each;
        tile[2] = min(a.each, a.rows - i * a.each);
    }
    for (int t = threadIdx.x; t < a.rows; t += 128) a.list[h * a.rows + t] = t * a.heads + h;
}

struct ScanArgs {
    States states;        // [head][element][number]
    const float* mix;     // rows × channels: x of all heads, then B and then C of all groups
    const float* rates;   // rows × heads
    const float* gates;   // rows × heads × dim
    float* out;           // as gates
    const float* decay;   // one a head
    const float* bias;
    const float* skip;
    int rows, channels, heads, groups;
    int dim, n;           // elements of a head, and numbers of the state for each
};
ARGS_SIZE(ScanArgs, 112); ARGS_FIELD(ScanArgs, states, 0); ARGS_FIELD(ScanArgs, mix, 32); ARGS_FIELD(ScanArgs, rates, 40);
ARGS_FIELD(ScanArgs, gates, 48); ARGS_FIELD(ScanArgs, out, 56); ARGS_FIELD(ScanArgs, decay, 64); ARGS_FIELD(ScanArgs, bias, 72);
ARGS_FIELD(ScanArgs, skip, 80); ARGS_FIELD(ScanArgs, rows, 88); ARGS_FIELD(ScanArgs, channels, 92);
ARGS_FIELD(ScanArgs, heads, 96); ARGS_FIELD(ScanArgs, groups, 100); ARGS_FIELD(ScanArgs, dim, 104); ARGS_FIELD(ScanArgs, n, 108);

// src/backend/cuda/recurrent.rs has the same number.
#define ELEMENTS 4  // elements of a warp

// See Scan in src/backend/op.rs. One warp some elements of a head, whose numbers stay in its registers: N times 32 of each.
template <int N>
__device__ __forceinline__ void scan(const ScanArgs& a) {
    const int lane = threadIdx.x & 31, item = blockIdx.x * 4 + (threadIdx.x >> 5);
    const int parts = (a.dim + ELEMENTS - 1) / ELEMENTS, head = item / parts, d0 = item % parts * ELEMENTS, n = a.n;
    pdl_launch();
    pdl_wait();
    if (head >= a.heads) return;
    const int group = head * a.groups / a.heads, inner = a.heads * a.dim;
    const float decay = a.decay[head], bias = a.bias[head], skip = a.skip[head];
    const float* old = a.states.old();
    const size_t own = ((size_t)head * a.dim + d0) * n;
    float s[ELEMENTS][N];
#pragma unroll
    for (int e = 0; e < ELEMENTS; e++)
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int k = i * 32 + lane;
            s[e][i] = old && k < n && d0 + e < a.dim ? old[own + (size_t)e * n + k] : 0.0f;
        }
    for (int t = 0; t < a.rows; t++) {
        const float* row = a.mix + (size_t)t * a.channels;
        float b[N], c[N], x[ELEMENTS], y[ELEMENTS];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int k = i * 32 + lane;
            b[i] = k < n ? row[inner + group * n + k] : 0.0f;
            c[i] = k < n ? row[inner + (a.groups + group) * n + k] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) x[e] = d0 + e < a.dim ? row[head * a.dim + d0 + e] : 0.0f;
        const float r = a.rates[(size_t)t * a.heads + head] + bias;
        const float rate = r > 20.0f ? r : log1pf(expf(r)), keep = expf(rate * decay);
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) {
            const float in = rate * x[e];
            y[e] = 0.0f;
#pragma unroll
            for (int i = 0; i < N; i++) {
                s[e][i] = __fmaf_rn(in, b[i], s[e][i] * keep);
                y[e] = __fmaf_rn(s[e][i], c[i], y[e]);
            }
        }
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) y[e] = warp_sum(y[e]);
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++)
            if (lane == e && d0 + e < a.dim) {
                const size_t at = (size_t)t * inner + head * a.dim + d0 + e;
                a.out[at] = (y[e] + skip * x[e]) * silu(a.gates[at]);
            }
    }
    float* next = a.states.next();
#pragma unroll
    for (int e = 0; e < ELEMENTS; e++)
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int k = i * 32 + lane;
            if (k < n && d0 + e < a.dim) next[own + (size_t)e * n + k] = s[e][i];
        }
}

extern "C" __global__ void __launch_bounds__(128) scan_32(const __grid_constant__ ScanArgs a) { scan<1>(a); }
extern "C" __global__ void __launch_bounds__(128) scan_64(const __grid_constant__ ScanArgs a) { scan<2>(a); }
extern "C" __global__ void __launch_bounds__(128) scan_128(const __grid_constant__ ScanArgs a) { scan<4>(a); }
extern "C" __global__ void __launch_bounds__(128) scan_256(const __grid_constant__ ScanArgs a) { scan<8>(a); }

struct PartNormArgs {
    float* x;        // rows × parts × n, in place
    const float* w;  // parts × n, or null for ones
    int n, parts;
    float eps;
};
ARGS_SIZE(PartNormArgs, 32); ARGS_FIELD(PartNormArgs, x, 0); ARGS_FIELD(PartNormArgs, w, 8); ARGS_FIELD(PartNormArgs, n, 16);
ARGS_FIELD(PartNormArgs, parts, 20); ARGS_FIELD(PartNormArgs, eps, 24);

// RMS norm of each part of a row by itself, with weights of its own: one block a part.
extern "C" __global__ void __launch_bounds__(256) part_norm(const __grid_constant__ PartNormArgs a) {
    __shared__ float sums[8];
    const int tid = threadIdx.x, part = blockIdx.x % a.parts;
    pdl_launch();
    pdl_wait();
    float* x = a.x + (size_t)blockIdx.x * a.n;
    const float* w = a.w ? a.w + (size_t)part * a.n : nullptr;
    float s = 0.0f;
    for (int i = tid; i < a.n; i += 256) s = __fmaf_rn(x[i], x[i], s);
    s = warp_sum(s);
    if ((tid & 31) == 0) sums[tid >> 5] = s;
    __syncthreads();
    s = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) s += sums[i];
    const float scale = norm_scale(s, a.n, a.eps);
    for (int i = tid; i < a.n; i += 256) x[i] = x[i] * scale * (w ? w[i] : 1.0f);
}
