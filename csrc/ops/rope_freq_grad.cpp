// saccade::rope_freq_grad
#include <vector>

#include "../cpu/kernels.h"
#include "rope_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/rope_freq_grad.h"
#endif

namespace saccade {
namespace {

using Run = void (*)(const Tensor&, FreqGradArgs&, int64_t width);

void cpu_run(const Tensor&, FreqGradArgs& args, int64_t width) {
  const int64_t rows = args.rope.batch * args.rope.tokens, blocks = std::min<int64_t>(cpu::kSumBlocks, rows);
  std::vector<double> partial(blocks * width, 0.0);
  if (!is_empty(args.rope))
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) cpu::rope_freq_grad(args, b, blocks, partial.data() + b * width);
    });
  for (int64_t i = 0; i < width; ++i) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += partial[b * width + i];
    if (args.rope.dtype == Dtype::kFloat64)
      static_cast<double*>(args.out)[i] = total;
    else
      static_cast<float*>(args.out)[i] = static_cast<float>(total);
  }
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, FreqGradArgs& args, int64_t) {
  Tensor workspace = torch::stable::new_empty(q, {rope_freq_grad_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "rope_freq_grad", rope_freq_grad_cuda, args);
}
#endif

template <Run kRun>
Tensor run(const Tensor& q, const OptionalTensor& k, const Tensor& dq, const OptionalTensor& dk,
           const Tensor& positions, int64_t groups, int64_t pairs, bool interleaved) {
  STD_TORCH_CHECK(k.has_value() == dk.has_value(), "dk: expected where k is, and only there");
  FreqGradArgs args;
  args.rope = rope_args(q, k, q, k, positions);
  check_like(dq, q, "dq");
  args.q_dx = dq.data_ptr();
  copy_strides(dq, args.q_dx_stride);
  if (k.has_value()) {
    check_like(*dk, *k, "dk");
    args.k_dx = dk->data_ptr();
    copy_strides(*dk, args.k_dx_stride);
  }
  Angles& a = args.rope.angles;
  a.groups = static_cast<int32_t>(groups);
  a.pairs = static_cast<int32_t>(pairs);
  a.interleaved = interleaved;
  check_groups(args.rope);
  const auto dtype = args.rope.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_zeros(q, {a.axes, groups, pairs}, dtype);
  args.out = out.data_ptr();
  if (!is_empty(args.rope) && pairs > 0) kRun(q, args, static_cast<int64_t>(a.axes) * groups * pairs);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("rope_freq_grad", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("rope_freq_grad", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
