// Launch of block_transpose: four kernels, one after the other.
#include "block_transpose.cuh"
#include "block_transpose.h"

namespace saccade {
namespace {

TransposePlan transpose_plan(const BlockTransposeArgs& args) {
  TransposePlan plan = {};
  plan.words = static_cast<int32_t>(ceil_div(args.rows, kMarkRows));
  plan.tiles = static_cast<int32_t>(ceil_div(args.columns, kTransposeThreads));
  plan.spans = static_cast<int32_t>(ceil_div(args.columns, kMarkColumns));
  return plan;
}

int64_t mark_count(const BlockTransposeArgs& args, const TransposePlan& plan) {
  return args.groups * plan.words * args.columns;
}

}  // namespace

int64_t block_transpose_workspace_cuda(const BlockTransposeArgs& args) {
  const TransposePlan plan = transpose_plan(args);
  return 4 * (2 * mark_count(args, plan) + args.groups * plan.tiles);
}

const char* block_transpose_cuda(const BlockTransposeArgs& args, void* stream) {
  if (args.entries > 0x7fffffff) return "block_transpose: more than 2^31 - 1 entries";
  if (args.groups == 0 || args.columns == 0) return nullptr;
  TransposePlan plan = transpose_plan(args);
  const int64_t marks = mark_count(args, plan), items = args.groups * plan.words;
  if (items * plan.spans > 0x7fffffff || args.groups * plan.tiles > 0x7fffffff) {
    return "block_transpose: more than 2^31 - 1 blocks";
  }
  plan.marks = static_cast<uint32_t*>(args.workspace);
  plan.before = static_cast<int32_t*>(args.workspace) + marks;
  plan.tile_sums = plan.before + marks;
  const dim3 by_row(static_cast<unsigned>(items)), by_column(static_cast<unsigned>(args.groups * plan.tiles));
  if (items > 0) {
    const size_t shared = 4 * least(args.columns, kMarkColumns);
    const dim3 grid(static_cast<unsigned>(items * plan.spans));
    if (const char* error = launch(block_mark_kernel, grid, kTransposeThreads, shared, stream, args, plan))
      return error;
  }
  if (const char* error = launch(block_count_kernel, by_column, kTransposeThreads, 0, stream, args, plan)) return error;
  if (const char* error = launch(block_place_kernel, by_column, kTransposeThreads, 0, stream, args, plan)) return error;
  if (items == 0) return nullptr;
  return launch(block_fill_kernel, by_row, kTransposeThreads, 0, stream, args, plan);
}

}  // namespace saccade
