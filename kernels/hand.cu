// Rows on their way between a GPU and processors, through host memory that both see. Copy engines would have them wait
// behind the weights that they carry.
#include "common.cuh"

struct HandArgs {
    const float* from;  // rows of n floats
    float* to;
    const int* idx;     // the rows, in both, -1 for none; null for the first ones
    int n, rows;
};
ARGS_SIZE(HandArgs, 32); ARGS_FIELD(HandArgs, from, 0); ARGS_FIELD(HandArgs, to, 8); ARGS_FIELD(HandArgs, idx, 16);
ARGS_FIELD(HandArgs, n, 24); ARGS_FIELD(HandArgs, rows, 28);

// A thread moves four floats, so that what crosses the link is on its way at once. What processors have written is read
// past the caches.
extern "C" __global__ void __launch_bounds__(256) hand_rows(const __grid_constant__ HandArgs a) {
    pdl_launch();
    pdl_wait();
    const int at = (blockIdx.x * 256 + threadIdx.x) * 4;
    const int row = a.idx ? *(const volatile int*)(a.idx + blockIdx.y) : blockIdx.y;
    if (at >= a.n || row < 0) return;
    const float* from = a.from + (size_t)row * a.n + at;
    float* to = a.to + (size_t)row * a.n + at;
    if (a.n % 4 == 0) {
        float4 v;
        asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
        *(float4*)to = v;
        return;
    }
    for (int i = 0; i < 4 && at + i < a.n; i++) to[i] = *(const volatile float*)(from + i);
}
