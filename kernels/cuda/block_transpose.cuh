// block_transpose: lists of blocks by column, rows ascending; specification
// python/saccade/reference/block_transpose.py.
//
//   mark    32 rows of a group: a word for every column, bit r set where row r holds it
//   count   for every column: bits before each word, and its length
//   place   where each column begins: lengths before it, of all groups
//   fill    each entry goes to begin of its column + bits before its word + bits below its own
//
// Whole numbers alone, and every place is computed from them: no order of arrival counts. An entry outside the columns
// is passed over. grid: of mark and fill (words x groups), of count and place (tiles of columns x groups).
#pragma once
#include "../block_args.h"
#include "prim/launch.cuh"

namespace saccade {

constexpr int kTransposeThreads = 256, kTransposeWarps = kTransposeThreads / kWarp;
constexpr int kMarkRows = 32;
constexpr int kMarkBytes = 48 * 1024;  // of words in shared memory
constexpr int kMarkColumns = kMarkBytes / 4;

struct TransposePlan {
  int32_t words;       // of a column: rows / 32
  int32_t tiles;       // of kTransposeThreads columns
  int32_t spans;       // of kMarkColumns columns; a block of mark takes one
  uint32_t* marks;     // [groups, words, columns]
  int32_t* before;     // [groups, words, columns]
  int32_t* tile_sums;  // [groups, tiles]
};

__device__ inline void transpose_barrier() {
#ifndef SACCADE_MUTANT_NO_TRANSPOSE_BARRIER
  __syncthreads();
#endif
}

// visit(row of the word, column, place in indices) for the entries of a word's rows: a warp takes a row.
template <typename Visit>
__device__ __forceinline__ void visit_entries(const BlockTransposeArgs& args, int64_t group, int64_t first_row,
                                              Visit visit) {
  const int rows = static_cast<int>(min(static_cast<int64_t>(kMarkRows), args.rows - first_row));
  for (int r = threadIdx.x / kWarp; r < rows; r += kTransposeWarps) {
    const int64_t list = group * args.rows + first_row + r, start = args.lists.starts[list];
    const int64_t end = min(start + args.lists.counts[list], args.entries);
    for (int64_t at = start + threadIdx.x % kWarp; at < end; at += kWarp) {
      const int32_t column = args.lists.indices[at];
      if (column >= 0 && column < args.columns) visit(r, column, at);
    }
  }
}

static __global__ void __launch_bounds__(kTransposeThreads)
    block_mark_kernel(const __grid_constant__ BlockTransposeArgs args, const __grid_constant__ TransposePlan plan) {
  SACCADE_SHARED(shared);
  uint32_t* mark = reinterpret_cast<uint32_t*>(shared);
  const int64_t item = blockIdx.x / plan.spans, group = item / plan.words, word = item - group * plan.words;
  const int32_t first = static_cast<int32_t>(blockIdx.x % plan.spans) * kMarkColumns;
  const int32_t columns = min(kMarkColumns, args.columns - first);
  for (int c = threadIdx.x; c < columns; c += kTransposeThreads) mark[c] = 0;
  transpose_barrier();
  visit_entries(args, group, word * kMarkRows, [&](int row, int32_t column, int64_t) {
    if (column >= first && column - first < columns) atomicOr(&mark[column - first], 1u << row);
  });
  transpose_barrier();
  uint32_t* out = plan.marks + item * args.columns + first;
  for (int c = threadIdx.x; c < columns; c += kTransposeThreads) out[c] = mark[c];
}

// Sum over the block, to all threads, and that over the threads before this one.
__device__ __forceinline__ int32_t transpose_sum(int32_t value, int32_t& before) {
  __shared__ int32_t sums[kTransposeWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t upto = value;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, upto, delta);
    if (lane >= delta) upto += other;
  }
  transpose_barrier();  // a sum before this one has been read
  if (lane == kWarp - 1) sums[warp] = upto;
  transpose_barrier();
  int32_t all = 0;
  before = upto - value;
#pragma unroll
  for (int w = 0; w < kTransposeWarps; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  return all;
}

static __global__ void __launch_bounds__(kTransposeThreads)
    block_count_kernel(const __grid_constant__ BlockTransposeArgs args, const __grid_constant__ TransposePlan plan) {
  const int64_t group = blockIdx.x / plan.tiles;
  const int32_t column = static_cast<int32_t>(blockIdx.x % plan.tiles) * kTransposeThreads + threadIdx.x;
  int32_t count = 0, before;
  if (column < args.columns) {
    int64_t at = group * plan.words * args.columns + column;
#pragma unroll 4
    for (int word = 0; word < plan.words; ++word, at += args.columns) {
      plan.before[at] = count;
      count += __popc(plan.marks[at]);
    }
    args.t_counts[group * args.columns + column] = count;
  }
  const int32_t all = transpose_sum(count, before);
  if (threadIdx.x == 0) plan.tile_sums[blockIdx.x] = all;
}

static __global__ void __launch_bounds__(kTransposeThreads)
    block_place_kernel(const __grid_constant__ BlockTransposeArgs args, const __grid_constant__ TransposePlan plan) {
  const int64_t group = blockIdx.x / plan.tiles, tiles = args.groups * plan.tiles;
  const int32_t column = static_cast<int32_t>(blockIdx.x % plan.tiles) * kTransposeThreads + threadIdx.x;
  int32_t mine = 0, later = 0, before;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kTransposeThreads) {
    (tile < blockIdx.x ? mine : later) += plan.tile_sums[tile];
  }
  mine = transpose_sum(mine, before);
  const int64_t total = mine + transpose_sum(later, before);
  const int64_t at = group * args.columns + column;
  transpose_sum(column < args.columns ? args.t_counts[at] : 0, before);
  if (column < args.columns) args.t_starts[at] = mine + before;
  const int64_t step = tiles * kTransposeThreads;
  for (int64_t i = total + static_cast<int64_t>(blockIdx.x) * kTransposeThreads + threadIdx.x; i < args.entries;
       i += step) {
    args.t_indices[i] = 0;
    if (args.t_ids != nullptr) args.t_ids[i] = 0;
  }
}

static __global__ void __launch_bounds__(kTransposeThreads)
    block_fill_kernel(const __grid_constant__ BlockTransposeArgs args, const __grid_constant__ TransposePlan plan) {
  const int64_t item = blockIdx.x, group = item / plan.words, first_row = (item - group * plan.words) * kMarkRows;
  visit_entries(args, group, first_row, [&](int row, int32_t column, int64_t from) {
    const int64_t at = item * args.columns + column;
    const int64_t to = static_cast<int64_t>(args.t_starts[group * args.columns + column]) + plan.before[at] +
                       __popc(plan.marks[at] & ((1u << row) - 1));
    if (to >= args.entries) return;  // only where lists share their entries
    args.t_indices[to] = static_cast<int32_t>(first_row + row);
    if (args.t_ids != nullptr) args.t_ids[to] = args.lists.ids[from];
  });
}

}  // namespace saccade
