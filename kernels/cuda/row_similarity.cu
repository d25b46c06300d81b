// Launch of row_similarity: 8 kernels (dtype x access width).
#include "prim/rows.cuh"
#include "row_similarity.cuh"
#include "row_similarity.h"

namespace saccade {

const char* row_similarity_cuda(const RowSimilarityArgs& args, void* stream) {
  if (args.batch == 0 || args.tokens == 0) return nullptr;
  Alignment alignment(args.dtype);
  align_rows(alignment, args.x, args.x_stride, args.batch, args.tokens);
  align_rows(alignment, args.y, args.y_stride, args.batch, args.tokens);
  alignment.columns(args.channels);
  SimilarityPlan plan = {1, kSimilarityThreads, 1};
  const int64_t units = ceil_div(args.channels, 16 / element_bytes(args.dtype));
  while (plan.lanes < units && plan.lanes < kWarp) plan.lanes *= 2;
  plan.slots = kSimilarityThreads / plan.lanes;
  plan.row_blocks = static_cast<uint32_t>(ceil_div(args.tokens, plan.slots));
  const int64_t blocks = args.batch * plan.row_blocks;
  if (blocks > INT32_MAX) return "row_similarity: more than 2^31 - 1 blocks of rows";
  return with_storage(args.dtype, alignment.access(),
                      "row_similarity: the GPU kernels take float32, float16 and bfloat16", [&](auto storage) {
                        using S = decltype(storage);
                        return launch(row_similarity_kernel<typename S::T, S::kAccess>,
                                      dim3(static_cast<unsigned>(blocks)), kSimilarityThreads, 0, stream, args, plan);
                      });
}

}  // namespace saccade
