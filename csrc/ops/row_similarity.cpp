// saccade::row_similarity
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/row_similarity.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, const RowSimilarityArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  for_items(args.batch * args.tokens, grain_of(args.channels * 8), 0,
            [&](int64_t item, float*) { kernels.row_similarity(args, item / args.tokens, item % args.tokens); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& x, const RowSimilarityArgs& args) {
  call_cuda(x, "row_similarity", row_similarity_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, const RowSimilarityArgs&);

template <Run kRun>
Tensor run(const Tensor& x, const Tensor& y) {
  RowSimilarityArgs args;
  args.dtype = check_values(x, "x");
  STD_TORCH_CHECK(check_values(y, "y") == args.dtype && y.device() == x.device(),
                  "y: expected the dtype and device of x");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(y.size(i) == x.size(i), "y: expected the shape of x");
  args.x = x.data_ptr();
  args.y = y.data_ptr();
  copy_used_strides(x, args.x_stride);
  copy_used_strides(y, args.y_stride);
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.channels = static_cast<int32_t>(x.size(2));
  Tensor out = torch::stable::new_empty(x, {args.batch, args.tokens}, ScalarType::Float);
  args.out = data_of<float>(out);
  if (args.batch * args.tokens > 0) kRun(x, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("row_similarity", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("row_similarity", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
