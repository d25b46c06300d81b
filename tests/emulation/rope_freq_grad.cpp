// rope_freq_grad on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/rope_freq_grad.cu"

#include "problem.h"

extern "C" const char* emulated_rope_freq_grad(const saccade::FreqGradArgs* args) {
  return saccade::rope_freq_grad_cuda(*args, nullptr);
}

extern "C" int64_t emulated_rope_freq_grad_workspace(const saccade::FreqGradArgs* args) {
  return saccade::rope_freq_grad_workspace_cuda(*args);
}

int main() {
  using namespace saccade;
  for (auto [skew, head_dim] : emulation::kMemory) {
    emulation::Problem problem(Dtype::kBFloat16, /*heads=*/4, /*kv_heads=*/2, /*tokens=*/70, head_dim, /*groups=*/2,
                               skew);
    problem.args.angles.interleaved = skew != 0;
    FreqGradArgs args;
    args.rope = problem.args;
    args.q_dx = problem.q.data() + skew;
    args.k_dx = problem.k.data() + skew;
    for (int i = 0; i < 3; ++i) args.q_dx_stride[i] = problem.args.q.x_stride[i];
    for (int i = 0; i < 3; ++i) args.k_dx_stride[i] = problem.args.k.x_stride[i];
    std::vector<float> out(2 * 2 * head_dim / 2), workspace(rope_freq_grad_workspace_cuda(args) / 4);
    args.out = out.data();
    args.workspace = workspace.data();
    if (const char* error = rope_freq_grad_cuda(args, nullptr)) return std::puts(error), 2;
  }
  return 0;
}
