// What the cache of keys and values holds.
#pragma once
#include "common.cuh"

// src/backend/cuda/attention.rs has the same numbers.
#define CACHE_F16 0
#define CACHE_F32 1
#define CACHE_Q8_0 2
#define Q8_0_BYTES 34  // a half and 32 signed bytes
