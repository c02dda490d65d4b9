// Matrix times vectors for weights that are not quantised (F32, F16, BF16), all in F32 arithmetic. One warp a row and
// up to eight vectors. Also the router of a mixture of experts.
#include "plain.cuh"

struct PlainArgs {
    const u8* w;
    const float* bias;
    float* out;      // row of token t at out + t * stride (out_idx[t] instead of t if given)
    const float* x;  // tokens × cols (row in_idx[t] instead of t if given)
    const int* in_idx;
    const int* out_idx;
    int rows, cols, stride, tokens;
    int mode;  // 0 store, 1 add
    int vector;  // rows start on 16 bytes and hold whole groups of eight elements
};
ARGS_SIZE(PlainArgs, 72); ARGS_FIELD(PlainArgs, w, 0); ARGS_FIELD(PlainArgs, bias, 8);
ARGS_FIELD(PlainArgs, out, 16); ARGS_FIELD(PlainArgs, x, 24); ARGS_FIELD(PlainArgs, in_idx, 32);
ARGS_FIELD(PlainArgs, out_idx, 40); ARGS_FIELD(PlainArgs, rows, 48); ARGS_FIELD(PlainArgs, cols, 52);
ARGS_FIELD(PlainArgs, stride, 56); ARGS_FIELD(PlainArgs, tokens, 60); ARGS_FIELD(PlainArgs, mode, 64);
ARGS_FIELD(PlainArgs, vector, 68);

template <class P, int NT>
__device__ __forceinline__ void plain(const PlainArgs& a) {
    const int lane = threadIdx.x & 31;
    const int row = blockIdx.x * 8 + (threadIdx.x >> 5);
    const int first = blockIdx.y * NT, tokens = min(NT, a.tokens - first);
    pdl_launch();
    pdl_wait();
    if (row >= a.rows) return;
    const u8* w = a.w + (size_t)row * a.cols * P::BYTES;
    const float* x[NT];
    float acc[NT];
#pragma unroll
    for (int t = 0; t < NT; t++) {
        int r = t < tokens ? (a.in_idx ? a.in_idx[first + t] : first + t) : 0;
        x[t] = a.x + (size_t)r * a.cols;
        acc[t] = 0.0f;
    }
    if (a.vector) {
        for (int k = lane * 8; k < a.cols; k += 256) {
            float v[8];
            P::eight(w + (size_t)k * P::BYTES, v);
#pragma unroll
            for (int t = 0; t < NT; t++) {
                if (t >= tokens) continue;
                float4 p = *(const float4*)(x[t] + k), q = *(const float4*)(x[t] + k + 4);
                // One order, whatever the number of tokens.
                const float u[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
                float sum = __fmul_rn(v[0], u[0]);
#pragma unroll
                for (int i = 1; i < 8; i++) sum = __fmaf_rn(v[i], u[i], sum);
                acc[t] += sum;
            }
        }
    } else {
        for (int k = lane; k < a.cols; k += 32) {
            float v = P::one(w + (size_t)k * P::BYTES);
#pragma unroll
            for (int t = 0; t < NT; t++)
                if (t < tokens) acc[t] = __fmaf_rn(v, x[t][k], acc[t]);
        }
    }
#pragma unroll
    for (int t = 0; t < NT; t++) {
        if (t >= tokens) continue;
        float v = warp_sum(acc[t]);
        if (lane != 0) continue;
        if (a.bias) v += a.bias[row];
        int r = a.out_idx ? a.out_idx[first + t] : first + t;
        float* o = a.out + (size_t)r * a.stride + row;
        *o = a.mode == 1 ? *o + v : v;
    }
}

#define PLAIN(T, N)                                                             \
    extern "C" __global__ void __launch_bounds__(256)                           \
        plain_##T##_##N(const __grid_constant__ PlainArgs a) {                  \
        plain<P##T, N>(a);                                                      \
    }
PLAIN(F32, 1)
PLAIN(F32, 8)
PLAIN(F16, 1)
PLAIN(F16, 8)
PLAIN(BF16, 1)
PLAIN(BF16, 8)
