// Launch of the gradient of merge: 16 kernels (dtype x access width, for max and for the others).
#include "merge.h"
#include "merge_bwd.cuh"

namespace saccade {

const char* merge_bwd_cuda(const MergeGradArgs& args, void* stream) {
  if (args.batch == 0 || args.tokens == 0 || args.width == 0) return nullptr;
  const bool is_max = args.mode == Reduce::kMax;
  Alignment alignment(args.dtype);
  align_rows(alignment, args.dy, args.dy_stride, args.batch, args.rows);
  if (is_max) align_rows(alignment, args.x, args.x_stride, args.batch, args.tokens);
  align_rows(alignment, args.dx, {0, 0}, 1, 1);
  alignment.columns(args.width);
  const int64_t places = is_max ? most(args.rows, args.tokens) : args.tokens;
  const RowPlan plan =
      make_row_plan(args.dtype, args.batch, places, args.width, /*rows_per_thread=*/is_max ? 1 : 2 * kGradUnroll);
  if (plan.total_blocks > INT32_MAX) return "merge_bwd: more than 2^31 - 1 tiles of rows";
  return with_storage(args.dtype, alignment.access(), "merge_bwd: the GPU kernels take float32, float16 and bfloat16",
                      [&](auto storage) {
                        using S = decltype(storage);
                        const auto kernel = is_max ? merge_max_bwd_kernel<typename S::T, S::kAccess>
                                                   : merge_bwd_kernel<typename S::T, S::kAccess>;
                        return launch(kernel, dim3(static_cast<unsigned>(plan.total_blocks)), row_plan_threads(plan), 0,
                                      stream, args, plan);
                      });
}

}  // namespace saccade
