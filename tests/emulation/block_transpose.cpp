// block_transpose on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/block_transpose.cu"

#include "problem.h"

extern "C" const char* emulated_block_transpose(const saccade::BlockTransposeArgs* args) {
  return saccade::block_transpose_cuda(*args, nullptr);
}

extern "C" int64_t emulated_block_transpose_workspace(const saccade::BlockTransposeArgs* args) {
  return saccade::block_transpose_workspace_cuda(*args);
}

// 40 rows that each hold every third of 300 columns.
int main() {
  constexpr int kRows = 40, kColumns = 300, kWidth = kColumns / 3;
  std::vector<int32_t> starts, counts, indices, t_starts(kColumns), t_counts(kColumns);
  for (int row = 0; row < kRows; ++row) {
    starts.push_back(row * kWidth), counts.push_back(kWidth);
    for (int i = 0; i < kWidth; ++i) indices.push_back(i * 3 + row % 3);
  }
  std::vector<int32_t> t_indices(indices.size()), t_ids(indices.size());
  saccade::BlockTransposeArgs args;
  args.lists = {starts.data(), counts.data(), indices.data(), indices.data(), {0, 0}};
  args.groups = 1;
  args.rows = kRows;
  args.columns = kColumns;
  args.entries = static_cast<int64_t>(indices.size());
  args.t_starts = t_starts.data();
  args.t_counts = t_counts.data();
  args.t_indices = t_indices.data();
  args.t_ids = t_ids.data();
  std::vector<int32_t> workspace(saccade::block_transpose_workspace_cuda(args) / 4);
  args.workspace = workspace.data();
  if (const char* error = saccade::block_transpose_cuda(args, nullptr)) return std::puts(error), 2;
  return 0;
}
