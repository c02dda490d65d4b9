// Shared by all kernels. Compiles under nvcc and under NVRTC without any header: halves are
// handled as 16-bit words through PTX, and only compiler built-ins are used.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// What the host's side of an argument structure is asserted to be, too (src/backend/cuda/args.rs): a field that is
// added in one place only does not compile in the other.
#define ARGS_SIZE(S, bytes) static_assert(sizeof(S) == bytes, "size of " #S)
#ifdef __CUDACC_RTC__ // compiling at first use has no offsetof; nvcc has checked the same sources
#define PLACE_OF(S, field, at) at
#else
#define PLACE_OF(S, field, at) __builtin_offsetof(S, field)
#endif
#define ARGS_FIELD(S, field, at) static_assert(PLACE_OF(S, field, at) == at, "place of " #S "." #field)

// What a pass is told in memory, so that a recorded launch serves every pass: the position of its first token, then the page
// of each PAGE positions of the cache (src/state/pages.rs).
#define PAGE 64
__device__ __forceinline__ int first_position(const int* pass) { return pass[0]; }
// Where the cache holds a position.
__device__ __forceinline__ int place_of(const int* pass, int position) {
    return pass[1 + position / PAGE] * PAGE + position % PAGE;
}

// A block of 32 activations quantised to int8: x[i] = d * q[i]; s is the sum of the 32 integers, as a float.
// 40 bytes: lanes that read consecutive blocks with 8-byte loads meet no bank conflict.
struct __align__(8) XBlk {
    u32 q[8];
    float d, s;
};
ARGS_SIZE(XBlk, 40);

__device__ __forceinline__ float h2f(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 f2h(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Two floats to two halves, `lo` in the low 16 bits.
__device__ __forceinline__ u32 pack_h2(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ __forceinline__ float bf2f(u16 b) { return __uint_as_float((u32)b << 16); }

// Programmatic dependent launch: a kernel may start while its predecessor in the stream still
// runs. Everything a predecessor wrote may be read, and everything it read may be overwritten,
// only after pdl_wait.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 smem_addr(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void cp_async16(void* dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(dst)), "l"(src));
}
__device__ __forceinline__ void cp_async4(void* dst, const void* src) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_addr(dst)), "l"(src));
}
// Copies 16 bytes, or writes 16 zeros if !valid.
__device__ __forceinline__ void cp_async16_zfill(void* dst, const void* src, bool valid) {
    int n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src),
                 "r"(n));
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;"); }
template <int N>
__device__ __forceinline__ void cp_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Bulk copies (from sm_90 on): one thread moves a whole span, and a barrier in shared memory counts
// its bytes. `bytes`, both addresses: multiples of 16.
__device__ __forceinline__ void bar_init(u64* bar, u32 arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void bar_expect(u64* bar, u32 bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}
__device__ __forceinline__ void bar_arrive(u64* bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
#endif
}
__device__ __forceinline__ void bulk_copy(void* dst, const void* src, u32 bytes, u64* bar) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(smem_addr(dst)), "l"(src), "r"(bytes), "r"(smem_addr(bar))
        : "memory");
#endif
}
__device__ __forceinline__ void bar_wait(u64* bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
    u32 done = 0;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
            "selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(smem_addr(bar)), "r"(parity)
            : "memory");
    } while (!done);
#endif
}

__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(p)));
}
__device__ __forceinline__ void ldmatrix4_trans(u32 (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(p)));
}
// c += a · b for a 16×16 tile a, a 16×8 tile b of halves, float accumulators.
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// src/backend/cuda/product.rs has the same numbers.
#define ACTIVATE_SILU 0
#define ACTIVATE_GELU 1
#define ACTIVATE_RELU2 2
#define ACTIVATE_CLAMPED 3

// f(x), times up where there is one.
__device__ __forceinline__ float activate(int how, float limit, float x, bool gated, float up) {
    if (how == ACTIVATE_CLAMPED) {
        const float g = fminf(x, limit), u = fmaxf(-limit, fminf(up, limit));
        return g / (1.0f + __expf(-1.702f * g)) * (u + 1.0f);
    }
    float v;
    if (how == ACTIVATE_GELU) {
        v = 0.5f * x * (1.0f + tanhf(0.7978846f * x * (1.0f + 0.044715f * x * x)));
    } else if (how == ACTIVATE_RELU2) {
        v = fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    } else {
        v = silu(x);
    }
    return gated ? v * up : v;
}

#define NO_NUMBER __int_as_float(0x7fffffff)
__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }

// What a norm multiplies by, for the sum of n squares. A sum that is too large gives no number, rather than zeros.
__device__ __forceinline__ float norm_scale(float sum, int n, float eps) {
    const float mean = sum / (float)n;
    return is_finite(mean) ? rsqrtf(mean + eps) : NO_NUMBER;
}

// A magnitude as bits. As integers they are in the order of the numbers, infinity and what is no number behind all others,
// so the largest of a block says whether all are finite.
__device__ __forceinline__ u32 magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// A block of 32 values, one a lane, to int8. Values that are not finite have no place among integers: the factor is
// then infinite or no number and all integers are zero, so that every product of the block is no number.
__device__ __forceinline__ void quantise_lanes(float v, XBlk* o, int lane) {
    const float amax = __uint_as_float(__reduce_max_sync(0xffffffffu, magnitude(v)));
    int q = amax > 0.0f ? __float2int_rn(v * (127.0f / amax)) : 0;
    int sum = __reduce_add_sync(0xffffffffu, q);
    u32 b = (u32)q & 255u;
    u32 b1 = __shfl_down_sync(0xffffffffu, b, 1);
    u32 b2 = __shfl_down_sync(0xffffffffu, b, 2);
    u32 b3 = __shfl_down_sync(0xffffffffu, b, 3);
    if ((lane & 3) == 0) o->q[lane >> 2] = b | (b1 << 8) | (b2 << 16) | (b3 << 24);
    if (lane == 0) {
        o->d = amax / 127.0f;
        o->s = (float)sum;
    }
}

// Four values a thread to int8; eight threads make a block of 32, and whole groups of eight take part: all of a warp.
__device__ __forceinline__ void quantise_four(float4 v, XBlk* row, int i, bool valid) {
    u32 most = max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) most = max(most, __shfl_xor_sync(0xffffffffu, most, o));
    const float m = __uint_as_float(most);
    const float inv = m > 0.0f ? 127.0f / m : 0.0f;
    const float f[4] = {v.x, v.y, v.z, v.w};
    u32 word = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) word |= ((u32)__float2int_rn(f[j] * inv) & 255u) << (8 * j);
    int s = __dp4a(0x01010101, (int)word, 0);
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
    if (!valid) return;
    XBlk* b = row + i / 8;
    b->q[i & 7] = word;
    if ((i & 7) == 0) {
        b->d = m / 127.0f;
        b->s = (float)s;
    }
}
