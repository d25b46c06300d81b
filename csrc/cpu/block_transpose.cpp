// block_transpose on the CPU: a counting sort of each group of lists. Whole numbers alone: one source serves every
// processor.
#include "planning_kernels.h"

namespace saccade::cpu {

int64_t block_transpose_count(const BlockTransposeArgs& a, int64_t group) {
  int32_t* counts = a.t_counts + group * a.columns;
  for (int32_t c = 0; c < a.columns; ++c) counts[c] = 0;
  int64_t total = 0;
  for (int64_t list = group * a.rows; list < (group + 1) * a.rows; ++list) {
    const int64_t start = a.lists.starts[list], count = a.lists.counts[list];
    if (count <= 0) continue;
    if (start < 0 || start + count > a.entries) return -1;
    for (int64_t n = start; n < start + count; ++n) {
      const int32_t column = a.lists.indices[n];
      if (column < 0 || column >= a.columns) return -1;
      ++counts[column];
    }
    total += count;
  }
  return total;
}

void block_transpose(const BlockTransposeArgs& a, int64_t group, int64_t begin) {
  int32_t *starts = a.t_starts + group * a.columns, *counts = a.t_counts + group * a.columns;
  for (int32_t c = 0; c < a.columns; ++c) {
    starts[c] = static_cast<int32_t>(begin);
    begin += counts[c];
  }
  // While they are filled, starts point behind what each column holds.
  for (int64_t list = group * a.rows; list < (group + 1) * a.rows; ++list) {
    const int64_t start = a.lists.starts[list];
    for (int64_t n = start; n < start + a.lists.counts[list]; ++n) {
      const int32_t to = starts[a.lists.indices[n]]++;
      a.t_indices[to] = static_cast<int32_t>(list - group * a.rows);
      if (a.t_ids != nullptr) a.t_ids[to] = a.lists.ids[n];
    }
  }
  for (int32_t c = 0; c < a.columns; ++c) starts[c] -= counts[c];
}

}  // namespace saccade::cpu
