// Windows of prompt_pool3d: where their members are, and the softmax of their weights.
#pragma once
#include "../../merge_args.h"
#include "vec.cuh"

namespace saccade {

struct Window {
  int64_t batch;
  int32_t corner[3];  // t, h, w of its first member
};

// Members of a window, 2^31 - 1 at most: the host checks.
__device__ __forceinline__ int window_members(const PromptPoolArgs& args) {
  return args.kernel[0] * args.kernel[1] * args.kernel[2];
}

// `index` counts windows in the order of y, [B, To, Ho, Wo].
__device__ __forceinline__ Window window_at(const PromptPoolArgs& args, uint32_t index) {
  Window window;
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const uint32_t rest = index / args.out_size[axis];
    window.corner[axis] = static_cast<int32_t>(index - rest * args.out_size[axis]) * args.stride[axis];
    index = rest;
  }
  window.batch = index;
  return window;
}

struct Member {
  int64_t token;  // in [B, T, H, W]
  int64_t x;      // its offset in x
};

__device__ __forceinline__ Member member_at(const PromptPoolArgs& args, const Window& window, int member) {
  const int row = member / args.kernel[2], plane = row / args.kernel[1];
  const int64_t t = window.corner[0] + plane, h = window.corner[1] + row - plane * args.kernel[1];
  const int64_t w = window.corner[2] + member - row * args.kernel[2];
  return {((window.batch * args.size[0] + t) * args.size[1] + h) * args.size[2] + w,
          window.batch * args.x_stride[0] + t * args.x_stride[1] + h * args.x_stride[2] + w * args.x_stride[3]};
}

// Of the weights in a window: weight of a member = exp(p / temperature - largest) / sum.
struct Softmax {
  float largest, sum;
  __device__ __forceinline__ float of(float logit) const { return expf(logit - largest) / sum; }
};

// Every warp computes it alone, in the same order: no barrier. A NaN or an infinite maximum makes every weight NaN.
__device__ __forceinline__ Softmax window_softmax(const PromptPoolArgs& args, const Window& window) {
  const int members = window_members(args), lane = threadIdx.x % kWarp;
  Softmax softmax = {-INFINITY, 0.0f};
#pragma unroll 1
  for (int m = lane; m < members; m += kWarp) {
    softmax.largest = fmaxf(softmax.largest, args.weights[member_at(args, window, m).token] / args.temperature);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    softmax.largest = fmaxf(softmax.largest, __shfl_xor_sync(0xffffffffu, softmax.largest, offset));
  }
#pragma unroll 1
  for (int m = lane; m < members; m += kWarp) {
    softmax.sum += expf(args.weights[member_at(args, window, m).token] / args.temperature - softmax.largest);
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    softmax.sum += __shfl_xor_sync(0xffffffffu, softmax.sum, offset);
  }
  return softmax;
}

// --- host ---

inline int64_t window_count(const PromptPoolArgs& args) {
  return args.batch * args.out_size[0] * args.out_size[1] * args.out_size[2];
}

inline int64_t members_of_a_window(const PromptPoolArgs& args) {
  return int64_t{1} * args.kernel[0] * args.kernel[1] * args.kernel[2];
}

inline int64_t token_count(const PromptPoolArgs& args) {
  return args.batch * args.size[0] * args.size[1] * args.size[2];
}

// A stride along a length of 1 is never used, and may be anything.
inline void align_grid(Alignment& alignment, const PromptPoolArgs& args) {
  alignment.bits |= reinterpret_cast<uintptr_t>(args.x);
  if (args.batch > 1) alignment.columns(args.x_stride[0]);
  for (int axis = 0; axis < 3; ++axis) {
    if (args.size[axis] > 1) alignment.columns(args.x_stride[1 + axis]);
  }
}

}  // namespace saccade
