// Rows on their way between a GPU and processors, through host memory that both see. Copy engines would have them wait
// behind the weights that they carry.
#include "common.cuh"

struct HandArgs {
    const float* from;  // rows of n floats
    float* to;
    int n, rows;
    int listed;   // whether only some of the rows are meant
    u32 only[8];  // which: a bit each
    int add;      // whether they are added to what is there
};
ARGS_SIZE(HandArgs, 64); ARGS_FIELD(HandArgs, from, 0); ARGS_FIELD(HandArgs, to, 8); ARGS_FIELD(HandArgs, n, 16);
ARGS_FIELD(HandArgs, rows, 20); ARGS_FIELD(HandArgs, listed, 24); ARGS_FIELD(HandArgs, only, 28); ARGS_FIELD(HandArgs, add, 60);

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
        if (a.add) {
            const float4 x = *(const float4*)to;
            v = make_float4(x.x + v.x, x.y + v.y, x.z + v.z, x.w + v.w);
        }
        *(float4*)to = v;
        return;
    }
    for (int i = 0; i < 4 && at + i < a.n; i++) {
        const float v = *(const volatile float*)(from + i);
        to[i] = a.add ? to[i] + v : v;
    }
}

struct ChoicesArgs {
    u32* ids;           // n: what the rows chose
    u32* to;            // the same for the host
    const u32* forced;  // what they are to choose instead; null: nothing
    const u32* slots;   // by expert, its slot or NO_SLOT; null: there are none
    int* kept;          // n: the slot that each choice has now, or -1
    u32* landed;        // becomes `uses` if the first `first` choices have slots: nothing is to be brought; null: it does not
    u32 uses;
    int n, first;
};
ARGS_SIZE(ChoicesArgs, 64); ARGS_FIELD(ChoicesArgs, ids, 0); ARGS_FIELD(ChoicesArgs, to, 8); ARGS_FIELD(ChoicesArgs, forced, 16);
ARGS_FIELD(ChoicesArgs, slots, 24); ARGS_FIELD(ChoicesArgs, kept, 32); ARGS_FIELD(ChoicesArgs, landed, 40);
ARGS_FIELD(ChoicesArgs, uses, 48); ARGS_FIELD(ChoicesArgs, n, 52); ARGS_FIELD(ChoicesArgs, first, 56);

// Hands choices to the host, and keeps which of them have slots before the host, which knows as much, gives slots to others.
extern "C" __global__ void __launch_bounds__(256) hand_choices(const __grid_constant__ ChoicesArgs a) {
    pdl_launch();
    pdl_wait();
    const int i = threadIdx.x;
    bool there = true;
    if (i < a.n) {
        u32 id;
        if (a.forced) {
            id = *(const volatile u32*)(a.forced + i);
            a.ids[i] = id;
        } else {
            id = __ldcg(a.ids + i);
        }
        a.to[i] = id;
        const int slot = a.slots ? (int)*(const volatile u32*)(a.slots + id) : -1;
        a.kept[i] = slot;
        there = slot >= 0 || i >= a.first;
    }
    if (__syncthreads_and(there) && a.landed && i == 0) *(volatile u32*)a.landed = a.uses;
}
