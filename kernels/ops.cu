// The small operations between matrix products: norms and the conversion of activations to what
// the products read, rotary embedding with the store to the KV cache, routing and combination of
// experts.
#include "cache.cuh"

struct PrepArgs {
    const float* x;    // rows × n (row idx[i] instead of i if given), stride n
    const float* up;   // the second operand of SwiGLU
    const float* w;    // weight of the norm; in prep_norms null for ones
    const int* idx;
    float* f;          // rows × n floats, or null
    XBlk* q;           // rows × n / 32 quantised blocks, or null
    u16* h;            // rows × pitch halves with zeros from n on, or null; times scale
    float* scale;
    int n, pitch;
    float eps;
    float limit;       // of prep_activate
    const float* b;    // prep_norms: bias of the norm, or null
    const float* by;   // prep_scaled: row i is multiplied by by[by_idx[i]]
    const int* by_idx;
    int how;           // prep_activate: see ACTIVATE_*
    int layer;         // prep_norms: the mean is subtracted first
    int add;           // prep_norms: to f, rather than in its place
};
ARGS_SIZE(PrepArgs, 120); ARGS_FIELD(PrepArgs, x, 0); ARGS_FIELD(PrepArgs, up, 8); ARGS_FIELD(PrepArgs, w, 16);
ARGS_FIELD(PrepArgs, idx, 24); ARGS_FIELD(PrepArgs, f, 32); ARGS_FIELD(PrepArgs, q, 40);
ARGS_FIELD(PrepArgs, h, 48); ARGS_FIELD(PrepArgs, scale, 56); ARGS_FIELD(PrepArgs, n, 64);
ARGS_FIELD(PrepArgs, pitch, 68); ARGS_FIELD(PrepArgs, eps, 72); ARGS_FIELD(PrepArgs, limit, 76);
ARGS_FIELD(PrepArgs, b, 80); ARGS_FIELD(PrepArgs, by, 88); ARGS_FIELD(PrepArgs, by_idx, 96);
ARGS_FIELD(PrepArgs, how, 104); ARGS_FIELD(PrepArgs, layer, 108); ARGS_FIELD(PrepArgs, add, 112);

#define PREP_COPY 0
#define PREP_NORM 1
#define PREP_SWIGLU 2
#define PREP_NORMS 3
#define PREP_ACTIVATE 4
#define PREP_SCALED 5

__device__ __forceinline__ float block_reduce(float v, bool max, float* shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    v = max ? warp_max(v) : warp_sum(v);
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    if (warp == 0) {
        float u = lane < warps ? shared[lane] : 0.0f;
        u = max ? warp_max(u) : warp_sum(u);
        if (lane == 0) shared[32] = u;
    }
    __syncthreads();
    v = shared[32];
    __syncthreads();
    return v;
}

// One block a row, or several where nothing of the whole row is wanted (no norm, no halves). Values are
// recomputed for each output rather than kept: rows lie in cache.
template <int MODE>
__device__ __forceinline__ void prep(const PrepArgs& a) {
    __shared__ float shared[33];
    pdl_launch();
    // The norm's weight is nobody's output: it may come nearer before the predecessor is done.
    if (MODE == PREP_NORM && blockIdx.x == 0)
        for (int i = threadIdx.x * 32; i < a.n; i += blockDim.x * 32)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(a.w + i));
    pdl_wait();
    const int row = blockIdx.x, n = a.n, tid = threadIdx.x, threads = blockDim.x;
    const float* x = a.x + (size_t)(a.idx ? a.idx[row] : row) * n;
    const float* up = MODE == PREP_SWIGLU || (MODE == PREP_ACTIVATE && a.up) ? a.up + (size_t)row * n : nullptr;
    float rs = 1.0f, mean = 0.0f;
    if (MODE == PREP_NORMS) {
        if (a.layer) {
            float s = 0.0f;
            for (int i = tid; i < n; i += threads) s += x[i];
            mean = block_reduce(s, false, shared) / (float)n;
        }
        float s = 0.0f;
        for (int i = tid; i < n; i += threads) s += (x[i] - mean) * (x[i] - mean);
        rs = norm_scale(block_reduce(s, false, shared), n, a.eps);
    }
    if (MODE == PREP_SCALED) rs = a.by[a.by_idx[row]];
    if (MODE == PREP_NORM) {
        float s = 0.0f;
#pragma unroll 4
        for (int i = tid; i < n; i += threads) s += x[i] * x[i];
        rs = norm_scale(block_reduce(s, false, shared), n, a.eps);
    }
    auto value = [&](int i) -> float {
        if (MODE == PREP_NORM) return x[i] * rs * a.w[i];
        if (MODE == PREP_SWIGLU) return silu(x[i]) * up[i];
        if (MODE == PREP_NORMS) {
            const float v = (x[i] - mean) * rs * (a.w ? a.w[i] : 1.0f);
            return a.b ? v + a.b[i] : v;
        }
        if (MODE == PREP_ACTIVATE) return activate(a.how, a.limit, x[i], up != nullptr, up ? up[i] : 0.0f);
        if (MODE == PREP_SCALED) return x[i] * rs;
        return x[i];
    };
    // Other parts of the row may be other blocks' work.
    const int first = blockIdx.y * threads, step = gridDim.y * threads;
    if (a.f)
        for (int i = first + tid; i < n; i += step) {
            float* to = a.f + (size_t)row * n + i;
            *to = MODE == PREP_NORMS && a.add ? *to + value(i) : value(i);
        }
    if (a.q) {
        // Eight threads a block of 32; n is a multiple of 32, so whole groups of eight take part.
        for (int i0 = first; i0 < n / 4; i0 += step) {
            const int i = i0 + tid;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (i < n / 4) v = make_float4(value(4 * i), value(4 * i + 1), value(4 * i + 2), value(4 * i + 3));
            quantise_four(v, a.q + (size_t)row * (n / 32), i, i < n / 4);
        }
    }
    if (a.h) {
        float m = 0.0f;
#pragma unroll 4
        for (int i = tid; i < n; i += threads) m = fmaxf(m, fabsf(value(i)));
        m = block_reduce(m, true, shared);
        // A power of two that brings the largest value to 2^13..2^14: nothing overflows, and
        // nothing that counts is lost to small halves.
        int e = (int)(__float_as_uint(m) >> 23) - 127 - 13;
        e = m > 0.0f ? max(-100, min(100, e)) : 0;
        const float inv = __uint_as_float((u32)(127 - e) << 23);
        if (tid == 0) a.scale[row] = __uint_as_float((u32)(127 + e) << 23);
        u32* h = (u32*)(a.h + (size_t)row * a.pitch);
#pragma unroll 2
        for (int i = tid; i < a.pitch / 2; i += threads) {
            float lo = 2 * i < n ? value(2 * i) : 0.0f;
            float hi = 2 * i + 1 < n ? value(2 * i + 1) : 0.0f;
            h[i] = pack_h2(lo * inv, hi * inv);
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) prep_copy(const __grid_constant__ PrepArgs a) {
    prep<PREP_COPY>(a);
}
extern "C" __global__ void __launch_bounds__(1024) prep_norm(const __grid_constant__ PrepArgs a) {
    prep<PREP_NORM>(a);
}
extern "C" __global__ void __launch_bounds__(1024) prep_swiglu(const __grid_constant__ PrepArgs a) {
    prep<PREP_SWIGLU>(a);
}
// Also in place, where floats alone are written: a thread reads an element before it writes it, and no other's.
extern "C" __global__ void __launch_bounds__(1024) prep_norms(const __grid_constant__ PrepArgs a) {
    prep<PREP_NORMS>(a);
}
extern "C" __global__ void __launch_bounds__(1024) prep_activate(const __grid_constant__ PrepArgs a) {
    prep<PREP_ACTIVATE>(a);
}
extern "C" __global__ void __launch_bounds__(1024) prep_scaled(const __grid_constant__ PrepArgs a) {
    prep<PREP_SCALED>(a);
}

struct RopeArgs {
    float* q;          // tokens × n_heads × head_dim, rotated in place
    const float* k;    // tokens × n_kv_heads × head_dim
    const float* v;
    const float* q_norm;  // head_dim, or null for ones
    const float* k_norm;
    const float* freqs;   // n_rot / 2
    const int* pass;      // see first_position
    void* k_cache;     // n_kv_heads × n_places × head_dim
    void* v_cache;
    int n_heads, n_kv_heads, head_dim, n_rot, n_places;
    int tokens;
    int neox;          // pairs (i, i + n_rot / 2) instead of (2i, 2i + 1)
    int cache_f32;     // CACHE_*; of rope_store no Q8_0
    float magnitude, q_eps, k_eps;
    int q_when, k_when;   // norms: 0 none, 1 before the rotary embedding, 2 behind it
    // Queries are multiplied by 1 + by * ln(1 + floor((position + offset) / every)); 0 for none.
    float by, every, offset;
};
ARGS_SIZE(RopeArgs, 136); ARGS_FIELD(RopeArgs, q, 0); ARGS_FIELD(RopeArgs, k, 8); ARGS_FIELD(RopeArgs, v, 16);
ARGS_FIELD(RopeArgs, q_norm, 24); ARGS_FIELD(RopeArgs, k_norm, 32); ARGS_FIELD(RopeArgs, freqs, 40);
ARGS_FIELD(RopeArgs, pass, 48); ARGS_FIELD(RopeArgs, k_cache, 56); ARGS_FIELD(RopeArgs, v_cache, 64);
ARGS_FIELD(RopeArgs, n_heads, 72); ARGS_FIELD(RopeArgs, n_kv_heads, 76); ARGS_FIELD(RopeArgs, head_dim, 80);
ARGS_FIELD(RopeArgs, n_rot, 84); ARGS_FIELD(RopeArgs, n_places, 88); ARGS_FIELD(RopeArgs, tokens, 92);
ARGS_FIELD(RopeArgs, neox, 96); ARGS_FIELD(RopeArgs, cache_f32, 100); ARGS_FIELD(RopeArgs, magnitude, 104);
ARGS_FIELD(RopeArgs, q_eps, 108); ARGS_FIELD(RopeArgs, k_eps, 112); ARGS_FIELD(RopeArgs, q_when, 116);
ARGS_FIELD(RopeArgs, k_when, 120); ARGS_FIELD(RopeArgs, by, 124); ARGS_FIELD(RopeArgs, every, 128);
ARGS_FIELD(RopeArgs, offset, 132);

__device__ __forceinline__ void cache_store(void* cache, size_t at, float v, int f32) {
    if (f32) {
        ((float*)cache)[at] = v;
    } else {
        ((u16*)cache)[at] = f2h(v);
    }
}

// RMS norm of a head in place, whose sum of squares is that of each lane's elements.
__device__ __forceinline__ void norm_head(float* x, const float* w, int n, float squares, float eps, int lane) {
    const float rs = norm_scale(warp_sum(squares), n, eps);
    for (int i = lane; i < n; i += 32) x[i] = w ? x[i] * rs * w[i] : x[i] * rs;
}

// Sine and cosine of the angle by which a pair of elements is rotated at a position.
__device__ __forceinline__ float2 angle_of(const RopeArgs& a, int pos, int pair) {
    float sn, cs;
    sincosf((float)pos * a.freqs[pair], &sn, &cs);
    return make_float2(sn * a.magnitude, cs * a.magnitude);
}

// Norms and rotates a head of queries or keys, by a warp in the room of a head at x; queries go back. `norm` is the norm's weight, or
// null, and `angle` says what angle_of does of a pair.
template <class Angle>
__device__ __forceinline__ void turn_head(const RopeArgs& a, float* x, int t, int pos, int h, bool is_q, int lane, const float* norm,
                                          Angle angle) {
    const int hd = a.head_dim;
    const float* src = is_q ? a.q + ((size_t)t * a.n_heads + h) * hd
                            : a.k + ((size_t)t * a.n_kv_heads + h) * hd;
    float s = 0.0f;
    for (int i = lane; i < hd; i += 32) {
        float v = src[i];
        x[i] = v;
        s += v * v;
    }
    const int when = is_q ? a.q_when : a.k_when;
    const float eps = is_q ? a.q_eps : a.k_eps;
    if (when == 1) norm_head(x, norm, hd, s, eps, lane);
    __syncwarp();
    for (int i = lane; i < a.n_rot / 2; i += 32) {
        int i0 = a.neox ? i : 2 * i, i1 = a.neox ? i + a.n_rot / 2 : 2 * i + 1;
        const float2 turn = angle(i);
        float u = x[i0], v = x[i1];
        x[i0] = u * turn.y - v * turn.x;
        x[i1] = u * turn.x + v * turn.y;
    }
    __syncwarp();
    if (when == 2) {
        s = 0.0f;
        for (int i = lane; i < hd; i += 32) s += x[i] * x[i];
        norm_head(x, norm, hd, s, eps, lane);
    }
    if (is_q && a.by != 0.0f) {
        const float factor = 1.0f + a.by * logf(floorf(((float)pos + a.offset) / a.every) + 1.0f);
        for (int i = lane; i < hd; i += 32) x[i] *= factor;
    }
    if (is_q) {
        float* q = a.q + ((size_t)t * a.n_heads + h) * hd;
        for (int i = lane; i < hd; i += 32) q[i] = x[i];
    }
}

// A head to the cache, as it is stored in backend/cpu/attention.rs.
__device__ __forceinline__ void store_head(void* cache, size_t at, const float* x, int n, int kind, int lane) {
    if (kind != CACHE_Q8_0) {
        for (int i = lane; i < n; i += 32) cache_store(cache, at + i, x[i], kind);
        return;
    }
    for (int i = lane; i < n; i += 32) {
        // A block is a warp's: n is a multiple of 32.
        const float v = x[i], most = __uint_as_float(__reduce_max_sync(0xffffffffu, magnitude(v)));
        const float d = is_finite(most) ? most / 127.0f : NO_NUMBER, inverse = d > 0.0f ? 1.0f / d : 0.0f;
        u8* block = (u8*)cache + (at + i) / 32 * Q8_0_BYTES;
        if (lane == 0) *(u16*)block = f2h(d);
        block[2 + lane] = (u8)(int)roundf(v * inverse);
    }
}

// Norm of each head, rotary embedding, store to the cache: one warp a head of a token.
extern "C" __global__ void __launch_bounds__(128) rope_store(const __grid_constant__ RopeArgs a) {
    __shared__ float heads[4][256], weights[4][256];
    __shared__ float2 angles[4][128];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int per_token = a.n_heads + 2 * a.n_kv_heads, hd = a.head_dim;
    const int item = blockIdx.x * 4 + warp;
    pdl_launch();
    if (item >= a.tokens * per_token) return;
    const int t = item / per_token, pos = first_position(a.pass) + t, place = place_of(a.pass, pos);
    int h = item % per_token;
    float* x = heads[warp];
    // What follows from the position alone, before the predecessor has ended.
    const float* norm = h < a.n_heads ? a.q_norm : a.k_norm;
    if (h < a.n_heads + a.n_kv_heads) {
        for (int i = lane; i < hd && norm; i += 32) weights[warp][i] = norm[i];
        for (int i = lane; i < a.n_rot / 2; i += 32) angles[warp][i] = angle_of(a, pos, i);
    }
    pdl_wait();
    if (h >= a.n_heads + a.n_kv_heads) {
        h -= a.n_heads + a.n_kv_heads;
        const float* v = a.v + ((size_t)t * a.n_kv_heads + h) * hd;
        for (int i = lane; i < hd; i += 32)
            cache_store(a.v_cache, ((size_t)h * a.n_places + place) * hd + i, v[i], a.cache_f32);
        return;
    }
    const bool is_q = h < a.n_heads;
    if (!is_q) h -= a.n_heads;
    turn_head(a, x, t, pos, h, is_q, lane, norm ? weights[warp] : nullptr, [&](int i) { return angles[warp][i]; });
    if (is_q) return;
    for (int i = lane; i < hd; i += 32)
        cache_store(a.k_cache, ((size_t)h * a.n_places + place) * hd + i, x[i], a.cache_f32);
}

struct HeadsArgs {
    RopeArgs of;    // n_kv_heads: of keys, or 0 where none are stored
    int v_heads;    // of values, or 0 where none are stored
    int v_normed;   // RMS norm without a weight
    float v_eps;
};
ARGS_SIZE(HeadsArgs, 152); ARGS_FIELD(HeadsArgs, of, 0); ARGS_FIELD(HeadsArgs, v_heads, 136); ARGS_FIELD(HeadsArgs, v_normed, 140);
ARGS_FIELD(HeadsArgs, v_eps, 144);

// As rope_store, of heads of any size, of which keys or values may not be there.
extern "C" __global__ void __launch_bounds__(128) rope_heads(const __grid_constant__ HeadsArgs a) {
    extern __shared__ float rooms[];  // a head a warp
    const RopeArgs& r = a.of;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, hd = r.head_dim;
    const int per_token = r.n_heads + r.n_kv_heads + a.v_heads;
    const int item = blockIdx.x * 4 + warp;
    pdl_launch();
    pdl_wait();
    if (item >= r.tokens * per_token) return;
    const int t = item / per_token, pos = first_position(r.pass) + t, place = place_of(r.pass, pos);
    int h = item % per_token;
    float* x = rooms + warp * hd;
    if (h < r.n_heads + r.n_kv_heads) {
        const bool is_q = h < r.n_heads;
        if (!is_q) h -= r.n_heads;
        turn_head(r, x, t, pos, h, is_q, lane, is_q ? r.q_norm : r.k_norm, [&](int i) { return angle_of(r, pos, i); });
        if (!is_q) store_head(r.k_cache, ((size_t)h * r.n_places + place) * hd, x, hd, r.cache_f32, lane);
        return;
    }
    h -= r.n_heads + r.n_kv_heads;
    const float* v = r.v + ((size_t)t * a.v_heads + h) * hd;
    float s = 0.0f;
    for (int i = lane; i < hd; i += 32) {
        x[i] = v[i];
        s += v[i] * v[i];
    }
    if (a.v_normed) norm_head(x, nullptr, hd, s, a.v_eps, lane);
    store_head(r.v_cache, ((size_t)h * r.n_places + place) * hd, x, hd, r.cache_f32, lane);
}

struct RouteArgs {
    float* scores;   // tokens × experts; used up
    u32* ids;        // tokens × used
    float* weights;
    int tokens, experts, used;
    int normalize;
    float scale;
};
ARGS_SIZE(RouteArgs, 48); ARGS_FIELD(RouteArgs, scores, 0); ARGS_FIELD(RouteArgs, ids, 8);
ARGS_FIELD(RouteArgs, weights, 16); ARGS_FIELD(RouteArgs, tokens, 24); ARGS_FIELD(RouteArgs, experts, 28);
ARGS_FIELD(RouteArgs, used, 32); ARGS_FIELD(RouteArgs, normalize, 36); ARGS_FIELD(RouteArgs, scale, 40);

// Softmax over the experts and the `used` largest, ties to the lower id: one warp a token.
extern "C" __global__ void __launch_bounds__(32) route_topk(const __grid_constant__ RouteArgs a) {
    pdl_launch();
    pdl_wait();
    const int t = blockIdx.x, lane = threadIdx.x;
    float* s = a.scores + (size_t)t * a.experts;
    float big = -1e38f, sum = 0.0f;
    for (int i = lane; i < a.experts; i += 32) big = fmaxf(big, s[i]);
    big = warp_max(big);
    for (int i = lane; i < a.experts; i += 32) {
        float e = expf(s[i] - big);
        s[i] = e;
        sum += e;
    }
    sum = warp_sum(sum);
    float chosen = 0.0f;
    for (int j = 0; j < a.used; j++) {
        float best = -1.0f;
        int id = 0x7fffffff;
        for (int i = lane; i < a.experts; i += 32)
            if (s[i] > best) best = s[i], id = i;
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            float b = __shfl_xor_sync(0xffffffffu, best, o);
            int k = __shfl_xor_sync(0xffffffffu, id, o);
            if (b > best || (b == best && k < id)) best = b, id = k;
        }
        // Scores that are not numbers are never chosen by comparison: the lowest id that is left. Choices are
        // distinct, so that an expert has no more rows than there are tokens.
        if (id >= a.experts) {
            best = 0.0f;
            for (int i = lane; i < a.experts; i += 32)
                if (s[i] != -2.0f) id = min(id, i);
#pragma unroll
            for (int o = 16; o > 0; o >>= 1) id = min(id, __shfl_xor_sync(0xffffffffu, id, o));
        }
        if (lane == (id & 31)) s[id] = -2.0f;
        __syncwarp();
        best /= sum;
        chosen += best;
        if (lane == 0) {
            a.ids[t * a.used + j] = (u32)id;
            a.weights[t * a.used + j] = best;
        }
    }
    __syncwarp();
    for (int j = lane; j < a.used; j += 32) {
        float w = a.weights[t * a.used + j];
        if (a.normalize) w /= chosen;
        a.weights[t * a.used + j] = w * a.scale;
    }
}

struct CombineArgs {
    float* x;              // tokens × n
    const float* out;      // tokens × used × n
    const float* weights;  // tokens × used
    int tokens, used, n;
};
ARGS_SIZE(CombineArgs, 40); ARGS_FIELD(CombineArgs, x, 0); ARGS_FIELD(CombineArgs, out, 8);
ARGS_FIELD(CombineArgs, weights, 16); ARGS_FIELD(CombineArgs, tokens, 24); ARGS_FIELD(CombineArgs, used, 28);
ARGS_FIELD(CombineArgs, n, 32);

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ CombineArgs a) {
    pdl_launch();
    pdl_wait();
    const long i = (long)blockIdx.x * 256 + threadIdx.x;
    if (i >= (long)a.tokens * a.n) return;
    const int t = (int)(i / a.n), e = (int)(i % a.n);
    float s = 0.0f;
    for (int j = 0; j < a.used; j++)
        s = __fmaf_rn(a.weights[t * a.used + j], a.out[((size_t)t * a.used + j) * a.n + e], s);
    a.x[i] += s;
}
