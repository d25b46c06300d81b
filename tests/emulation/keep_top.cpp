// keep_top on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#define SACCADE_SELECT_THREADS 96
#include "../../kernels/cuda/keep_top.cu"

#include "problem.h"

extern "C" const char* emulated_keep_top(const saccade::KeepTopArgs* args) {
  return saccade::keep_top_cuda(*args, nullptr);
}

int main() {
  std::vector<float> scores(2 * 500);
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<float>(i * 7 % 101 / 3);
  std::vector<int64_t> out(2 * 123);
  saccade::KeepTopArgs args;
  args.scores = scores.data();
  args.score_stride = 500;
  args.batch = 2;
  args.tokens = 500;
  args.k = 123;
  args.out = out.data();
  if (const char* error = saccade::keep_top_cuda(args, nullptr)) return std::puts(error), 2;
  return 0;
}
