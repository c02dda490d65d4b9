// Weights to halves, for the matrix product of a prefill (`half_*`: rows padded with zeros to
// `pitch` elements), and to floats, for the embedding (`float_*`: rows back to back).
// A warp converts 1024 elements of a row at a time, the next ones on their way meanwhile.
#include "blocks.cuh"

struct DequantArgs {
    const u8* w;
    void* out;
    int rows, cols;
    int pitch;  // elements from row to row of the output
};
ARGS_SIZE(DequantArgs, 32); ARGS_FIELD(DequantArgs, w, 0); ARGS_FIELD(DequantArgs, out, 8);
ARGS_FIELD(DequantArgs, rows, 16); ARGS_FIELD(DequantArgs, cols, 20); ARGS_FIELD(DequantArgs, pitch, 24);

template <class B, bool HALF>
__device__ __forceinline__ void dequant(const DequantArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    constexpr int BUF = Step<B>::BUF;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u8* ring = smem + warp * (2 * BUF + (HALF ? 32 * 80 : 32 * 144));
    u8* tmp = ring + 2 * BUF;
    const u32 steps = (a.cols + 1023) / 1024;
    const u32 items = a.rows * steps, stride = gridDim.x * 8;
    const int row_bytes = a.cols / B::ELEMS * B::BYTES;
    u32 item = blockIdx.x * 8 + warp;
    pdl_launch();
    auto source = [&](u32 i) { return a.w + (size_t)(i / steps) * row_bytes + i % steps * Step<B>::BYTES; };
    auto fetch = [&](u32 i, int slot) {
        if (i < items)
            stage<B>(ring + slot * BUF, source(i),
                     min(Step<B>::BYTES, row_bytes - (int)(i % steps) * Step<B>::BYTES), lane);
        cp_commit();
    };
    fill_grid<B>(threadIdx.x, 256);
    __syncthreads();
    pdl_wait();
    fetch(item, 0);
    for (int slot = 0; item < items; item += stride, slot ^= 1) {
        fetch(item + stride, slot ^ 1);
        cp_wait<1>();
        __syncwarp();
        const u32 row = item / steps, s = item % steps;
        const u8* p = ring + slot * BUF + staged_at<B>(source(item));
        const bool valid = s * 32 + lane < a.cols / 32;
        Quants q;
        if (valid) {
            if (B::ELEMS == 32) {
                B::decode(p + lane * B::BYTES, 0, q);
            } else {
                B::decode(p + (lane >> 3) * B::BYTES, lane & 7, q);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float f[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (valid) values_of<B>(q, i, f);
            if (HALF) {
                *(uint2*)(tmp + lane * 80 + i * 8) =
                    make_uint2(pack_h2(f[0], f[1]), pack_h2(f[2], f[3]));
            } else {
                *(float4*)(tmp + lane * 144 + i * 16) = make_float4(f[0], f[1], f[2], f[3]);
            }
        }
        __syncwarp();
        // Elements of this step that the output row has room for: a multiple of 32.
        const int n = min(1024, a.pitch - (int)s * 1024);
        const size_t at = (size_t)row * a.pitch + s * 1024;
        if (HALF) {
            u8* out = (u8*)a.out + at * 2;
            for (int c = lane; c < n / 8; c += 32)
                *(uint4*)(out + c * 16) = *(const uint4*)(tmp + (c >> 2) * 80 + (c & 3) * 16);
        } else {
            u8* out = (u8*)a.out + at * 4;
            for (int c = lane; c < n / 4; c += 32)
                *(float4*)(out + c * 16) = *(const float4*)(tmp + (c >> 3) * 144 + (c & 7) * 16);
        }
        __syncwarp();
    }
    cp_wait<0>();
}

#define DEQUANT(T)                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                       \
        half_##T(const __grid_constant__ DequantArgs a) {                                   \
        dequant<B##T, true>(a);                                                             \
    }                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                       \
        float_##T(const __grid_constant__ DequantArgs a) {                                  \
        dequant<B##T, false>(a);                                                            \
    }
FOR_EACH_QUANT(DEQUANT)

template <int KIND>
__device__ __forceinline__ float plain_value(const u8* w, size_t i) {
    if (KIND == 0) return ((const float*)w)[i];
    u16 h = ((const u16*)w)[i];
    return KIND == 1 ? h2f(h) : bf2f(h);
}

// Plain types: one block a row.
template <int KIND, bool HALF>
__device__ __forceinline__ void convert(const DequantArgs& a) {
    pdl_launch();
    pdl_wait();
    const size_t row = blockIdx.x;
    for (int k = threadIdx.x; k < a.pitch; k += blockDim.x) {
        float v = k < a.cols ? plain_value<KIND>(a.w, row * a.cols + k) : 0.0f;
        if (HALF) {
            ((u16*)a.out)[row * a.pitch + k] = f2h(v);
        } else {
            ((float*)a.out)[row * a.pitch + k] = v;
        }
    }
}

#define CONVERT(T, KIND)                                                                     \
    extern "C" __global__ void half_##T(const __grid_constant__ DequantArgs a) {             \
        convert<KIND, true>(a);                                                              \
    }                                                                                        \
    extern "C" __global__ void float_##T(const __grid_constant__ DequantArgs a) {            \
        convert<KIND, false>(a);                                                             \
    }
CONVERT(F32, 0)
CONVERT(F16, 1)
CONVERT(BF16, 2)
