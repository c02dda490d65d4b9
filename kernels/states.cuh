// Recurrent states, as the kernels of recurrences see them.
#pragma once
#include "common.cuh"

// Recurrences. A state has two copies: a pass reads the one whose number lies at `state`, or nothing where it begins at
// position 0, and writes that of the number with its lowest bit turned. Each row follows from the one before.
struct States {
    float* all;        // copies, `floats` each
    const int* pass;   // see first_position
    const int* state;
    int floats, offset;  // of a copy; where the layer's part of it begins
    __device__ __forceinline__ const float* old() const {
        return first_position(pass) == 0 ? nullptr : all + (size_t)*state * floats + offset;
    }
    __device__ __forceinline__ float* next() const { return all + (size_t)(*state ^ 1) * floats + offset; }
};
ARGS_SIZE(States, 32); ARGS_FIELD(States, all, 0); ARGS_FIELD(States, pass, 8); ARGS_FIELD(States, state, 16);
ARGS_FIELD(States, floats, 24); ARGS_FIELD(States, offset, 28);
