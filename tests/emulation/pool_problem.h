// A small problem of prompt_pool3d, for the programs that ThreadSanitizer watches. Values do not matter there.
#pragma once
#include "merge_problem.h"

namespace saccade::emulation {

struct PoolProblem {
  std::vector<uint16_t> x;
  std::vector<float> weights;
  PromptPoolArgs args;

  // Windows of `kernel` places along each axis, `stride` apart; 2 of them along h, or along t and h.
  PoolProblem(RowMemory memory, int kernel, int stride) {
    const int size[3] = {kernel == 3 ? 5 : kernel, kernel + stride, kernel};
    const int64_t places = int64_t{1} * size[0] * size[1] * size[2], width = memory.width;
    x = values(places * width, memory.skew);
    for (int64_t i = 0; i < places; ++i) weights.push_back(0.001f * (i % 7));
    for (int axis = 0; axis < 3; ++axis) {
      args.size[axis] = size[axis];
      args.kernel[axis] = kernel;
      args.stride[axis] = stride;
      args.out_size[axis] = (size[axis] - kernel) / stride + 1;
    }
    args.x = x.data() + memory.skew;
    args.x_stride[0] = places * width;
    args.x_stride[1] = size[1] * size[2] * width;
    args.x_stride[2] = size[2] * width;
    args.x_stride[3] = width;
    args.weights = weights.data();
    args.batch = 1;
    args.width = width;
    args.dtype = Dtype::kBFloat16;
  }

  int64_t windows() const { return int64_t{1} * args.out_size[0] * args.out_size[1] * args.out_size[2]; }
};

// A window that one run of lanes takes; one that several stages of members make up.
struct WindowShape {
  int kernel, stride;
};
constexpr WindowShape kWindows[] = {{3, 2}, {7, 1}};

}  // namespace saccade::emulation
