// out[t][r] = Σ_k x[t][k] · w[r][k] for few bulk rows: the same bits as gemm.cu on weights that dequant.cu has turned
// to halves, without the way through memory. Bound by the bytes of the quantised weights.
//
// A block takes 32 rows of weights and 16 or 64 tokens, 256 columns at a time. Eight warps copy weights ahead, four
// stages deep, and turn them to halves; eight others copy the tokens' halves and multiply what was turned before.
#include "blocks.cuh"
#include "gemm.cuh"

#define BN 32        // rows of weights of a block
#define KC 256       // columns of a chunk
#define STAGES 4     // chunks of weights on their way
#define X_STAGES 3   // chunks of tokens
#define PITCH ((KC + 8) * 2)  // bytes from row to row of halves: eight rows lie in different banks
#define SIDE 256     // threads that turn, and that multiply

// A chunk of one row of weights.
template <class B>
struct Raw {
    static const int BYTES = KC / B::ELEMS * B::BYTES;
    static const int LINES = ((BYTES + 30) / 16) | 1;  // odd, so that rows lie in different banks
};

// The side that brings weights and turns them to halves.
template <class B>
struct Turner {
    const GemmArgs& a;
    const int n0, chunks, tid;
    u8 *const raw, *const halves;
    // What a thread turns: 32 columns of a row.
    const int row, part, row_bytes;
    const bool words;

    __device__ __forceinline__ Turner(const GemmArgs& a, int n0, int chunks, u8* raw, u8* halves, int tid)
        : a(a), n0(n0), chunks(chunks), tid(tid), raw(raw), halves(halves), row(tid % BN), part(tid / BN),
          row_bytes(a.cols / B::ELEMS * B::BYTES), words(B::BYTES % 16 == 0 && ((size_t)a.w & 15) != 0) {}

    __device__ __forceinline__ const u8* source(int row, int i) const {
        return (const u8*)a.w + (size_t)min(n0 + row, a.rows - 1) * row_bytes + (size_t)i * Raw<B>::BYTES;
    }
    __device__ __forceinline__ void fetch(int i) const {
        if (i < chunks) {
            u8* to = raw + i % STAGES * (BN * Raw<B>::LINES * 16);
            const int len = min(Raw<B>::BYTES, row_bytes - i * Raw<B>::BYTES);
            if (words) {
                for (int c = tid; c < BN * (Raw<B>::BYTES / 4); c += SIDE) {
                    const int row = c / (Raw<B>::BYTES / 4), at = c % (Raw<B>::BYTES / 4) * 4;
                    if (at < len) cp_async4(to + row * (Raw<B>::LINES * 16) + at, source(row, i) + at);
                }
            } else {
#pragma unroll 3
                for (int c = tid; c < BN * Raw<B>::LINES; c += SIDE) {
                    const int row = c / Raw<B>::LINES, line = c % Raw<B>::LINES;
                    const u8* src = source(row, i);
                    const u8* first = (const u8*)((size_t)src & ~(size_t)15) + 16 * line;
                    if (first < src + len) cp_async16(to + row * (Raw<B>::LINES * 16) + 16 * line, first);
                }
            }
        }
        cp_commit();
    }
    __device__ __forceinline__ void decode(int i) const {
        const u8* p = raw + i % STAGES * (BN * Raw<B>::LINES * 16) + row * (Raw<B>::LINES * 16);
        if (B::BYTES % 16 != 0) p += (size_t)source(row, i) & 15;
        uint4* to = (uint4*)(halves + (i & 1) * (BN * PITCH) + row * PITCH + part * 64);
        if (i * KC + part * 32 >= a.cols) {
#pragma unroll
            for (int k = 0; k < 4; k++) to[k] = make_uint4(0, 0, 0, 0);
            return;
        }
        Quants q;
        if (B::ELEMS == 32) {
            B::decode(p + part * B::BYTES, 0, q);
        } else {
            B::decode(p, part, q);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float f[4], g[4];
            values_of<B>(q, 2 * k, f);
            values_of<B>(q, 2 * k + 1, g);
            to[k] = make_uint4(pack_h2(f[0], f[1]), pack_h2(f[2], f[3]), pack_h2(g[0], g[1]), pack_h2(g[2], g[3]));
        }
    }
};

// The side that multiplies: MT tiles of 16 tokens. With one, four warps have 8 rows of weights each; with four, eight
// warps have 16.
template <int MT>
struct Multiplier {
    static const int NT = MT == 1 ? 1 : 2;
    const GemmArgs& a;
    const int m0, n0, chunks, tid, lane, wm, wn;
    u8* const xs;
    const u8* const halves;
    const bool works;
    float acc[NT][4];

    __device__ __forceinline__ Multiplier(const GemmArgs& a, int m0, int n0, int chunks, u8* xs, const u8* halves, int tid)
        : a(a), m0(m0), n0(n0), chunks(chunks), tid(tid), lane(tid & 31), wm(MT == 1 ? 0 : (tid >> 5) % MT * 16),
          wn(MT == 1 ? (tid >> 5) * 8 : (tid >> 5) / MT * 16), xs(xs), halves(halves), works(MT > 1 || (tid >> 5) < BN / 8) {
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
    }
    __device__ __forceinline__ void fetch(int i) const {
        if (i < chunks) {
            u8* to = xs + i % X_STAGES * (MT * 16 * PITCH);
            const int n = min(KC, a.pitch - i * KC) / 8;
            for (int c = tid; c < MT * 16 * (KC / 8); c += SIDE) {
                const int t = c / (KC / 8), at = c % (KC / 8);
                // Rows of tokens that are not there are multiplied as they lie, and not stored.
                if (at < n && m0 + t < a.tokens) cp_async16(to + t * PITCH + at * 16, a.x + (size_t)(m0 + t) * a.pitch + i * KC + at * 8);
            }
        }
        cp_commit();
    }
    __device__ __forceinline__ void multiply(int i) {
        if (!works) return;
        const u8* sx = xs + i % X_STAGES * (MT * 16 * PITCH) + (wm + (lane & 15)) * PITCH + (lane >> 4) * 16;
        const u8* sw = halves + (i & 1) * (BN * PITCH);
        // In the order of gemm.cu: sixteen columns at a time. Rows hold whole 64 of them.
        const int steps = min(KC, a.pitch - i * KC) / 16;
        if (NT == 1) {
            sw += (wn + (lane & 7)) * PITCH + (lane >> 3) * 16;
#pragma unroll 4
            for (int k = 0; k < steps; k += 2) {
                u32 fx[4], fy[4], fw[4];
                ldmatrix4(fx, sx + k * 32);
                ldmatrix4(fy, sx + k * 32 + 32);
                ldmatrix4(fw, sw + k * 32);
                mma_f16(acc[0], fx, fw[0], fw[1]);
                mma_f16(acc[0], fy, fw[2], fw[3]);
            }
        } else {
            sw += (wn + (lane & 7) + ((lane >> 4) << 3)) * PITCH + ((lane >> 3) & 1) * 16;
#pragma unroll 4
            for (int k = 0; k < steps; k++) {
                u32 fx[4], fw[4];
                ldmatrix4(fx, sx + k * 32);
                ldmatrix4(fw, sw + k * 32);
                mma_f16(acc[0], fx, fw[0], fw[1]);
                mma_f16(acc[NT - 1], fx, fw[2], fw[3]);
            }
        }
    }
    __device__ __forceinline__ void store() const {
        if (!works) return;
        const bool wide = stores_wide(a);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = m0 + wm + (lane >> 2) + half * 8;
            if (t >= a.tokens) continue;
            float* o = a.out + (size_t)(a.out_idx ? a.out_idx[t] : t) * a.stride;
#pragma unroll
            for (int j = 0; j < NT; j++)
                store_two(a, o, a.scale[t], wide, n0 + wn + j * 8 + (lane & 3) * 2, acc[j][half * 2], acc[j][half * 2 + 1]);
        }
    }
};

// Both sides meet at one place, so that the barrier is that of the whole block.
template <class B, int MT>
__device__ __forceinline__ void thin(const GemmArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    u8* halves = smem + STAGES * BN * Raw<B>::LINES * 16;
    u8* xs = halves + 2 * BN * PITCH;
    const int m0 = blockIdx.x * (MT * 16), n0 = blockIdx.y * BN;
    const int chunks = (a.pitch + KC - 1) / KC;
    pdl_launch();
    const bool turns = threadIdx.x < SIDE;
    const Turner<B> turner(a, n0, chunks, smem, halves, threadIdx.x % SIDE);
    Multiplier<MT> multiplier(a, m0, n0, chunks, xs, halves, threadIdx.x % SIDE);
    if (turns) {
        // Weights are nobody's output: they may come while the predecessor still runs.
#pragma unroll
        for (int i = 0; i < STAGES; i++) turner.fetch(i);
        cp_wait<STAGES - 1>();
    } else {
        pdl_wait();
        multiplier.fetch(0);
        multiplier.fetch(1);
    }
    __syncthreads();
    if (turns) turner.decode(0);
    for (int i = 0; i < chunks; i++) {
        // Chunk i + 1 is there; chunk i is turned, and what lay in the other half has been multiplied.
        if (turns) {
            cp_wait<STAGES - 2>();
        } else {
            cp_wait<1>();
        }
        __syncthreads();
        if (turns) {
            turner.fetch(i + STAGES);
            if (i + 1 < chunks) turner.decode(i + 1);
        } else {
            multiplier.fetch(i + 2);
            multiplier.multiply(i);
        }
    }
    cp_wait<0>();
    if (!turns) multiplier.store();
}

#define THIN(T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(2 * SIDE) thin_##T##_16(const __grid_constant__ GemmArgs a) { \
        thin<B##T, 1>(a);                                                                                  \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(2 * SIDE) thin_##T##_64(const __grid_constant__ GemmArgs a) { \
        thin<B##T, 4>(a);                                                                                  \
    }
FOR_EACH_QUANT(THIN)
