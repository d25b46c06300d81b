// Sums in a fixed order: over lanes, and over a block.
#pragma once
#include "launch.cuh"

namespace saccade {

constexpr int kMaxWarps = 16;  // of a block that calls block_sum

// Sum over aligned runs of `lanes` lanes (a power of two), to all of them. The whole warp calls it.
__device__ __forceinline__ float lane_sum(float value, int lanes) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < lanes) value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

__device__ inline void sum_barrier() {
#ifndef SACCADE_MUTANT_NO_SUM_BARRIER
  __syncthreads();
#endif
}

// Sums kCount values over the block, to all threads. `turn` alternates between 0 and 1 from one call to the next: a
// buffer is written again only after a barrier that its readers have passed, so one barrier per call is enough.
template <int kCount>
__device__ __forceinline__ void block_sum(float (&value)[kCount], int turn) {
  __shared__ float partial[2][kCount][kMaxWarps];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = lane_sum(value[i], kWarp);
    if (threadIdx.x % kWarp == 0) partial[turn][i][warp] = value[i];
  }
  sum_barrier();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = 0.0f;
    for (int w = 0; w < warps; ++w) value[i] += partial[turn][i][w];
  }
}

}  // namespace saccade
