// out[t][r] = Σ_k x[t][k] · w[r][k] on tensor cores, for prefill: halves in, float accumulators.
// Both operands lie with k contiguous, rows `pitch` halves apart, pitch a multiple of 64 and the
// padding zero. Tiles of BM tokens × BN rows × 64 go through a ring in shared memory.
#include "common.cuh"

struct GemmArgs {
    const u16* x;
    const u16* w;
    const float* scale;  // of each row of x
    const float* bias;   // one a row of w, or null
    float* out;          // row of token t at out + t * stride (out_idx[t] instead of t if given)
    const int* out_idx;
    int tokens, rows, pitch, stride;
    int mode;  // 0 store, 1 add
};
ARGS_SIZE(GemmArgs, 72); ARGS_FIELD(GemmArgs, x, 0); ARGS_FIELD(GemmArgs, w, 8);
ARGS_FIELD(GemmArgs, scale, 16); ARGS_FIELD(GemmArgs, bias, 24); ARGS_FIELD(GemmArgs, out, 32);
ARGS_FIELD(GemmArgs, out_idx, 40); ARGS_FIELD(GemmArgs, tokens, 48); ARGS_FIELD(GemmArgs, rows, 52);
ARGS_FIELD(GemmArgs, pitch, 56); ARGS_FIELD(GemmArgs, stride, 60); ARGS_FIELD(GemmArgs, mode, 64);

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

    const bool wide = ((size_t)a.out & 7) == 0 && (a.stride & 1) == 0;
#pragma unroll
    for (int i = 0; i < WM / 16; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = m0 + wm + i * 16 + (lane >> 2) + half * 8;
            if (t >= a.tokens) continue;
            const float scale = a.scale[t];
            float* o = a.out + (size_t)(a.out_idx ? a.out_idx[t] : t) * a.stride;
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                const int r = n0 + wn + j * 8 + (lane & 3) * 2;
                if (r >= a.rows) continue;
                const bool two = r + 1 < a.rows;
                float v0 = acc[i][j][half * 2] * scale, v1 = acc[i][j][half * 2 + 1] * scale;
                if (a.bias) {
                    v0 += a.bias[r];
                    if (two) v1 += a.bias[r + 1];
                }
                if (wide && two) {
                    float2 v = make_float2(v0, v1);
                    if (a.mode == 1) {
                        float2 old = *(const float2*)(o + r);
                        v.x += old.x;
                        v.y += old.y;
                    }
                    *(float2*)(o + r) = v;
                } else {
                    o[r] = a.mode == 1 ? o[r] + v0 : v0;
                    if (two) o[r + 1] = a.mode == 1 ? o[r + 1] + v1 : v1;
                }
            }
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
