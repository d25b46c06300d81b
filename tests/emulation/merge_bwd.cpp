// The gradient of merge on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a
// program that ThreadSanitizer can watch.
#include "../../kernels/cuda/merge_bwd.cu"

#include "merge_problem.h"

extern "C" const char* emulated_merge_bwd(const saccade::MergeGradArgs* args) {
  return saccade::merge_bwd_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  using Problem = emulation::MergeProblem;
  const Problem problem;
  for (auto [skew, width] : emulation::kRowMemory) {
    for (Reduce mode : {Reduce::kMean, Reduce::kMax, Reduce::kReplace}) {
      auto dy = emulation::values(Problem::kBatch * Problem::kRows * width, skew);
      auto x = emulation::values(Problem::kBatch * Problem::kTokens * width, skew);
      auto dx = emulation::values(Problem::kBatch * Problem::kTokens * width, skew);
      const std::vector<float> total(Problem::kBatch * Problem::kRows, 2.0f);
      MergeGradArgs args;
      problem.describe(args, width);
      args.dy = dy.data() + skew;
      args.dy_stride[0] = Problem::kRows * width;
      args.x = x.data() + skew;
      args.x_stride[0] = Problem::kTokens * width;
      args.dy_stride[1] = args.x_stride[1] = width;
      args.weight = problem.weight.data();
      args.weight_stride = Problem::kTokens;
      args.total = total.data();
      args.plan = problem.plan;
      args.mode = mode;
      args.dx = dx.data() + skew;
      if (const char* error = merge_bwd_cuda(args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
