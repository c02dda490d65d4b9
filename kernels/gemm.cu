// out[t][r] = Σ_k x[t][k] · w[r][k] on tensor cores, for prefill: halves in, float accumulators.
// Both operands lie with k contiguous, rows `pitch` halves apart, pitch a multiple of 64 and the
// padding zero. Tiles of BM tokens × BN rows × 64 go through a ring in shared memory.
#include "gemm.cuh"

#define BK 64

// Byte offset of a 16-byte chunk in a tile of 128-byte rows; the exclusive or spreads the rows of
// a column over all banks.
__device__ __forceinline__ int tile_at(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

template <int BM, int BN, int WM, int WN, int STAGES>
__device__ __forceinline__ void gemm(const GemmArgs& a) {
    extern __shared__ __align__(128) u8 smem[];
    constexpr int THREADS = (BM / WM) * (BN / WN) * 32;
    constexpr int STAGE = (BM + BN) * 128;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
    const int wm = (warp % (BM / WM)) * WM, wn = (warp / (BM / WM)) * WN;
    const int tiles = a.pitch / BK;
    pdl_launch();
    pdl_wait();

    auto load = [&](int kt) {
        if (kt < tiles) {
            u8* s = smem + (kt % STAGES) * STAGE;
#pragma unroll
            for (int i = 0; i < (BM + BN) * 8 / THREADS; i++) {
                int c = tid + i * THREADS;
                int row = c >> 3, chunk = c & 7;
                const u16* src = row < BM
                    ? a.x + (size_t)min(m0 + row, a.tokens - 1) * a.pitch
                    : a.w + (size_t)min(n0 + row - BM, a.rows - 1) * a.pitch;
                cp_async16(s + tile_at(row, chunk), src + kt * BK + chunk * 8);
            }
        }
        cp_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);

    float acc[WM / 16][WN / 8][4];
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int j = 0; j < WN / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;

    for (int kt = 0; kt < tiles; kt++) {
        cp_wait<STAGES - 2>();
        __syncthreads();
        load(kt + STAGES - 1);
        const u8* sx = smem + (kt % STAGES) * STAGE;
        const u8* sw = sx + BM * 128;
#pragma unroll
        for (int kk = 0; kk < BK / 16; kk++) {
            u32 fx[WM / 16][4], fw[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
                ldmatrix4(fx[i], sx + tile_at(wm + i * 16 + (lane & 15), kk * 2 + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < WN / 16; j++)
                ldmatrix4(fw[j], sw + tile_at(wn + j * 16 + (lane & 7) + ((lane >> 4) << 3),
                                              kk * 2 + ((lane >> 3) & 1)));
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
#pragma unroll
                for (int j = 0; j < WN / 8; j++)
                    mma_f16(acc[i][j], fx[i], fw[j / 2][(j & 1) * 2], fw[j / 2][(j & 1) * 2 + 1]);
        }
    }
    cp_wait<0>();

    const bool wide = stores_wide(a);
#pragma unroll
    for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = m0 + wm + i * 16 + (lane >> 2) + half * 8;
            if (t >= a.tokens) continue;
            const float scale = a.scale[t];
            float* o = a.out + (size_t)(a.out_idx ? a.out_idx[t] : t) * a.stride;
#pragma unroll
            for (int j = 0; j < WN / 8; j++)
                store_two(a, o, scale, wide, n0 + wn + j * 8 + (lane & 3) * 2, acc[i][j][half * 2], acc[i][j][half * 2 + 1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    gemm_128x128(const __grid_constant__ GemmArgs a) {
    gemm<128, 128, 64, 32, 3>(a);
}
extern "C" __global__ void __launch_bounds__(256, 2)
    gemm_64x64(const __grid_constant__ GemmArgs a) {
    gemm<64, 64, 32, 16, 4>(a);
}
