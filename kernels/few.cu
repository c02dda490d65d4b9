// Matrix times two to eight vectors on GPUs of compute capability 9.0 and later: tiles of sixteen rows
// against eight tokens on int8 tensor cores, on activations quantised per 32, bound by the bytes of the
// weights as for one vector (bulk.cu).
//
// A stage of the ring holds a piece of each of a tile's rows, one copy a row, a little more than a multiple
// of 128 bytes apart: so the eight rows that a warp reads at once lie in different banks. The warps of a
// block share the columns of a piece; another warp copies ahead, and one adds up what they found.
#include "tiles.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

#define FEW_WARPS 16
#define COPIER FEW_WARPS
#define STORER (FEW_WARPS + 1)
#define THREADS ((FEW_WARPS + 2) * 32)
#define ROWS 16

struct Pieces {
    int blocks, count, piece_bytes;
    bool words;  // blocks of whole lines in a file that does not keep them there: copied word by word
};

template <class B>
__device__ __forceinline__ Pieces pieces_of(const GemvArgs& a) {
    Pieces p;
    p.blocks = a.cols / B::ELEMS;
    p.count = (p.blocks + a.piece - 1) / a.piece;
    p.piece_bytes = a.piece * B::BYTES;
    p.words = B::BYTES % 16 == 0 && (((size_t)a.w[0] | (size_t)a.w[1] | (size_t)a.w[2]) & 15) != 0;
    return p;
}

// Piece pc of the row in a tile's slot: of SwiGLU's, gate's rows are slots 0 to 7, and up's 8 to 15.
__device__ __forceinline__ const u8* piece_at(const GemvArgs& a, const Tile& tile, const Pieces& p, int slot, int pc) {
    const bool up = a.mode == MODE_SWIGLU && slot >= ROWS / 2;
    const u8* w = up ? a.w[1] : a.w[tile.seg];
    const int row = tile.row + (up ? slot - ROWS / 2 : slot);
    return w + (size_t)row * a.row_bytes + (size_t)pc * p.piece_bytes;
}

__device__ __forceinline__ bool filled(const GemvArgs& a, const Tile& tile, int slot) {
    return (a.mode == MODE_SWIGLU ? slot % (ROWS / 2) : slot) < tile.rows;
}

__device__ __forceinline__ int phase(const u8* src, bool words) { return words ? 0 : (int)(size_t)src & 15; }

// Where activations lie in shared memory: rows of tokens apart as those of weights are.
struct Tokens {
    u8* at;
    int pitch;
};

// The copying warp. With each piece of a block's first tile come the same columns of the activations, once
// they are there; the barrier of the stage counts the bytes of both.
template <class B>
__device__ __forceinline__ void copy_pieces(const GemvArgs& a, const Pieces& p, int tile_rows, int tiles, u8* ring,
                                            Tokens xs, u64* full, u64* empty, int lane) {
    const int kb = B::ELEMS / 32;
    auto len_of = [&](int pc) { return min(a.piece, p.blocks - pc * a.piece); };
    auto copy_tokens = [&](int pc, int stage) {
        if (lane >= a.tokens) return;
        const int row = a.in_idx ? a.in_idx[lane] : lane;
        const int at = pc * a.piece * kb * (int)sizeof(XBlk);
        bulk_copy(xs.at + lane * xs.pitch + at, (const u8*)(a.x + (size_t)row * a.x_blocks) + at,
                  len_of(pc) * kb * (int)sizeof(XBlk), &full[stage]);
    };
    // Weights are nobody's output: stages fill up while the predecessor still runs.
    const int mine_tiles = (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    const int wait_at = min(a.stages, mine_tiles * p.count) - 1;
    int stage = 0, fill = 0;
    u32 parity = 0;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, tile_rows);
        const bool first = n == blockIdx.x;
        for (int pc = 0; pc < p.count; pc++) {
            bar_wait(&empty[stage], parity ^ 1);
            u8* to = ring + stage * (ROWS * a.run_pitch);
            const int len = len_of(pc) * B::BYTES;
            const bool mine = !p.words && lane < ROWS && filled(a, tile, lane);
            const u8* src = piece_at(a, tile, p, lane & (ROWS - 1), pc);
            const u32 before = (u32)(size_t)src & 15, span = mine ? (before + len + 15) & ~15u : 0;
            u32 bytes = __reduce_add_sync(0xffffffffu, span);
            if (first) bytes += a.tokens * len_of(pc) * kb * (int)sizeof(XBlk);
            if (p.words) {
                for (int slot = 0; slot < ROWS; slot++) {
                    if (!filled(a, tile, slot)) continue;
                    const u8* from = piece_at(a, tile, p, slot, pc);
                    u8* dst = to + slot * a.run_pitch;
                    for (int i = lane * 4; i < len; i += 128) *(u32*)(dst + i) = *(const u32*)(from + i);
                }
                __syncwarp();
            }
            if (lane == 0) bar_expect(&full[stage], bytes);
            __syncwarp();
            if (mine) bulk_copy(to + lane * a.run_pitch, src - before, span, &full[stage]);
            if (fill == wait_at) {
                pdl_wait();
                for (int k = 0; k <= min(fill, p.count - 1); k++) copy_tokens(k, k);
            } else if (first && fill > wait_at) {
                copy_tokens(pc, stage);
            }
            fill++;
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

// The storing warp: adds up what the warps found, in order. Lane 4g + q has rows g and g + 8 for tokens 2q
// and 2q + 1, as tensor cores leave them. What results are added to is fetched before they are there.
__device__ __forceinline__ void store_tiles(const GemvArgs& a, int tile_rows, int tiles,
                                            const float4 (*part)[FEW_WARPS][32], u64* summed, u64* taken, int lane) {
    u32 parity = 0;
    int buf = 0;
    const bool swiglu = a.mode == MODE_SWIGLU;
    const int g = lane >> 2, t0 = 2 * (lane & 3);
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, tile_rows);
        const float* bias0 = a.bias[tile.seg];
        const float* bias1 = swiglu ? a.bias[1] : bias0;
        const int at[2] = {g, swiglu ? g : g + 8};
        float* out[2];
        bool has[2][2];  // row, token
        float v[2][2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int t = t0 + k;
            const int row = t < a.tokens && a.out_idx ? a.out_idx[t] : t;
            out[k] = a.out[tile.seg] + (size_t)row * a.stride[tile.seg] + tile.row;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float* bias = r == 0 ? bias0 : bias1;
                has[r][k] = t < a.tokens && at[r] < tile.rows;
                v[r][k] = has[r][k] && bias ? bias[tile.row + at[r]] : 0.0f;
                if (a.mode == MODE_ADD && has[r][k]) v[r][k] += out[k][at[r]];
            }
        }
        bar_wait(&summed[buf], parity);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < FEW_WARPS; w++) {
            const float4 s = part[buf][w][lane];
            sum = make_float4(sum.x + s.x, sum.y + s.y, sum.z + s.z, sum.w + s.w);
        }
        __syncwarp();
        if (lane == 0) bar_arrive(&taken[buf]);
        v[0][0] += sum.x;
        v[0][1] += sum.y;
        v[1][0] += sum.z;
        v[1][1] += sum.w;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (swiglu) {
                if (has[0][k]) out[k][g] = silu(v[0][k]) * v[1][k];
            } else {
                if (has[0][k]) out[k][g] = v[0][k];
                if (has[1][k]) out[k][g + 8] = v[1][k];
            }
        }
        if ((buf ^= 1) == 0) parity ^= 1;
    }
}

// The factors of the parts of a unit, for the lane's two rows. The four lanes that have the same rows divide
// the work, where a block has many parts.
template <class B>
__device__ __forceinline__ void unit_scales(const u8* p0, const u8* p1, int j, int q, Quants (&s)[2][Lanes<B>::SUBS]) {
    const int SUBS = Lanes<B>::SUBS;
    if constexpr (SUBS == 1) {
        B::scales(p0, j, s[0][0]);
        B::scales(p1, j, s[1][0]);
    } else {
        Quants mine[(SUBS + 1) / 2];
#pragma unroll
        for (int k = 0; k < SUBS / 2; k++) {
            const int item = q + 4 * k;
            B::scales(item / SUBS ? p1 : p0, Lanes<B>::sub(j, item % SUBS), mine[k]);
        }
#pragma unroll
        for (int item = 0; item < 2 * SUBS; item++) {
            Quants& to = s[item / SUBS][item % SUBS];
            const Quants& from = mine[item / 4];
            to.a0 = __shfl_sync(0xffffffffu, from.a0, item & 3, 4);
            if (B::HALVES) to.a1 = __shfl_sync(0xffffffffu, from.a1, item & 3, 4);
            if (B::MINS) to.m0 = __shfl_sync(0xffffffffu, from.m0, item & 3, 4);
            if (B::MINS && B::HALVES) to.m1 = __shfl_sync(0xffffffffu, from.m1, item & 3, 4);
        }
    }
}

// One block of 32 columns: the products of sixteen rows and eight tokens, added to acc. p0 and p1 are the
// lane's two rows, s0 and s1 their factors, b its word of its token's block; x0 and x1 are the blocks of the
// tokens of its results.
template <class B>
__device__ __forceinline__ void multiply(const u8* p0, const u8* p1, const Quants& s0, const Quants& s1, int sub, int q,
                                         const u32* b, const u8* x0, const u8* x1, float (&acc)[4]) {
    u32 w[4];
    B::pair(p0, sub, q, w[0], w[2]);
    B::pair(p1, sub, q, w[1], w[3]);
    const u32 b0 = b[0], b1 = b[4];
    const float2 e0 = *(const float2*)(x0 + 32), e1 = *(const float2*)(x1 + 32);
    const float d[2] = {e0.x, e1.x}, total[2] = {e0.y, e1.y};
    int c[4];
    if (B::HALVES) {
        int c1[4], first[4];
        mma_s8_half(c, w[0], w[1], b0);
        mma_s8_half(c1, w[2], w[3], b1);
        // Ones as weights give the sums of the tokens' first halves.
        if (B::MINS) mma_s8_half(first, 0x01010101u, 0x01010101u, b0);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const Quants& r = e < 2 ? s0 : s1;
            float v = r.a0 * sum_of(c[e]) + r.a1 * sum_of(c1[e]);
            if (B::MINS) v -= r.m0 * sum_of(first[e]) + r.m1 * (total[e & 1] - sum_of(first[e]));
            acc[e] += v * d[e & 1];
        }
    } else {
        mma_s8(c, w, b0, b1);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const Quants& r = e < 2 ? s0 : s1;
            float v = r.a0 * sum_of(c[e]);
            if (B::MINS) v -= r.m0 * total[e & 1];
            acc[e] += v * d[e & 1];
        }
    }
}

// What orders accesses to shared memory. racecheck follows __syncthreads and named barriers, not these mbarriers,
// and so reports a write against later reads where only they stand between the two. mbarrier.arrive (also with
// expect_tx) releases and mbarrier.try_wait acquires at the scope of the block by default; every lane waits for
// itself, and __syncwarp orders the accesses of a warp's lanes with the arrival of its lane 0.
//
// - ring, written by bulk copies: they complete the transaction count of full[stage], on which every warp waits
//   before it reads. Word by word (Pieces.words): the copier's stores, __syncwarp, lane 0's arrival at full[stage].
// - ring, written anew: the warps read, __syncwarp, lane 0 of each arrives at empty[stage]; the copier waits for all
//   FEW_WARPS of them. parity ^ 1 passes at once only the first time round, when nobody has read the stage.
// - activations: written once, in the first tile, by bulk copies that full[stage] of the same piece counts; each
//   warp waits for every stage of that tile, whatever it reads of it, so later tiles find all of them. Never
//   written again.
// - part[buf]: a warp stores its sums, __syncwarp, lane 0 arrives at summed[buf]; the storing warp waits for all
//   FEW_WARPS before it reads. It reads, __syncwarp, lane 0 arrives at taken[buf]; a warp waits for that before it
//   stores to the same buf two tiles later. Again the first wait of either buf passes at once, when nothing was
//   stored there.
// - the barriers themselves: initialised by thread 0, fenced, then __syncthreads.
//
// Nothing is read or written between a thread's last arrival and the block's end, so none of it outlives the block;
// copies in flight do not either, since every stage that is filled is waited for.
template <class B>
__device__ __forceinline__ void few(const GemvArgs& a) {
    extern __shared__ __align__(128) u8 smem[];
    __shared__ __align__(8) u64 full[STAGES_MAX], empty[STAGES_MAX], summed[2], taken[2];
    __shared__ float4 part[2][FEW_WARPS][32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Pieces p = pieces_of<B>(a);
    const int tile_rows = a.mode == MODE_SWIGLU ? ROWS / 2 : ROWS;
    const int tiles = tiles_of(a, tile_rows);
    const int nb = a.cols / 32;
    const Tokens xs = {smem + a.stages * (ROWS * a.run_pitch), (nb * (int)sizeof(XBlk) + 127) / 128 * 128 + 16};
    pdl_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            bar_init(&full[i], 1);
            bar_init(&empty[i], FEW_WARPS);
        }
        for (int i = 0; i < 2; i++) {
            bar_init(&summed[i], FEW_WARPS);
            bar_init(&taken[i], 1);
        }
    }
    __syncthreads();
    if (warp == COPIER) {
        copy_pieces<B>(a, p, tile_rows, tiles, smem, xs, full, empty, lane);
        return;
    }
    if (warp == STORER) {
        pdl_wait();
        store_tiles(a, tile_rows, tiles, part, summed, taken, lane);
        return;
    }
    const int g = lane >> 2, q = lane & 3;
    // Columns of tokens that are not there repeat the last one, and are not stored.
    const int last = a.tokens - 1;
    const u8* xb = xs.at + min(g, last) * xs.pitch + 4 * q;
    const u8* x0 = xs.at + min(2 * q, last) * xs.pitch;
    const u8* x1 = xs.at + min(2 * q + 1, last) * xs.pitch;
    int stage = 0, buf = 0;
    u32 parity = 0, part_parity = 0;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, tile_rows);
        // Rows that the matrix has not are computed from what lies there, and not stored.
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int pc = 0; pc < p.count; pc++) {
            const u8* from = smem + stage * (ROWS * a.run_pitch);
            const u8* r0 = from + g * a.run_pitch + phase(piece_at(a, tile, p, g, pc), p.words);
            const u8* r1 = from + (g + 8) * a.run_pitch + phase(piece_at(a, tile, p, g + 8, pc), p.words);
            const int first = pc * a.piece;
            const int units = min(a.piece, p.blocks - first) * Lanes<B>::UNITS;
            bar_wait(&full[stage], parity);
#pragma unroll B::ELEMS == 32 ? 2 : 1
            for (int u = warp; u < units; u += FEW_WARPS) {
                const int block = u / Lanes<B>::UNITS, j = u % Lanes<B>::UNITS;
                const int at = block * B::BYTES;
                const int kb = (first + block) * (B::ELEMS / 32);
                Quants scales[2][Lanes<B>::SUBS];
                unit_scales<B>(r0 + at, r1 + at, j, q, scales);
#pragma unroll
                for (int k = 0; k < Lanes<B>::SUBS; k++) {
                    const int sub = B::ELEMS == 32 ? 0 : Lanes<B>::sub(j, k);
                    const int x = (kb + sub) * (int)sizeof(XBlk);
                    multiply<B>(r0 + at, r1 + at, scales[0][k], scales[1][k], sub, q, (const u32*)(xb + x), x0 + x, x1 + x,
                                acc);
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
        part[buf][warp][lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        __syncwarp();
        if (lane == 0) bar_arrive(&summed[buf]);
        if ((buf ^= 1) == 0) part_parity ^= 1;
    }
}

#define FEW(T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) few_##T(const __grid_constant__ GemvArgs a) { \
        few<B##T>(a);                                                                                     \
    }
FOR_EACH_QUANT(FEW)
#endif
