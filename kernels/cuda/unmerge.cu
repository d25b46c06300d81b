// Launch of unmerge: 8 kernels (dtype x access width).
#include "unmerge.cuh"
#include "unmerge.h"

namespace saccade {

const char* unmerge_cuda(const UnmergeArgs& args, void* stream) {
  if (args.batch == 0 || args.tokens == 0 || args.width == 0) return nullptr;
  Alignment alignment(args.dtype);
  align_rows(alignment, args.y, args.y_stride, args.batch, args.rows);
  align_rows(alignment, args.residual, args.residual_stride, args.batch, args.tokens);
  align_rows(alignment, args.gate, args.gate_stride, args.batch, args.tokens);
  align_rows(alignment, args.out, {0, 0}, 1, 1);
  alignment.columns(args.width);
  const RowPlan plan = make_row_plan(args.dtype, args.batch, args.tokens, args.width,
                                     /*rows_per_thread=*/2 * kUnmergeUnroll);
  if (plan.total_blocks > INT32_MAX) return "unmerge: more than 2^31 - 1 tiles of tokens";
  return with_storage(
      args.dtype, alignment.access(), "unmerge: the GPU kernels take float32, float16 and bfloat16", [&](auto storage) {
        using S = decltype(storage);
        return launch(unmerge_kernel<typename S::T, S::kAccess>, dim3(static_cast<unsigned>(plan.total_blocks)),
                      row_plan_threads(plan), 0, stream, args, plan);
      });
}

}  // namespace saccade
