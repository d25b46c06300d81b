// sparse_attention on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program
// that ThreadSanitizer can watch.
#include "../../kernels/cuda/sparse_attention.cu"

#include "attention_problem.h"
#include "problem.h"

extern "C" const char* emulated_sparse_attention(const saccade::SparseAttentionArgs* args) {
  return saccade::sparse_attention_cuda(*args, nullptr);
}

extern "C" int64_t emulated_sparse_attention_workspace(const saccade::SparseAttentionArgs* args) {
  return saccade::sparse_attention_workspace_cuda(*args);
}

namespace saccade {

const char* attend_once(int head_dim, int block, bool by_box, bool ordered, int skew) {
  emulation::AttentionProblem problem(head_dim, block, by_box, ordered, skew);
  SparseAttentionArgs args;
  args.in = problem.in;
  args.in.heads = args.in.kv_heads = 1;
  if (by_box) args.in.key_bias = problem.key_bias.data();
  args.out = problem.out.data() + skew;
  for (int i = 0; i < 3; ++i) args.out_stride[i] = problem.stride[i];
  args.lse = problem.lse.data();
  return sparse_attention_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  const char* errors[] = {
      saccade::attend_once(40, 64, true, false, 0),
      saccade::attend_once(72, 128, false, true, 1),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
