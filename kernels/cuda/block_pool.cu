// Launch of block_pool: lanes and slots for a row, and the 3 kernels.
#include "block_pool.cuh"
#include "block_pool.h"

namespace saccade {
namespace {

template <typename T>
const char* launch_pool(const BlockPoolArgs& args, void* stream) {
  const int64_t units = ceil_div(args.head_dim, T::kVector);
  BlockPoolPlan plan = {};
  plan.lanes = static_cast<int32_t>(least(units, kPoolThreads));
  plan.slots = static_cast<int32_t>(least(kPoolThreads / plan.lanes, args.block));
  plan.tiles = static_cast<int32_t>(ceil_div(units, plan.lanes));
  Alignment alignment(args.dtype);
  alignment.tensor(args.x, args.x_stride, args.batch, args.heads, args.tokens);
  plan.aligned = alignment.access() == T::kVector;
  const int64_t grid = args.batch * args.heads * args.blocks * plan.tiles;
  if (grid > 0x7fffffff) return "block_pool: more than 2^31 - 1 blocks";
  return launch(block_pool_kernel<T>, dim3(static_cast<unsigned>(grid)), kPoolThreads, 0, stream, args, plan);
}

}  // namespace

int64_t block_pool_workspace_cuda(const BlockPoolArgs&) { return 0; }

const char* block_pool_cuda(const BlockPoolArgs& args, void* stream) {
  if (args.block < 1) return "block_pool: a block has at least one token";
  if (args.batch == 0 || args.heads == 0 || args.blocks == 0 || args.head_dim == 0) return nullptr;
  if (args.dtype == Dtype::kFloat32) return launch_pool<Float32>(args, stream);
  if (args.dtype == Dtype::kFloat16) return launch_pool<Float16>(args, stream);
  if (args.dtype == Dtype::kBFloat16) return launch_pool<BFloat16>(args, stream);
  return "block_pool: the GPU kernels take float32, float16 and bfloat16";
}

}  // namespace saccade
