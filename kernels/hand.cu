// Rows on their way between a GPU and processors, through host memory that both see. Copy engines would have them wait
// behind the weights that they carry.
#include "common.cuh"

struct HandArgs {
    const float* from;  // rows of n floats
    float* to;
    int n, rows;
    int listed;   // whether only some of the rows are meant
    u32 only[8];  // which: a bit each
};
ARGS_SIZE(HandArgs, 64); ARGS_FIELD(HandArgs, from, 0); ARGS_FIELD(HandArgs, to, 8); ARGS_FIELD(HandArgs, n, 16);
ARGS_FIELD(HandArgs, rows, 20); ARGS_FIELD(HandArgs, listed, 24); ARGS_FIELD(HandArgs, only, 28);

// A thread moves four floats, so that what crosses the link is on its way at once. What processors have written is read
// past the caches. Which rows is told with the launch: a list in host memory would be read by each warp in turn, a microsecond each.
extern "C" __global__ void __launch_bounds__(256) hand_rows(const __grid_constant__ HandArgs a) {
    pdl_launch();
    pdl_wait();
    const int at = (blockIdx.x * 256 + threadIdx.x) * 4;
    const int row = blockIdx.y;
    if (at >= a.n || (a.listed && !(a.only[row >> 5] >> (row & 31) & 1u))) return;
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
