// The gradients of sparse_attention on the CPU, from the very sources that nvcc compiles: a shared library for ctypes,
// and a program that ThreadSanitizer can watch.
#define SACCADE_ATTENTION_SHARED saccade::attention_shared
namespace saccade {
inline long attention_shared = 100 * 1024;  // decides between one stage and two
}
#include "../../kernels/cuda/sparse_attention_bwd.cu"

#include "attention_problem.h"
#include "problem.h"

extern "C" const char* emulated_sparse_attention_bwd(const saccade::SparseAttentionGradArgs* args) {
  return saccade::sparse_attention_bwd_cuda(*args, nullptr);
}

extern "C" int64_t emulated_sparse_attention_bwd_workspace(const saccade::SparseAttentionGradArgs* args) {
  return saccade::sparse_attention_bwd_workspace_cuda(*args);
}

extern "C" void emulated_multiprocessor(int bytes) { saccade::attention_shared = bytes; }

namespace saccade {

// One key head.
const char* attend_once(int head_dim, int block, bool by_box, bool ordered, int skew, int heads) {
  emulation::AttentionProblem problem(head_dim, block, by_box, ordered, skew);
  SparseAttentionGradArgs args;
  args.in = problem.in;
  args.in.heads = heads, args.in.kv_heads = 1;
  if (by_box) args.in.key_bias = problem.key_bias.data(), args.dkey_bias = problem.dkey_bias.data();
  args.dout = problem.dout.data() + skew, args.out = problem.out.data() + skew;
  args.dq = problem.dq.data() + skew, args.dk = problem.dk.data() + skew, args.dv = problem.dv.data() + skew;
  for (int i = 0; i < 3; ++i) {
    args.dout_stride[i] = args.out_stride[i] = problem.stride[i];
    args.dq_stride[i] = args.dk_stride[i] = args.dv_stride[i] = problem.stride[i];
  }
  args.lse = problem.lse.data(), args.dlse = problem.dlse.data(), args.delta = problem.delta.data();
  return sparse_attention_bwd_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  const char* first = saccade::attend_once(40, 64, true, false, 0, 2);
  saccade::attention_shared = 82 * 1024;  // two blocks of one stage
  for (const char* error : {first, saccade::attend_once(64, 128, false, true, 1, 1)}) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
