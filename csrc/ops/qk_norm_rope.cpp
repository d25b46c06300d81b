// saccade::qk_norm_rope, qk_norm_rope_, qk_norm_rope_bwd
#include <algorithm>
#include <vector>

#include "../cpu/kernels.h"
#include "rope_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/qk_norm_rope.h"
#endif

namespace saccade {
namespace {

void set_weight(NormArgs& args, const Tensor& q, const OptionalTensor& weight, int64_t heads, const char* name,
                const void*& out) {
  if (!weight.has_value()) return;
  const int64_t expected = args.row ? heads * args.rope.head_dim : args.rope.head_dim;
  STD_TORCH_CHECK(
      weight->dim() == 1 && weight->size(0) == expected && weight->is_contiguous() && weight->device() == q.device(),
      name, ": expected a contiguous [", expected, "] on the device of q");
  args.weight_dtype = dtype_of(*weight, name);
  STD_TORCH_CHECK(args.weight_dtype == args.rope.dtype || args.weight_dtype == Dtype::kFloat32, name,
                  ": expected float32 or the dtype of q");
  out = weight->data_ptr();
}

struct NormOptions {
  AngleOptions angles;
  double eps;
  bool row;
};

NormArgs norm_args(const Tensor& q, const OptionalTensor& k, const Tensor& q_out, const OptionalTensor& k_out,
                   const OptionalTensor& q_weight, const OptionalTensor& k_weight, const Tensor& positions,
                   const Tensor& steps, const NormOptions& o) {
  NormArgs args;
  args.rope = rope_args(q, k, q_out, k_out, positions);
  set_angles(args.rope, q, steps, o.angles);
  args.eps = o.eps;
  args.row = o.row;
  STD_TORCH_CHECK(!(q_weight.has_value() && k_weight.has_value()) || q_weight->scalar_type() == k_weight->scalar_type(),
                  "k_weight: expected the dtype of q_weight");
  set_weight(args, q, q_weight, args.rope.q.heads, "q_weight", args.q_weight);
  set_weight(args, q, k_weight, args.rope.k.heads, "k_weight", args.k_weight);
  return args;
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------
using Run = void (*)(const Tensor&, const NormArgs&);

void cpu_run(const Tensor&, const NormArgs& args) {
  const cpu::Kernels& kernels = cpu::kernels(args.rope.dtype);
  torch::stable::parallel_for(0, cpu::tiles(args.rope), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) kernels.qk_norm_rope(args, item);
  });
}
#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, const NormArgs& args) { call_cuda(q, "qk_norm_rope", qk_norm_rope_cuda, args); }
#endif

template <Run kRun>
std::tuple<Tensor, Tensor> functional(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
                                      const OptionalTensor& k_weight, const Tensor& positions, const Tensor& steps,
                                      int64_t shift, int64_t begin, int64_t end, bool interleaved, double scale,
                                      double eps, bool row) {
  Tensor q_out = torch::stable::empty_like(q), k_out = output_like(k, q);
  const NormArgs args = norm_args(q, k, q_out, k.has_value() ? OptionalTensor(k_out) : std::nullopt, q_weight, k_weight,
                                  positions, steps, {{shift, begin, end, interleaved, scale, false}, eps, row});
  if (!is_empty(args.rope)) kRun(q, args);
  return {q_out, k_out};
}

template <Run kRun>
void inplace(const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
             const Tensor& positions, const Tensor& steps, int64_t shift, int64_t begin, int64_t end, bool interleaved,
             double scale, double eps, bool row) {
  const NormArgs args = norm_args(q, k, q, k, q_weight, k_weight, positions, steps,
                                  {{shift, begin, end, interleaved, scale, false}, eps, row});
  if (!is_empty(args.rope)) kRun(q, args);
}

// ---- backward
// --------------------------------------------------------------------------------------------------------
using RunBackward = void (*)(const Tensor&, NormGradArgs&, int64_t q_width, int64_t k_width);

// Sum of the blocks' partial sums, in their order; `out` float32, or float64 where `wide`.
void add_blocks(const double* partial, int64_t blocks, int64_t stride, int64_t width, bool wide, void* out) {
  for (int64_t i = 0; out != nullptr && i < width; ++i) {
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += partial[b * stride + i];
    if (wide)
      static_cast<double*>(out)[i] = total;
    else
      static_cast<float*>(out)[i] = static_cast<float>(total);
  }
}

void cpu_run_backward(const Tensor&, NormGradArgs& args, int64_t q_width, int64_t k_width) {
  const RopeArgs& rope = args.norm.rope;
  const bool wide = rope.dtype == Dtype::kFloat64;
  const int64_t blocks = std::min<int64_t>(cpu::kSumBlocks, rope.batch * rope.tokens), stride = q_width + k_width;
  std::vector<double> partial(blocks * stride);
  args.workspace = partial.data();
  const cpu::Kernels& kernels = cpu::kernels(rope.dtype);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) kernels.qk_norm_rope_bwd(args, b, blocks);
  });
  add_blocks(partial.data(), blocks, stride, q_width, wide, args.q_dweight);
  add_blocks(partial.data() + q_width, blocks, stride, k_width, wide, args.k_dweight);
}

#ifdef SACCADE_WITH_CUDA
void cuda_run_backward(const Tensor& q, NormGradArgs& args, int64_t, int64_t) {
  Tensor workspace = torch::stable::new_empty(q, {qk_norm_rope_bwd_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "qk_norm_rope_bwd", qk_norm_rope_bwd_cuda, args);
}
#endif

template <RunBackward kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dq, const OptionalTensor& dk, const Tensor& q,
                                                    const OptionalTensor& k, const OptionalTensor& q_weight,
                                                    const OptionalTensor& k_weight, const Tensor& positions,
                                                    const Tensor& steps, int64_t shift, int64_t begin, int64_t end,
                                                    bool interleaved, double scale, double eps, bool row) {
  STD_TORCH_CHECK(k.has_value() == dk.has_value(), "dk: expected where k is, and only there");
  Tensor q_grad = torch::stable::empty_like(q), k_grad = output_like(k, q);
  NormGradArgs args;
  args.norm = norm_args(q, k, q_grad, k.has_value() ? OptionalTensor(k_grad) : std::nullopt, q_weight, k_weight,
                        positions, steps, {{shift, begin, end, interleaved, scale, false}, eps, row});
  check_like(dq, q, "dq");
  args.q_dy = dq.data_ptr();
  copy_strides(dq, args.q_dy_stride);
  if (k.has_value()) {
    check_like(*dk, *k, "dk");
    args.k_dy = dk->data_ptr();
    copy_strides(*dk, args.k_dy_stride);
  }
  const RopeArgs& rope = args.norm.rope;
  const auto sum_dtype = rope.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const int64_t q_width = row ? rope.q.heads * rope.head_dim : rope.head_dim;
  const int64_t k_width = row ? rope.k.heads * rope.head_dim : rope.head_dim;
  Tensor q_dweight = torch::stable::new_zeros(q, {q_weight.has_value() ? q_width : 0}, sum_dtype);
  Tensor k_dweight = torch::stable::new_zeros(q, {k_weight.has_value() ? k_width : 0}, sum_dtype);
  if (q_weight.has_value()) args.q_dweight = q_dweight.data_ptr();
  if (k_weight.has_value()) args.k_dweight = k_dweight.data_ptr();
  if (!is_empty(rope)) kRun(q, args, q_width, k_width);
  return {q_grad, k_grad, q_dweight, k_dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&functional<cpu_run>));
  m.impl("qk_norm_rope_", TORCH_BOX(&inplace<cpu_run>));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&backward<cpu_run_backward>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&functional<cuda_run>));
  m.impl("qk_norm_rope_", TORCH_BOX(&inplace<cuda_run>));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&backward<cuda_run_backward>));
}
#endif

}  // namespace saccade
