// apply_rope on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/apply_rope.cu"

#include "problem.h"

extern "C" const char* emulated_apply_rope(const saccade::RopeArgs* args) {
  return saccade::apply_rope_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  for (bool interleaved : {false, true}) {
    for (auto [skew, head_dim] : emulation::kMemory) {
      emulation::Problem problem(Dtype::kBFloat16, /*heads=*/4, /*kv_heads=*/2, /*tokens=*/5, head_dim,
                                 /*groups=*/2 - skew, skew);
      problem.args.angles.interleaved = interleaved;
      if (const char* error = apply_rope_cuda(problem.args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
