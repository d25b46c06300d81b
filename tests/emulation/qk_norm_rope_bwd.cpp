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
    for (int heads : {4, row ? 64 : 2}) {  // 64 heads of 512 columns make a row too long for registers
      emulation::Problem problem(Dtype::kBFloat16, heads, 2, /*tokens=*/3, heads == 64 ? 512 : 32, /*groups=*/2);
      problem.args.angles.interleaved = heads == 4;
      NormGradArgs args;
      args.norm.rope = problem.args;
      args.norm.row = row;
      args.q_dy = problem.q.data();
      args.k_dy = problem.k.data();
      for (int i = 0; i < 3; ++i) args.q_dy_stride[i] = problem.args.q.x_stride[i];
      for (int i = 0; i < 3; ++i) args.k_dy_stride[i] = problem.args.k.x_stride[i];
      std::vector<float> dweight(2 * heads * 512), workspace(qk_norm_rope_bwd_workspace_cuda(args) / 4);
      args.q_dweight = dweight.data();
      args.k_dweight = dweight.data() + heads * 512;
      args.workspace = workspace.data();
      if (const char* error = qk_norm_rope_bwd_cuda(args, nullptr)) return std::puts(error), 2;
    }
  }
  return 0;
}
