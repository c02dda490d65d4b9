// Matrix times one to eight vectors, for decoding, on GPUs of compute capability 9.0 and later: int8 dot
// products on activations quantised per 32, bound by the bytes of the weights. A vector's results are the same
// bits alone and among others.
//
// Rows are cut into tiles of some 16 to 32 KiB that lie in one piece of memory where the shape allows,
// since many small copies run at two thirds of the memory's rate. Tiles are dealt to the blocks in turn.
// In a block one warp copies tiles ahead into a ring of stages, eight compute, and one adds up what they
// found and stores it. While the ring fills for the first time, each block norms and quantises the
// activations of one token for itself; several tokens' have been quantised before (`quantise_rows`).
#include "tiles.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

#define COPIER WARPS
#define STORER (WARPS + 1)
#define THREADS ((WARPS + 2) * 32)

struct Shape {
    int row_bytes, tile_rows, steps, pieces, step_bytes;
    bool words;  // blocks of whole lines in a file that does not keep them there: copied word by word
};

template <class B>
__device__ __forceinline__ Shape shape_of(const GemvArgs& a) {
    Shape s;
    const int units = a.cols / B::ELEMS * Lanes<B>::UNITS;
    s.row_bytes = a.cols / B::ELEMS * B::BYTES;
    s.tile_rows = WARPS / a.row_warps * (a.mode == MODE_SWIGLU ? 1 : 2);
    s.steps = (units + 31) / 32;
    s.pieces = (s.steps + a.piece - 1) / a.piece;
    s.step_bytes = 32 / Lanes<B>::UNITS * B::BYTES;
    s.words = B::BYTES % 16 == 0 && (((size_t)a.w[0] | (size_t)a.w[1] | (size_t)a.w[2]) & 15) != 0;
    return s;
}

// Where in its run a copy from `src` begins: as far from a line of 128 bytes as in memory, which is what
// copies at full rate want.
__device__ __forceinline__ int phase(const u8* src, bool words) { return (int)(size_t)src & (words ? 112 : 127); }

// The copying warp.
template <class B>
__device__ __forceinline__ void copy_tiles(const GemvArgs& a, const Shape& sh, int tiles, u8* ring, int stage_bytes,
                                           u64* full, u64* empty, int lane) {
    const bool swiglu = a.mode == MODE_SWIGLU;
    const bool whole = sh.pieces == 1;
    int stage = 0;
    u32 parity = 0;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, sh.tile_rows);
        const int runs = (swiglu ? 2 : 1) * (whole ? 1 : tile.rows);
        for (int pc = 0; pc < sh.pieces; pc++) {
            bar_wait(&empty[stage], parity ^ 1);
            const int at = pc * a.piece * sh.step_bytes;
            const int len = whole ? tile.rows * sh.row_bytes : min(a.piece * sh.step_bytes, sh.row_bytes - at);
            u8* to = ring + stage * stage_bytes;
            auto source = [&](int r) {
                const int row = tile.row + (whole ? 0 : r % tile.rows);
                return a.w[swiglu ? (whole ? r : r / tile.rows) : tile.seg] + (size_t)row * sh.row_bytes + at;
            };
            // Row i of a tile in pieces is run i; those of `up` follow the full count of gate's.
            auto target = [&](int r) {
                return to + (whole ? r : r / tile.rows * sh.tile_rows + r % tile.rows) * a.run_pitch;
            };
            const bool mine = !sh.words && lane < runs;
            const u8* src = source(mine ? lane : 0);
            const u32 before = (u32)(size_t)src & 15, span = mine ? (before + len + 15) & ~15u : 0;
            const u32 bytes = __reduce_add_sync(0xffffffffu, span);
            for (int r = 0; sh.words && r < runs; r++) {
                const u8* from = source(r);
                u8* dst = target(r) + phase(from, true);
                for (int i = lane * 4; i < len; i += 128) *(u32*)(dst + i) = *(const u32*)(from + i);
            }
            __syncwarp();
            if (lane == 0) bar_expect(&full[stage], bytes);
            __syncwarp();
            if (mine) bulk_copy(target(lane) + (phase(src, false) & ~15), src - before, span, &full[stage]);
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

// The storing warp: adds up the warps of each row, in order. What results are added to is fetched before
// they are there. A lane has a pair of rows of one token, or two.
template <int NT>
__device__ __forceinline__ void store_tiles(const GemvArgs& a, int tile_rows, int tiles,
                                            const float (*part)[WARPS][NT][2], u64* summed, u64* taken, int lane) {
    u32 parity = 0;
    int buf = 0;
    const int kw = a.row_warps;
    const bool swiglu = a.mode == MODE_SWIGLU;
    const int width = swiglu ? tile_rows : tile_rows / 2;  // pairs of rows
    constexpr int ITEMS = WARPS * NT > 32 ? WARPS * NT / 32 : 1;
    const int t = lane % NT;
    const int out_row = t < a.tokens && a.out_idx ? a.out_idx[t] : t;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, tile_rows);
        const float* bias0 = a.bias[tile.seg];
        const float* bias1 = swiglu ? a.bias[1] : bias0;
        float* o = a.out[tile.seg] + (size_t)out_row * a.stride[tile.seg] + tile.row;
        int at0[ITEMS], at1[ITEMS];
        bool has0[ITEMS], has1[ITEMS];
        float add0[ITEMS], add1[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int slot = lane / NT + 32 / NT * i;
            at0[i] = swiglu ? slot : 2 * slot;
            at1[i] = swiglu ? slot : at0[i] + 1;
            const bool mine = slot < width && t < a.tokens;
            has0[i] = mine && at0[i] < tile.rows;
            has1[i] = mine && at1[i] < tile.rows;
            add0[i] = has0[i] && bias0 ? bias0[tile.row + at0[i]] : 0.0f;
            add1[i] = has1[i] && bias1 ? bias1[tile.row + at1[i]] : 0.0f;
            if (a.mode == MODE_ADD) {
                if (has0[i]) add0[i] += o[at0[i]];
                if (has1[i]) add1[i] += o[at1[i]];
            }
        }
        bar_wait(&summed[buf], parity);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int slot = lane / NT + 32 / NT * i;
            float v0 = 0.0f, v1 = 0.0f;
            if (has0[i]) {
                for (int k = 0; k < kw; k++) {
                    v0 += part[buf][slot * kw + k][t][0];
                    v1 += part[buf][slot * kw + k][t][1];
                }
            }
            v0 += add0[i];
            v1 += add1[i];
            if (swiglu) {
                if (has0[i]) o[at0[i]] = silu(v0) * v1;
            } else {
                if (has0[i]) o[at0[i]] = v0;
                if (has1[i]) o[at1[i]] = v1;
            }
        }
        __syncwarp();
        if (lane == 0) bar_arrive(&taken[buf]);
        if ((buf ^= 1) == 0) parity ^= 1;
    }
}

// Brings the activations of several tokens, which are quantised already. Blocks that lanes read at once lie next to
// each other, so that their reads meet no bank twice: first those of each unit's part 0, then part 1, ...
template <class B>
__device__ __forceinline__ void load_rows(const GemvArgs& a, XBlk* xs, int nb, int units) {
    pdl_wait();
    for (int t = 0; t < a.tokens; t++) {
        const int row = a.in_idx ? a.in_idx[t] : t;
        const u64* src = (const u64*)(a.x + (size_t)row * nb);
        u64* dst = (u64*)(xs + (size_t)t * nb);
        for (int i = threadIdx.x; i < nb * 5; i += WARPS * 32) {
            const int kb = i / 5, word = i % 5;
            const int to = B::ELEMS == 32 ? kb : Lanes<B>::part(kb & 7) * units + (kb >> 3) * Lanes<B>::UNITS + Lanes<B>::lane(kb & 7);
            dst[to * 5 + word] = src[i];
        }
    }
    compute_sync();
}

// What orders accesses to shared memory. racecheck follows __syncthreads and named barriers, not these mbarriers, and so
// reports the stores to `part`, and bulk copies into the ring, against the reads after them. mbarrier.arrive (also with
// expect_tx) releases and mbarrier.try_wait acquires at the scope of the block by default; every lane waits for itself,
// and __syncwarp orders the accesses of a warp's lanes with the arrival of its lane 0.
//
// - ring: copies complete the transaction count of full[stage], word-wise stores come before lane 0's arrival there by
//   __syncwarp; every lane of a computing warp waits on it before it reads. They read, __syncwarp, lane 0 of each arrives
//   at empty[stage]; the copier waits for all WARPS before it fills the stage anew.
// - part[buf]: a warp stores its sums, __syncwarp, lane 0 arrives at summed[buf], for all WARPS of which the storing warp
//   waits before it reads. It reads, __syncwarp, lane 0 arrives at taken[buf], which a warp awaits before it stores to the
//   same buffer two tiles later; the first wait of either buffer passes at once, when nothing was stored there.
// - activations: stored before any tile by the computing warps, which meet at a named barrier, and never written again.
// - the barriers themselves: initialised by thread 0, then __syncthreads.
template <class B, int NT>
__device__ __forceinline__ void bulk(const GemvArgs& a) {
    extern __shared__ __align__(128) u8 smem[];
    __shared__ __align__(8) u64 full[STAGES_MAX], empty[STAGES_MAX], summed[2], taken[2];
    __shared__ float part[2][WARPS][NT][2];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Shape sh = shape_of<B>(a);
    const int tiles = tiles_of(a, sh.tile_rows);
    const int runs = (a.mode == MODE_SWIGLU ? 2 : 1) * (sh.pieces == 1 ? 1 : sh.tile_rows);
    const int stage_bytes = runs * a.run_pitch;
    XBlk* xs = (XBlk*)(smem + a.stages * stage_bytes);
    const int nb = a.cols / 32;
    pdl_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            bar_init(&full[i], 1);
            bar_init(&empty[i], WARPS);
        }
        for (int i = 0; i < 2; i++) {
            bar_init(&summed[i], WARPS);
            bar_init(&taken[i], 1);
        }
    }
    __syncthreads();
    if (warp == COPIER) {
        copy_tiles<B>(a, sh, tiles, smem, stage_bytes, full, empty, lane);
        return;
    }
    if (warp == STORER) {
        pdl_wait();
        store_tiles<NT>(a, sh.tile_rows, tiles, part, summed, taken, lane);
        return;
    }
    const int units = a.cols / B::ELEMS * Lanes<B>::UNITS;
    // All warps that decode meet behind the activations.
    fill_grid<B>(threadIdx.x, WARPS * 32);
    if constexpr (NT == 1) {
        load_activations(a, xs, nb);
    } else {
        load_rows<B>(a, xs, nb, units);
    }

    const bool swiglu = a.mode == MODE_SWIGLU;
    const int kw = a.row_warps, kq = warp % kw, slot = warp / kw;
    int stage = 0, buf = 0;
    u32 parity = 0, part_parity = 0;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, sh.tile_rows);
        // Rows that the matrix has not are computed from what lies there, and not stored.
        const int i0 = swiglu ? slot : 2 * slot, i1 = swiglu ? slot : 2 * slot + 1;
        const u8* w0 = a.w[swiglu ? 0 : tile.seg];
        const u8* w1 = a.w[swiglu ? 1 : tile.seg];
        float acc[NT][2];
#pragma unroll
        for (int t = 0; t < NT; t++) acc[t][0] = acc[t][1] = 0.0f;
        for (int pc = 0; pc < sh.pieces; pc++) {
            const u8* from = smem + stage * stage_bytes;
            const u8 *b0, *b1;
            if (sh.pieces == 1) {
                const size_t at = (size_t)tile.row * sh.row_bytes;
                b0 = from + phase(w0 + at, sh.words) + i0 * sh.row_bytes;
                b1 = from + (swiglu ? a.run_pitch : 0) + phase(w1 + at, sh.words) + i1 * sh.row_bytes;
            } else {
                const size_t at = (size_t)pc * a.piece * sh.step_bytes;
                b0 = from + i0 * a.run_pitch + phase(w0 + (size_t)(tile.row + i0) * sh.row_bytes + at, sh.words);
                b1 = from + (i1 + (swiglu ? sh.tile_rows : 0)) * a.run_pitch +
                     phase(w1 + (size_t)(tile.row + i1) * sh.row_bytes + at, sh.words);
            }
            bar_wait(&full[stage], parity);
            const int first = pc * a.piece, last = min(first + a.piece, sh.steps);
            for (int s = first + kq; s < last; s += kw) {
                const int unit = s * 32 + lane;
                if (unit >= units) continue;
                const int j = lane % Lanes<B>::UNITS;
                const int at = (s - first) * sh.step_bytes + lane / Lanes<B>::UNITS * B::BYTES;
                const int kb0 = B::ELEMS == 32 ? unit : unit / Lanes<B>::UNITS * 8;
#pragma unroll
                for (int k = 0; k < Lanes<B>::SUBS; k++) {
                    const int sub = Lanes<B>::sub(j, k);
                    Quants q0, q1;
                    B::decode(b0 + at, B::ELEMS == 32 ? 0 : sub, q0);
                    B::decode(b1 + at, B::ELEMS == 32 ? 0 : sub, q1);
                    const int kb = NT > 1 ? k * units + unit : (B::ELEMS == 32 ? kb0 : kb0 + sub);
#pragma unroll
                    for (int t = 0; t < NT; t++) {
                        if (NT > 1 && t >= a.tokens) break;
                        const Activations x(xs + (size_t)t * nb + kb);
                        acc[t][0] = dot<B>(q0, x.q, x.d, x.s, acc[t][0]);
                        acc[t][1] = dot<B>(q1, x.q, x.d, x.s, acc[t][1]);
                    }
                }
            }
            __syncwarp();
            if (lane == 0) bar_arrive(&empty[stage]);
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        bar_wait(&taken[buf], part_parity ^ 1);
        // Both rows at once: the lower half of the warp ends with the first, the upper with the second.
        const bool upper = lane >= 16;
#pragma unroll
        for (int t = 0; t < NT; t++) {
            float v = upper ? acc[t][1] : acc[t][0];
            v += __shfl_xor_sync(0xffffffffu, upper ? acc[t][0] : acc[t][1], 16);
#pragma unroll
            for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
            if ((lane & 15) == 0) part[buf][warp][t][lane >> 4] = v;
        }
        __syncwarp();
        if (lane == 0) bar_arrive(&summed[buf]);
        if ((buf ^= 1) == 0) part_parity ^= 1;
    }
}

#define BULK(T, N)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) bulk_##T##_##N(const __grid_constant__ GemvArgs a) { \
        bulk<B##T, N>(a);                                                                                          \
    }
#define BULKS(T) \
    BULK(T, 1)   \
    BULK(T, 2)   \
    BULK(T, 4)   \
    BULK(T, 8)
FOR_EACH_QUANT(BULKS)

struct QuantiseArgs {
    const float* x;     // tokens × cols
    const float* norm;  // weight of the norm; null for none
    XBlk* q;            // tokens × cols / 32
    float eps;
    int cols;
};
ARGS_SIZE(QuantiseArgs, 32); ARGS_FIELD(QuantiseArgs, x, 0); ARGS_FIELD(QuantiseArgs, norm, 8);
ARGS_FIELD(QuantiseArgs, q, 16); ARGS_FIELD(QuantiseArgs, eps, 24); ARGS_FIELD(QuantiseArgs, cols, 28);

// What bulk_*_1 does to its input, for a token a block: the same bits.
extern "C" __global__ void __launch_bounds__(256) quantise_rows(const __grid_constant__ QuantiseArgs a) {
    const size_t row = blockIdx.x;
    const int nb = a.cols / 32;
    pdl_launch();
    norm_rows({a.x + row * a.cols, a.norm, a.eps, a.cols}, 1, a.q + row * nb, nb);
}
#endif
