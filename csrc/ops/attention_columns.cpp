// saccade::attention_columns
#include "attention_map.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/attention_columns.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, AttentionMapArgs& args) {
  const cpu::PlanningKernels& kernels = cpu::planning_kernels();
  const AttentionInputs& in = args.in;
  run_map(args, in.batch * in.heads, args.row_count, 1, in.k_len, kernels.attention_columns_pack,
          kernels.attention_columns);
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, AttentionMapArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {attention_columns_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "attention_columns", attention_columns_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, AttentionMapArgs&);

template <Run kRun>
Tensor run(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& rows,
           const OptionalTensor& key_bias, bool causal, double scale) {
  AttentionMapArgs args = map_args(q, k, rows, key_bias, causal, scale);
  check_dense(lse, ScalarType::Float, q, "lse");
  STD_TORCH_CHECK(
      lse.dim() == 3 && lse.size(0) == args.in.batch && lse.size(1) == args.in.heads && lse.size(2) == args.row_count,
      "lse: expected [B, H, ", args.row_count, "]");
  args.lse = data_of<float>(lse);
  Tensor out = torch::stable::new_empty(q, {args.in.batch, args.in.heads, args.in.k_len}, ScalarType::Float);
  args.columns = data_of<float>(out);
  if (out.numel() > 0) kRun(q, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("attention_columns", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("attention_columns", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
