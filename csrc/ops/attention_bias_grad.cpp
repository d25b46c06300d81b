// saccade::attention_bias_grad
#include "../cpu/attention_kernels.h"
#include "../util/queue.h"
#include "attention_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/attention_bias_grad.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor& q, const Tensor& dbias, AttentionBiasGradArgs& args) {
  const cpu::AttentionBiasGradKernels& kernels = cpu::attention_kernels().attention_bias_grad;
  const AttentionInputs& in = args.in;
  const BlockLayoutArgs& l = in.layout;
  const bool wide = in.bias_dtype == Dtype::kFloat32;
  Tensor sums = dbias;
  if (!wide)
    sums = torch::stable::new_empty(q, {args.bias_batch, args.bias_heads, in.q_len, in.k_len}, ScalarType::Float);
  torch::stable::zero_(sums);
  float* rows = data_of<float>(sums);
  const int64_t shared = (args.bias_batch == 1 ? in.batch : 1) * (args.bias_heads == 1 ? in.heads : 1);
  const int64_t items = args.bias_batch * args.bias_heads * l.q_blocks * (l.q_block / cpu::kTile);
  // Where samples or heads have orders of their own, a tile holds other rows in each: one after the other.
  const bool one_order = l.q_order.stride[0] == 0 && l.q_order.stride[1] == 0;
  const int64_t step = one_order ? shared : 1;
  for (int64_t from = 0; from < shared; from += step)
    for_queue(items, kernels.space(args),
              [&](int64_t item, float* space) { kernels.run(args, rows, item, from, from + step, space); });
  if (!wide) {
    Tensor out = dbias;
    torch::stable::copy_(out, sums);
  }
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, const Tensor&, AttentionBiasGradArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {attention_bias_grad_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "attention_bias_grad", attention_bias_grad_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, const Tensor&, AttentionBiasGradArgs&);

template <Run kRun>
Tensor run(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
           const Tensor& delta, const Tensor& starts, const Tensor& counts, const Tensor& indices,
           const OptionalTensor& p_starts, const OptionalTensor& p_counts, const OptionalTensor& p_indices,
           const OptionalTensor& p_ids, const OptionalTensor& bits, const OptionalTensor& box, const OptionalTensor& at,
           const OptionalTensor& q_order, const OptionalTensor& k_order, const Tensor& bias,
           const OptionalTensor& key_bias, int64_t q_block, int64_t k_block, double scale) {
  AttentionBiasGradArgs args;
  args.in = attention_inputs(
      q, k, v, {starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order}, bias,
      key_bias, q_block, k_block, scale);
  const AttentionInputs& in = args.in;
  check_sizes(dout, q, "dout", {in.batch, in.heads, in.q_len, in.head_dim});
  check_values(dout, "dout", in.dtype, args.dout_stride);
  args.dout = dout.data_ptr();
  args.lse = check_floats(lse, q, "lse", {in.batch, in.heads, in.q_len});
  args.delta = check_floats(delta, q, "delta", {in.batch, in.heads, in.q_len});
  args.bias_batch = bias.size(0);
  args.bias_heads = static_cast<int32_t>(bias.size(1));
  Tensor dbias = torch::stable::new_empty(bias, {bias.size(0), bias.size(1), in.q_len, in.k_len});
  args.dbias = dbias.data_ptr();
  if (is_empty(in))
    torch::stable::zero_(dbias);
  else if (dbias.numel() > 0)
    kRun(q, dbias, args);
  return dbias;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("attention_bias_grad", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("attention_bias_grad", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
