// Gradient of prompt_pool3d; specification reference/prompt_pool3d.py. Two kernels, no atomics:
//
//   windows  a block per window: a_i, dy . x_i and dy . y = sum_i a_i dy . x_i, into the workspace. A warp takes kDots
//            members at a time, so that dy is read once for all of them.
//   tokens   a run of lanes per token, over the windows that contain it: dx_i = sum of a_i dy,
//            dweight_i = sum of a_i (dy . x_i - dy . y) / temperature
#pragma once
#include "prim/reduce.cuh"
#include "prim/vec.cuh"
#include "prim/window.cuh"

namespace saccade {

constexpr int kPoolGradThreads = 256;
constexpr int kDots = 4;

// Warps of a block of the first kernel; lanes that share a token, and tokens that a block takes, of the second.
struct PoolGradPlan {
  int32_t lanes, slots;
  float* weight;  // [windows, members] a
  float* dot;     // [windows, members] dy . x
  float* mean;    // [windows] dy . y
};

__device__ inline void dot_barrier() {
#ifndef SACCADE_MUTANT_NO_DOT_BARRIER
  __syncthreads();
#endif
}

template <typename T, int kAccess>
__global__ void __launch_bounds__(kPoolGradThreads)
    prompt_pool3d_bwd_window_kernel(const __grid_constant__ PromptPoolGradArgs args,
                                    const __grid_constant__ PoolGradPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const PromptPoolArgs& pool = args.pool;
  const Window window = window_at(pool, blockIdx.x);
  const Softmax softmax = window_softmax(pool, window);
  const int members = window_members(pool), lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const Bits* x = static_cast<const Bits*>(pool.x);
  const Bits* dy = static_cast<const Bits*>(args.dy) + blockIdx.x * pool.width;  // [D]
  float* weights = plan.weight + static_cast<int64_t>(blockIdx.x) * members;     // [members]
  float* dots = plan.dot + static_cast<int64_t>(blockIdx.x) * members;           // [members]

#pragma unroll 1
  for (int64_t first = threadIdx.x / kWarp * kDots; first < members; first += warps * kDots) {
    float sum[kDots];
    int64_t offset[kDots];
    int exists[kDots];
#pragma unroll
    for (int u = 0; u < kDots; ++u) {
      sum[u] = 0.0f;
      exists[u] = first + u < members;
      offset[u] = member_at(pool, window, static_cast<int>(exists[u] ? first + u : first)).x;
    }
#pragma unroll 1
    for (int64_t column = lane * kVector; column < pool.width; column += kWarp * kVector) {
      const int64_t left = pool.width - column;
      const int count = left < kVector ? static_cast<int>(left) : kVector;
      float given[kVector];
      Vector raw[kDots];  // [kVector]
      unpack<T>(load<T, kAccess>(dy + column, count), given);
#pragma unroll
      for (int u = 0; u < kDots; ++u) raw[u] = load<T, kAccess>(x + offset[u] + column, exists[u] ? count : 0);
#pragma unroll
      for (int u = 0; u < kDots; ++u) {
        float value[kVector];
        unpack<T>(raw[u], value);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (i < count) sum[u] = fmaf(given[i], value[i], sum[u]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kDots; ++u) {
      sum[u] = lane_sum(sum[u], kWarp);
      if (lane == 0 && exists[u]) dots[first + u] = sum[u];
    }
  }
#pragma unroll 1
  for (int m = threadIdx.x; m < members; m += blockDim.x) {
    weights[m] = softmax.of(pool.weights[member_at(pool, window, m).token] / pool.temperature);
  }
  dot_barrier();
  if (threadIdx.x >= kWarp) return;

  float mean = 0.0f;  // dy . y
#pragma unroll 4
  for (int m = lane; m < members; m += kWarp) mean = fmaf(weights[m], dots[m], mean);
  mean = lane_sum(mean, kWarp);
  if (lane == 0) plan.mean[blockIdx.x] = mean;
}

// Windows [first, last] of an axis that contain `place`.
struct Span {
  int first, last;
};

__device__ __forceinline__ Span windows_around(int place, int kernel, int stride, int count) {
  const int before = place - kernel + 1;
  return {before <= 0 ? 0 : (before + stride - 1) / stride, min(place / stride, count - 1)};
}

template <typename T, int kAccess>
__global__ void __launch_bounds__(kPoolGradThreads, 6)
    prompt_pool3d_bwd_token_kernel(const __grid_constant__ PromptPoolGradArgs args,
                                   const __grid_constant__ PoolGradPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const PromptPoolArgs& pool = args.pool;
  const int slot = threadIdx.x / plan.lanes, lane = threadIdx.x - slot * plan.lanes;
  const uint32_t tokens = pool.batch * pool.size[0] * pool.size[1] * pool.size[2];
  const uint32_t token = blockIdx.x * plan.slots + slot;
  if (slot >= plan.slots || token >= tokens) return;

  int place[3];
  uint32_t rest = token;
  Span span[3];
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const uint32_t higher = rest / pool.size[axis];
    place[axis] = static_cast<int>(rest - higher * pool.size[axis]);
    span[axis] = windows_around(place[axis], pool.kernel[axis], pool.stride[axis], pool.out_size[axis]);
    rest = higher;
  }
  // For every window that contains the token: its index, and the token's among its members.
  auto for_each_window = [&](auto use) {
#pragma unroll 1
    for (int t = span[0].first; t <= span[0].last; ++t) {
#pragma unroll 1
      for (int h = span[1].first; h <= span[1].last; ++h) {
#pragma unroll 1
        for (int w = span[2].first; w <= span[2].last; ++w) {
          const int plane = place[0] - t * pool.stride[0], row = place[1] - h * pool.stride[1];
          const int member = (plane * pool.kernel[1] + row) * pool.kernel[2] + place[2] - w * pool.stride[2];
          const uint32_t window = ((rest * pool.out_size[0] + t) * pool.out_size[1] + h) * pool.out_size[2] + w;
          use(window, static_cast<int64_t>(window) * window_members(pool) + member);
        }
      }
    }
  };

  if (lane == 0) {
    float sum = 0.0f;
    for_each_window([&](uint32_t window, int64_t at) { sum += plan.weight[at] * (plan.dot[at] - plan.mean[window]); });
    args.dweights[token] = sum / pool.temperature;
  }
#pragma unroll 1
  for (int64_t column = lane * kVector; column < pool.width; column += plan.lanes * kVector) {
    const int64_t left = pool.width - column;
    const int count = left < kVector ? static_cast<int>(left) : kVector;
    float sum[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] = 0.0f;
    for_each_window([&](uint32_t window, int64_t at) {
      const float weight = plan.weight[at];
      float value[kVector];
      unpack<T>(load<T, kAccess>(static_cast<const Bits*>(args.dy) + window * pool.width + column, count), value);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] = fmaf(weight, value[i], sum[i]);
    });
    store<T, kAccess>(static_cast<Bits*>(args.dx) + token * pool.width + column, pack<T>(sum), count);
  }
}

}  // namespace saccade
