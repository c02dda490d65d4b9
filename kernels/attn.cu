// Attention over the KV cache on tensor cores, with a running softmax: nothing grows with the
// context. The query heads that share one key/value head are computed together: row m of a tile
// is token m / group, head m % group of the group.
//
// prefill: four warps, 16 rows each, share tiles of keys. Keys fall into ranges, whose results are added one after the
// other, by the block itself; where rows are so few that blocks would be, each range has a block, and `attn_join` adds
// them up in the same way. decode: one tile of 16 rows; four warps take 16 keys each of a tile, and blocks take ranges
// of keys; `attn_merge` adds the ranges up.
// Tiles and ranges begin at fixed positions, so that a token's result does not depend on the tokens next to it,
// nor on how many there are: keys that it does not see add zero.
#include "attn.cuh"

struct AttnArgs {
    const float* q;   // tokens × n_heads × HD, rotated
    const void* k;    // n_kv_heads × n_places × HD
    const void* v;
    float* out;       // prefill: tokens × n_heads × HD; in ranges: ranges × tokens × n_heads × HD,
                      // not divided by the sum
    float2* ml;       // in ranges: ranges × tokens × n_heads (largest score in base 2, sum)
    int n_heads, n_kv_heads, n_places;
    int tokens;
    const int* pass;  // see first_position
    float scale;           // of scores, times log2(e)
    // From here on for the kernels that end in _by.
    float cap;             // scores become cap * tanh(score / cap), times log2(e); 0 for none
    const float* sinks;    // a score of each query head that takes part in the sum and has no value, or null
    int window, chunk;     // see first_seen
    int skip;              // tokens of the pass before the first of these
};
ARGS_SIZE(AttnArgs, 96); ARGS_FIELD(AttnArgs, q, 0); ARGS_FIELD(AttnArgs, k, 8); ARGS_FIELD(AttnArgs, v, 16);
ARGS_FIELD(AttnArgs, out, 24); ARGS_FIELD(AttnArgs, ml, 32); ARGS_FIELD(AttnArgs, n_heads, 40);
ARGS_FIELD(AttnArgs, n_kv_heads, 44); ARGS_FIELD(AttnArgs, n_places, 48); ARGS_FIELD(AttnArgs, tokens, 52);
ARGS_FIELD(AttnArgs, pass, 56); ARGS_FIELD(AttnArgs, scale, 64); ARGS_FIELD(AttnArgs, cap, 68);
ARGS_FIELD(AttnArgs, sinks, 72); ARGS_FIELD(AttnArgs, window, 80); ARGS_FIELD(AttnArgs, chunk, 84);
ARGS_FIELD(AttnArgs, skip, 88);

// Ranges of prompts are eight times as long.
#define LONGER 8
__device__ __forceinline__ int bulk_begin(int i) { return LONGER * range_begin(i); }
__device__ __forceinline__ int bulk_range_of(int key) { return range_of(key / LONGER); }

// What rows have found in ranges of keys so far: the largest score in base 2 and the sum, of the ranges' own results
// multiplied by `was` and `by` when the next one is added.
struct Found {
    float most, sum;
    __device__ __forceinline__ Found() : most(NEG_BIG), sum(0.0f) {}
    __device__ __forceinline__ void add(float m, float s, float& was, float& by) {
        const float now = fmaxf(most, m);
        was = exp2f(most - now);
        by = exp2f(m - now);
        sum = __fmaf_rn(s, by, sum * was);
        most = now;
    }
};
__device__ __forceinline__ float joined(float before, float was, float v, float by) {
    return __fmaf_rn(v, by, before * was);
}

// Of a tile of keys, the first of them at element `base`, those in front of `known`, or those behind; a tile lies in one page.
template <int HD, bool F32, int KT>
__device__ __forceinline__ void load_keys(u8* dst, const void* cache, size_t base, int first, int known, bool behind,
                                          int end, int tid) {
    constexpr int PITCH = (HD + 8) * 2, CH = HD / 8;
    for (int c = tid; c < KT * CH; c += 128) {
        int key = c / CH, ch = c % CH;
        if ((first + key >= known) != behind) continue;
        bool valid = first + key < end;
        size_t at = base + (size_t)(valid ? key : 0) * HD + ch * 8;
        u8* d = dst + key * PITCH + ch * 16;
        if (F32) {
            uint4 r = make_uint4(0, 0, 0, 0);
            if (valid) {
                const float4* s = (const float4*)((const float*)cache + at);
                float4 x = s[0], y = s[1];
                r = make_uint4(pack_h2(x.x, x.y), pack_h2(x.z, x.w), pack_h2(y.x, y.y),
                               pack_h2(y.z, y.w));
            }
            *(uint4*)d = r;
        } else {
            cp_async16_zfill(d, (const u16*)cache + at, valid);
        }
    }
    cp_commit();
}

// BY: scores are capped, keys are hidden behind a window, or there are sinks. Keys that a row does not see add zero to its
// sums, so that rows of a tile may begin at different ones.
template <int HD, bool F32, bool DECODE, bool BY>
__device__ __forceinline__ void attend(const AttnArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    constexpr int PITCH = (HD + 8) * 2;
    constexpr int BM = DECODE ? 16 : 64;
    constexpr int KT = (HD == 256 && !DECODE) ? 32 : 64;  // keys of a tile
    constexpr int KW = DECODE ? 16 : KT;                  // keys of it that a warp takes
    u8* sq = smem;
    u8* sk = sq + BM * PITCH;
    u8* sv = sk + KT * PITCH;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int group = a.n_heads / a.n_kv_heads;
    const int rows = a.tokens * group;
    // The last tiles see the most keys: start them first.
    const int tile = DECODE ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int m0 = tile * BM, kvh = blockIdx.y;
    const int last_t = (min(m0 + BM, rows) - 1) / group;
    // Written before the first kernel of the pass: nothing to wait for.
    const int first_pos = first_position(a.pass) + a.skip;
    // The last ranges are the longest: start them first.
    const int range = gridDim.z - 1 - blockIdx.z;
    const bool split = !DECODE && gridDim.z > 1;
    const int seen = first_pos + last_t + 1;
    const int unhidden = BY ? first_seen(first_pos + m0 / group, a.window, a.chunk) / KT * KT : 0;
    const int begin = max(DECODE ? range_begin(range) : split ? bulk_begin(range) : 0, unhidden);
    const int end = DECODE ? min(range_begin(range + 1), seen) : split ? min(bulk_begin(range + 1), seen) : seen;
    static_assert(PAGE % KT == 0, "tiles lie in one page");
    auto base = [&](int place) { return ((size_t)kvh * a.n_places + place) * HD; };
    // Known before anything is waited for, and then a tile ahead.
    int place = begin < end ? place_of(a.pass, begin) : 0;
    const int row_w = DECODE ? 0 : warp * 16, key_w = DECODE ? warp * 16 : 0;
    pdl_launch();
    if (DECODE && (begin >= first_pos + a.tokens || (BY && begin >= range_begin(range + 1)))) return;
    if (split && begin >= end) return;
    // Keys and values of earlier passes are there; those of this pass are when the predecessor has ended.
    const int known = DECODE ? first_pos : 0;
    if (DECODE && begin < end) {
        load_keys<HD, F32, KT>(sk, a.k, base(place), begin, known, false, end, tid);
        load_keys<HD, F32, KT>(sv, a.v, base(place), begin, known, false, end, tid);
    }
    pdl_wait();

    for (int c = tid; c < BM * (HD / 4); c += 128) {
        int r = c / (HD / 4), d = c % (HD / 4) * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (m0 + r < rows) {
            int t = (m0 + r) / group, h = kvh * group + (m0 + r) % group;
            x = *(const float4*)(a.q + ((size_t)t * a.n_heads + h) * HD + d);
        }
        *(uint2*)(sq + r * PITCH + d * 2) = make_uint2(pack_h2(x.x * a.scale, x.y * a.scale),
                                                       pack_h2(x.z * a.scale, x.w * a.scale));
    }

    float o[HD / 8][4];
#pragma unroll
    for (int i = 0; i < HD / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[i][e] = 0.0f;
    float mx[2] = {NEG_BIG, NEG_BIG}, sum[2] = {0.0f, 0.0f};
    // Prompts: what the ranges up to this one have found, with their results in `out` while this one is computed.
    Found found[2];
    bool first = true;
    int bulk = DECODE ? 0 : bulk_range_of(begin);
    auto each_row = [&](auto f) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int m = m0 + row_w + (lane >> 2) + 8 * h;
            if (m < rows) f(h, a.out + ((size_t)(m / group) * a.n_heads + kvh * group + m % group) * HD + (lane & 3) * 2, m);
        }
    };
    auto sum_lanes = [&]() {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
            sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        }
    };
    // Adds a range that has ended to those before it; `o` is the result of all then.
    auto add_range = [&]() {
        sum_lanes();
        each_row([&](int h, const float* dst, int) {
            float was, by;
            found[h].add(mx[h], sum[h], was, by);
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                const float2 before = first ? make_float2(0.0f, 0.0f) : *(const float2*)(dst + i * 8);
                o[i][2 * h] = joined(before.x, was, o[i][2 * h], by);
                o[i][2 * h + 1] = joined(before.y, was, o[i][2 * h + 1], by);
            }
        });
    };
    auto put = [&](int h, float* dst, float by) {
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            *(float2*)(dst + i * 8) = make_float2(o[i][2 * h] * by, o[i][2 * h + 1] * by);
    };
    int pos[2], low[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        pos[h] = first_pos + (m0 + row_w + (lane >> 2) + 8 * h) / group;
        low[h] = BY ? first_seen(pos[h], a.window, a.chunk) : 0;
    }

    if (begin < end && begin + KT > known) {
        load_keys<HD, F32, KT>(sk, a.k, base(place), begin, known, true, end, tid);
        if (DECODE) load_keys<HD, F32, KT>(sv, a.v, base(place), begin, known, true, end, tid);
    }
    for (int k0 = begin; k0 < end; k0 += KT) {
        cp_wait<0>();
        __syncthreads();
        if (!DECODE || k0 != begin) load_keys<HD, F32, KT>(sv, a.v, base(place), k0, 0, true, end, tid);
        if (k0 + KT < end) place = place_of(a.pass, k0 + KT);

        float s[KW / 8][4];
#pragma unroll
        for (int j = 0; j < KW / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
#pragma unroll
        for (int kk = 0; kk < HD / 16; kk++) {
            u32 fq[4];
            ldmatrix4(fq, sq + (row_w + (lane & 15)) * PITCH + kk * 32 + (lane >> 4) * 16);
#pragma unroll
            for (int j = 0; j < KW / 16; j++) {
                u32 fk[4];
                int key = key_w + j * 16 + (lane & 7) + ((lane >> 4) << 3);
                ldmatrix4(fk, sk + key * PITCH + kk * 32 + ((lane >> 3) & 1) * 16);
                mma_f16(s[2 * j], fq, fk[0], fk[1]);
                mma_f16(s[2 * j + 1], fq, fk[2], fk[3]);
            }
        }
        if (BY && a.cap != 0.0f) {
#pragma unroll
            for (int j = 0; j < KW / 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[j][e] = a.cap * tanhf(s[j][e] / a.cap);
        }
        float nm[2] = {mx[0], mx[1]};
#pragma unroll
        for (int j = 0; j < KW / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = k0 + key_w + j * 8 + (lane & 3) * 2 + (e & 1);
                if (key > pos[e >> 1] || key >= end || (BY && key < low[e >> 1])) s[j][e] = -1e38f;
                nm[e >> 1] = fmaxf(nm[e >> 1], s[j][e]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            nm[h] = fmaxf(nm[h], __shfl_xor_sync(0xffffffffu, nm[h], 1));
            nm[h] = fmaxf(nm[h], __shfl_xor_sync(0xffffffffu, nm[h], 2));
            float f = exp2f(mx[h] - nm[h]);
            mx[h] = nm[h];
            sum[h] *= f;
#pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                o[i][2 * h] *= f;
                o[i][2 * h + 1] *= f;
            }
        }
        u32 p[KW / 8][2];
#pragma unroll
        for (int j = 0; j < KW / 8; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float e0 = exp2f(s[j][2 * h] - mx[h]), e1 = exp2f(s[j][2 * h + 1] - mx[h]);
                sum[h] += e0 + e1;
                p[j][h] = pack_h2(e0, e1);
            }
        }
        cp_wait<0>();
        __syncthreads();
        if (k0 + KT < end) load_keys<HD, F32, KT>(sk, a.k, base(place), k0 + KT, 0, true, end, tid);
#pragma unroll
        for (int j = 0; j < KW / 16; j++) {
            u32 fp[4] = {p[2 * j][0], p[2 * j][1], p[2 * j + 1][0], p[2 * j + 1][1]};
#pragma unroll
            for (int i = 0; i < HD / 16; i++) {
                u32 fv[4];
                int key = key_w + j * 16 + (lane & 15);
                ldmatrix4_trans(fv, sv + key * PITCH + i * 32 + (lane >> 4) * 16);
                mma_f16(o[2 * i], fp, fv[0], fv[1]);
                mma_f16(o[2 * i + 1], fp, fv[2], fv[3]);
            }
        }
        if (!DECODE && k0 + KT < end && k0 + KT == bulk_begin(bulk + 1)) {
            add_range();
            each_row([&](int h, float* dst, int) { put(h, dst, 1.0f); });
#pragma unroll
            for (int i = 0; i < HD / 8; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[i][e] = 0.0f;
            mx[0] = mx[1] = NEG_BIG;
            sum[0] = sum[1] = 0.0f;
            first = false;
            bulk++;
        }
    }

    if (split) {
        sum_lanes();
        each_row([&](int h, float* dst, int m) {
            put(h, dst + (size_t)range * a.tokens * a.n_heads * HD, 1.0f);
            const size_t head = ((size_t)range * a.tokens + m / group) * a.n_heads + kvh * group + m % group;
            if ((lane & 3) == 0) a.ml[head] = make_float2(mx[h], sum[h]);
        });
        return;
    }
    if (!DECODE) {
        add_range();
        each_row([&](int h, float* dst, int m) {
            put(h, dst, one_over(found[h].most, found[h].sum, BY ? a.sinks : nullptr, kvh * group + m % group));
        });
        return;
    }
    sum_lanes();

    // Adds up the four warps: their results lie over the tiles, which nobody reads any more.
    __shared__ float wm[4][16], ws[4][16];
    cp_wait<0>();
    __syncthreads();
    float* so = (float*)sk;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int r = (lane >> 2) + 8 * h;
        if ((lane & 3) == 0) {
            wm[warp][r] = mx[h];
            ws[warp][r] = sum[h];
        }
#pragma unroll
        for (int i = 0; i < HD / 8; i++)
            *(float2*)(so + (warp * 16 + r) * HD + i * 8 + (lane & 3) * 2) =
                make_float2(o[i][2 * h], o[i][2 * h + 1]);
    }
    __syncthreads();
    for (int c = tid; c < 16 * HD; c += 128) {
        int r = c / HD, d = c % HD, m = m0 + r;
        if (m >= rows) continue;
        float big = fmaxf(fmaxf(wm[0][r], wm[1][r]), fmaxf(wm[2][r], wm[3][r]));
        float acc = 0.0f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float f = exp2f(wm[w][r] - big);
            acc += f * so[(w * 16 + r) * HD + d];
            total += f * ws[w][r];
        }
        size_t head = ((size_t)range * a.tokens + m / group) * a.n_heads + kvh * group + m % group;
        a.out[head * HD + d] = acc;
        if (d == 0) a.ml[head] = make_float2(big, total);
    }
}

#define ATTN_ONE(NAME, HD, F32, DECODE, BY)                                                 \
    extern "C" __global__ void __launch_bounds__(128) NAME(const __grid_constant__ AttnArgs a) { \
        attend<HD, F32, DECODE, BY>(a);                                                     \
    }
#define ATTN(HD)                                             \
    ATTN_ONE(attn_decode_f16_##HD, HD, false, true, false)   \
    ATTN_ONE(attn_decode_f32_##HD, HD, true, true, false)    \
    ATTN_ONE(attn_prefill_f16_##HD, HD, false, false, false) \
    ATTN_ONE(attn_prefill_f32_##HD, HD, true, false, false)  \
    ATTN_ONE(attn_decode_f16_##HD##_by, HD, false, true, true)   \
    ATTN_ONE(attn_decode_f32_##HD##_by, HD, true, true, true)    \
    ATTN_ONE(attn_prefill_f16_##HD##_by, HD, false, false, true) \
    ATTN_ONE(attn_prefill_f32_##HD##_by, HD, true, false, true)
ATTN(16)
ATTN(32)
ATTN(64)
ATTN(80)
ATTN(96)
ATTN(128)
ATTN(256)

struct MergeArgs {
    const float* part;   // ranges × tokens × width
    const float2* ml;    // ranges × tokens × n_heads
    float* out;          // tokens × width
    XBlk* q;             // tokens × width / 32, or null
    int tokens, width, head_dim;
    const int* pass;
    const float* sinks;  // as in AttnArgs
    int window, chunk, skip;
};
ARGS_SIZE(MergeArgs, 80); ARGS_FIELD(MergeArgs, part, 0); ARGS_FIELD(MergeArgs, ml, 8);
ARGS_FIELD(MergeArgs, out, 16); ARGS_FIELD(MergeArgs, q, 24); ARGS_FIELD(MergeArgs, tokens, 32);
ARGS_FIELD(MergeArgs, width, 36); ARGS_FIELD(MergeArgs, head_dim, 40); ARGS_FIELD(MergeArgs, pass, 48);
ARGS_FIELD(MergeArgs, sinks, 56); ARGS_FIELD(MergeArgs, window, 64); ARGS_FIELD(MergeArgs, chunk, 68);
ARGS_FIELD(MergeArgs, skip, 72);

#define MERGERS 8     // warps of a block of attn_merge
#define GROUP 16      // ranges that a warp adds up at a time
#define GROUPS_MAX 48  // of a sequence: range_begin of GROUP times as many is beyond what an int counts

// Adds the ranges of keys up, in order, and quantises: a block for 32 elements of a token. Its warps add up groups of ranges, which lie
// at fixed positions, and fetch all of a group at once; the first one then adds the groups up.
extern "C" __global__ void __launch_bounds__(MERGERS * 32) attn_merge(const __grid_constant__ MergeArgs a) {
    __shared__ float found[3][GROUPS_MAX][32];  // of each group the largest score, the sum and the element
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int blocks = (a.width + 31) / 32, item = blockIdx.x;
    const int t = item / blocks, e = item % blocks * 32 + lane;
    const int n_heads = a.width / a.head_dim, h = min(e, a.width - 1) / a.head_dim;
    // What this token sees; ranges after these hold nothing for it.
    const int keys = first_position(a.pass) + t + 1;
    const int first = range_of(first_seen(keys - 1, a.window, a.chunk)), end = range_of(keys - 1) + 1;
    const int group0 = first / GROUP, groups = (end - 1) / GROUP - group0 + 1;
    pdl_launch();
    pdl_wait();
    for (int g = warp; g < groups; g += MERGERS) {
        float2 ml[GROUP];
        float p[GROUP], big = NEG_BIG, total = 0.0f, v = 0.0f;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int s = (group0 + g) * GROUP + i;
            const bool is = s >= first && s < end && e < a.width;
            const size_t row = (size_t)s * a.tokens + t;
            ml[i] = is ? __ldcg(a.ml + row * n_heads + h) : make_float2(NEG_BIG, 0.0f);
            p[i] = is ? __ldcg(a.part + row * a.width + e) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) big = fmaxf(big, ml[i].x);
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const float f = exp2f(ml[i].x - big);
            total = __fmaf_rn(f, ml[i].y, total);
            v = __fmaf_rn(f, p[i], v);
        }
        found[0][g][lane] = big;
        found[1][g][lane] = total;
        found[2][g][lane] = v;
    }
    __syncthreads();
    if (warp > 0) return;
    const float sink = a.sinks ? a.sinks[h] * LOG2_E : NEG_BIG;
    float big = sink, total = 0.0f, v = 0.0f;
    for (int g = 0; g < groups; g++) big = fmaxf(big, found[0][g][lane]);
    for (int g = 0; g < groups; g++) {
        const float f = exp2f(found[0][g][lane] - big);
        total = __fmaf_rn(f, found[1][g][lane], total);
        v = __fmaf_rn(f, found[2][g][lane], v);
    }
    if (a.sinks) total += exp2f(sink - big);
    if (e < a.width) {
        v /= total;
        a.out[(size_t)t * a.width + e] = v;
    }
    if (!a.q) return;
    quantise_lanes(v, a.q + item, lane);
}

// Adds the ranges of keys of prompts up, as blocks do that have all of them: one thread an element.
extern "C" __global__ void __launch_bounds__(128) attn_join(const __grid_constant__ MergeArgs a) {
    const int item = blockIdx.x * 128 + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (item >= a.tokens * a.width) return;
    const int t = item / a.width, h = item % a.width / a.head_dim, n_heads = a.width / a.head_dim;
    const int pos = first_position(a.pass) + a.skip + t;
    Found found;
    float v = 0.0f;
    for (int s = bulk_range_of(first_seen(pos, a.window, a.chunk)); bulk_begin(s) <= pos; s++) {
        const float2 ml = a.ml[((size_t)s * a.tokens + t) * n_heads + h];
        float was, by;
        found.add(ml.x, ml.y, was, by);
        v = joined(v, was, a.part[(size_t)s * a.tokens * a.width + item], by);
    }
    a.out[item] = v * one_over(found.most, found.sum, a.sinks, h);
}
