// qk_norm_rope on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/qk_norm_rope.cu"

#include "problem.h"

extern "C" const char* emulated_qk_norm_rope(const saccade::NormArgs* args) {
  return saccade::qk_norm_rope_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  for (bool row : {false, true}) {
    for (bool interleaved : {false, true}) {
      for (auto [skew, head_dim] : emulation::kMemory) {
        emulation::Problem problem(Dtype::kBFloat16, /*heads=*/4, /*kv_heads=*/2, /*tokens=*/3, head_dim,
                                   /*groups=*/2, skew);
        problem.args.angles.interleaved = interleaved;
        NormArgs args;
        args.rope = problem.args;
        args.row = row;
        if (const char* error = qk_norm_rope_cuda(args, nullptr)) return std::puts(error), 2;
      }
    }
  }
  return 0;
}
