// Launch of the gradient of prompt_pool3d: 16 kernels (dtype x access width, for windows and for tokens).
#include "prim/rows.cuh"
#include "prompt_pool3d.h"
#include "prompt_pool3d_bwd.cuh"

namespace saccade {
namespace {

const char* kRefusal = "prompt_pool3d_bwd: the GPU kernels take float32, float16 and bfloat16";

}  // namespace

int64_t prompt_pool3d_bwd_workspace_cuda(const PromptPoolGradArgs& args) {
  return window_count(args.pool) * (2 * members_of_a_window(args.pool) + 1) * static_cast<int64_t>(sizeof(float));
}

const char* prompt_pool3d_bwd_cuda(const PromptPoolGradArgs& args, void* stream) {
  const PromptPoolArgs& pool = args.pool;
  const int64_t tokens = token_count(pool), windows = window_count(pool), members = members_of_a_window(pool);
  if (tokens == 0) return nullptr;
  if (tokens > INT32_MAX || windows > INT32_MAX) return "prompt_pool3d_bwd: more than 2^31 - 1 places";
  if (members > INT32_MAX) return "prompt_pool3d_bwd: more than 2^31 - 1 places in a window";
  Alignment alignment(pool.dtype);
  align_grid(alignment, pool);
  align_rows(alignment, args.dy, {0, 0}, 1, 1);
  align_rows(alignment, args.dx, {0, 0}, 1, 1);
  alignment.columns(pool.width);
  const int access = alignment.access();

  PoolGradPlan plan = {};
  const int64_t units = ceil_div(pool.width, 16 / element_bytes(pool.dtype));
  plan.lanes = static_cast<int32_t>(most(least(units, kWarp), 1));
  plan.slots = kPoolGradThreads / plan.lanes;
  plan.weight = static_cast<float*>(args.workspace);
  plan.dot = plan.weight + windows * members;
  plan.mean = plan.dot + windows * members;
  const int warps = static_cast<int>(least(ceil_div(members, kDots), kPoolGradThreads / kWarp));
  const dim3 token_grid(static_cast<unsigned>(ceil_div(tokens, plan.slots)));
  const int token_threads = static_cast<int>(ceil_div(static_cast<int64_t>(plan.lanes) * plan.slots, kWarp) * kWarp);
  return with_storage(pool.dtype, access, kRefusal, [&](auto storage) -> const char* {
    using S = decltype(storage);
    if (windows > 0) {
      const char* error = launch(prompt_pool3d_bwd_window_kernel<typename S::T, S::kAccess>,
                                 dim3(static_cast<unsigned>(windows)), warps * kWarp, 0, stream, args, plan);
      if (error != nullptr) return error;
    }
    return launch(prompt_pool3d_bwd_token_kernel<typename S::T, S::kAccess>, token_grid, token_threads, 0, stream, args,
                  plan);
  });
}

}  // namespace saccade
