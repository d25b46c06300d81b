// saccade::prompt_pool3d, prompt_pool3d_bwd
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/prompt_pool3d.h"
#endif

namespace saccade {
namespace {

int64_t windows(const PromptPoolArgs& args) {
  return static_cast<int64_t>(args.out_size[0]) * args.out_size[1] * args.out_size[2];
}
int64_t volume(const PromptPoolArgs& args) {
  return static_cast<int64_t>(args.kernel[0]) * args.kernel[1] * args.kernel[2];
}

void cpu_run(const Tensor&, const PromptPoolArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  const int64_t count = windows(args);
  for_items(args.batch * count, grain_of(args.width * volume(args) * 4), volume(args),
            [&](int64_t item, float* space) { kernels.prompt_pool3d(args, item / count, item % count, space); });
}

void cpu_run_backward(const Tensor&, PromptPoolGradArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  const PromptPoolArgs& p = args.pool;
  const int64_t count = windows(p), tokens = static_cast<int64_t>(p.size[0]) * p.size[1] * p.size[2];
  std::vector<float> workspace(p.batch * count * 2 * volume(p));
  args.workspace = workspace.data();
  for_items(p.batch * count, grain_of(p.width * volume(p) * 4), 0,
            [&](int64_t item, float*) { kernels.prompt_pool3d_bwd_windows(args, item / count, item % count); });
  for_items(p.batch * tokens, grain_of(p.width * 8), 0,
            [&](int64_t item, float*) { kernels.prompt_pool3d_bwd(args, item / tokens, item % tokens); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& x, const PromptPoolArgs& args) { call_cuda(x, "prompt_pool3d", prompt_pool3d_cuda, args); }
void cuda_run_backward(const Tensor& x, PromptPoolGradArgs& args) {
  Tensor workspace = torch::stable::new_empty(x, {prompt_pool3d_bwd_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(x, "prompt_pool3d_bwd", prompt_pool3d_bwd_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, const PromptPoolArgs&);
using RunBackward = void (*)(const Tensor&, PromptPoolGradArgs&);
using Sizes = const int64_t (&)[3];

PromptPoolArgs pool_args(const Tensor& x, const Tensor& weights, Sizes kernel, Sizes stride, double temperature) {
  PromptPoolArgs args;
  args.dtype = check_values(x, "x", 5);
  args.x = x.data_ptr();
  args.batch = x.size(0);
  args.width = x.size(4);
  for (int i = 0; i < 4; ++i) args.x_stride[i] = stride_of(x, i);
  for (int i = 0; i < 3; ++i) {
    const int64_t size = x.size(i + 1);
    STD_TORCH_CHECK(kernel[i] >= 1 && kernel[i] <= size && stride[i] >= 1, "kernel, stride: expected 1 to ", size,
                    " and at least 1 on axis ", i, ", got ", kernel[i], " and ", stride[i]);
    args.size[i] = static_cast<int32_t>(size);
    args.kernel[i] = static_cast<int32_t>(kernel[i]);
    args.stride[i] = static_cast<int32_t>(stride[i]);
    args.out_size[i] = static_cast<int32_t>((size - kernel[i]) / stride[i] + 1);
  }
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a number above 0, got ", temperature);
  args.temperature = static_cast<float>(temperature);
  check_table(weights, ScalarType::Float, x, "weights", {args.batch, args.size[0], args.size[1], args.size[2]});
  STD_TORCH_CHECK(weights.size(0) == args.batch, "weights: expected the batch of x");
  args.weights = data_of<const float>(weights);
  return args;
}

template <Run kRun>
Tensor forward(const Tensor& x, const Tensor& weights, int64_t kt, int64_t kh, int64_t kw, int64_t st, int64_t sh,
               int64_t sw, double temperature) {
  PromptPoolArgs args = pool_args(x, weights, {kt, kh, kw}, {st, sh, sw}, temperature);
  Tensor y =
      torch::stable::new_empty(x, {args.batch, args.out_size[0], args.out_size[1], args.out_size[2], args.width});
  args.y = y.data_ptr();
  if (y.numel() > 0) kRun(x, args);
  return y;
}

template <RunBackward kRun>
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weights, int64_t kt, int64_t kh,
                                    int64_t kw, int64_t st, int64_t sh, int64_t sw, double temperature) {
  PromptPoolGradArgs args;
  args.pool = pool_args(x, weights, {kt, kh, kw}, {st, sh, sw}, temperature);
  const PromptPoolArgs& p = args.pool;
  STD_TORCH_CHECK(check_values(dy, "dy", 5) == p.dtype && dy.is_contiguous() && dy.device() == x.device() &&
                      dy.size(0) == p.batch && dy.size(1) == p.out_size[0] && dy.size(2) == p.out_size[1] &&
                      dy.size(3) == p.out_size[2] && dy.size(4) == p.width,
                  "dy: expected a contiguous tensor shaped like the output, of x's dtype and device");
  Tensor dx = torch::stable::new_empty(x, {p.batch, p.size[0], p.size[1], p.size[2], p.width});
  Tensor dweights = torch::stable::new_empty(weights, {p.batch, p.size[0], p.size[1], p.size[2]});
  args.dy = dy.data_ptr();
  args.dx = dx.data_ptr();
  args.dweights = data_of<float>(dweights);
  if (dweights.numel() > 0) kRun(x, args);
  return {dx, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("prompt_pool3d", TORCH_BOX(&forward<cpu_run>));
  m.impl("prompt_pool3d_bwd", TORCH_BOX(&backward<cpu_run_backward>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("prompt_pool3d", TORCH_BOX(&forward<cuda_run>));
  m.impl("prompt_pool3d_bwd", TORCH_BOX(&backward<cuda_run_backward>));
}
#endif

}  // namespace saccade
