// attention_columns on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program
// that ThreadSanitizer can watch.
#define SACCADE_PAIR_PART 100
#include "../../kernels/cuda/attention_columns.cu"

#include "map_problem.h"

extern "C" const char* emulated_attention_columns(const saccade::AttentionMapArgs* args) {
  return saccade::attention_columns_cuda(*args, nullptr);
}

extern "C" int64_t emulated_attention_columns_workspace(const saccade::AttentionMapArgs* args) {
  return saccade::attention_columns_workspace_cuda(*args);
}

int main() {
  using saccade::Dtype;
  const char* errors[] = {
      saccade::emulation::map_once(saccade::attention_columns_cuda, Dtype::kFloat16, 40, 72, false),
      saccade::emulation::map_once(saccade::attention_columns_cuda, Dtype::kBFloat16, 20, 72, true),
      saccade::emulation::map_once(saccade::attention_columns_cuda, Dtype::kFloat32, 70, 40, true),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
