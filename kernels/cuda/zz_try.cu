// Launch of merge: the 16 kernels (dtype x access width x adding or picking).
#include "/tmp/merge_5.cuh"
#include "merge.h"

namespace saccade {

const char* merge_cuda(const MergeArgs& args, void* stream) {
  if (args.batch == 0 || args.rows == 0) return nullptr;
  Alignment alignment(args.dtype);
  align_rows(alignment, args.x, args.x_stride, args.batch, args.tokens);
  align_rows(alignment, args.y, {0, 0}, 1, 1);
  alignment.columns(args.width);
  const RowPlan plan = make_row_plan(args.dtype, args.batch, args.rows, args.width, /*rows_per_thread=*/2);
  if (plan.total_blocks > INT32_MAX) return "merge: more than 2^31 - 1 tiles of rows";
  const bool picks = args.mode == Reduce::kMax || args.mode == Reduce::kReplace;
  return with_storage(
      args.dtype, alignment.access(), "merge: the GPU kernels take float32, float16 and bfloat16", [&](auto storage) {
        using S = decltype(storage);
        const auto kernel =
            picks ? merge_kernel<typename S::T, S::kAccess, true> : merge_kernel<typename S::T, S::kAccess, false>;
        return launch(kernel, dim3(static_cast<unsigned>(plan.total_blocks)), row_plan_threads(plan), 0, stream, args,
                      plan);
      });
}

}  // namespace saccade
