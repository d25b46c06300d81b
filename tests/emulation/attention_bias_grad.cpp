// The gradient of a shared bias on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and
// a program that ThreadSanitizer can watch.
#include "../../kernels/cuda/attention_bias_grad.cu"

#include "attention_problem.h"
#include "problem.h"

extern "C" const char* emulated_attention_bias_grad(const saccade::AttentionBiasGradArgs* args) {
  return saccade::attention_bias_grad_cuda(*args, nullptr);
}

extern "C" int64_t emulated_attention_bias_grad_workspace(const saccade::AttentionBiasGradArgs* args) {
  return saccade::attention_bias_grad_workspace_cuda(*args);
}

namespace saccade {

const char* grade_once(int head_dim, int block, bool by_box, bool ordered, int skew) {
  emulation::AttentionProblem problem(head_dim, block, by_box, ordered, skew);
  AttentionBiasGradArgs args;
  args.in = problem.in;
  args.in.bias = problem.bias.data();
  args.in.bias_stride[2] = args.in.k_len;
  args.dout = problem.dout.data() + skew;
  for (int i = 0; i < 3; ++i) args.dout_stride[i] = problem.stride[i];
  args.lse = problem.lse.data(), args.delta = problem.delta.data();
  args.dbias = problem.dbias.data();
  args.workspace = problem.workspace.data();
  return attention_bias_grad_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  const char* errors[] = {
      saccade::grade_once(40, 64, true, false, 0),
      saccade::grade_once(64, 128, false, true, 1),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
