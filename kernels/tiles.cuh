// How the matrix products that copy tiles ahead (bulk.cu) deal rows out as tiles.
#pragma once
#include "gemv.cuh"

#define STAGES_MAX 8

// Which parts of a super-block a lane takes: those that share their bytes. Part s of lane group j.
template <class B>
struct Lanes {
    static const int SUBS = B::ELEMS == 32 ? 1 : B::SHARED;
    static const int UNITS = B::ELEMS == 32 ? 1 : 8 / SUBS;  // lanes a block
    static __device__ __forceinline__ int sub(int j, int s) {
        if (SUBS == 1) return j;
        if (SUBS == 4) return 4 * j + s;
        return B::APART ? 4 * (j >> 1) + (j & 1) + 2 * s : 2 * j + s;
    }
    // The lane group and the part in it that `sub` gives a part of the super-block.
    static __device__ __forceinline__ int lane(int sub) {
        if (SUBS == 1) return sub;
        if (SUBS == 4) return sub >> 2;
        return B::APART ? 2 * (sub >> 2) + (sub & 1) : sub >> 1;
    }
    static __device__ __forceinline__ int part(int sub) {
        if (SUBS == 1) return 0;
        if (SUBS == 4) return sub & 3;
        return B::APART ? (sub >> 1) & 1 : sub & 1;
    }
};

// A tile: rows of one matrix (SWIGLU: as many of gate and of up).
struct Tile {
    int seg, row, rows;
};

__device__ __forceinline__ int tiles_of(const GemvArgs& a, int tile_rows) {
    if (a.mode == MODE_SWIGLU) return (a.rows[0] + tile_rows - 1) / tile_rows;
    int n = 0;
    for (int s = 0; s < a.segments; s++) n += (a.rows[s] + tile_rows - 1) / tile_rows;
    return n;
}

__device__ __forceinline__ Tile tile_of(const GemvArgs& a, int n, int tile_rows) {
    Tile t;
    t.seg = 0;
    if (a.mode != MODE_SWIGLU) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const int here = (a.rows[s] + tile_rows - 1) / tile_rows;
            if (t.seg == s && s + 1 < a.segments && n >= here) {
                n -= here;
                t.seg = s + 1;
            }
        }
    }
    t.row = n * tile_rows;
    t.rows = min(tile_rows, a.rows[t.seg] - t.row);
    return t;
}
