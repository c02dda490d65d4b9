// out[t][r] = Σ_k x[t][k] · w[r][k] for few bulk rows: the same bits as gemm.cu on weights that dequant.cu has turned
// to halves, without the way through memory. Bound by the bytes of the quantised weights.
#include "thin.cuh"

#define THIN(T, SIZE, MT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(2 * SIDE) thin_##T##_##SIZE(const __grid_constant__ GemmArgs a) { \
        thin<B##T, MT, 3>(a, nullptr, blockIdx.x * SIZE, blockIdx.y * BN);                                         \
    }
#define THINS(T)   \
    THIN(T, 16, 1) \
    THIN(T, 64, 4)
FOR_EACH_QUANT(THINS)
