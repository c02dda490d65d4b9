// Gated delta nets: see DeltaNet in src/backend/op.rs. Each row is computed in an order of its own.
#include "states.cuh"

struct DeltaArgs {
    States states;        // [head][key][value]
    const float* mix;     // rows × channels: queries and keys of n_keys heads, then values of n_values
    const float* beta;    // rows × each
    const float* alpha;
    const float* gates;   // rows × n_values × dim
    float* out;           // as gates
    const float* decay;   // one a value head
    const float* bias;
    const float* norm;    // dim, or null for ones
    int rows, channels, n_keys, n_values;
    int each;             // numbers of a row of beta, and of alpha
    int tiled;            // see DeltaNet in src/backend/op.rs
    float eps;
    int dim;
};
ARGS_SIZE(DeltaArgs, 128); ARGS_FIELD(DeltaArgs, states, 0); ARGS_FIELD(DeltaArgs, mix, 32); ARGS_FIELD(DeltaArgs, beta, 40);
ARGS_FIELD(DeltaArgs, alpha, 48); ARGS_FIELD(DeltaArgs, gates, 56); ARGS_FIELD(DeltaArgs, out, 64);
ARGS_FIELD(DeltaArgs, decay, 72); ARGS_FIELD(DeltaArgs, bias, 80); ARGS_FIELD(DeltaArgs, norm, 88);
ARGS_FIELD(DeltaArgs, rows, 96); ARGS_FIELD(DeltaArgs, channels, 100); ARGS_FIELD(DeltaArgs, n_keys, 104);
ARGS_FIELD(DeltaArgs, n_values, 108); ARGS_FIELD(DeltaArgs, each, 112); ARGS_FIELD(DeltaArgs, tiled, 116);
ARGS_FIELD(DeltaArgs, eps, 120); ARGS_FIELD(DeltaArgs, dim, 124);

// Where a value head's key head is, and its numbers in a row of beta and of alpha.
struct DeltaPlace {
    int key, beta, alpha;
    __device__ __forceinline__ DeltaPlace(const DeltaArgs& a, int head) {
        const int share = a.n_values / a.n_keys;
        key = a.tiled ? head % a.n_keys : head / share;
        const int grouped = key * 2 * share + head % share;
        beta = a.tiled ? head : grouped;
        alpha = a.tiled ? head : grouped + share;
    }
};

// What of a state is kept.
__device__ __forceinline__ float kept(float x, float decay) { return expf(decay * (x > 20.0f ? x : log1pf(expf(x)))); }

// What a thread brings of a row before the row before it is done.
struct DeltaRow {
    float q, k, v, gate, alpha, beta;
};

// Exact rows, all in one launch. One block a value head, four threads a column of its state, which stays in registers:
// thread 4 j + p has the rows 4 i + p of column j.
template <int DIM>
__device__ __forceinline__ void delta(const DeltaArgs& a) {
    constexpr int N = DIM / 4;
    // Two rows' worth: who is ahead writes the other one.
    __shared__ float qs[2][DIM], ks[2][DIM], os[2][DIM];
    const int tid = threadIdx.x, lane = tid & 31, j = tid >> 2, p = tid & 3, head = blockIdx.x;
    const DeltaPlace at(a, head);
    const float decay = a.decay[head], bias = a.bias[head], weight = a.norm ? a.norm[j] : 1.0f;
    pdl_launch();
    pdl_wait();
    const float* old = a.states.old();
    float s[N];
    const size_t own = (size_t)head * DIM * DIM + j;
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = old ? old[own + (size_t)(4 * i + p) * DIM] : 0.0f;
    auto bring = [&](int t) {
        DeltaRow r;
        const float* row = a.mix + (size_t)t * a.channels;
        r.q = row[at.key * DIM + j];
        r.k = row[(a.n_keys + at.key) * DIM + j];
        r.v = row[(2 * a.n_keys + head) * DIM + j];
        r.gate = a.gates[((size_t)t * a.n_values + head) * DIM + j];
        r.beta = a.beta[(size_t)t * a.each + at.beta];
        r.alpha = a.alpha[(size_t)t * a.each + at.alpha];
        return r;
    };
    DeltaRow here = bring(0);
    for (int t = 0; t < a.rows; t++) {
        const DeltaRow r = here;
        float *q = qs[t & 1], *k = ks[t & 1], *o = os[t & 1];
        if (p == 0) q[j] = r.q, k[j] = r.k;
        __syncthreads();
        if (t + 1 < a.rows) here = bring(t + 1);
        float q2 = 0.0f, k2 = 0.0f;
#pragma unroll
        for (int i = lane; i < DIM; i += 32) q2 = __fmaf_rn(q[i], q[i], q2), k2 = __fmaf_rn(k[i], k[i], k2);
        const float q_unit = 1.0f / sqrtf(warp_sum(q2) + a.eps), k_unit = 1.0f / sqrtf(warp_sum(k2) + a.eps);
        const float keep = kept(r.alpha + bias, decay);
        float d = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            s[i] *= keep;
            d = __fmaf_rn(s[i], k[4 * i + p] * k_unit, d);
        }
        d += __shfl_xor_sync(0xffffffffu, d, 1);
        d += __shfl_xor_sync(0xffffffffu, d, 2);
        d = (r.v - d) / (1.0f + expf(-r.beta));
        float y = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            s[i] = __fmaf_rn(k[4 * i + p] * k_unit, d, s[i]);
            y = __fmaf_rn(s[i], q[4 * i + p] * q_unit, y);
        }
        y += __shfl_xor_sync(0xffffffffu, y, 1);
        y += __shfl_xor_sync(0xffffffffu, y, 2);
        y *= rsqrtf((float)DIM);
        if (p == 0) o[j] = y;
        __syncthreads();
        float y2 = 0.0f;
#pragma unroll
        for (int i = lane; i < DIM; i += 32) y2 = __fmaf_rn(o[i], o[i], y2);
        const float scale = norm_scale(warp_sum(y2), DIM, a.eps);
        if (p == 0) a.out[((size_t)t * a.n_values + head) * DIM + j] = y * scale * weight * silu(r.gate);
    }
    float* next = a.states.next();
#pragma unroll
    for (int i = 0; i < N; i++) next[own + (size_t)(4 * i + p) * DIM] = s[i];
}

extern "C" __global__ void __launch_bounds__(128) delta_32(const __grid_constant__ DeltaArgs a) { delta<32>(a); }
extern "C" __global__ void __launch_bounds__(256) delta_64(const __grid_constant__ DeltaArgs a) { delta<64>(a); }
extern "C" __global__ void __launch_bounds__(512) delta_128(const __grid_constant__ DeltaArgs a) { delta<128>(a); }

// Bulk rows, in three launches: what a row is on its own, what follows from the row before, and what is done to its outcome.
// Columns of a state know nothing of each other, so a head is several blocks, and between two rows lies nothing but a
// column's sum.

// One warp a head of queries or of keys of a row, or 32 value heads' numbers; in place. Queries become as long as 1 / sqrt(dim), keys as 1;
// alpha what is kept of the state, and beta what is taken of the difference.
extern "C" __global__ void __launch_bounds__(256) delta_rows(const __grid_constant__ DeltaArgs a) {
    const int lane = threadIdx.x & 31, item = blockIdx.x * 8 + (threadIdx.x >> 5);
    const int each = 2 * a.n_keys + (a.n_values + 31) / 32, t = item / each, h = item % each;
    pdl_launch();
    pdl_wait();
    if (t >= a.rows) return;
    if (h >= 2 * a.n_keys) {
        const int head = (h - 2 * a.n_keys) * 32 + lane;
        if (head >= a.n_values) return;
        const DeltaPlace at(a, head);
        float* beta = const_cast<float*>(a.beta) + (size_t)t * a.each + at.beta;
        float* alpha = const_cast<float*>(a.alpha) + (size_t)t * a.each + at.alpha;
        *beta = 1.0f / (1.0f + expf(-*beta));
        *alpha = kept(*alpha + a.bias[head], a.decay[head]);
        return;
    }
    float* x = const_cast<float*>(a.mix) + (size_t)t * a.channels + (size_t)h * a.dim;
    float sum = 0.0f;
    for (int i = lane; i < a.dim; i += 32) sum = __fmaf_rn(x[i], x[i], sum);
    float unit = 1.0f / sqrtf(warp_sum(sum) + a.eps);
    if (h < a.n_keys) unit *= rsqrtf((float)a.dim);
    for (int i = lane; i < a.dim; i += 32) x[i] *= unit;
}

// src/backend/cuda/recurrent.rs has the same number.
#define COLUMNS 32  // of a state, to a block
#define AT_ONCE 8   // rows that are brought together, two such before they are needed
#define STAGES 3

// Four threads a column, which stays in their registers: of each 16 rows, thread p of them has those from 4 p on. They are 8 lanes apart,
// so that neighbours read the same keys and queries.
template <int DIM>
__device__ __forceinline__ void delta_columns(const DeltaArgs& a) {
    constexpr int G = DIM / 16, SLICES = DIM / COLUMNS;
    __shared__ __align__(16) float qs[STAGES][AT_ONCE][DIM], ks[STAGES][AT_ONCE][DIM], vs[STAGES][AT_ONCE][COLUMNS];
    __shared__ float keeps[STAGES][AT_ONCE], betas[STAGES][AT_ONCE];
    const int tid = threadIdx.x, lane = tid & 31, p = lane >> 3, column = (tid >> 5) * 8 + (lane & 7);
    const int head = blockIdx.x / SLICES, first = blockIdx.x % SLICES * COLUMNS, j = first + column;
    const DeltaPlace at(a, head);
    pdl_launch();
    pdl_wait();
    auto bring = [&](int t0, int stage) {
        for (int i = tid; i < AT_ONCE * DIM / 4; i += 128) {
            const int r = i / (DIM / 4), e = i % (DIM / 4) * 4;
            if (t0 + r >= a.rows) break;
            const float* row = a.mix + (size_t)(t0 + r) * a.channels;
            cp_async16(&qs[stage][r][e], row + at.key * DIM + e);
            cp_async16(&ks[stage][r][e], row + (a.n_keys + at.key) * DIM + e);
        }
        const int r = tid / (COLUMNS / 4), e = tid % (COLUMNS / 4) * 4;
        if (r < AT_ONCE && t0 + r < a.rows)
            cp_async16(&vs[stage][r][e], a.mix + (size_t)(t0 + r) * a.channels + (2 * a.n_keys + head) * DIM + first + e);
        if (tid < AT_ONCE && t0 + tid < a.rows) {
            cp_async4(&keeps[stage][tid], a.alpha + (size_t)(t0 + tid) * a.each + at.alpha);
            cp_async4(&betas[stage][tid], a.beta + (size_t)(t0 + tid) * a.each + at.beta);
        }
        cp_commit();
    };
    bring(0, 0);
    bring(AT_ONCE, 1);
    const float* old = a.states.old();
    const size_t own = ((size_t)head * DIM + 4 * p) * DIM + j;
    float s[G][4];
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[g][e] = old ? old[own + (size_t)(16 * g + e) * DIM] : 0.0f;
    auto row = [&](int t, int stage, int r) {
        const float keep = keeps[stage][r], beta = betas[stage][r], v = vs[stage][r][column];
        float k[G][4], d[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < G; g++) {
            const float4 four = *(const float4*)&ks[stage][r][16 * g + 4 * p];
            k[g][0] = four.x, k[g][1] = four.y, k[g][2] = four.z, k[g][3] = four.w;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[g][e] *= keep;
                d[e] = __fmaf_rn(s[g][e], k[g][e], d[e]);
            }
        }
        float sum = (d[0] + d[1]) + (d[2] + d[3]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 8);
        sum += __shfl_xor_sync(0xffffffffu, sum, 16);
        const float by = (v - sum) * beta;
#pragma unroll
        for (int g = 0; g < G; g++) {
            const float4 four = *(const float4*)&qs[stage][r][16 * g + 4 * p];
            const float q[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[g][e] = __fmaf_rn(k[g][e], by, s[g][e]);
                y[e] = __fmaf_rn(s[g][e], q[e], y[e]);
            }
        }
        float out = (y[0] + y[1]) + (y[2] + y[3]);
        out += __shfl_xor_sync(0xffffffffu, out, 8);
        out += __shfl_xor_sync(0xffffffffu, out, 16);
        if (p == 0) a.out[((size_t)t * a.n_values + head) * DIM + j] = out;
    };
    int stage = 0;
    for (int t0 = 0; t0 < a.rows; t0 += AT_ONCE, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        cp_wait<1>();
        // Nobody reads the rows before these any more: others may come in their place.
        __syncthreads();
        bring(t0 + 2 * AT_ONCE, stage == 0 ? STAGES - 1 : stage - 1);
        if (t0 + AT_ONCE <= a.rows) {
#pragma unroll 4
            for (int r = 0; r < AT_ONCE; r++) row(t0 + r, stage, r);
        } else {
#pragma unroll 1
            for (int r = 0; r < a.rows - t0; r++) row(t0 + r, stage, r);
        }
    }
    float* next = a.states.next();
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
        for (int e = 0; e < 4; e++) next[own + (size_t)(16 * g + e) * DIM] = s[g][e];
}

extern "C" __global__ void __launch_bounds__(128) delta_columns_32(const __grid_constant__ DeltaArgs a) { delta_columns<32>(a); }
extern "C" __global__ void __launch_bounds__(128) delta_columns_64(const __grid_constant__ DeltaArgs a) { delta_columns<64>(a); }
extern "C" __global__ void __launch_bounds__(128) delta_columns_128(const __grid_constant__ DeltaArgs a) { delta_columns<128>(a); }

// The norm of each value head of a row, and its gate: one warp each.
extern "C" __global__ void __launch_bounds__(256) delta_norm(const __grid_constant__ DeltaArgs a) {
    const int lane = threadIdx.x & 31, item = blockIdx.x * 8 + (threadIdx.x >> 5);
    pdl_launch();
    pdl_wait();
    if (item >= a.rows * a.n_values) return;
    float* y = a.out + (size_t)item * a.dim;
    const float* gate = a.gates + (size_t)item * a.dim;
    float sum = 0.0f;
    for (int i = lane; i < a.dim; i += 32) sum = __fmaf_rn(y[i], y[i], sum);
    const float scale = norm_scale(warp_sum(sum), a.dim, a.eps);
    for (int i = lane; i < a.dim; i += 32) y[i] = y[i] * scale * (a.norm ? a.norm[i] : 1.0f) * silu(gate[i]);
}
