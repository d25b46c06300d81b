// block_select on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#define SACCADE_CHOOSE_KEYS 64
#define SACCADE_CHOOSE_THREADS 64
#include "../../kernels/cuda/block_select.cu"

#include "problem.h"

extern "C" const char* emulated_block_select(const saccade::BlockSelectArgs* args) {
  return saccade::block_select_cuda(*args, nullptr);
}

namespace saccade {

const char* select_once(int q_blocks, int k_blocks, Choose mode, bool with_classes) {
  constexpr int kDim = 20;
  std::vector<float> q(q_blocks * kDim, 0.1f), k(k_blocks * kDim, 0.1f);
  for (int i = 0; i < k_blocks; ++i) k[i * kDim] = static_cast<float>(i * 7 % 101) / 8;
  std::vector<uint8_t> classes;
  for (int i = 0; i < q_blocks * k_blocks; ++i) classes.push_back(i % 5);
  std::vector<int32_t> counts(q_blocks), indices(q_blocks * k_blocks), p_counts = counts, p_indices = indices;
  BlockSelectArgs args;
  args.q = q.data();
  args.k = k.data();
  args.batch = args.heads = args.kv_heads = 1;
  args.head_dim = kDim;
  args.q_blocks = q_blocks;
  args.k_blocks = args.width = k_blocks;
  args.mode = mode;
  args.keep = 3;
  args.p = 0.4f;
  args.scale = 1.0f;
  args.counts = counts.data();
  args.indices = indices.data();
  if (with_classes) {
    args.classes = classes.data();
    args.p_counts = p_counts.data();
    args.p_indices = p_indices.data();
  }
  return block_select_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  using saccade::Choose;
  const char* errors[] = {
      saccade::select_once(3, 40, Choose::kShare, true),
      saccade::select_once(2, 90, Choose::kShare, true),
      saccade::select_once(1, 80, Choose::kTop, false),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
