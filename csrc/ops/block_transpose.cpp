// saccade::block_transpose
#include <vector>

#include "../cpu/planning_kernels.h"
#include "../util/parallel.h"
#include "planning_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/block_transpose.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, BlockTransposeArgs& args) {
  // Lengths of the columns of each group, then where each begins, then its entries.
  const int64_t grain = grain_of(8 * (args.entries / args.groups + args.columns));
  std::vector<int64_t> entries(args.groups);
  for_items(args.groups, grain, 0, [&](int64_t g, float*) { entries[g] = cpu::block_transpose_count(args, g); });
  int64_t begin = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    STD_TORCH_CHECK(entries[g] >= 0, "starts, counts, indices: an entry lies outside of the ", args.entries,
                    " entries or the ", args.columns, " columns");
    const int64_t count = entries[g];
    entries[g] = begin;
    begin += count;
    STD_TORCH_CHECK(begin <= args.entries, "starts, counts: expected lists that do not overlap in storage");
  }
  for_items(args.groups, grain, 0, [&](int64_t g, float*) { cpu::block_transpose(args, g, entries[g]); });
  for (int64_t i = begin; i < args.entries; ++i) {
    args.t_indices[i] = 0;
    if (args.t_ids != nullptr) args.t_ids[i] = 0;
  }
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& starts, BlockTransposeArgs& args) {
  Tensor workspace = torch::stable::new_empty(starts, {block_transpose_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(starts, "block_transpose", block_transpose_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, BlockTransposeArgs&);
using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <Run kRun>
Lists run(const Tensor& starts, const Tensor& counts, const Tensor& indices, const OptionalTensor& ids,
          int64_t columns) {
  for (const Tensor* t : {&starts, &counts}) {
    check_dense(*t, ScalarType::Int, starts, "starts, counts");
    STD_TORCH_CHECK(
        t->dim() == 3 && t->size(0) == starts.size(0) && t->size(1) == starts.size(1) && t->size(2) == starts.size(2),
        "starts, counts: expected [1 or B, 1 or H, rows]");
  }
  check_dense(indices, ScalarType::Int, starts, "indices");
  BlockTransposeArgs args;
  args.groups = starts.size(0) * starts.size(1);
  args.rows = small(starts.size(2), "starts");
  args.columns = small(columns, "columns");
  args.entries = small(indices.numel(), "indices");
  args.lists.starts = data_of<const int32_t>(starts);
  args.lists.counts = data_of<const int32_t>(counts);
  args.lists.indices = data_of<const int32_t>(indices);
  args.lists.stride[0] = starts.size(1);
  args.lists.stride[1] = 1;
  if (ids.has_value()) {
    check_dense(*ids, ScalarType::Int, starts, "ids");
    STD_TORCH_CHECK(ids->numel() == args.entries, "ids: expected the shape of indices");
    args.lists.ids = data_of<const int32_t>(*ids);
  }
  Tensor t_starts = torch::stable::new_empty(starts, {starts.size(0), starts.size(1), columns});
  Tensor t_counts = torch::stable::empty_like(t_starts);
  Tensor t_indices = torch::stable::new_empty(starts, {args.entries});
  Tensor t_ids = torch::stable::new_empty(starts, {ids.has_value() ? args.entries : 0});
  args.t_starts = data_of<int32_t>(t_starts);
  args.t_counts = data_of<int32_t>(t_counts);
  args.t_indices = data_of<int32_t>(t_indices);
  args.t_ids = ids.has_value() ? data_of<int32_t>(t_ids) : nullptr;
  if (args.groups > 0) kRun(starts, args);
  return {t_starts, t_counts, t_indices, t_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("block_transpose", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("block_transpose", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
