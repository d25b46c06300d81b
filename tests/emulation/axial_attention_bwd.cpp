// axial_attention_bwd on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program
// that ThreadSanitizer can watch.
#define SACCADE_AXIAL_PART 64
#include "../../kernels/cuda/axial_attention_bwd.cu"

#include "axial_problem.h"

extern "C" const char* emulated_axial_attention_bwd(const saccade::AxialAttentionGradArgs* args) {
  return saccade::axial_attention_bwd_cuda(*args, nullptr);
}

extern "C" int64_t emulated_axial_attention_bwd_workspace(const saccade::AxialAttentionGradArgs* args) {
  return saccade::axial_attention_bwd_workspace_cuda(*args);
}

int main() {
  const auto run = [](int t, int head_dim, bool mean, int skew) {
    saccade::emulation::AxialProblem problem(t, head_dim, mean, skew);
    return saccade::axial_attention_bwd_cuda(problem.args, nullptr);
  };
  const char* errors[] = {run(5, 72, false, 0), run(2, 64, true, 1), run(2, 136, false, 0)};
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
