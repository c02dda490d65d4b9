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

template <class B>
__device__ __forceinline__ void copy_pieces(const GemvArgs& a, const Pieces& p, int tile_rows, int tiles, u8* ring,
                                            u64* full, u64* empty, int lane) {
    int stage = 0;
    u32 parity = 0;
    for (int n = blockIdx.x; n < tiles; n += gridDim.x) {
        const Tile tile = tile_of(a, n, tile_rows);
        for (int pc = 0; pc < p.count; pc++) {
            bar_wait(&empty[stage], parity ^ 1);
            u8* to = ring + stage * (ROWS * a.run_pitch);
            const int len = min(p.piece_bytes, (p.blocks - pc * a.piece) * B::BYTES);
            if (p.words) {
                for (int slot = 0; slot < ROWS; slot++) {
                    if (!filled(a, tile, slot)) continue;
                    const u8* src = piece_at(a, tile, p, slot, pc);
                    u8* dst = to + slot * a.run_pitch;
                    for (int i = lane * 4; i < len; i += 128) *(u32*)(dst + i) = *(const u32*)(src + i);
                }
                __syncwarp();
                if (lane == 0) bar_arrive(&full[stage]);
            } else {
                const bool mine = lane < ROWS && filled(a, tile, lane);
                const u8* src = piece_at(a, tile, p, lane & (ROWS - 1), pc);
                const u32 before = (u32)(size_t)src & 15, span = mine ? (before + len + 15) & ~15u : 0;
                const u32 bytes = __reduce_add_sync(0xffffffffu, span);
                if (lane == 0) bar_expect(&full[stage], bytes);
                __syncwarp();
                if (mine) bulk_copy(to + lane * a.run_pitch, src - before, span, &full[stage]);
            }
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

// Brings the activations to shared memory, the rows of tokens apart as those of weights are.
__device__ __forceinline__ void load_tokens(const GemvArgs& a, u8* xs, int x_pitch, int nb) {
    pdl_wait();
    for (int t = 0; t < a.tokens; t++) {
        const int row = a.in_idx ? a.in_idx[t] : t;
        const u64* src = (const u64*)(a.x + (size_t)row * a.x_blocks);
        u64* dst = (u64*)(xs + t * x_pitch);
        for (int i = threadIdx.x; i < nb * 5; i += FEW_WARPS * 32) cp_async8(dst + i, src + i);
    }
    cp_commit();
    cp_wait<0>();
    asm volatile("bar.sync 1, %0;" ::"n"(FEW_WARPS * 32) : "memory");
}

// One block of 32 columns: the products of sixteen rows and eight tokens, added to acc. p0 and p1 are the
// lane's two rows, b its word of its token's block; x0 and x1 are the blocks of the tokens of its results.
template <class B>
__device__ __forceinline__ void multiply(const u8* p0, const u8* p1, int sub, int q, const u32* b, const u8* x0,
                                         const u8* x1, float (&acc)[4]) {
    u32 w[4];
    B::pair(p0, sub, q, w[0], w[2]);
    B::pair(p1, sub, q, w[1], w[3]);
    Quants s[2];
    B::scales(p0, sub, s[0]);
    B::scales(p1, sub, s[1]);
    const u32 b0 = b[0], b1 = b[4];
    const uint2 e0 = *(const uint2*)(x0 + 32), e1 = *(const uint2*)(x1 + 32);
    const float d[2] = {__uint_as_float(e0.x), __uint_as_float(e1.x)};
    const int total[2] = {(int)e0.y, (int)e1.y};
    int c[4] = {0, 0, 0, 0};
    if (B::HALVES) {
        int c1[4] = {0, 0, 0, 0}, first[4] = {0, 0, 0, 0};
        mma_s8_half(c, w[0], w[1], b0);
        mma_s8_half(c1, w[2], w[3], b1);
        // Ones as weights give the sums of the tokens' first halves.
        if (B::MINS) mma_s8_half(first, 0x01010101u, 0x01010101u, b0);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const Quants& r = s[e >> 1];
            float v = r.a0 * (float)c[e] + r.a1 * (float)c1[e];
            if (B::MINS) v -= r.m0 * (float)first[e] + r.m1 * (float)(total[e & 1] - first[e]);
            acc[e] += v * d[e & 1];
        }
    } else {
        mma_s8(c, w, b0, b1);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const Quants& r = s[e >> 1];
            float v = r.a0 * (float)c[e];
            if (B::MINS) v -= r.m0 * (float)total[e & 1];
            acc[e] += v * d[e & 1];
        }
    }
}

template <class B>
__device__ __forceinline__ void few(const GemvArgs& a) {
    extern __shared__ __align__(128) u8 smem[];
    __shared__ __align__(8) u64 full[STAGES_MAX], empty[STAGES_MAX], summed[2], taken[2];
    __shared__ float4 part[2][FEW_WARPS][32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Pieces p = pieces_of<B>(a);
    const int tile_rows = a.mode == MODE_SWIGLU ? ROWS / 2 : ROWS;
    const int tiles = tiles_of(a, tile_rows);
    u8* xs = smem + a.stages * (ROWS * a.run_pitch);
    const int nb = a.cols / 32;
    const int x_pitch = (nb * (int)sizeof(XBlk) + 127) / 128 * 128 + 16;
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
        copy_pieces<B>(a, p, tile_rows, tiles, smem, full, empty, lane);
        return;
    }
    if (warp == STORER) {
        pdl_wait();
        store_tiles(a, tile_rows, tiles, part, summed, taken, lane);
        return;
    }
    load_tokens(a, xs, x_pitch, nb);

    const int g = lane >> 2, q = lane & 3;
    // Columns of tokens that are not there repeat the last one, and are not stored.
    const int last = a.tokens - 1;
    const u8* xb = xs + min(g, last) * x_pitch + 4 * q;
    const u8* x0 = xs + min(2 * q, last) * x_pitch;
    const u8* x1 = xs + min(2 * q + 1, last) * x_pitch;
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
#pragma unroll
                for (int k = 0; k < Lanes<B>::SUBS; k++) {
                    const int sub = B::ELEMS == 32 ? 0 : Lanes<B>::sub(j, k);
                    const int x = (kb + sub) * (int)sizeof(XBlk);
                    multiply<B>(r0 + at, r1 + at, sub, q, (const u32*)(xb + x), x0 + x, x1 + x, acc);
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
