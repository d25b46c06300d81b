// merge_plan on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#define SACCADE_SELECT_THREADS 96
#include "../../kernels/cuda/merge_plan.cu"

#include "problem.h"

extern "C" const char* emulated_merge_plan(const saccade::MergePlanArgs* args) {
  return saccade::merge_plan_cuda(*args, nullptr);
}

extern "C" int64_t emulated_merge_plan_workspace(const saccade::MergePlanArgs* args) {
  return saccade::merge_plan_workspace_cuda(*args);
}

int main() {
  using namespace saccade;
  for (const bool whole_batch : {false, true}) {
    // Every second token is a source, some share a destination, scores are equal in threes; more than 256 rows.
    constexpr int kBatch = 2, kTokens = 600, kRows = 380;
    std::vector<float> score(kBatch * kTokens);
    std::vector<int32_t> target(kBatch * kTokens, -1), inverse(kBatch * kTokens), ptr(kBatch * (kRows + 1));
    std::vector<int32_t> members(kBatch * kTokens), head(kBatch * kRows), counts(kBatch);
    for (int i = 0; i < kBatch * kTokens; ++i) {
      score[i] = static_cast<float>(i * 7 % 101 / 3);
      if (i % 2) target[i] = i * 5 % kTokens / 8 * 8;
      if (i % 50 == 0) target[i] = -2;
    }
    MergePlanArgs args;
    args.score = score.data();
    args.target = target.data();
    args.batch = kBatch;
    args.tokens = kTokens;
    args.rows = kRows;
    args.r = whole_batch ? 400 : 190;
    args.whole_batch = whole_batch;
    args.inverse = inverse.data();
    args.ptr = ptr.data();
    args.members = members.data();
    args.head = head.data();
    args.counts = counts.data();
    std::vector<int64_t> workspace(merge_plan_workspace_cuda(args) / 8 + 1);
    args.workspace = workspace.data();
    if (const char* error = merge_plan_cuda(args, nullptr)) return std::puts(error), 2;
  }
  return 0;
}
