// The product of few bulk rows that thin.cu and moe.cu are made of: weights as they lie in the file are turned to halves
// on their way to the tensor cores.
//
// A block takes 32 rows of weights and 16 or 64 tokens, 256 columns at a time. Eight warps copy weights ahead, four
// stages deep, and turn them to halves; eight others copy the tokens' halves and multiply what was turned before.
#pragma once
#include "blocks.cuh"
#include "gemm.cuh"
#include "plain.cuh"

#define BN 32        // rows of weights of a block
#define KC 256       // columns of a chunk
#define STAGES 4     // chunks of weights on their way
#define PITCH ((KC + 8) * 2)  // bytes from row to row of halves: eight rows lie in different banks
#define SIDE 256     // threads that turn, and that multiply

// 32 weights that are not quantised, in the place of a block.
template <class P>
struct Whole {
    static const int ELEMS = 32, BYTES = 32 * P::BYTES;
};

// 32 weights to halves: a block, or a part of a super-block.
template <class B>
struct Turn {
    static __device__ __forceinline__ void part(const u8* p, int part, uint4* to) {
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
template <class P>
struct Turn<Whole<P>> {
    static __device__ __forceinline__ void part(const u8* p, int part, uint4* to) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            float v[8];
            P::eight(p + (part * 32 + k * 8) * P::BYTES, v);
            to[k] = make_uint4(pack_h2(v[0], v[1]), pack_h2(v[2], v[3]), pack_h2(v[4], v[5]), pack_h2(v[6], v[7]));
        }
    }
};

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
        Turn<B>::part(p, part, to);
    }
};

// The side that multiplies: MT tiles of 16 tokens, XS chunks of them. With one tile, four warps have 8 rows of weights
// each; with more, two warps for each tile have 16.
template <int MT, int XS>
struct Multiplier {
    static const int NT = MT == 1 ? 1 : 2;
    static const int COPIES = MT * 16 * (KC / 8) / SIDE;  // lines of a chunk that a thread brings, each of another token
    const GemmArgs& a;
    const int* const from;  // rows of x of the tokens, or null: as they come
    int rows[COPIES];       // those of the tokens whose lines this thread brings; none is -1
    const int m0, n0, chunks, tid, lane, wm, wn;
    u8* const xs;
    const u8* const halves;
    const bool works;
    float acc[NT][4];

    __device__ __forceinline__ Multiplier(const GemmArgs& a, const int* from, int m0, int n0, int chunks, u8* xs,
                                          const u8* halves, int tid)
        : a(a), from(from), m0(m0), n0(n0), chunks(chunks), tid(tid), lane(tid & 31), wm(MT == 1 ? 0 : (tid >> 5) % MT * 16),
          wn(MT == 1 ? (tid >> 5) * 8 : (tid >> 5) / MT * 16), xs(xs), halves(halves), works(wn < BN) {
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[j][e] = 0.0f;
        // Rows of tokens that are not there are multiplied as they lie, and not stored.
#pragma unroll
        for (int j = 0; j < COPIES; j++) {
            const int t = m0 + (tid >> 5) + j * (SIDE / 32);
            rows[j] = t < a.tokens ? row_of(t) : -1;
        }
    }
    __device__ __forceinline__ int row_of(int t) const { return from ? from[t] : t; }
    __device__ __forceinline__ void fetch(int i) const {
        if (i < chunks) {
            u8* to = xs + i % XS * (MT * 16 * PITCH) + (tid >> 5) * PITCH + lane * 16;
            if (lane < min(KC, a.pitch - i * KC) / 8) {
#pragma unroll
                for (int j = 0; j < COPIES; j++)
                    if (rows[j] >= 0) cp_async16(to + j * (SIDE / 32) * PITCH, a.x + (size_t)rows[j] * a.pitch + i * KC + lane * 8);
            }
        }
        cp_commit();
    }
    __device__ __forceinline__ void multiply(int i) {
        if (!works) return;
        const u8* sx = xs + i % XS * (MT * 16 * PITCH) + (wm + (lane & 15)) * PITCH + (lane >> 4) * 16;
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
            const float scale = a.scale[row_of(t)];
#pragma unroll
            for (int j = 0; j < NT; j++)
                store_two(a, o, scale, wide, n0 + wn + j * 8 + (lane & 3) * 2, acc[j][half * 2], acc[j][half * 2 + 1]);
        }
    }
};

// Tokens from m0 on and rows of weights from n0 on. Both sides meet at one place, so that the barrier is that of the
// whole block.
template <class B, int MT, int XS>
__device__ __forceinline__ void thin(const GemmArgs& a, const int* from, int m0, int n0) {
    extern __shared__ __align__(16) u8 smem[];
    u8* halves = smem + STAGES * BN * Raw<B>::LINES * 16;
    u8* xs = halves + 2 * BN * PITCH;
    const int chunks = (a.pitch + KC - 1) / KC;
    pdl_launch();
    const bool turns = threadIdx.x < SIDE;
    const Turner<B> turner(a, n0, chunks, smem, halves, threadIdx.x % SIDE);
    Multiplier<MT, XS> multiplier(a, from, m0, n0, chunks, xs, halves, threadIdx.x % SIDE);
    if (turns) {
        // Weights are nobody's output: they may come while the predecessor still runs.
#pragma unroll
        for (int i = 0; i < STAGES; i++) turner.fetch(i);
        fill_grid<B>(threadIdx.x, SIDE);
        cp_wait<STAGES - 1>();
    } else {
        pdl_wait();
#pragma unroll
        for (int i = 0; i < XS - 1; i++) multiplier.fetch(i);
    }
    __syncthreads();
    if (turns) turner.decode(0);
    for (int i = 0; i < chunks; i++) {
        // Chunk i + 1 is there; chunk i is turned, and what lay in the other half has been multiplied.
        if (turns) {
            cp_wait<STAGES - 2>();
        } else {
            cp_wait<XS - 2>();
        }
        __syncthreads();
        if (turns) {
            turner.fetch(i + STAGES);
            if (i + 1 < chunks) turner.decode(i + 1);
        } else {
            multiplier.fetch(i + XS - 1);
            multiplier.multiply(i);
        }
    }
    cp_wait<0>();
    if (!turns) multiplier.store();
}
