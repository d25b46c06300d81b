// row_similarity on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/row_similarity.cu"

#include "merge_problem.h"

extern "C" const char* emulated_row_similarity(const saccade::RowSimilarityArgs* args) {
  return saccade::row_similarity_cuda(*args, nullptr);
}

int main() {
  using namespace saccade;
  constexpr int kBatch = 2, kTokens = 11;
  for (auto [skew, width] : emulation::kRowMemory) {
    auto x = emulation::values(kBatch * kTokens * width, skew);
    auto y = emulation::values(width, skew);
    std::vector<float> out(kBatch * kTokens);
    RowSimilarityArgs args;
    args.x = x.data() + skew;
    args.x_stride[0] = kTokens * width;
    args.x_stride[1] = width;
    args.y = y.data() + skew;
    args.batch = kBatch;
    args.tokens = kTokens;
    args.channels = width;
    args.dtype = Dtype::kBFloat16;
    args.out = out.data();
    if (const char* error = row_similarity_cuda(args, nullptr)) return std::puts(error), 2;
  }
  return 0;
}
