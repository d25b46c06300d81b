// saccade::attention_rows
#include "attention_map.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/attention_rows.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, AttentionMapArgs& args) {
  const cpu::PlanningKernels& kernels = cpu::planning_kernels();
  const AttentionInputs& in = args.in;
  run_map(args, in.batch * in.kv_heads, in.k_len, in.heads / in.kv_heads, args.row_count, kernels.attention_rows_pack,
          kernels.attention_rows);
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, AttentionMapArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {attention_rows_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "attention_rows", attention_rows_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, AttentionMapArgs&);

template <Run kRun>
std::tuple<Tensor, Tensor> run(const Tensor& q, const Tensor& k, const OptionalTensor& rows,
                               const OptionalTensor& key_bias, bool causal, double scale) {
  AttentionMapArgs args = map_args(q, k, rows, key_bias, causal, scale);
  Tensor lse = torch::stable::new_empty(q, {args.in.batch, args.in.heads, args.row_count}, ScalarType::Float);
  Tensor entropy = torch::stable::empty_like(lse);
  args.lse = data_of<float>(lse);
  args.entropy = data_of<float>(entropy);
  if (lse.numel() > 0) kRun(q, args);
  return {lse, entropy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("attention_rows", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("attention_rows", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
