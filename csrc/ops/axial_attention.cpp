// saccade::axial_attention, axial_attention_bwd
#include "../cpu/axial_kernels.h"
#include "../cpu/axial_plan.h"
#include "../util/parallel.h"
#include "../util/tensor.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/axial_attention.h"
#include "cuda/axial_attention_bwd.h"
#endif

namespace saccade {
namespace {

struct Numbers {
  int64_t prefix, grid[3], box[3];
  bool mean;
  double scale;
};

Tensor floats(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

// x [B, H, S, D] as q, last stride 1; a stride that is never used is 0.
void set_strides(const Tensor& x, const Tensor& q, const char* name, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions [B, H, S, D], got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type() && x.device() == q.device(), name,
                  ": expected the dtype and device of q");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == q.size(i), name, ": expected the shape of q");
  check_dense_columns(x, name);
  copy_used_strides(x, stride);
}

AxialAttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Numbers& x) {
  AxialAttentionArgs a;
  set_strides(q, q, "q", a.q_stride);
  set_strides(k, q, "k", a.k_stride);
  set_strides(v, q, "v", a.v_stride);
  a.dtype = kernel_dtype(q, "q");
  a.q = q.data_ptr();
  a.k = k.data_ptr();
  a.v = v.data_ptr();
  a.batch = q.size(0);
  a.heads = small(q.size(1), "q: heads", 0);
  a.tokens = q.size(2);
  a.head_dim = static_cast<int32_t>(q.size(3));
  STD_TORCH_CHECK(q.size(3) >= 8 && q.size(3) <= 256 && q.size(3) % 8 == 0,
                  "q: expected a head_dim that is a multiple of 8 up to 256, got ", q.size(3));
  a.scale = static_cast<float>(x.scale);
  AxialGeometry& m = a.geometry;
  m.prefix = small(x.prefix, "prefix", 0);
  m.mean = x.mean && x.prefix > 0;
  const char* const names[3] = {"t", "h", "w"};
  const char* const box_names[3] = {"bt", "bh", "bw"};
  int64_t cells = 1;
  for (int i = 0; i < 3; ++i) {
    m.grid[i] = small(x.grid[i], names[i], 0);
    m.box[i] = small(x.box[i], box_names[i], 1);
    cells *= m.grid[i];
    STD_TORCH_CHECK(cells <= INT32_MAX, "t, h, w: expected at most 2^31 - 1 tokens");
  }
  STD_TORCH_CHECK(a.tokens == x.prefix + cells && a.tokens <= INT32_MAX, "q: expected ", x.prefix + cells,
                  " tokens (prefix + t * h * w), at most 2^31 - 1, got ", a.tokens);
  return a;
}

int64_t boxes_of(const AxialGeometry& m) {
  int64_t count = 1;
  for (int i = 0; i < 3; ++i) count *= (int64_t{m.grid[i]} + m.box[i] - 1) / m.box[i];
  return count;
}

// ---- forward --------------------------------------------------------------------------------------------------------
void cpu_run(const Tensor& q, AxialAttentionArgs& a) {
  const cpu::AxialKernels& kernels = cpu::axial_kernels();
  const cpu::AxialPlan plan = cpu::axial_plan(a);
  const int64_t rows = a.batch * a.heads, space = kernels.space(a);
  const Tensor workspace = floats(q, {cpu::axial_workspace(a)});
  a.workspace = workspace.data_ptr();
  for_items(rows * plan.runs, 1, space, [&](int64_t item, float* own) { kernels.run(a, item, own); });
  if (a.geometry.prefix == 0) return;
  if (!a.geometry.mean)
    for_items(rows * plan.chunks, 1, space, [&](int64_t item, float* own) { kernels.see(a, item, own); });
  for_items(rows, 1, space, [&](int64_t row, float* own) { kernels.end(a, row, own); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, AxialAttentionArgs& a) {
  const Tensor workspace = torch::stable::new_empty(q, {axial_attention_workspace_cuda(a)}, ScalarType::Byte);
  a.workspace = workspace.data_ptr();
  call_cuda(q, "axial_attention", axial_attention_cuda, a);
}
#endif

using Run = void (*)(const Tensor&, AxialAttentionArgs&);

template <Run kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, int64_t prefix,
                                                   int64_t t, int64_t h, int64_t w, int64_t bt, int64_t bh, int64_t bw,
                                                   bool mean, double scale) {
  AxialAttentionArgs a = arguments(q, k, v, {prefix, {t, h, w}, {bt, bh, bw}, mean, scale});
  Tensor out = output_like(q), lse = floats(q, {a.batch, a.heads, a.tokens});
  const int64_t boxes = boxes_of(a.geometry);
  Tensor group_out = mean ? floats(q, {a.batch, a.heads, boxes, prefix, q.size(3)}) : floats(q, {0});
  Tensor group_lse = mean ? floats(q, {a.batch, a.heads, boxes, prefix}) : floats(q, {0});
  a.out = out.data_ptr();
  set_strides(out, q, "out", a.out_stride);
  a.lse = data_of<float>(lse);
  a.group_out = data_of<float>(group_out);
  a.group_lse = data_of<float>(group_lse);
  if (q.numel() > 0) kRun(q, a);
  return {out, lse, group_out, group_lse};
}

// ---- backward -------------------------------------------------------------------------------------------------------
void cpu_run_backward(const Tensor& q, AxialAttentionGradArgs& a) {
  const cpu::AxialKernels& kernels = cpu::axial_kernels();
  const cpu::AxialPlan plan = cpu::axial_plan(a.forward);
  const int64_t rows = a.forward.batch * a.forward.heads, space = kernels.space_bwd(a);
  const int64_t runs = plan.runs > 0 ? plan.runs : 1;  // without boxes the prefix remains
  const Tensor workspace = floats(q, {cpu::axial_bwd_workspace(a.forward)});
  a.workspace = workspace.data_ptr();
  for_items(rows * runs, 1, space, [&](int64_t item, float* own) { kernels.run_bwd(a, item, own); });
  if (a.forward.geometry.prefix > 0)
    for_items(rows, 1, space, [&](int64_t row, float* own) { kernels.end_bwd(a, row, own); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run_backward(const Tensor& q, AxialAttentionGradArgs& a) {
  const Tensor workspace = torch::stable::new_empty(q, {axial_attention_bwd_workspace_cuda(a)}, ScalarType::Byte);
  a.workspace = workspace.data_ptr();
  call_cuda(q, "axial_attention_bwd", axial_attention_bwd_cuda, a);
}
#endif

float* check_floats(const Tensor& x, const Tensor& q, const char* name, int64_t count) {
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.device() == q.device() && x.numel() == count, name,
      ": expected contiguous float32 of ", count, " elements on the device of q");
  return data_of<float>(x);
}

using RunBackward = void (*)(const Tensor&, AxialAttentionGradArgs&);

template <RunBackward kRun>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const Tensor& group_out,
                                            const Tensor& group_lse, int64_t prefix, int64_t t, int64_t h, int64_t w,
                                            int64_t bt, int64_t bh, int64_t bw, bool mean, double scale) {
  AxialAttentionGradArgs a;
  AxialAttentionArgs& f = a.forward;
  f = arguments(q, k, v, {prefix, {t, h, w}, {bt, bh, bw}, mean, scale});
  set_strides(out, q, "out", f.out_stride);
  f.out = out.data_ptr();
  f.lse = check_floats(lse, q, "lse", f.batch * f.heads * f.tokens);
  const int64_t terms = f.geometry.mean ? f.batch * f.heads * boxes_of(f.geometry) * prefix : 0;
  f.group_out = check_floats(group_out, q, "group_out", terms * f.head_dim);
  f.group_lse = check_floats(group_lse, q, "group_lse", terms);
  set_strides(dout, q, "dout", a.dout_stride);
  a.dout = dout.data_ptr();
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  set_strides(dq, q, "dq", a.dq_stride);
  set_strides(dk, q, "dk", a.dk_stride);
  set_strides(dv, q, "dv", a.dv_stride);
  a.dq = dq.data_ptr();
  a.dk = dk.data_ptr();
  a.dv = dv.data_ptr();
  if (q.numel() > 0) kRun(q, a);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("axial_attention", TORCH_BOX(&forward<cpu_run>));
  m.impl("axial_attention_bwd", TORCH_BOX(&backward<cpu_run_backward>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("axial_attention", TORCH_BOX(&forward<cuda_run>));
  m.impl("axial_attention_bwd", TORCH_BOX(&backward<cuda_run_backward>));
}
#endif

}  // namespace saccade
