// unmerge on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/unmerge.cu"

#include "merge_problem.h"

extern "C" const char* emulated_unmerge(const saccade::UnmergeArgs* args) {
  return saccade::unmerge_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  using Problem = emulation::MergeProblem;
  const Problem problem;
  for (auto [skew, width] : emulation::kRowMemory) {
    for (bool one_gate : {false, true}) {
      auto y = emulation::values(Problem::kBatch * Problem::kRows * width, skew);
      auto residual = emulation::values(Problem::kBatch * Problem::kTokens * width, skew);
      auto gate = emulation::values((one_gate ? 1 : Problem::kTokens) * width, skew);
      auto out = emulation::values(Problem::kBatch * Problem::kTokens * width, skew);
      UnmergeArgs args;
      problem.describe(args, width);
      args.y = y.data() + skew;
      args.y_stride[0] = Problem::kRows * width;
      args.residual = residual.data() + skew;
      args.residual_stride[0] = Problem::kTokens * width;
      args.y_stride[1] = args.residual_stride[1] = width;
      args.gate = gate.data() + skew;
      args.gate_stride[1] = one_gate ? 0 : width;
      args.inverse = problem.inverse.data();
      args.shared = true;
      args.out = out.data() + skew;
      if (const char* error = unmerge_cuda(args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
