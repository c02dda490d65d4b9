// Weights that are not quantised: eight of them, or one, as floats.
#pragma once
#include "common.cuh"

struct PF32 {
    static const int BYTES = 4;
    static __device__ __forceinline__ float one(const u8* p) { return *(const float*)p; }
    static __device__ __forceinline__ void eight(const u8* p, float* v) {
        float4 a = *(const float4*)p, b = *(const float4*)(p + 16);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
};
struct PF16 {
    static const int BYTES = 2;
    static __device__ __forceinline__ float conv(u16 h) { return h2f(h); }
    static __device__ __forceinline__ float one(const u8* p) { return conv(*(const u16*)p); }
    static __device__ __forceinline__ void eight(const u8* p, float* v) {
        uint4 a = *(const uint4*)p;
        u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = conv((u16)w[i]);
            v[2 * i + 1] = conv((u16)(w[i] >> 16));
        }
    }
};
struct PBF16 {
    static const int BYTES = 2;
    static __device__ __forceinline__ float one(const u8* p) { return bf2f(*(const u16*)p); }
    static __device__ __forceinline__ void eight(const u8* p, float* v) {
        uint4 a = *(const uint4*)p;
        u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2 * i] = __uint_as_float(w[i] << 16);
            v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
        }
    }
};
