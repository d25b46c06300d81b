// saccade::keep_top
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/keep_top.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, const KeepTopArgs& args) {
  for_items(args.batch, grain_of(args.tokens * 16), 0, [&](int64_t b, float*) { cpu::keep_top(args, b); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& scores, const KeepTopArgs& args) { call_cuda(scores, "keep_top", keep_top_cuda, args); }
#endif

using Run = void (*)(const Tensor&, const KeepTopArgs&);

template <Run kRun>
Tensor run(const Tensor& scores, int64_t k) {
  STD_TORCH_CHECK(
      scores.dim() == 2 && scores.scalar_type() == ScalarType::Float && (scores.size(1) <= 1 || scores.stride(1) == 1),
      "scores: expected [B, N] float32 with a last stride of 1");
  STD_TORCH_CHECK(k >= 0 && k <= scores.size(1), "k: expected 0 to ", scores.size(1), ", got ", k);
  KeepTopArgs args;
  args.scores = data_of<const float>(scores);
  args.score_stride = stride_of(scores, 0);
  args.batch = scores.size(0);
  args.tokens = scores.size(1);
  args.k = k;
  Tensor out = torch::stable::new_empty(scores, {args.batch, k}, ScalarType::Long);
  args.out = data_of<int64_t>(out);
  if (args.batch * k > 0) kRun(scores, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("keep_top", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("keep_top", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
