// Matrix times up to eight vectors, for decoding: int8 dot products on activations quantised per
// 32. Bound by the bytes of the weights, so everything serves to keep their stream unbroken: each
// warp copies its rows ahead into its own ring in shared memory (asynchronously, in whole 16-byte
// lines, whatever the blocks' size and alignment) and computes from there. The grid is as large
// as fits the device at once; warps walk over pairs of rows.
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
    XBlk* hidden_q;      // SWIGLU: tokens × rows / 32, or null
    const float* raw;    // instead of x: tokens × cols floats, to be normed and quantised here
    const float* norm;   // weight of that norm
    float eps;
};

#define WARPS 8

// The two rows of work item n of this warp.
struct Pair {
    const u8* p0;
    const u8* p1;
    int seg, r0, r1;
    bool valid;
};

__device__ __forceinline__ Pair pair_of(const GemvArgs& a, int n, int warp, size_t row_bytes) {
    Pair r;
    r.valid = false;
    r.seg = 0;
    r.r0 = r.r1 = 0;
    r.p0 = r.p1 = a.w[0];
    if (a.mode == MODE_SWIGLU) {
        int row = (blockIdx.x + (n >> 2) * gridDim.x) * 32 + warp * 4 + (n & 3);
        if (row < a.rows[0]) {
            r.valid = true;
            r.r0 = r.r1 = row;
            r.p0 = a.w[0] + row * row_bytes;
            r.p1 = a.w[1] + row * row_bytes;
        }
        return r;
    }
    int p = blockIdx.x * WARPS + warp + n * gridDim.x * WARPS;
#pragma unroll
    for (int s = 0; s < 3; s++) {
        if (s < a.segments && !r.valid) {
            int pairs = (a.rows[s] + 1) >> 1;
            if (p < pairs) {
                r.valid = true;
                r.seg = s;
                r.r0 = 2 * p;
                r.r1 = min(2 * p + 1, a.rows[s] - 1);
                r.p0 = a.w[s] + r.r0 * row_bytes;
                r.p1 = a.w[s] + r.r1 * row_bytes;
            }
            p -= pairs;
        }
    }
    return r;
}

__device__ __forceinline__ int items_of(const GemvArgs& a, int warp) {
    if (a.mode == MODE_SWIGLU) {
        int groups = (a.rows[0] + 31) / 32;
        int mine = (groups - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
        return 4 * max(mine, 0);
    }
    int pairs = 0;
    for (int s = 0; s < a.segments; s++) pairs += (a.rows[s] + 1) >> 1;
    int first = blockIdx.x * WARPS + warp, all = gridDim.x * WARPS;
    return max((pairs - first + all - 1) / all, 0);
}

template <class B>
__device__ __forceinline__ float dot(const Quants& w, const u32* x, float d, int s) {
    int i0 = 0, i1 = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        i0 = __dp4a((int)w.q[i], (int)x[i], i0);
        i1 = __dp4a((int)w.q[i + 4], (int)x[i + 4], i1);
    }
    float r;
    if (B::HALVES) {
        r = w.a0 * (float)i0 + w.a1 * (float)i1;
        if (B::MINS) {
            int s0 = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) s0 = __dp4a(0x01010101, (int)x[i], s0);
            r -= w.m0 * (float)s0 + w.m1 * (float)(s - s0);
        }
    } else {
        r = w.a0 * (float)(i0 + i1);
        if (B::MINS) r -= w.m0 * (float)s;
    }
    return r * d;
}

// Quantises the 32 hidden values of a group for each token; warp t does token t.
template <int NT>
__device__ __forceinline__ void quantise_group(const GemvArgs& a, const float (*h)[NT], int group,
                                               int warp, int lane) {
    if (warp >= a.tokens) return;
    float v = h[lane][warp];
    float amax = warp_max(fabsf(v));
    float d = amax / 127.0f;
    int q = amax > 0.0f ? __float2int_rn(v * (127.0f / amax)) : 0;
    int sum = __reduce_add_sync(0xffffffffu, q);
    u32 b = (u32)q & 255u;
    u32 b1 = __shfl_down_sync(0xffffffffu, b, 1);
    u32 b2 = __shfl_down_sync(0xffffffffu, b, 2);
    u32 b3 = __shfl_down_sync(0xffffffffu, b, 3);
    XBlk* o = a.hidden_q + (size_t)warp * (a.rows[0] / 32) + group;
    if ((lane & 3) == 0) o->q[lane >> 2] = b | (b1 << 8) | (b2 << 16) | (b3 << 24);
    if (lane == 0) {
        o->d = d;
        o->s = sum;
    }
}

// RMS norm and quantisation of the input rows, by every block for itself: cheaper than a kernel of its
// own, which would have to end before this one begins. Rows are read past L1, which may hold what lay
// there before.
__device__ __forceinline__ void norm_rows(const GemvArgs& a, XBlk* xs, int nb) {
    __shared__ float part[WARPS];
    const int tid = threadIdx.x, warp = tid >> 5;
    for (int t = 0; t < a.tokens; t++) {
        const float4* x = (const float4*)(a.raw + (size_t)t * a.cols);
        float sum = 0.0f;
#pragma unroll 4
        for (int i = tid; i < a.cols / 4; i += WARPS * 32) {
            float4 v = __ldcg(x + i);
            sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
        sum = warp_sum(sum);
        if ((tid & 31) == 0) part[warp] = sum;
        __syncthreads();
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += part[i];
        const float rs = rsqrtf(sum / (float)a.cols + a.eps);
        // Eight threads a block of 32; whole groups of eight take part.
        for (int i0 = 0; i0 < a.cols / 4; i0 += WARPS * 32) {
            const int i = i0 + tid;
            float v[4] = {0, 0, 0, 0};
            if (i < a.cols / 4) {
                float4 r = __ldcg(x + i);
                const float* w = a.norm + 4 * i;
                v[0] = r.x * rs * w[0];
                v[1] = r.y * rs * w[1];
                v[2] = r.z * rs * w[2];
                v[3] = r.w * rs * w[3];
            }
            float m = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
            for (int o = 1; o < 8; o <<= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
            const float inv = m > 0.0f ? 127.0f / m : 0.0f;
            u32 word = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) word |= ((u32)__float2int_rn(v[j] * inv) & 255u) << (8 * j);
            int s = __dp4a(0x01010101, (int)word, 0);
#pragma unroll
            for (int o = 1; o < 8; o <<= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
            if (i < a.cols / 4) {
                XBlk* b = xs + (size_t)t * nb + i / 8;
                b->q[tid & 7] = word;
                if ((tid & 7) == 0) {
                    b->d = m / 127.0f;
                    b->s = s;
                }
            }
        }
        __syncthreads();
    }
}

// Whether multiprocessors have shared memory to spare: data centre cards of these generations do.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
#define LONG_STEPS 1
#else
#define LONG_STEPS 0
#endif

// For one token the work on a step of small blocks is short, so a step is twice as long: what surrounds
// it counts half.
// 20 to 71 KiB of ring a block: two to four blocks a multiprocessor with their activations.
template <class B, int NT>
struct Ring {
    static const int UNROLL = LONG_STEPS && NT == 1 && B::ELEMS == 32 ? 2 : 1;
    static const int LEAST = B::ELEMS == 32 && UNROLL == 1 ? 3 : 2;
    static const int FIT = 4500 * UNROLL / (2 * Step<B, UNROLL>::BUF);
    static const int STAGES = FIT < LEAST ? LEAST : (FIT > 5 ? 5 : FIT);
};

template <class B, int NT>
__device__ __forceinline__ void gemv(const GemvArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ float hidden[32][NT];
    __shared__ __align__(8) u64 bars[WARPS][Ring<B, NT>::STAGES];
    const int U = Ring<B, NT>::UNROLL, STAGES = Ring<B, NT>::STAGES;
    typedef Step<B, U> Step;
    const int BUF = Step::BUF;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* ring = smem + warp * (STAGES * 2 * BUF);
    XBlk* xs = (XBlk*)(smem + WARPS * STAGES * 2 * BUF);
    const int nb = a.cols / 32;
    const int steps = (a.cols + 1024 * U - 1) / (1024 * U);
    const int row_bytes = a.cols / B::ELEMS * B::BYTES;
    const int items = items_of(a, warp);

    pdl_launch();
#if __CUDA_ARCH__ >= 900
    // Blocks of whole lines must stay on lines in shared memory; in a file that does not keep
    // them there they are copied word by word instead.
    const bool bulk = B::BYTES % 16 != 0 || (((size_t)a.w[0] | (size_t)a.w[1] | (size_t)a.w[2]) & 15) == 0;
    if (lane == 0)
        for (int i = 0; i < STAGES; i++) bar_init(&bars[warp][i]);
    __syncwarp();
#else
    const bool bulk = false;
#endif

    // The fetching side runs STAGES - 1 steps ahead of the computing side.
    int fn = 0, fs = 0, slot_f = 0;
    Pair fp = pair_of(a, 0, warp, row_bytes);
    auto fetch = [&]() {
        if (fn < items) {
            const int at = fs * Step::BYTES;
            const int len = min(Step::BYTES, row_bytes - at);
            u8* buf = ring + slot_f * 2 * BUF;
            if (bulk) {
                if (lane == 0) {
                    u64* bar = &bars[warp][slot_f];
                    const u32 off0 = (u32)(size_t)(fp.p0 + at) & 15, off1 = (u32)(size_t)(fp.p1 + at) & 15;
                    const u32 n0 = (off0 + len + 15) & ~15u, n1 = (off1 + len + 15) & ~15u;
                    bar_expect(bar, fp.valid ? n0 + n1 : 0);
                    if (fp.valid) {
                        bulk_copy(buf, fp.p0 + at - off0, n0, bar);
                        bulk_copy(buf + BUF, fp.p1 + at - off1, n1, bar);
                    }
                }
            } else if (fp.valid) {
                stage<B, U>(buf, fp.p0 + at, len, lane);
                stage<B, U>(buf + BUF, fp.p1 + at, len, lane);
            }
            if (++fs == steps) {
                fs = 0;
                fn++;
                fp = pair_of(a, fn, warp, row_bytes);
            }
        }
        if (!bulk) cp_commit();
        slot_f = slot_f + 1 == STAGES ? 0 : slot_f + 1;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();

    pdl_wait();
    if (a.raw) {
        norm_rows(a, xs, nb);
    } else {
        const int words = nb * 5;
        for (int t = 0; t < a.tokens; t++) {
            int row = a.in_idx ? a.in_idx[t] : t;
            const u64* src = (const u64*)(a.x + (size_t)row * nb);
            u64* dst = (u64*)(xs + (size_t)t * nb);
            for (int i = threadIdx.x; i < words; i += WARPS * 32) dst[i] = src[i];
        }
    }
    __syncthreads();

    int slot = 0;
    u32 parity = 0;
    for (int n = 0; n < items; n++) {
        Pair pr = pair_of(a, n, warp, row_bytes);
        float acc[2][NT];
#pragma unroll
        for (int t = 0; t < NT; t++) acc[0][t] = acc[1][t] = 0.0f;
        for (int s = 0; s < steps; s++) {
            if (bulk) {
                bar_wait(&bars[warp][slot], parity);
            } else {
                cp_wait<STAGES - 2>();
                __syncwarp();
            }
            const u8* buf = ring + slot * 2 * BUF;
            const int at = s * Step::BYTES;
            const u8* b0 = buf + staged_at<B>(pr.p0 + at);
            const u8* b1 = buf + BUF + staged_at<B>(pr.p1 + at);
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int kb = (s * U + u) * 32 + lane;
                if (!pr.valid || kb >= nb) continue;
                Quants q0, q1;
                const int part = u * Step::PART;
                if (B::ELEMS == 32) {
                    B::decode(b0 + part + lane * B::BYTES, 0, q0);
                    B::decode(b1 + part + lane * B::BYTES, 0, q1);
                } else {
                    B::decode(b0 + part + (lane >> 3) * B::BYTES, lane & 7, q0);
                    B::decode(b1 + part + (lane >> 3) * B::BYTES, lane & 7, q1);
                }
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    if (t < a.tokens) {
                        const u64* xp = (const u64*)(xs + (size_t)t * nb + kb);
                        u32 x[8];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            u64 v = xp[i];
                            x[2 * i] = (u32)v;
                            x[2 * i + 1] = (u32)(v >> 32);
                        }
                        u64 ds = xp[4];
                        float d = __uint_as_float((u32)ds);
                        int sum = (int)(ds >> 32);
                        acc[0][t] += dot<B>(q0, x, d, sum);
                        acc[1][t] += dot<B>(q1, x, d, sum);
                    }
                }
            }
            __syncwarp();
            fetch();
            if (++slot == STAGES) {
                slot = 0;
                parity ^= 1;
            }
        }
#pragma unroll
        for (int t = 0; t < NT; t++) {
            if (t >= a.tokens) continue;
            float v0 = warp_sum(acc[0][t]), v1 = warp_sum(acc[1][t]);
            if (a.mode == MODE_SWIGLU) {
                if (a.bias[0] && pr.valid) v0 += a.bias[0][pr.r0];
                if (a.bias[1] && pr.valid) v1 += a.bias[1][pr.r0];
                float h = pr.valid ? silu(v0) * v1 : 0.0f;
                if (lane == 0) {
                    hidden[warp * 4 + (n & 3)][t] = h;
                    if (a.out[0] && pr.valid) a.out[0][(size_t)t * a.stride[0] + pr.r0] = h;
                }
            } else if (lane == 0 && pr.valid) {
                const float* bias = a.bias[pr.seg];
                if (bias) {
                    v0 += bias[pr.r0];
                    v1 += bias[pr.r1];
                }
                int row = a.out_idx ? a.out_idx[t] : t;
                float* o = a.out[pr.seg] + (size_t)row * a.stride[pr.seg];
                if (a.mode == MODE_ADD) {
                    v0 += o[pr.r0];
                    v1 += o[pr.r1];
                }
                o[pr.r0] = v0;
                if (pr.r1 != pr.r0) o[pr.r1] = v1;
            }
        }
        if (a.mode == MODE_SWIGLU && (n & 3) == 3) {
            __syncthreads();
            if (a.hidden_q) {
                int group = blockIdx.x + (n >> 2) * gridDim.x;
                quantise_group<NT>(a, hidden, group, warp, lane);
            }
            __syncthreads();
        }
    }
    cp_wait<0>();
}

#define GEMV(T, N)                                                                      \
    extern "C" __global__ void __launch_bounds__(256, N == 8 ? 2 : 3)                   \
        gemv_##T##_##N(const __grid_constant__ GemvArgs a) {                            \
        gemv<B##T, N>(a);                                                               \
    }
#define GEMVS(T) \
    GEMV(T, 1)   \
    GEMV(T, 2)   \
    GEMV(T, 4)   \
    GEMV(T, 8)
FOR_EACH_QUANT(GEMVS)
