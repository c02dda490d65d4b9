// Matrix times up to eight vectors, for decoding, on GPUs before compute capability 9.0 (later ones have
// bulk.cu): int8 dot products on activations quantised per 32. Bound by the bytes of the weights, so
// everything serves to keep their stream unbroken: each warp copies its rows ahead into its own ring in
// shared memory (asynchronously, in whole 16-byte lines, whatever the blocks' size and alignment) and
// computes from there. The grid is as large as fits the device at once; warps walk over pairs of rows.
#include "gemv.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900

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

// Quantises the 32 hidden values of a group for each token; warp t does token t.
template <int NT>
__device__ __forceinline__ void quantise_group(const GemvArgs& a, const float (*h)[NT], int group,
                                               int warp, int lane) {
    if (warp >= a.tokens) return;
    quantise_lanes(h[lane][warp], a.hidden_q + (size_t)warp * (a.rows[0] / 32) + group, lane);
}

// 20 to 35 KiB of ring a block: two or more blocks a multiprocessor with their activations.
template <class B>
struct Ring {
    static const int LEAST = B::ELEMS == 32 ? 3 : 2;
    static const int FIT = 4500 / (2 * Step<B>::BUF);
    static const int STAGES = FIT < LEAST ? LEAST : (FIT > 5 ? 5 : FIT);
};

template <class B, int NT>
__device__ __forceinline__ void gemv(const GemvArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ float hidden[32][NT];
    const int STAGES = Ring<B>::STAGES;
    typedef Step<B> Step;
    const int BUF = Step::BUF;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* ring = smem + warp * (STAGES * 2 * BUF);
    XBlk* xs = (XBlk*)(smem + WARPS * STAGES * 2 * BUF);
    const int nb = a.cols / 32;
    const int steps = (a.cols + 1023) / 1024;
    const int row_bytes = a.cols / B::ELEMS * B::BYTES;
    const int items = items_of(a, warp);

    // The fetching side runs STAGES - 1 steps ahead of the computing side.
    int fn = 0, fs = 0, slot_f = 0;
    Pair fp = pair_of(a, 0, warp, row_bytes);
    auto fetch = [&]() {
        if (fn < items) {
            const int at = fs * Step::BYTES;
            const int len = min(Step::BYTES, row_bytes - at);
            u8* buf = ring + slot_f * 2 * BUF;
            if (fp.valid) {
                stage<B>(buf, fp.p0 + at, len, lane);
                stage<B>(buf + BUF, fp.p1 + at, len, lane);
            }
            if (++fs == steps) {
                fs = 0;
                fn++;
                fp = pair_of(a, fn, warp, row_bytes);
            }
        }
        cp_commit();
        slot_f = slot_f + 1 == STAGES ? 0 : slot_f + 1;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();

    fill_grid<B>(threadIdx.x, WARPS * 32);
    load_activations(a, xs, nb);

    int slot = 0;
    for (int n = 0; n < items; n++) {
        Pair pr = pair_of(a, n, warp, row_bytes);
        float acc[2][NT];
#pragma unroll
        for (int t = 0; t < NT; t++) acc[0][t] = acc[1][t] = 0.0f;
        for (int s = 0; s < steps; s++) {
            cp_wait<STAGES - 2>();
            __syncwarp();
            const u8* buf = ring + slot * 2 * BUF;
            const int at = s * Step::BYTES;
            const u8* b0 = buf + staged_at<B>(pr.p0 + at);
            const u8* b1 = buf + BUF + staged_at<B>(pr.p1 + at);
            const int kb = s * 32 + lane;
            if (pr.valid && kb < nb) {
                Quants q0, q1;
                if (B::ELEMS == 32) {
                    B::decode(b0 + lane * B::BYTES, 0, q0);
                    B::decode(b1 + lane * B::BYTES, 0, q1);
                } else {
                    B::decode(b0 + (lane >> 3) * B::BYTES, lane & 7, q0);
                    B::decode(b1 + (lane >> 3) * B::BYTES, lane & 7, q1);
                }
#pragma unroll
                for (int t = 0; t < NT; t++) {
                    if (t < a.tokens) {
                        const Activations x(xs + (size_t)t * nb + kb);
                        acc[0][t] = dot<B>(q0, x.q, x.d, x.s, acc[0][t]);
                        acc[1][t] = dot<B>(q1, x.q, x.d, x.s, acc[1][t]);
                    }
                }
            }
            __syncwarp();
            fetch();
            if (++slot == STAGES) slot = 0;
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
#endif
