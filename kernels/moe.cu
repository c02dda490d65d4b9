// Mixtures of experts whose weights all rest in device memory: nothing here waits for the host. A table gives the
// addresses of each expert's gate, up and down; kernels read it by the ids that the router has chosen.
//
// Exact rows: `router_*` norms a row and scores the experts; `gate_up_*` and `down_*` choose among them, compute each
// (token, choice) for itself, and `down_*` adds the choices up. A row's sums are made in the order of the kernels that compute one expert
// (bulk.cu, before compute capability 9.0 gemv.cu; plain.cu), so its bits are those of a streamed expert.
// Bulk rows: `sort_rows` lists the rows of each expert, `grouped_*` multiplies a tile of them at a time (thin.cuh).
#include "plain.cuh"
#include "thin.cuh"
#include "tiles.cuh"

struct RouterArgs {
    const float* x;     // tokens × n
    const float* norm;  // n
    const u8* w;        // experts × n
    float* f;           // tokens × n, normed
    XBlk* q;            // tokens × n / 32, the same quantised
    float* scores;      // tokens × experts
    int n, experts;
    float eps;
};
ARGS_SIZE(RouterArgs, 64); ARGS_FIELD(RouterArgs, x, 0); ARGS_FIELD(RouterArgs, norm, 8); ARGS_FIELD(RouterArgs, w, 16);
ARGS_FIELD(RouterArgs, f, 24); ARGS_FIELD(RouterArgs, q, 32); ARGS_FIELD(RouterArgs, scores, 40);
ARGS_FIELD(RouterArgs, n, 48); ARGS_FIELD(RouterArgs, experts, 52); ARGS_FIELD(RouterArgs, eps, 56);

#define ROUTER_WARPS 4  // experts of a block

// Norm and scores: a block has one token and ROUTER_WARPS experts, the last block of a token none; that one stores the
// normed row. Weights are on their way before the predecessor has ended.
template <class P>
__device__ __forceinline__ void router(const RouterArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ float part[ROUTER_WARPS];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, threads = ROUTER_WARPS * 32;
    const int t = blockIdx.y, n4 = a.n / 4, row_bytes = a.n * P::BYTES;
    const int expert = (int)blockIdx.x * ROUTER_WARPS + warp;
    const bool stores = blockIdx.x + 1 == gridDim.x, scores = !stores && expert < a.experts;
    float* xs = (float*)smem;
    float* ws = xs + a.n;
    u8* rows = (u8*)(ws + a.n);
    const u8* src = a.w + (size_t)expert * row_bytes;
    if (scores)
        for (int i = lane * 16; i < row_bytes; i += 512) cp_async16(rows + warp * row_bytes + i, src + i);
    for (int i = tid; i < n4; i += threads) cp_async16(ws + 4 * i, a.norm + 4 * i);
    cp_commit();
    pdl_launch();
    pdl_wait();
    const float4* x = (const float4*)(a.x + (size_t)t * a.n);
    float sum = 0.0f;
#pragma unroll 4
    for (int i = tid; i < n4; i += threads) {
        const float4 v = __ldcg(x + i);
        ((float4*)xs)[i] = v;
        sum = __fmaf_rn(v.x, v.x, sum);
        sum = __fmaf_rn(v.y, v.y, sum);
        sum = __fmaf_rn(v.z, v.z, sum);
        sum = __fmaf_rn(v.w, v.w, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) part[warp] = sum;
    cp_wait<0>();
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ROUTER_WARPS; i++) sum += part[i];
    const float rs = norm_scale(sum, a.n, a.eps);
    for (int i0 = 0; i0 < n4; i0 += threads) {
        const int i = i0 + tid;
        float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (i < n4) {
            const float4 v = ((const float4*)xs)[i], w = ((const float4*)ws)[i];
            y = make_float4(v.x * rs * w.x, v.y * rs * w.y, v.z * rs * w.z, v.w * rs * w.w);
            ((float4*)xs)[i] = y;
            if (stores) ((float4*)(a.f + (size_t)t * a.n))[i] = y;
        }
        if (stores) quantise_four(y, a.q + (size_t)t * (a.n / 32), i, i < n4);
    }
    __syncthreads();
    if (!scores) return;
    float acc = 0.0f;
    for (int k = lane * 8; k < a.n; k += 256) {
        float v[8];
        P::eight(rows + warp * row_bytes + k * P::BYTES, v);
        const float4 p = *(const float4*)(xs + k), q = *(const float4*)(xs + k + 4);
        const float u[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
        float s = __fmul_rn(v[0], u[0]);
#pragma unroll
        for (int i = 1; i < 8; i++) s = __fmaf_rn(v[i], u[i], s);
        acc += s;
    }
    acc = warp_sum(acc);
    if (lane == 0) a.scores[(size_t)t * a.experts + expert] = acc;
}

#define ROUTER(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(ROUTER_WARPS * 32) router_##T(const __grid_constant__ RouterArgs a) { \
        router<P##T>(a);                                                                                                 \
    }
ROUTER(F32)
ROUTER(F16)
ROUTER(BF16)

struct ExpertsArgs {
    const u64* table;     // experts × TABLE: gate, up, down, then a bias of each or 0
    const float* scores;  // tokens × experts
    const XBlk* q;        // tokens × n / 32
    const float* f;       // tokens × n
    float* hidden;        // tokens × used × ff
    float* x;             // tokens × n, what down makes
    const u32* ids;       // tokens × used that others chose, with their weights; null: chosen by the scores
    const float* weights;
    int experts, used, n, ff;
    int row_warps, piece;  // the order of sums, as GemvArgs
    int each;              // pairs of rows of a warp (gate_up_*), rows of a block (down_*)
    int row_room;          // bytes of shared memory of a row
    int normalize;         // of the weights, as RouteArgs
    float scale;
    int how;               // ACTIVATE_*
    float limit;           // of that
    int add;               // ADD_*
    int share;             // of what is chosen in RAM 256ths are for processors. -1: none is in RAM
    const u8* landing;     // where the others in RAM have been brought, in the order of choices or to slots; null: they are read in RAM
    u64 slot;              // bytes of one of them
    int which;             // WHICH_*, where some are in RAM
    const int* kept;       // tokens × used, of those in RAM: the slot that has it, or -1; null: there are no slots, or all is in RAM
    const u32* slots;      // by expert, its slot once all that was chosen has been brought
};
ARGS_SIZE(ExpertsArgs, 160); ARGS_FIELD(ExpertsArgs, table, 0); ARGS_FIELD(ExpertsArgs, scores, 8);
ARGS_FIELD(ExpertsArgs, q, 16); ARGS_FIELD(ExpertsArgs, f, 24); ARGS_FIELD(ExpertsArgs, hidden, 32);
ARGS_FIELD(ExpertsArgs, x, 40); ARGS_FIELD(ExpertsArgs, ids, 48); ARGS_FIELD(ExpertsArgs, weights, 56);
ARGS_FIELD(ExpertsArgs, experts, 64); ARGS_FIELD(ExpertsArgs, used, 68); ARGS_FIELD(ExpertsArgs, n, 72);
ARGS_FIELD(ExpertsArgs, ff, 76); ARGS_FIELD(ExpertsArgs, row_warps, 80); ARGS_FIELD(ExpertsArgs, piece, 84);
ARGS_FIELD(ExpertsArgs, each, 88); ARGS_FIELD(ExpertsArgs, row_room, 92); ARGS_FIELD(ExpertsArgs, normalize, 96);
ARGS_FIELD(ExpertsArgs, scale, 100); ARGS_FIELD(ExpertsArgs, how, 104); ARGS_FIELD(ExpertsArgs, limit, 108);
ARGS_FIELD(ExpertsArgs, add, 112); ARGS_FIELD(ExpertsArgs, share, 116);
ARGS_FIELD(ExpertsArgs, landing, 120); ARGS_FIELD(ExpertsArgs, slot, 128); ARGS_FIELD(ExpertsArgs, which, 136);
ARGS_FIELD(ExpertsArgs, kept, 144); ARGS_FIELD(ExpertsArgs, slots, 152);

// Of a token's choices that are not for processors:
#define WHICH_ALL 0
#define WHICH_HERE 1     // those in device memory
#define WHICH_BROUGHT 2  // the others
#define WHICH_ARRIVED 3  // all, those in RAM from their slots, where they are now

// What becomes of the outputs of a token's choices.
#define ADD_NOT 0    // their sum lies in x
#define ADD_TO_X 1   // their sum is added to it
#define ADD_APART 2  // x has a row for each

#define TABLE 6  // addresses of an expert
#define IN_RAM (1ull << 63)  // in the first of them

#define DOWN_THREADS 512
#define DOWN_WARPS (DOWN_THREADS / 32)
#define USED_MAX 32   // choices of a token, a lane each
#define EACH_MAX 16   // rows of a block of down_*

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// A lane takes one part of a super-block at a time: gemv.cu.
template <class B>
struct Order {
    static const int SUBS = 1;
    static const int UNITS = B::ELEMS == 32 ? 1 : 8;
    static __device__ __forceinline__ int sub(int j, int) { return j; }
};
#else
template <class B>
struct Order : Lanes<B> {};
#endif

#define NO_EXPERT 0x7fffffff

// What a token has chosen, of lane j the j-th.
struct Choice {
    int id;
    float weight;
};

// What route_topk does with the scores of a token, by one warp in registers: its first `many` choices. Weights are right if
// those are all. Every block chooses for itself: cheaper than to wait for one that does it for all.
template <int K>
__device__ __forceinline__ Choice choose(const ExpertsArgs& a, const float* scores, int many, int lane) {
    float s[K], big = -1e38f, sum = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
        s[k] = lane + 32 * k < a.experts ? __ldcg(scores + lane + 32 * k) : -1e38f;
        big = fmaxf(big, s[k]);
    }
    big = warp_max(big);
#pragma unroll
    for (int k = 0; k < K; k++) {
        const bool is = lane + 32 * k < a.experts;
        s[k] = is ? expf(s[k] - big) : -2.0f;
        if (is) sum += s[k];
    }
    sum = warp_sum(sum);
    float chosen = 0.0f;
    Choice mine = {0, 0.0f};
    for (int j = 0; j < many; j++) {
        float best = -1.0f;
        int id = NO_EXPERT;
#pragma unroll
        for (int k = 0; k < K; k++)
            if (s[k] > best) best = s[k], id = lane + 32 * k;
        // What is left is not negative, so that it compares as integers do; lanes that found none have no bit.
        const u32 bits = id == NO_EXPERT ? 0u : __float_as_uint(best) + 1u;
        const u32 most = __reduce_max_sync(0xffffffffu, bits);
        id = __reduce_min_sync(0xffffffffu, bits == most ? id : NO_EXPERT);
        best = __uint_as_float(most - 1u);
        // Scores that are not numbers are never chosen by comparison: the lowest id that is left.
        if (most == 0u) {
            best = 0.0f;
            id = NO_EXPERT;
#pragma unroll
            for (int k = 0; k < K; k++)
                if (s[k] != -2.0f) id = min(id, lane + 32 * k);
            id = __reduce_min_sync(0xffffffffu, id);
        }
#pragma unroll
        for (int k = 0; k < K; k++)
            if (lane + 32 * k == id) s[k] = -2.0f;
        best /= sum;
        chosen += best;
        if (lane == j) mine = {id, best};
    }
    if (a.normalize) mine.weight /= chosen;
    mine.weight *= a.scale;
    return mine;
}

__device__ __forceinline__ Choice choose(const ExpertsArgs& a, int t, int many, int lane) {
    const float* scores = a.scores + (size_t)t * a.experts;
    return a.experts <= 128 ? choose<4>(a, scores, many, lane) : choose<16>(a, scores, many, lane);
}

// Starts the copy of a row of `len` bytes to `to`, where it will lie at to + staged_at(src).
template <class B>
__device__ __forceinline__ void fetch_row(u8* to, const u8* src, int len, int lane) {
    if (B::BYTES % 16 == 0 && ((size_t)src & 15) != 0) {
        for (int c = lane * 4; c < len; c += 128) cp_async4(to + c, src + c);
        return;
    }
    const u8* first = (const u8*)((size_t)src & ~(size_t)15);
    const int lines = (int)((src + len + 15 - first) >> 4);
#pragma unroll 3
    for (int i = lane; i < lines; i += 32) cp_async16(to + 16 * i, first + 16 * i);
}

// Sums of two rows of weights in shared memory with one row of activations of `cols` columns.
template <class B>
__device__ __forceinline__ float2 two_rows(const ExpertsArgs& a, const u8* b0, const u8* b1, const XBlk* xs, int cols, int lane) {
    typedef Order<B> O;
    const int units = cols / B::ELEMS * O::UNITS, steps = (units + 31) / 32;
    const int j = lane % O::UNITS;
    float v0 = 0.0f, v1 = 0.0f;
    // Each share of the steps that a warp of bulk.cu has, then the shares in order. Those behind the last step are zero.
    for (int kq = 0; kq < min(a.row_warps, min(a.piece, steps)); kq++) {
        float acc0 = 0.0f, acc1 = 0.0f;
        for (int first = 0; first < steps; first += a.piece) {
            for (int s = first + kq; s < min(first + a.piece, steps); s += a.row_warps) {
                const int unit = s * 32 + lane;
                if (unit >= units) continue;
                const int block = unit / O::UNITS;
#pragma unroll
                for (int k = 0; k < O::SUBS; k++) {
                    const int sub = B::ELEMS == 32 ? 0 : O::sub(j, k);
                    Quants q0, q1;
                    B::decode(b0 + block * B::BYTES, sub, q0);
                    B::decode(b1 + block * B::BYTES, sub, q1);
                    const Activations x(xs + (B::ELEMS == 32 ? unit : block * 8 + sub));
                    acc0 = dot<B>(q0, x.q, x.d, x.s, acc0);
                    acc1 = dot<B>(q1, x.q, x.d, x.s, acc1);
                }
            }
        }
        acc0 = warp_sum(acc0);
        acc1 = warp_sum(acc1);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
        v0 = acc0, v1 = acc1;
#else
        v0 += acc0, v1 += acc1;
#endif
    }
    return make_float2(v0, v1);
}

// As plain.cu, with rows that are read from memory.
template <class P>
__device__ __forceinline__ float2 two_rows_plain(const u8* w0, const u8* w1, const float* x, int cols, int lane) {
    float acc0 = 0.0f, acc1 = 0.0f;
    for (int k = lane * 8; k < cols; k += 256) {
        float v[8], w[8];
        P::eight(w0 + (size_t)k * P::BYTES, v);
        P::eight(w1 + (size_t)k * P::BYTES, w);
        const float4 p = __ldcg((const float4*)(x + k)), q = __ldcg((const float4*)(x + k + 4));
        const float u[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
        float s0 = __fmul_rn(v[0], u[0]), s1 = __fmul_rn(w[0], u[0]);
#pragma unroll
        for (int i = 1; i < 8; i++) {
            s0 = __fmaf_rn(v[i], u[i], s0);
            s1 = __fmaf_rn(w[i], u[i], s1);
        }
        acc0 += s0;
        acc1 += s1;
    }
    return make_float2(warp_sum(acc0), warp_sum(acc1));
}

#define OF_PROCESSORS (-2)

// Where a choice of a token is computed: OF_PROCESSORS, which have the last ones of those in RAM; its place among the others of
// those; -1 in device memory. By a warp, whose lane j has the j-th choice.
template <class Args>
__device__ __forceinline__ int site_of(const Args& a, int id, int lane) {
    if (a.share < 0) return -1;
    const bool ram = lane < a.used && (a.table[(size_t)id * TABLE] & IN_RAM);
    const u32 all = __ballot_sync(0xffffffffu, ram);
    const int others = __popc(all) - ((__popc(all) * a.share + 128) >> 8), mine = __popc(all & ((1u << lane) - 1));
    return !ram ? -1 : mine < others ? mine : OF_PROCESSORS;
}

// Where a choice lies for a launch: a place of the landing, or -1 for its address in the table.
struct Site {
    int at;
    bool is_meant;
};

// That of choice `lane` of a token, the pair of this number.
__device__ __forceinline__ Site site_for(const ExpertsArgs& a, int pair, int id, int lane) {
    int at = site_of(a, id, lane);
    const bool ours = at != OF_PROCESSORS;
    bool brought = at >= 0;
    if (brought && a.kept) {
        const bool now = a.which == WHICH_ARRIVED;
        at = now ? -1 : __ldcg(a.kept + pair);
        brought = at < 0;
        if (brought && (now || a.which == WHICH_BROUGHT)) at = (int)__ldcg(a.slots + id);
    }
    const bool all = a.which == WHICH_ALL || a.which == WHICH_ARRIVED;
    return {at, ours && (all || brought == (a.which == WHICH_BROUGHT))};
}

// Matrix `k` of an expert.
__device__ __forceinline__ const u8* matrix_of(const ExpertsArgs& a, int id, int k, int place) {
    const u64* row = a.table + (size_t)id * TABLE;
    const u64 first = row[0] & ~IN_RAM, at = k == 0 ? first : row[k];
    if (place < 0 || !a.landing) return (const u8*)at;
    // As src/backend/cuda/handover.rs brings it.
    const u64 low = min(first, min(row[1], row[2])) & ~127ull;
    return a.landing + (size_t)place * a.slot + (at - low);
}

// Where gate and up of a pair's expert lie, then their biases: by the first warp of a block, for all of them behind a barrier.
// Null if it is not for this launch.
__device__ __forceinline__ void find_expert(const ExpertsArgs& a, int pair, int lane, const u8** at) {
    const int j = pair % a.used;
    int id, place = -1;
    if (a.ids) {
        const int mine = lane < a.used ? (int)__ldcg(a.ids + pair - j + lane) : 0;
        const Site site = site_for(a, pair - j + lane, mine, lane);
        id = __shfl_sync(0xffffffffu, mine, j);
        place = __shfl_sync(0xffffffffu, site.at, j);
        if (!__shfl_sync(0xffffffffu, (int)site.is_meant, j)) {
            if (lane < 4) at[lane] = nullptr;
            return;
        }
    } else {
        const Choice c = choose(a, pair / a.used, j + 1, lane);
        id = __shfl_sync(0xffffffffu, c.id, j);
    }
    if (lane < 2) at[lane] = matrix_of(a, id, lane, place);
    else if (lane < 4) at[lane] = (const u8*)a.table[(size_t)id * TABLE + lane + 1];
}

// What gate and up of a row become.
__device__ __forceinline__ float hidden_of(const ExpertsArgs& a, const u8* const* at, int row, float2 v) {
    if (at[2]) v.x += ((const float*)at[2])[row];
    if (at[3]) v.y += ((const float*)at[3])[row];
    return activate(a.how, a.limit, v.x, true, v.y);
}

// hidden[pair] = f(gate · x) * (up · x). The predecessor left the scores, or the ids. Successors are let in only when it has ended:
// `down_*` reads the scores before this kernel is done.
template <class B>
__device__ __forceinline__ void gate_up(const ExpertsArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ const u8* at[4];
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const int pair = blockIdx.y, nb = a.n / 32, row_bytes = a.n / B::ELEMS * B::BYTES;
    const int row0 = (blockIdx.x * WARPS + warp) * a.each, n = min(a.each, a.ff - row0);
    u8* mine = smem + warp * a.each * 2 * a.row_room;
    XBlk* xs = (XBlk*)(smem + WARPS * a.each * 2 * a.row_room);
    fill_grid<B>(tid, WARPS * 32);
    pdl_wait();
    pdl_launch();
    if (warp == 0) {
        find_expert(a, pair, lane, at);
    } else {
        const u64* src = (const u64*)(a.q + (size_t)(pair / a.used) * nb);
#pragma unroll 2
        for (int i = tid - 32; i < nb * 5; i += (WARPS - 1) * 32) ((u64*)xs)[i] = __ldcg(src + i);
    }
    __syncthreads();
    if (!at[0]) {
        // What down quantises with the others'.
        if (lane < n) a.hidden[(size_t)pair * a.ff + row0 + lane] = 0.0f;
        return;
    }
    const u8 *gate = at[0] + (size_t)row0 * row_bytes, *up = at[1] + (size_t)row0 * row_bytes;
    for (int i = 0; i < n; i++) {
        fetch_row<B>(mine + 2 * i * a.row_room, gate + (size_t)i * row_bytes, row_bytes, lane);
        fetch_row<B>(mine + (2 * i + 1) * a.row_room, up + (size_t)i * row_bytes, row_bytes, lane);
    }
    cp_commit();
    cp_wait<0>();
    __syncwarp();
    float* out = a.hidden + (size_t)pair * a.ff + row0;
    for (int i = 0; i < n; i++) {
        const float2 v = two_rows<B>(a, mine + 2 * i * a.row_room + staged_at<B>(gate + (size_t)i * row_bytes),
                                     mine + (2 * i + 1) * a.row_room + staged_at<B>(up + (size_t)i * row_bytes), xs, a.n, lane);
        if (lane == 0) out[i] = hidden_of(a, at, row0 + i, v);
    }
}

template <class P>
__device__ __forceinline__ void gate_up_plain(const ExpertsArgs& a) {
    __shared__ const u8* at[4];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, pair = blockIdx.y;
    pdl_wait();
    pdl_launch();
    if (warp == 0) find_expert(a, pair, lane, at);
    __syncthreads();
    for (int i = 0; i < a.each; i++) {
        const int row = (blockIdx.x * WARPS + warp) * a.each + i;
        if (row >= a.ff || !at[0]) return;
        const size_t from = (size_t)row * a.n * P::BYTES;
        const float2 v = two_rows_plain<P>(at[0] + from, at[1] + from, a.f + (size_t)(pair / a.used) * a.n, a.n, lane);
        if (lane == 0) a.hidden[(size_t)pair * a.ff + row] = hidden_of(a, at, row, v);
    }
}

// What down_* share: where the experts of a token lie, their weights, and the sums of a block's rows by choice.
struct Choices {
    const u8* at[USED_MAX];
    const float* bias[USED_MAX];
    float weights[USED_MAX];
    float out[USED_MAX * EACH_MAX];
};

__device__ __forceinline__ void find_experts(const ExpertsArgs& a, int t, Choices& c) {
    const int lane = threadIdx.x;
    if (lane < 32) {
        Choice mine = {0, 0.0f};
        Site site = {-1, true};
        if (!a.ids) {
            mine = choose(a, t, a.used, lane);
        } else if (lane < a.used) {
            mine = {(int)__ldcg(a.ids + (size_t)t * a.used + lane), __ldcg(a.weights + (size_t)t * a.used + lane)};
        }
        if (a.ids) site = site_for(a, t * a.used + lane, mine.id, lane);
        if (lane < a.used) {
            const u64* row = a.table + (size_t)mine.id * TABLE;
            c.at[lane] = site.is_meant ? matrix_of(a, mine.id, 2, site.at) : nullptr;
            c.bias[lane] = (const float*)row[5];
            c.weights[lane] = mine.weight;
        }
    }
    __syncthreads();
}

// A pair of rows of an expert, from `row` on.
__device__ __forceinline__ void keep_pair(const ExpertsArgs& a, Choices& c, int j, int row, float* out, float2 v) {
    if (c.bias[j]) {
        v.x += c.bias[j][min(row, a.n - 1)];
        v.y += c.bias[j][min(row + 1, a.n - 1)];
    }
    out[0] = v.x;
    out[1] = v.y;
}

// x[t][row] += Σ weights[j] * out[j][row], or = that, in the order of `combine`; `x` is that row of the token.
__device__ __forceinline__ void add_choices(const ExpertsArgs& a, const Choices& c, int row0, float* x) {
    const int r = threadIdx.x;
    if (a.add == ADD_APART) {
        for (int i = r; i < a.used * a.each; i += DOWN_THREADS) {
            const int j = i / a.each, row = row0 + i % a.each;
            if (c.at[j] && row < a.n) x[(size_t)j * a.n + row] = c.out[i];
        }
        return;
    }
    if (r >= a.each || row0 + r >= a.n) return;
    float s = 0.0f;
    for (int j = 0; j < a.used; j++) s = __fmaf_rn(c.weights[j], c.out[j * a.each + r], s);
    x[row0 + r] = a.add == ADD_TO_X ? x[row0 + r] + s : s;
}

// A block has `each` rows of down in all experts of one token. Weights are on their way while the predecessor, `gate_up_*`,
// still runs.
template <class B>
__device__ __forceinline__ void down(const ExpertsArgs& a) {
    extern __shared__ __align__(16) u8 smem[];
    __shared__ Choices c;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const int t = blockIdx.y, row0 = blockIdx.x * a.each, row_bytes = a.ff / B::ELEMS * B::BYTES;
    const int half = a.each / 2, items = a.used * half;
    XBlk* xs = (XBlk*)(smem + a.used * a.each * a.row_room);
    pdl_launch();
    fill_grid<B>(tid, DOWN_THREADS);
    find_experts(a, t, c);
    auto source = [&](int item, int i) {
        return c.at[item / half] + (size_t)min(row0 + item % half * 2 + i, a.n - 1) * row_bytes;
    };
    for (int item = warp; item < items; item += DOWN_WARPS) {
        if (!c.at[item / half]) continue;
        fetch_row<B>(smem + 2 * item * a.row_room, source(item, 0), row_bytes, lane);
        fetch_row<B>(smem + (2 * item + 1) * a.row_room, source(item, 1), row_bytes, lane);
    }
    cp_commit();
    pdl_wait();
    const float4* hidden = (const float4*)(a.hidden + (size_t)t * a.used * a.ff);
    const int all = a.used * a.ff / 4;
    for (int i0 = 0; i0 < all; i0 += 4 * DOWN_THREADS) {
        float4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = i0 + k * DOWN_THREADS + tid;
            v[k] = i < all ? __ldcg(hidden + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = i0 + k * DOWN_THREADS + tid;
            if (i - tid < all) quantise_four(v[k], xs, i, i < all);
        }
    }
    cp_wait<0>();
    __syncthreads();
    for (int item = warp; item < items; item += DOWN_WARPS) {
        if (!c.at[item / half]) continue;
        const float2 v = two_rows<B>(a, smem + 2 * item * a.row_room + staged_at<B>(source(item, 0)),
                                     smem + (2 * item + 1) * a.row_room + staged_at<B>(source(item, 1)),
                                     xs + item / half * (a.ff / 32), a.ff, lane);
        if (lane == 0) keep_pair(a, c, item / half, row0 + item % half * 2, c.out + 2 * item, v);
    }
    __syncthreads();
    add_choices(a, c, row0, a.x + (size_t)t * a.n * (a.add == ADD_APART ? a.used : 1));
}

template <class P>
__device__ __forceinline__ void down_plain(const ExpertsArgs& a) {
    __shared__ Choices c;
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const int t = blockIdx.y, row0 = blockIdx.x * a.each, half = a.each / 2;
    pdl_launch();
    find_experts(a, t, c);
    pdl_wait();
    for (int item = warp; item < a.used * half; item += DOWN_WARPS) {
        const int row = row0 + item % half * 2;
        const u8* w = c.at[item / half];
        if (!w) continue;
        const size_t row_bytes = (size_t)a.ff * P::BYTES;
        const float2 v = two_rows_plain<P>(w + min(row, a.n - 1) * row_bytes, w + min(row + 1, a.n - 1) * row_bytes,
                                           a.hidden + (size_t)(t * a.used + item / half) * a.ff, a.ff, lane);
        if (lane == 0) keep_pair(a, c, item / half, row, c.out + 2 * item, v);
    }
    __syncthreads();
    add_choices(a, c, row0, a.x + (size_t)t * a.n * (a.add == ADD_APART ? a.used : 1));
}

#define EXACT(T, GATE_UP, DOWN)                                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 3) gate_up_##T(const __grid_constant__ ExpertsArgs a) { \
        GATE_UP(a);                                                                                                \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(DOWN_THREADS, 1) down_##T(const __grid_constant__ ExpertsArgs a) {   \
        DOWN(a);                                                                                                   \
    }
#define EXACT_QUANT(T) EXACT(T, gate_up<B##T>, down<B##T>)
#define EXACT_PLAIN(T) EXACT(T, gate_up_plain<P##T>, down_plain<P##T>)
FOR_EACH_QUANT(EXACT_QUANT)
EXACT_PLAIN(F32)
EXACT_PLAIN(F16)
EXACT_PLAIN(BF16)

struct SortArgs {
    const u32* ids;  // pairs: tokens × used
    int* lists;      // tokens of the pairs by expert, then the pairs' numbers
    int* tiles;      // `most` times expert, first place in the lists, rows; no expert is -1
    int pairs, used, experts;
    int each;        // rows of a tile
    int most;        // tiles there is room for
};
ARGS_SIZE(SortArgs, 48); ARGS_FIELD(SortArgs, ids, 0); ARGS_FIELD(SortArgs, lists, 8); ARGS_FIELD(SortArgs, tiles, 16);
ARGS_FIELD(SortArgs, pairs, 24); ARGS_FIELD(SortArgs, used, 28); ARGS_FIELD(SortArgs, experts, 32);
ARGS_FIELD(SortArgs, each, 36); ARGS_FIELD(SortArgs, most, 40);

// One block. The order of an expert's rows follows from chance, and no row's result from its place.
extern "C" __global__ void __launch_bounds__(1024) sort_rows(const __grid_constant__ SortArgs a) {
    extern __shared__ __align__(16) u8 room[];
    __shared__ int total;
    int *count = (int*)room, *next = count + a.experts, *tile = next + a.experts;
    const int tid = threadIdx.x, lane = tid & 31;
    pdl_launch();
    for (int i = tid; i < a.experts; i += 1024) count[i] = 0;
    __syncthreads();
    pdl_wait();
    for (int i = tid; i < a.pairs; i += 1024) atomicAdd(count + __ldcg(a.ids + i), 1);
    __syncthreads();
    if (tid < 32) {
        int rows = 0, tiles = 0;
        for (int i0 = 0; i0 < a.experts; i0 += 32) {
            const int i = i0 + lane, n = i < a.experts ? count[i] : 0, m = (n + a.each - 1) / a.each;
            int r = n, s = m;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const int r1 = __shfl_up_sync(0xffffffffu, r, o), s1 = __shfl_up_sync(0xffffffffu, s, o);
                if (lane >= o) r += r1, s += s1;
            }
            if (i < a.experts) {
                next[i] = rows + r - n;
                tile[i] = tiles + s - m;
            }
            rows += __shfl_sync(0xffffffffu, r, 31);
            tiles += __shfl_sync(0xffffffffu, s, 31);
        }
        if (lane == 0) total = tiles;
    }
    __syncthreads();
    for (int e = tid; e < a.experts; e += 1024)
        for (int at = 0, i = tile[e]; at < count[e]; at += a.each, i++) {
            a.tiles[3 * i] = e;
            a.tiles[3 * i + 1] = next[e] + at;
            a.tiles[3 * i + 2] = min(a.each, count[e] - at);
        }
    for (int i = total + tid; i < a.most; i += 1024) a.tiles[3 * i] = -1;
    __syncthreads();
    for (int i = tid; i < a.pairs; i += 1024) {
        const int at = atomicAdd(next + __ldcg(a.ids + i), 1);
        a.lists[at] = i / a.used;
        a.lists[a.pairs + at] = i;
    }
}

struct GroupedArgs {
    const u64* table;    // as ExpertsArgs
    const int* tiles;    // as SortArgs
    const u16* x;        // rows of pitch halves
    const float* scale;  // of each row of x
    const int* from;     // row of x by place in the lists; null: the place itself
    const int* to;       // row of the results likewise
    float* out[2];       // of matrix `first`, and of the next one
    int rows, cols, pitch, stride;
    int first;           // which of the table's first three
};
ARGS_SIZE(GroupedArgs, 88); ARGS_FIELD(GroupedArgs, table, 0); ARGS_FIELD(GroupedArgs, tiles, 8);
ARGS_FIELD(GroupedArgs, x, 16); ARGS_FIELD(GroupedArgs, scale, 24); ARGS_FIELD(GroupedArgs, from, 32);
ARGS_FIELD(GroupedArgs, to, 40); ARGS_FIELD(GroupedArgs, out, 48); ARGS_FIELD(GroupedArgs, rows, 64);
ARGS_FIELD(GroupedArgs, cols, 68); ARGS_FIELD(GroupedArgs, pitch, 72); ARGS_FIELD(GroupedArgs, stride, 76);
ARGS_FIELD(GroupedArgs, first, 80);

// A block has 32 rows of one matrix of one expert, and a tile of the rows that chose it.
template <class B, int MT, int XS>
__device__ __forceinline__ void grouped(const GroupedArgs& a) {
    pdl_wait();
    const int *tile = a.tiles + 3 * blockIdx.x, expert = __ldcg(tile);
    if (expert < 0) return;
    const int at = __ldcg(tile + 1), z = blockIdx.z;
    GemmArgs g;
    g.x = a.from ? a.x : a.x + (size_t)at * a.pitch;
    g.w = (const u16*)a.table[expert * TABLE + a.first + z];
    g.scale = a.from ? a.scale : a.scale + at;
    g.bias = (const float*)a.table[expert * TABLE + 3 + a.first + z];
    g.out = a.to ? a.out[z] : a.out[z] + (size_t)at * a.stride;
    g.out_idx = a.to ? a.to + at : nullptr;
    g.tokens = __ldcg(tile + 2);
    g.rows = a.rows;
    g.pitch = a.pitch;
    g.stride = a.stride;
    g.mode = 0;
    g.cols = a.cols;
    thin<B, MT, XS>(g, a.from ? a.from + at : nullptr, 0, blockIdx.y * BN);
}

// In tiles of 48 two blocks share a multiprocessor.
#define GROUPED(T, B, SIZE, XS, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(2 * SIDE, BLOCKS)                                         \
        grouped_##T##_##SIZE(const __grid_constant__ GroupedArgs a) {                                      \
        grouped<B, SIZE / 16, XS>(a);                                                                      \
    }
#define GROUPED_QUANT(T) GROUPED(T, B##T, 16, 3, 2) GROUPED(T, B##T, 48, 2, 2) GROUPED(T, B##T, 64, 3, 1)
#define GROUPED_PLAIN(T) \
    GROUPED(T, Whole<P##T>, 16, 3, 2) GROUPED(T, Whole<P##T>, 48, 2, 1) GROUPED(T, Whole<P##T>, 64, 3, 1)
FOR_EACH_QUANT(GROUPED_QUANT)
GROUPED_PLAIN(F32)
GROUPED_PLAIN(F16)
GROUPED_PLAIN(BF16)

struct BesideArgs {
    const u64* table;      // as ExpertsArgs
    const u32* ids;        // tokens × used
    const float* weights;  // tokens × used
    const float* out;      // tokens × used × n, of the choices that were computed here
    const float* answers;  // the same of processors, in host memory
    float* x;              // tokens × n
    int used, n, share;    // as ExpertsArgs
    int add;               // to x, rather than in its place
};
ARGS_SIZE(BesideArgs, 64); ARGS_FIELD(BesideArgs, table, 0); ARGS_FIELD(BesideArgs, ids, 8); ARGS_FIELD(BesideArgs, weights, 16);
ARGS_FIELD(BesideArgs, out, 24); ARGS_FIELD(BesideArgs, answers, 32); ARGS_FIELD(BesideArgs, x, 40);
ARGS_FIELD(BesideArgs, used, 48); ARGS_FIELD(BesideArgs, n, 52); ARGS_FIELD(BesideArgs, share, 56); ARGS_FIELD(BesideArgs, add, 60);

#define AT_ONCE 8  // rows of a thread that are on their way at once

// The choices of a token, added up in the order of `combine`. A thread has four columns; n is a multiple of 4.
extern "C" __global__ void __launch_bounds__(64) combine_beside(const __grid_constant__ BesideArgs a) {
    __shared__ float weights[USED_MAX];
    __shared__ bool of_host[USED_MAX];
    const int tid = threadIdx.x, t = blockIdx.y, at = (blockIdx.x * 64 + tid) * 4;
    pdl_launch();
    pdl_wait();
    if (tid < 32) {
        const int id = tid < a.used ? (int)__ldcg(a.ids + (size_t)t * a.used + tid) : 0;
        of_host[tid] = site_of(a, id, tid) == OF_PROCESSORS;
        weights[tid] = tid < a.used ? __ldcg(a.weights + (size_t)t * a.used + tid) : 0.0f;
    }
    __syncthreads();
    if (at >= a.n) return;
    float4 s = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int j0 = 0; j0 < a.used; j0 += AT_ONCE) {
        float4 v[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (j0 + k >= a.used) break;
            const size_t row = ((size_t)t * a.used + j0 + k) * a.n + at;
            if (of_host[j0 + k])
                asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(v[k].x), "=f"(v[k].y), "=f"(v[k].z), "=f"(v[k].w) : "l"(a.answers + row));
            else
                v[k] = __ldcg((const float4*)(a.out + row));
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (j0 + k >= a.used) break;
            const float w = weights[j0 + k];
            s.x = __fmaf_rn(w, v[k].x, s.x);
            s.y = __fmaf_rn(w, v[k].y, s.y);
            s.z = __fmaf_rn(w, v[k].z, s.z);
            s.w = __fmaf_rn(w, v[k].w, s.w);
        }
    }
    float4* x = (float4*)(a.x + (size_t)t * a.n + at);
    if (a.add) {
        const float4 was = *x;
        s.x += was.x, s.y += was.y, s.z += was.z, s.w += was.w;
    }
    *x = s;
}
