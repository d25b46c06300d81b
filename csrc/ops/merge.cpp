// saccade::merge, merge_bwd
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/merge.h"
#endif

namespace saccade {
namespace {

int64_t row_space(int64_t width) { return 3 * cpu::ceil_div(width, 64) * 64; }

void cpu_run(const Tensor&, const MergeArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  for_items(args.batch * args.rows, grain_of(args.width * 8), row_space(args.width),
            [&](int64_t item, float* space) { kernels.merge(args, item / args.rows, item % args.rows, space); });
}

void cpu_run_backward(const Tensor&, const MergeGradArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  if (args.mode == Reduce::kMax) {
    for_items(args.batch * args.rows, grain_of(args.width * 8), row_space(args.width), [&](int64_t item, float* space) {
      kernels.merge_max_bwd(args, item / args.rows, item % args.rows, space);
    });
  }
  for_items(args.batch * args.tokens, grain_of(args.width * 8), 0, [&](int64_t item, float*) {
    const int64_t batch = item / args.tokens, token = item % args.tokens;
    const bool dropped = args.plan.inverse[(args.plan.shared ? 0 : batch * args.tokens) + token] < 0;
    if (args.mode != Reduce::kMax || dropped) kernels.merge_bwd(args, batch, token);
  });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& x, const MergeArgs& args) { call_cuda(x, "merge", merge_cuda, args); }
void cuda_run_backward(const Tensor& dy, const MergeGradArgs& args) {
  call_cuda(dy, "merge_bwd", merge_bwd_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, const MergeArgs&);
using RunBackward = void (*)(const Tensor&, const MergeGradArgs&);

template <Run kRun>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight, const Tensor& ptr,
                                           const Tensor& members, const Tensor& head, int64_t mode) {
  MergeArgs args;
  args.dtype = check_values(x, "x");
  args.mode = reduce_of(mode);
  args.x = x.data_ptr();
  copy_used_strides(x, args.x_stride);
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.width = x.size(2);
  args.plan = plan_of(x, ptr, members, head, args.batch);
  STD_TORCH_CHECK(members.size(1) == args.tokens, "members: expected ", args.tokens, " tokens, got ", members.size(1));
  args.rows = head.size(1);
  args.weight = weights_of(weight, x, args.tokens, args.weight_stride);
  Tensor y = torch::stable::new_empty(x, {args.batch, args.rows, args.width});
  Tensor total = torch::stable::new_empty(x, {args.batch, args.rows}, ScalarType::Float);
  Tensor log_total = torch::stable::new_empty(x, {args.batch, args.rows}, ScalarType::Float);
  args.y = y.data_ptr();
  args.total = data_of<float>(total);
  args.log_total = data_of<float>(log_total);
  if (args.batch * args.rows > 0) kRun(x, args);
  return {y, total, log_total};
}

template <RunBackward kRun>
Tensor backward(const Tensor& dy, const OptionalTensor& x, const OptionalTensor& weight, const Tensor& total,
                const Tensor& inverse, const Tensor& ptr, const Tensor& members, const Tensor& head, int64_t mode) {
  MergeGradArgs args;
  args.dtype = check_values(dy, "dy");
  args.mode = reduce_of(mode);
  args.batch = dy.size(0);
  args.rows = dy.size(1);
  args.width = dy.size(2);
  args.plan = plan_of(dy, ptr, members, head, args.batch);
  args.tokens = members.size(1);
  STD_TORCH_CHECK(head.size(1) == args.rows, "head: expected ", args.rows, " rows, got ", head.size(1));
  check_table(inverse, ScalarType::Int, dy, "inverse", {head.size(0), args.tokens});
  STD_TORCH_CHECK(inverse.size(0) == head.size(0), "inverse: expected the batch of head");
  args.plan.inverse = data_of<const int32_t>(inverse);
  args.dy = dy.data_ptr();
  copy_used_strides(dy, args.dy_stride);
  STD_TORCH_CHECK(args.mode != Reduce::kMax || x.has_value(), "x: expected where mode is max");
  if (args.mode == Reduce::kMax) {
    STD_TORCH_CHECK(check_values(*x, "x") == args.dtype && x->size(0) == args.batch && x->size(1) == args.tokens &&
                        x->size(2) == args.width && x->device() == dy.device(),
                    "x: expected [B, N, D] of dy's dtype and device");
    args.x = x->data_ptr();
    copy_used_strides(*x, args.x_stride);
  }
  args.weight = weights_of(weight, dy, args.tokens, args.weight_stride);
  check_table(total, ScalarType::Float, dy, "total", {args.batch, args.rows});
  STD_TORCH_CHECK(total.size(0) == args.batch, "total: expected the batch of dy");
  args.total = data_of<const float>(total);
  Tensor dx = torch::stable::new_empty(dy, {args.batch, args.tokens, args.width});
  args.dx = dx.data_ptr();
  if (args.batch * args.tokens > 0) kRun(dy, args);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("merge", TORCH_BOX(&forward<cpu_run>));
  m.impl("merge_bwd", TORCH_BOX(&backward<cpu_run_backward>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("merge", TORCH_BOX(&forward<cuda_run>));
  m.impl("merge_bwd", TORCH_BOX(&backward<cuda_run_backward>));
}
#endif

}  // namespace saccade
