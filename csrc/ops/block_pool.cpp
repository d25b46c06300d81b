// saccade::block_pool
#include "../cpu/planning_kernels.h"
#include "../util/parallel.h"
#include "planning_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/block_pool.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, const BlockPoolArgs& args) {
  const cpu::PlanningKernels& kernels = cpu::planning_kernels();
  const int64_t per_head = args.blocks, per_sample = per_head * args.heads;
  for_items(args.batch * per_sample, grain_of(int64_t{args.block} * args.head_dim * 4),
            cpu::kPoolChains * cpu::pool_pitch(args.head_dim), [&](int64_t item, float* space) {
              kernels.block_pool(args, item / per_sample, item % per_sample / per_head, item % per_head, space);
            });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& x, const BlockPoolArgs& args) { call_cuda(x, "block_pool", block_pool_cuda, args); }
#endif

using Run = void (*)(const Tensor&, const BlockPoolArgs&);

template <Run kRun>
Tensor run(const Tensor& x, const OptionalTensor& order, int64_t block) {
  BlockPoolArgs args;
  args.dtype = check_rows(x, "x", args.x_stride);
  args.x = x.data_ptr();
  args.batch = x.size(0);
  args.heads = small(x.size(1), "x");
  args.tokens = x.size(2);
  args.head_dim = small(x.size(3), "x");
  STD_TORCH_CHECK(block >= 1 && block <= INT32_MAX, "block: expected at least 1, got ", block);
  args.block = static_cast<int32_t>(block);
  int64_t positions = (args.tokens + block - 1) / block * block;
  if (order.has_value()) {
    check_dense(*order, ScalarType::Int, x, "order");
    STD_TORCH_CHECK(order->dim() == 3 && order->size(2) % block == 0, "order: expected [1 or B, 1 or H, n * block]");
    shared_strides(*order, args.batch, args.heads, "order", args.order.stride);
    args.order.data = data_of<const int32_t>(*order);
    positions = order->size(2);
  }
  args.blocks = small(positions / block, "order");
  Tensor out = torch::stable::new_empty(x, {args.batch, args.heads, args.blocks, args.head_dim}, ScalarType::Float);
  args.out = data_of<float>(out);
  if (out.numel() > 0) kRun(x, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("block_pool", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("block_pool", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
