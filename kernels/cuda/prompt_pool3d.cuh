// prompt_pool3d: a softmax inside every window, then the weighted sum; specification reference/prompt_pool3d.py.
//
//   window   one output place; a block takes one window and a tile of its columns
//   slots    runs of lanes that share the members of a window: 1, or more where windows are large
//
// The weights and offsets of kStage members at a time stand in shared memory. A thread keeps one vector of columns; its
// slot adds up chunks of kPoolChunk members, and slot 0 the sums of the slots, in the order of the members.
#pragma once
#include "prim/vec.cuh"
#include "prim/window.cuh"

namespace saccade {

constexpr int kPoolThreads = 256;
constexpr int kPoolChunk = 32;
constexpr int kPoolSlots = 8;
constexpr int kStage = kPoolSlots * kPoolChunk;
constexpr int kPoolUnroll = 4;

struct PoolPlan {
  int32_t lanes, slots;
  uint32_t tiles;  // of the columns
};

__device__ inline void stage_barrier() {
#ifndef SACCADE_MUTANT_NO_STAGE_BARRIER
  __syncthreads();
#endif
}

__device__ inline void pool_barrier() {
#ifndef SACCADE_MUTANT_NO_POOL_BARRIER
  __syncthreads();
#endif
}

template <typename T, int kAccess>
__global__ void __launch_bounds__(kPoolThreads)
    prompt_pool3d_kernel(const __grid_constant__ PromptPoolArgs args, const __grid_constant__ PoolPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  __shared__ float weight[kStage];
  __shared__ int64_t offset[kStage];
  struct Part {
    float value[kVector];
  };
  __shared__ Part parts[kPoolThreads];  // [slots, lanes]

  const uint32_t tile = blockIdx.x % plan.tiles, index = blockIdx.x / plan.tiles;
  const Window window = window_at(args, index);
  const Softmax softmax = window_softmax(args, window);
  const uint32_t members = window_members(args);
  const int slot = threadIdx.x / plan.lanes, lane = threadIdx.x - slot * plan.lanes;
  const int64_t column = (static_cast<int64_t>(tile) * plan.lanes + lane) * kVector, left = args.width - column;
  const int count = slot >= plan.slots || left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
  const Bits* x = static_cast<const Bits*>(args.x) + column;

  float sum[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum[i] = 0.0f;
#pragma unroll 1
  for (uint32_t staged = 0; staged < members; staged += kStage) {
    const int here = static_cast<int>(min(members - staged, uint32_t{kStage}));
    for (int m = threadIdx.x; m < here; m += blockDim.x) {
      const Member member = member_at(args, window, staged + m);
      weight[m] = softmax.of(args.weights[member.token] / args.temperature);
      offset[m] = member.x;
    }
    stage_barrier();
#pragma unroll 1
    for (int chunks = 0; chunks < here; chunks += plan.slots * kPoolChunk) {
      float part[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) part[i] = 0.0f;
      const int begin = chunks + slot * kPoolChunk, end = count == 0 ? 0 : min(begin + kPoolChunk, here);
#pragma unroll 1
      for (int first = begin; first < end; first += kPoolUnroll) {
        Vector raw[kPoolUnroll];  // [kVector]
#pragma unroll
        for (int u = 0; u < kPoolUnroll; ++u) {
          const bool exists = first + u < end;
          raw[u] = load<T, kAccess>(x + offset[exists ? first + u : first], exists ? count : 0);
        }
#pragma unroll
        for (int u = 0; u < kPoolUnroll; ++u) {
          if (first + u >= end) continue;
          float value[kVector];
          unpack<T>(raw[u], value);
#pragma unroll
          for (int i = 0; i < kVector; ++i) part[i] = fmaf(weight[first + u], value[i], part[i]);
        }
      }
      if (plan.slots == 1) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += part[i];
        continue;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) parts[threadIdx.x].value[i] = part[i];
      pool_barrier();
      for (int s = 0; slot == 0 && s < plan.slots && chunks + s * kPoolChunk < here; ++s) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += parts[s * plan.lanes + lane].value[i];
      }
      __syncthreads();  // the parts have been read
    }
    if (staged + kStage < members) __syncthreads();  // the weights have been read
  }
  if (slot != 0) return;
  store<T, kAccess>(static_cast<Bits*>(args.y) + index * args.width + column, pack<T>(sum), count);
}

}  // namespace saccade
