// Attention with heads of any size (a multiple of 16 up to 576), on tensor cores and with a running softmax as attn.cu, whose
// kernels for some sizes are faster. Values may be the beginning of the keys, as those of latent vectors are, and the cache may
// be Q8_0.
//
// A block has 32 rows (row m is token m / group, head m % group of the group) and takes 32 keys at a time. Each of eight warps
// computes the scores of 16 rows and 8 keys, then 32 rows of a share of the columns. Tiles and ranges of keys begin at fixed
// positions, and keys that a row does not see add zero, so that a row's result does not depend on the rows next to it.
#include "attn.cuh"
#include "cache.cuh"

struct WideArgs {
    const float* q;   // tokens × n_heads × dk, rotated
    const void* k;    // n_kv_heads × n_places × dk
    const void* v;    // n_kv_heads × n_places × dv; null where values are the first dv elements of keys
    float* out;       // prefill: tokens × n_heads × dv; decode: ranges × tokens × n_heads × dv, not divided by the sum
    float2* ml;       // decode: ranges × tokens × n_heads (largest score in base 2, sum)
    const int* pass;  // see first_position
    const float* sinks;  // a score of each query head that takes part in the sum and has no value, or null
    int n_heads, n_kv_heads, n_places, tokens;
    int dk, dv;
    float scale;      // of scores, times log2(e)
    float cap;        // scores become cap * tanh(score / cap), times log2(e); 0 for none
    int window, chunk;   // see first_seen
    int apart;        // values of their own have a room of their own in shared memory
};
ARGS_SIZE(WideArgs, 104); ARGS_FIELD(WideArgs, q, 0); ARGS_FIELD(WideArgs, k, 8); ARGS_FIELD(WideArgs, v, 16);
ARGS_FIELD(WideArgs, out, 24); ARGS_FIELD(WideArgs, ml, 32); ARGS_FIELD(WideArgs, pass, 40); ARGS_FIELD(WideArgs, sinks, 48);
ARGS_FIELD(WideArgs, n_heads, 56); ARGS_FIELD(WideArgs, n_kv_heads, 60); ARGS_FIELD(WideArgs, n_places, 64);
ARGS_FIELD(WideArgs, tokens, 68); ARGS_FIELD(WideArgs, dk, 72); ARGS_FIELD(WideArgs, dv, 76); ARGS_FIELD(WideArgs, scale, 80);
ARGS_FIELD(WideArgs, cap, 84); ARGS_FIELD(WideArgs, window, 88); ARGS_FIELD(WideArgs, chunk, 92);
ARGS_FIELD(WideArgs, apart, 96);

// src/backend/cuda/heads.rs has the same numbers.
#define ROWS 32         // rows of a block
#define KEYS 32         // keys of a tile
#define WARPS 8
#define PAIRS 4         // most times 16 columns of a warp: dv is at most 512
#define SCORE_PITCH 40  // floats from row to row of scores, and halves of what becomes of them

// A tile of keys or values, the first at element `base` of the cache; a tile lies in one page. Rows are filled up with zeros.
template <int KIND>
__device__ __forceinline__ void load_tile(u8* dst, int pitch, const void* cache, size_t base, int dim, int filled, int valid,
                                          int warp, int lane) {
    for (int key = warp; key < KEYS; key += WARPS) {
        const size_t row = base + (size_t)(key < valid ? key : 0) * dim;
        for (int c = lane * 8; c < filled; c += 256) {
            u8* to = dst + key * pitch + c * 2;
            const bool here = key < valid && c < dim;
            const size_t at = row + (here ? c : 0);
            if (KIND == CACHE_Q8_0) {
                uint4 r = make_uint4(0, 0, 0, 0);
                if (here) {
                    // Blocks begin at even addresses.
                    const u8* block = (const u8*)cache + at / 32 * Q8_0_BYTES;
                    const u16* q = (const u16*)(block + 2 + at % 32);
                    const float d = h2f(*(const u16*)block);
                    const u32 two[4] = {q[0], q[1], q[2], q[3]};
                    auto pair = [&](u32 w) { return pack_h2(d * (float)(signed char)(w & 255), d * (float)(signed char)(w >> 8)); };
                    r = make_uint4(pair(two[0]), pair(two[1]), pair(two[2]), pair(two[3]));
                }
                *(uint4*)to = r;
            } else if (KIND == CACHE_F32) {
                uint4 r = make_uint4(0, 0, 0, 0);
                if (here) {
                    const float4* s = (const float4*)((const float*)cache + at);
                    const float4 x = s[0], y = s[1];
                    r = make_uint4(pack_h2(x.x, x.y), pack_h2(x.z, x.w), pack_h2(y.x, y.y), pack_h2(y.z, y.w));
                }
                *(uint4*)to = r;
            } else {
                cp_async16_zfill(to, (const u16*)cache + at, here);
            }
        }
    }
    cp_commit();
}

template <int KIND, bool DECODE>
__device__ __forceinline__ void attend_wide(const WideArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ float factors[ROWS];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int dk = a.dk, dv = a.dv, filled = (dk + 31) / 32 * 32;
    const bool own = a.v != nullptr, apart = own && a.apart;
    const int kp = (filled + 8) * 2, vp = own ? (dv + 8) * 2 : kp;
    u8* sq = smem;
    u8* sk = sq + ROWS * kp;
    u8* sv = apart ? sk + KEYS * kp : sk;
    float* ss = (float*)(sk + KEYS * kp + (apart ? KEYS * vp : 0));
    u8* sp = (u8*)(ss + ROWS * SCORE_PITCH);
    const int group = a.n_heads / a.n_kv_heads, rows = a.tokens * group;
    // The last tiles see the most keys: start them first.
    const int tile = DECODE ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int m0 = tile * ROWS, kvh = blockIdx.y;
    const int first_pos = first_position(a.pass);
    const int range = gridDim.z - 1 - blockIdx.z;
    const int seen = first_pos + (min(m0 + ROWS, rows) - 1) / group + 1;
    const int unhidden = first_seen(first_pos + m0 / group, a.window, a.chunk) / KEYS * KEYS;
    const int begin = max(DECODE ? range_begin(range) : 0, unhidden);
    const int end = DECODE ? min(range_begin(range + 1), seen) : seen;
    static_assert(PAGE % KEYS == 0, "tiles lie in one page");
    auto base = [&](int place, int dim) { return ((size_t)kvh * a.n_places + place) * dim; };
    int place = begin < end ? place_of(a.pass, begin) : 0;
    pdl_launch();
    if (DECODE && (begin >= first_pos + a.tokens || begin >= range_begin(range + 1))) return;
    pdl_wait();

    for (int r = warp; r < ROWS; r += WARPS) {
        const int t = (m0 + r) / group, h = kvh * group + (m0 + r) % group;
        const float* q = a.q + ((size_t)t * a.n_heads + h) * dk;
        for (int d = lane * 4; d < filled; d += 128) {
            float4 x = make_float4(0, 0, 0, 0);
            if (m0 + r < rows && d < dk) x = *(const float4*)(q + d);
            *(uint2*)(sq + r * kp + d * 2) =
                make_uint2(pack_h2(x.x * a.scale, x.y * a.scale), pack_h2(x.z * a.scale, x.w * a.scale));
        }
    }

    // What a thread has of the softmax: four keys of a row.
    const int row = tid >> 3, key4 = (tid & 7) * 4;
    const int pos = first_pos + (m0 + row) / group, low = first_seen(pos, a.window, a.chunk);
    float mx = NEG_BIG, sum = 0.0f;
    // 16 rows and 8 keys of the scores.
    const int of_rows = (warp >> 2) * 16, of_keys = (warp & 3) * 8;
    float o[2][PAIRS][2][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < PAIRS; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) o[m][i][n][e] = 0.0f;

    if (begin < end) load_tile<KIND>(sk, kp, a.k, base(place, dk), dk, filled, end - begin, warp, lane);
    for (int k0 = begin; k0 < end; k0 += KEYS) {
        const int here = place;
        cp_wait<0>();
        __syncthreads();
        if (apart) load_tile<KIND>(sv, vp, a.v, base(here, dv), dv, dv, end - k0, warp, lane);
        if (k0 + KEYS < end) place = place_of(a.pass, k0 + KEYS);

        float s[2][4];
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][e] = s[1][e] = 0.0f;
        const u8* qs = sq + (of_rows + (lane & 15)) * kp + (lane >> 4) * 16;
        const u8* ks = sk + (of_keys + (lane & 7)) * kp + (lane >> 3) * 16;
#pragma unroll 4
        for (int k = 0; k < filled; k += 32) {
            u32 fx[4], fy[4], fk[4];
            ldmatrix4(fx, qs + k * 2);
            ldmatrix4(fy, qs + k * 2 + 32);
            ldmatrix4(fk, ks + k * 2);
            mma_f16(s[0], fx, fk[0], fk[1]);
            mma_f16(s[1], fy, fk[2], fk[3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
            *(float2*)(ss + (of_rows + (lane >> 2) + 8 * h) * SCORE_PITCH + of_keys + (lane & 3) * 2) =
                make_float2(s[0][2 * h] + s[1][2 * h], s[0][2 * h + 1] + s[1][2 * h + 1]);
        __syncthreads();
        // Keys have been read.
        if (own && !apart) load_tile<KIND>(sv, vp, a.v, base(here, dv), dv, dv, end - k0, warp, lane);

        const float4 four = *(const float4*)(ss + row * SCORE_PITCH + key4);
        float v[4] = {four.x, four.y, four.z, four.w}, nm = mx;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = k0 + key4 + e;
            if (a.cap != 0.0f) v[e] = a.cap * tanhf(v[e] / a.cap);
            if (key > pos || key >= end || key < low) v[e] = -1e38f;
            nm = fmaxf(nm, v[e]);
        }
#pragma unroll
        for (int w = 1; w < 8; w <<= 1) nm = fmaxf(nm, __shfl_xor_sync(0xffffffffu, nm, w));
        const float f = exp2f(mx - nm);
        mx = nm;
        sum *= f;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            v[e] = exp2f(v[e] - mx);
            sum += v[e];
        }
        *(uint2*)(sp + (row * SCORE_PITCH + key4) * 2) = make_uint2(pack_h2(v[0], v[1]), pack_h2(v[2], v[3]));
        if ((tid & 7) == 0) factors[row] = f;
        cp_wait<0>();
        __syncthreads();
        if (apart && k0 + KEYS < end)
            load_tile<KIND>(sk, kp, a.k, base(place, dk), dk, filled, end - k0 - KEYS, warp, lane);

#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float f = factors[m * 16 + (lane >> 2) + 8 * h];
#pragma unroll
                for (int i = 0; i < PAIRS; i++)
#pragma unroll
                    for (int n = 0; n < 2; n++) o[m][i][n][2 * h] *= f, o[m][i][n][2 * h + 1] *= f;
            }
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            u32 fp[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
                ldmatrix4(fp[m], sp + (m * 16 + (lane & 15)) * SCORE_PITCH * 2 + k * 32 + (lane >> 4) * 16);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int column = (warp + i * WARPS) * 16;
                if (column >= dv) continue;
                u32 fv[4];
                ldmatrix4_trans(fv, sv + (k * 16 + (lane & 15)) * vp + column * 2 + (lane >> 4) * 16);
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    mma_f16(o[m][i][0], fp[m], fv[0], fv[1]);
                    mma_f16(o[m][i][1], fp[m], fv[2], fv[3]);
                }
            }
        }
        if (!apart && k0 + KEYS < end) {
            // Values lay where keys come.
            __syncthreads();
            load_tile<KIND>(sk, kp, a.k, base(place, dk), dk, filled, end - k0 - KEYS, warp, lane);
        }
    }
    cp_wait<0>();
#pragma unroll
    for (int w = 1; w < 8; w <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, w);
    __syncthreads();
    if ((tid & 7) == 0) {
        const int m = m0 + row, h = kvh * group + m % group;
        factors[row] = DECODE ? 1.0f : one_over(mx, sum, m < rows ? a.sinks : nullptr, h);
        if (DECODE && m < rows) a.ml[((size_t)range * a.tokens + m / group) * a.n_heads + h] = make_float2(mx, sum);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = m * 16 + (lane >> 2) + 8 * h, r = m0 + at;
            if (r >= rows) continue;
            const float inv = factors[at];
            const size_t t = DECODE ? (size_t)range * a.tokens + r / group : r / group;
            float* dst = a.out + (t * a.n_heads + kvh * group + r % group) * dv;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int column = (warp + i * WARPS) * 16;
                if (column >= dv) continue;
#pragma unroll
                for (int n = 0; n < 2; n++)
                    *(float2*)(dst + column + n * 8 + (lane & 3) * 2) =
                        make_float2(o[m][i][n][2 * h] * inv, o[m][i][n][2 * h + 1] * inv);
            }
        }
}

#define WIDE(NAME, KIND, DECODE)                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 2) NAME(const __grid_constant__ WideArgs a) { \
        attend_wide<KIND, DECODE>(a);                                                            \
    }
WIDE(wide_decode_f16, CACHE_F16, true)
WIDE(wide_decode_f32, CACHE_F32, true)
WIDE(wide_decode_q8, CACHE_Q8_0, true)
WIDE(wide_prefill_f16, CACHE_F16, false)
WIDE(wide_prefill_f32, CACHE_F32, false)
WIDE(wide_prefill_q8, CACHE_Q8_0, false)
