// Launch of prompt_pool3d: 8 kernels (dtype x access width).
#include "prim/rows.cuh"
#include "prompt_pool3d.cuh"
#include "prompt_pool3d.h"

namespace saccade {

const char* prompt_pool3d_cuda(const PromptPoolArgs& args, void* stream) {
  const int64_t windows = window_count(args);
  if (windows == 0 || args.width == 0) return nullptr;
  if (members_of_a_window(args) > INT32_MAX) return "prompt_pool3d: more than 2^31 - 1 places in a window";
  Alignment alignment(args.dtype);
  align_grid(alignment, args);
  align_rows(alignment, args.y, {0, 0}, 1, 1);
  alignment.columns(args.width);

  PoolPlan plan = {};
  const int64_t units = ceil_div(args.width, 16 / element_bytes(args.dtype));
  plan.slots = members_of_a_window(args) > kPoolChunk ? kPoolSlots : 1;
  plan.tiles = static_cast<uint32_t>(ceil_div(units, kPoolThreads / plan.slots));
  plan.lanes = static_cast<int32_t>(ceil_div(units, plan.tiles));
  const int64_t blocks = windows * plan.tiles;
  if (blocks > INT32_MAX) return "prompt_pool3d: more than 2^31 - 1 tiles of windows";
  const int threads = static_cast<int>(ceil_div(static_cast<int64_t>(plan.lanes) * plan.slots, kWarp) * kWarp);
  return with_storage(args.dtype, alignment.access(),
                      "prompt_pool3d: the GPU kernels take float32, float16 and bfloat16", [&](auto storage) {
                        using S = decltype(storage);
                        return launch(prompt_pool3d_kernel<typename S::T, S::kAccess>,
                                      dim3(static_cast<unsigned>(blocks)), threads, 0, stream, args, plan);
                      });
}

}  // namespace saccade
