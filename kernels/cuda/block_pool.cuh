// block_pool: mean of the tokens of each block; specification python/saccade/reference/block_pool.py.
//
// A block of threads takes one block of tokens, of up to 128 vectors of a row: lanes x slots, a slot walks every
// `slots`th position. The sums of the slots are added in order: the tokens of a block alone decide a result. grid:
// (vectors of a row / lanes) x blocks x heads x samples.
#pragma once
#include "../block_args.h"
#include "prim/vec.cuh"

namespace saccade {

constexpr int kPoolThreads = 128;

struct BlockPoolPlan {
  int32_t lanes, slots;  // lanes * slots <= kPoolThreads
  int32_t tiles;         // of a row
  bool aligned;          // 16-byte accesses are allowed
};

__device__ inline void block_pool_barrier() {
#ifndef SACCADE_MUTANT_NO_BLOCK_POOL_BARRIER
  __syncthreads();
#endif
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    block_pool_kernel(const __grid_constant__ BlockPoolArgs args, const __grid_constant__ BlockPoolPlan plan) {
  __shared__ float sums[kPoolThreads * T::kVector];  // [slots, lanes * kVector]
  __shared__ int32_t counts[kPoolThreads];           // [slots]
  const int tile = static_cast<int>(blockIdx.x % plan.tiles);
  const int64_t row = blockIdx.x / plan.tiles, entry = row / args.blocks, batch = entry / args.heads;
  const int64_t head = entry - batch * args.heads;
  const int32_t first = static_cast<int32_t>(row - entry * args.blocks) * args.block;
  const int slot = threadIdx.x / plan.lanes, lane = threadIdx.x - slot * plan.lanes;
  const int column = (tile * plan.lanes + lane) * T::kVector, count = min(T::kVector, args.head_dim - column);
  const int width = plan.lanes * T::kVector;
  if (slot < plan.slots) {
    const typename T::Bits* x = static_cast<const typename T::Bits*>(args.x) + batch * args.x_stride[0] +
                                head * args.x_stride[1] + (count > 0 ? column : 0);
    const int32_t* order = args.order.data;
    if (order != nullptr) order += batch * args.order.stride[0] + head * args.order.stride[1];
    float sum[T::kVector] = {};
    int32_t tokens = 0;
#pragma unroll 4
    for (int i = slot; i < args.block; i += plan.slots) {
      const int64_t token = order != nullptr ? order[first + i] : first + i;
      if (token < 0 || token >= args.tokens) continue;
      ++tokens;
      const typename T::Bits* from = x + token * args.x_stride[2];
      const bool whole = plan.aligned && count >= T::kVector;
      float value[T::kVector];
      unpack<T>(whole ? load<T, T::kVector>(from, count) : load<T, 1>(from, count), value);
#pragma unroll
      for (int v = 0; v < T::kVector; ++v) sum[v] += value[v];
    }
#pragma unroll
    for (int v = 0; v < T::kVector; ++v) sums[slot * width + lane * T::kVector + v] = sum[v];
    if (lane == 0) counts[slot] = tokens;
  }
  block_pool_barrier();
  float* out = args.out + row * args.head_dim + tile * width;
  int32_t tokens = 0;
  for (int s = 0; s < plan.slots; ++s) tokens += counts[s];
  for (int c = threadIdx.x; c < min(width, args.head_dim - tile * width); c += kPoolThreads) {
    float sum = 0.0f;
    for (int s = 0; s < plan.slots; ++s) sum += sums[s * width + c];
    out[c] = tokens == 0 ? 0.0f : sum / static_cast<float>(tokens);
  }
}

}  // namespace saccade
