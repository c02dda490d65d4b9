// What the kernels of attention have in common: which keys a position sees, and how decoding divides them.
#pragma once
#include "common.cuh"

#define LOG2_E 1.4426950408889634f

// The first key that a position sees: all, the last `window` ones, or those since the last multiple of `chunk`.
__device__ __forceinline__ int first_seen(int position, int window, int chunk) {
    if (window > 0) return max(position + 1 - window, 0);
    return chunk > 0 ? position / chunk * chunk : 0;
}

// Where range i of the keys begins: 64 ranges of 64 keys, then 32 of each size twice that before. So many blocks have
// work soon, none has more than a thirty-second of a long text, and the number of ranges stays small (`workspace.rs` computes the same).
__device__ __forceinline__ int range_begin(int i) {
    if (i < 64) return 64 * i;
    const int k = (i - 64) >> 5;
    return (4096 + 128 * ((i - 64) & 31)) << k;
}

// The range that holds a key.
__device__ __forceinline__ int range_of(int key) {
    if (key < 4096) return key / 64;
    const int k = 31 - __clz(key >> 12);
    return 64 + 32 * k + (key - (4096 << k)) / (128 << k);
}

#define NEG_BIG (-1e30f)

// By what a row's result is multiplied; the sink, if there is one, takes part in the sum.
__device__ __forceinline__ float one_over(float most, float sum, const float* sinks, int head) {
    if (!sinks) return 1.0f / sum;
    const float sink = sinks[head] * LOG2_E, big = fmaxf(most, sink);
    const float f = exp2f(most - big);
    return f / __fmaf_rn(sum, f, exp2f(sink - big));
}
