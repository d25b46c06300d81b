// The gradient of qk_norm_rope on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a
// program that ThreadSanitizer can watch.
#include "../../kernels/cuda/qk_norm_rope_bwd.cu"

#include "problem.h"

extern "C" const char* emulated_qk_norm_rope_bwd(const saccade::NormGradArgs* args) {
  return saccade::qk_norm_rope_bwd_cuda(*args, nullptr);
}

extern "C" int64_t emulated_qk_norm_rope_bwd_workspace(const saccade::NormGradArgs* args) {
  return saccade::qk_norm_rope_bwd_workspace_cuda(*args);
}

int main() {
  using namespace saccade;
  for (bool row : {false, true}) {
    for (auto [skew, head_dim] : emulation::kMemory) {
      emulation::Problem problem(Dtype::kBFloat16, /*heads=*/4, /*kv_heads=*/2, /*tokens=*/row ? 3 : 80, head_dim,
                                 /*groups=*/2, skew);
      problem.args.angles.interleaved = skew != 0;
      NormGradArgs args;
      args.norm.rope = problem.args;
      args.norm.row = row;
      args.q_dy = problem.q.data() + skew;
      args.k_dy = problem.k.data() + skew;
      for (int i = 0; i < 3; ++i) args.q_dy_stride[i] = problem.args.q.x_stride[i];
      for (int i = 0; i < 3; ++i) args.k_dy_stride[i] = problem.args.k.x_stride[i];
      std::vector<float> dweight(2 * 4 * 32), workspace(qk_norm_rope_bwd_workspace_cuda(args) / 4);
      // The second pass has 512 threads, which cost the sanitizer seconds: a few times are enough.
      if (skew == 0) args.q_dweight = dweight.data();
      if (head_dim == 32 && row) args.k_dweight = dweight.data() + 4 * 32;
      args.workspace = workspace.data();
      if (const char* error = qk_norm_rope_bwd_cuda(args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
