// Operations on activations one by one, for what no fused kernel covers: sums, scales and gates, routers of all kinds, sums
// of experts' outputs, and convolutions. Each row is computed in an order of its own.
#include "states.cuh"

struct ActArgs {
    float* x;         // rows × n, written
    const float* y;   // see each kernel
    float* z;
    const int* pass;  // see first_position
    int rows, n;
    int each;         // act_split: elements of a head; act_logits: floats from row to row of x; act_multiply: of y; act_part: the same
    float by, cap;
};
ARGS_SIZE(ActArgs, 56); ARGS_FIELD(ActArgs, x, 0); ARGS_FIELD(ActArgs, y, 8); ARGS_FIELD(ActArgs, z, 16);
ARGS_FIELD(ActArgs, pass, 24); ARGS_FIELD(ActArgs, rows, 32); ARGS_FIELD(ActArgs, n, 36); ARGS_FIELD(ActArgs, each, 40);
ARGS_FIELD(ActArgs, by, 44); ARGS_FIELD(ActArgs, cap, 48);

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// One thread an element; f gets the row, the place in it and the place in all.
template <class F>
__device__ __forceinline__ void each(const ActArgs& a, F f) {
    pdl_launch();
    pdl_wait();
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i < (size_t)a.rows * a.n) f((int)(i / a.n), (int)(i % a.n), i);
}

#define ACT(NAME, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ ActArgs a) { \
        each(a, [&](int t, int e, size_t i) { __VA_ARGS__; });                                \
    }
// x += y
ACT(act_add, a.x[i] += a.y[i])
// x *= by
ACT(act_scale, a.x[i] *= a.by)
// x += y's row of the position
ACT(act_position, a.x[i] += a.y[(size_t)(first_position(a.pass) + t) * a.n + e])
// x *= sigmoid(y)
ACT(act_gate, a.x[i] *= sigmoid(a.y[i]))
// x *= sigmoid(y), one number a row
ACT(act_gate_row, a.x[i] *= sigmoid(a.y[t]))
// Of each head of y, the first half to x and the second one to z.
ACT(act_split, const float* head = a.y + (size_t)t * 2 * a.n + e / a.each * 2 * a.each; a.x[i] = head[e % a.each];
    a.z[i] = head[a.each + e % a.each])
// x = y
ACT(act_copy, a.x[i] = a.y[i])
// x *= y, a vector as wide or one number
ACT(act_multiply, a.x[i] *= a.y[min(e, a.each - 1)])
// x = the first columns of rows of y, which are `each` wide
ACT(act_part, a.x[i] = a.y[(size_t)t * a.each + e])
// Weights of choices x are multiplied by y of the experts whose ids are z.
ACT(act_weigh, a.x[i] *= a.y[((const u32*)a.z)[i]])
// x = cap * tanh(by * x / cap), or by * x
ACT(act_logits, float* x = a.x + (size_t)t * a.each + e; const float v = *x * a.by;
    *x = a.cap != 0.0f ? a.cap * tanhf(v / a.cap) : v)

struct RouteByArgs {
    float* scores;      // tokens × experts; used up
    const float* bias;  // added to probabilities where experts are chosen, one an expert; or null
    u32* ids;           // tokens × used
    float* weights;
    int tokens, experts, used;
    int gating;         // see GATING_*
    int normalize, groups, kept;
    float scale;
};
ARGS_SIZE(RouteByArgs, 64); ARGS_FIELD(RouteByArgs, scores, 0); ARGS_FIELD(RouteByArgs, bias, 8);
ARGS_FIELD(RouteByArgs, ids, 16); ARGS_FIELD(RouteByArgs, weights, 24); ARGS_FIELD(RouteByArgs, tokens, 32);
ARGS_FIELD(RouteByArgs, experts, 36); ARGS_FIELD(RouteByArgs, used, 40); ARGS_FIELD(RouteByArgs, gating, 44);
ARGS_FIELD(RouteByArgs, normalize, 48); ARGS_FIELD(RouteByArgs, groups, 52); ARGS_FIELD(RouteByArgs, kept, 56);
ARGS_FIELD(RouteByArgs, scale, 60);

// src/backend/cuda/ops.rs has the same numbers.
#define GATING_SOFTMAX 0
#define GATING_SIGMOID 1
#define GATING_SOFTMAX_OF_CHOSEN 2
#define GATING_SIGMOID_OF_CHOSEN 3

#define MINUS_INFINITY __int_as_float(0xff800000)
// Least sum that weights are divided by.
#define LEAST_SUM 6.1035156e-5f

// exp(v - largest) in place, by a warp; returns the sum.
__device__ __forceinline__ float exponentials(float* v, int n, int lane) {
    float big = -1e38f, sum = 0.0f;
    for (int i = lane; i < n; i += 32) big = fmaxf(big, v[i]);
    big = warp_max(big);
    for (int i = lane; i < n; i += 32) {
        v[i] = expf(v[i] - big);
        sum += v[i];
    }
    return warp_sum(sum);
}

// Chances of groups that are not among the `kept` best become minus infinity. A group is worth the sum of its two best.
__device__ __forceinline__ void keep_groups(const RouteByArgs& a, float* chances, float* worth, int lane) {
    const int size = a.experts / a.groups;
    for (int g = lane; g < a.groups; g += 32) {
        float best = MINUS_INFINITY, second = MINUS_INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++) {
            const float c = chances[i];
            if (c > best) second = best, best = c;
            else if (c > second) second = c;
        }
        worth[g] = size == 1 || best == MINUS_INFINITY ? best : best + second;
    }
    __syncwarp();
    for (int g = lane; g < a.groups; g += 32) {
        int better = 0;
        for (int o = 0; o < a.groups; o++) better += worth[o] > worth[g] || (worth[o] == worth[g] && o < g);
        if (better < a.kept) continue;
        for (int i = g * size; i < (g + 1) * size; i++) chances[i] = MINUS_INFINITY;
    }
    __syncwarp();
}

// Chooses `used` distinct experts, the best first and ties to the lower id, and weighs them: one warp a token.
extern "C" __global__ void __launch_bounds__(32) route_by(const __grid_constant__ RouteByArgs a) {
    extern __shared__ float chances[];  // experts, then a worth a group
    pdl_launch();
    pdl_wait();
    const int t = blockIdx.x, lane = threadIdx.x;
    float* s = a.scores + (size_t)t * a.experts;
    u32* ids = a.ids + (size_t)t * a.used;
    float* weights = a.weights + (size_t)t * a.used;
    float sum = 1.0f;
    if (a.gating == GATING_SOFTMAX) sum = exponentials(s, a.experts, lane);
    for (int i = lane; i < a.experts; i += 32) {
        if (a.gating == GATING_SOFTMAX) s[i] /= sum;
        if (a.gating == GATING_SIGMOID) s[i] = 1.0f / (1.0f + expf(-s[i]));
        const float c = a.bias ? s[i] + a.bias[i] : s[i];
        chances[i] = c == c ? c : MINUS_INFINITY;
    }
    __syncwarp();
    if (a.groups > 1) keep_groups(a, chances, chances + a.experts, lane);
    for (int j = 0; j < a.used; j++) {
        float best = MINUS_INFINITY;
        int id = 0x7fffffff;
        for (int i = lane; i < a.experts; i += 32) {
            const float c = chances[i];  // no number: chosen already
            if (c == c && (id == 0x7fffffff || c > best)) best = c, id = i;
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            const float b = __shfl_xor_sync(0xffffffffu, best, o);
            const int k = __shfl_xor_sync(0xffffffffu, id, o);
            if (b > best || (b == best && k < id)) best = b, id = k;
        }
        __syncwarp();
        if (lane == 0) {
            chances[id] = NO_NUMBER;
            ids[j] = (u32)id;
            weights[j] = s[id];
        }
        __syncwarp();
    }
    if (a.gating == GATING_SOFTMAX_OF_CHOSEN) {
        sum = exponentials(weights, a.used, lane);
        for (int j = lane; j < a.used; j += 32) weights[j] /= sum;
    }
    float chosen = 0.0f;
    for (int j = lane; j < a.used; j += 32) {
        if (a.gating == GATING_SIGMOID_OF_CHOSEN) weights[j] = 1.0f / (1.0f + expf(-weights[j]));
        chosen += weights[j];
    }
    chosen = fmaxf(warp_sum(chosen), LEAST_SUM);
    for (int j = lane; j < a.used; j += 32) {
        const float w = a.normalize ? weights[j] / chosen : weights[j];
        weights[j] = w * a.scale;
    }
}

struct SumArgs {
    float* x;              // tokens × n
    const float* out;      // tokens × used × n
    const float* weights;  // tokens × used, or null for ones
    int tokens, used, n;
    int add;               // to x, rather than in its place
};
ARGS_SIZE(SumArgs, 40); ARGS_FIELD(SumArgs, x, 0); ARGS_FIELD(SumArgs, out, 8); ARGS_FIELD(SumArgs, weights, 16);
ARGS_FIELD(SumArgs, tokens, 24); ARGS_FIELD(SumArgs, used, 28); ARGS_FIELD(SumArgs, n, 32); ARGS_FIELD(SumArgs, add, 36);

// The outputs of experts, in the order of choices.
extern "C" __global__ void __launch_bounds__(256) act_sum(const __grid_constant__ SumArgs a) {
    pdl_launch();
    pdl_wait();
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= (size_t)a.tokens * a.n) return;
    const size_t t = i / a.n, e = i % a.n;
    float s = 0.0f;
    for (int j = 0; j < a.used; j++) {
        const float w = a.weights ? a.weights[t * a.used + j] : 1.0f;
        s = __fmaf_rn(w, a.out[(t * a.used + j) * a.n + e], s);
    }
    a.x[i] = a.add ? a.x[i] + s : s;
}

struct ConvArgs {
    States states;    // [taps - 1][channels]: the last inputs
    float* mix;       // rows × channels, in place; short_conv: rows × 3 × channels, read
    float* out;       // short_conv: rows × channels
    const float* w;   // channels × taps, the newest input's last
    int rows, channels, taps;
};
ARGS_SIZE(ConvArgs, 72); ARGS_FIELD(ConvArgs, states, 0); ARGS_FIELD(ConvArgs, mix, 32); ARGS_FIELD(ConvArgs, out, 40);
ARGS_FIELD(ConvArgs, w, 48); ARGS_FIELD(ConvArgs, rows, 56); ARGS_FIELD(ConvArgs, channels, 60);
ARGS_FIELD(ConvArgs, taps, 64);

#define TAPS_MAX 8
#define ROWS_AHEAD 8

// One thread a channel. SHORT: out = c * conv(b * x) of the parts b, c and x; else mix = silu(conv(mix) + bias), where BIASED.
template <bool SHORT, bool BIASED>
__device__ __forceinline__ void convolve(const ConvArgs& a, const float* bias) {
    const int c = blockIdx.x * 128 + threadIdx.x, n = a.channels;
    pdl_launch();
    pdl_wait();
    if (c >= n) return;
    // The last TAPS_MAX inputs, the newest one last; those before `taps` have no weight.
    float window[TAPS_MAX], w[TAPS_MAX];
    const float* old = a.states.old();
    const int shift = TAPS_MAX - a.taps;
#pragma unroll
    for (int i = 0; i < TAPS_MAX; i++) {
        w[i] = i >= shift ? a.w[(size_t)c * a.taps + i - shift] : 0.0f;
        window[i] = i > shift && old ? old[(size_t)(i - shift - 1) * n + c] : 0.0f;
    }
    for (int t0 = 0; t0 < a.rows; t0 += ROWS_AHEAD) {
        float x[ROWS_AHEAD], gate[ROWS_AHEAD];
#pragma unroll
        for (int i = 0; i < ROWS_AHEAD; i++) {
            const size_t t = t0 + i;
            const bool here = t0 + i < a.rows;
            gate[i] = 0.0f;
            if (SHORT) {
                const float* row = a.mix + 3 * t * n + c;
                x[i] = here ? row[0] * row[2 * n] : 0.0f;
                if (here) gate[i] = row[n];
            } else {
                x[i] = here ? a.mix[t * n + c] : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS_AHEAD; i++) {
            if (t0 + i >= a.rows) break;
            const size_t at = (size_t)(t0 + i) * n + c;
#pragma unroll
            for (int k = 0; k < TAPS_MAX - 1; k++) window[k] = window[k + 1];
            window[TAPS_MAX - 1] = x[i];
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < TAPS_MAX; k++) sum = __fmaf_rn(window[k], w[k], sum);
            if (BIASED) sum += bias[c];
            if (SHORT) a.out[at] = gate[i] * sum;
            else a.mix[at] = silu(sum);
        }
    }
    float* next = a.states.next();
#pragma unroll
    for (int i = 0; i < TAPS_MAX; i++)
        if (i > shift) next[(size_t)(i - shift - 1) * n + c] = window[i];
}

extern "C" __global__ void __launch_bounds__(128) conv(const __grid_constant__ ConvArgs a) { convolve<false, false>(a, nullptr); }
extern "C" __global__ void __launch_bounds__(128) short_conv(const __grid_constant__ ConvArgs a) { convolve<true, false>(a, nullptr); }

struct BiasedConvArgs {
    ConvArgs of;
    const float* bias;  // one a channel
};
ARGS_SIZE(BiasedConvArgs, 80); ARGS_FIELD(BiasedConvArgs, of, 0); ARGS_FIELD(BiasedConvArgs, bias, 72);

extern "C" __global__ void __launch_bounds__(128) conv_biased(const __grid_constant__ BiasedConvArgs a) {
    convolve<false, true>(a.of, a.bias);
}

struct GroupsArgs {
    float* mix;        // rows × channels: queries and keys of n_keys heads, then values
    float* gates;      // rows × as many elements as values
    const float* from; // rows × n_keys × (queries, keys, values and gates of a key head)
    int rows, n_keys;
    int keys, values;  // elements of a key head's queries or keys, and of its values or gates
};
ARGS_SIZE(GroupsArgs, 40); ARGS_FIELD(GroupsArgs, mix, 0); ARGS_FIELD(GroupsArgs, gates, 8); ARGS_FIELD(GroupsArgs, from, 16);
ARGS_FIELD(GroupsArgs, rows, 24); ARGS_FIELD(GroupsArgs, n_keys, 28); ARGS_FIELD(GroupsArgs, keys, 32);
ARGS_FIELD(GroupsArgs, values, 36);

// One thread an element of a row.
extern "C" __global__ void __launch_bounds__(256) split_groups(const __grid_constant__ GroupsArgs a) {
    pdl_launch();
    pdl_wait();
    const int group = 2 * (a.keys + a.values), width = a.n_keys * group;
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= (size_t)a.rows * width) return;
    const size_t t = i / width;
    const int key = (int)(i % width) / group, e = (int)(i % width) % group;
    float* mix = a.mix + t * a.n_keys * (2 * a.keys + a.values);
    const float v = a.from[i];
    if (e < a.keys) mix[key * a.keys + e] = v;
    else if (e < 2 * a.keys) mix[(a.n_keys + key) * a.keys + e - a.keys] = v;
    else if (e < 2 * a.keys + a.values) mix[2 * a.n_keys * a.keys + key * a.values + e - 2 * a.keys] = v;
    else a.gates[(t * a.n_keys + key) * a.values + e - 2 * a.keys - a.values] = v;
}
