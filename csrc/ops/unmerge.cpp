// saccade::unmerge
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/unmerge.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, const UnmergeArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  for_items(args.batch * args.tokens, grain_of(args.width * 8), 0,
            [&](int64_t item, float*) { kernels.unmerge(args, item / args.tokens, item % args.tokens); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& y, const UnmergeArgs& args) { call_cuda(y, "unmerge", unmerge_cuda, args); }
#endif

using Run = void (*)(const Tensor&, const UnmergeArgs&);

template <Run kRun>
Tensor run(const Tensor& y, const Tensor& inverse, const OptionalTensor& residual, const OptionalTensor& gate) {
  UnmergeArgs args;
  args.dtype = check_values(y, "y");
  args.y = y.data_ptr();
  copy_used_strides(y, args.y_stride);
  args.batch = y.size(0);
  args.rows = y.size(1);
  args.width = y.size(2);
  check_table(inverse, ScalarType::Int, y, "inverse", {args.batch, -1});
  args.inverse = data_of<const int32_t>(inverse);
  args.shared = inverse.size(0) == 1;
  args.tokens = inverse.size(1);
  if (residual.has_value()) {
    STD_TORCH_CHECK(check_values(*residual, "residual") == args.dtype && residual->size(0) == args.batch &&
                        residual->size(1) == args.tokens && residual->size(2) == args.width &&
                        residual->device() == y.device(),
                    "residual: expected [B, N, D] of y's dtype and device");
    args.residual = residual->data_ptr();
    copy_used_strides(*residual, args.residual_stride);
  }
  if (gate.has_value()) {
    STD_TORCH_CHECK(check_values(*gate, "gate") == args.dtype && (gate->size(0) == args.batch || gate->size(0) == 1) &&
                        (gate->size(1) == args.tokens || gate->size(1) == 1) && gate->size(2) == args.width &&
                        gate->device() == y.device(),
                    "gate: expected [1 or B, 1 or N, D] of y's dtype and device");
    args.gate = gate->data_ptr();
    copy_used_strides(*gate, args.gate_stride);
  }
  Tensor out = torch::stable::new_empty(y, {args.batch, args.tokens, args.width});
  args.out = out.data_ptr();
  if (args.batch * args.tokens > 0) kRun(y, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("unmerge", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("unmerge", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
