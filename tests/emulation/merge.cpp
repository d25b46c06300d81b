// merge on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/merge.cu"

#include "merge_problem.h"

extern "C" const char* emulated_merge(const saccade::MergeArgs* args) { return saccade::merge_cuda(*args, nullptr); }

int main() {
  using namespace saccade;
  using Problem = emulation::MergeProblem;
  const Problem problem;
  for (auto [skew, width] : emulation::kRowMemory) {
    for (Reduce mode : {Reduce::kMean, Reduce::kMax}) {
      auto x = emulation::values(Problem::kBatch * Problem::kTokens * width, skew);
      auto y = emulation::values(Problem::kBatch * Problem::kRows * width, skew);
      std::vector<float> total(Problem::kBatch * Problem::kRows), log_total(total.size());
      MergeArgs args;
      problem.describe(args, width);
      args.x = x.data() + skew;
      args.x_stride[0] = Problem::kTokens * width;
      args.x_stride[1] = width;
      args.weight = problem.weight.data();
      args.weight_stride = Problem::kTokens;
      args.plan = problem.plan;
      args.mode = mode;
      args.y = y.data() + skew;
      args.total = total.data();
      args.log_total = log_total.data();
      if (const char* error = merge_cuda(args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
