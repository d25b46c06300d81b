// saccade::knn_density
#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/knn_density.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor& x, KnnDensityArgs& args) {
  // Every row is a destination: the tiles are packed as match packs them.
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  const int64_t tiles = cpu::ceil_div(args.tokens, kernels.shape.tile), padded = tiles * kernels.shape.tile;
  const int64_t panels = cpu::ceil_div(args.tokens, kernels.shape.panel);
  std::vector<int32_t> all(args.tokens);
  for (int64_t i = 0; i < args.tokens; ++i) all[i] = static_cast<int32_t>(i);
  MatchArgs rows;
  rows.metric = args.x;
  copy_used_strides(x, rows.metric_stride);
  rows.dst = all.data();
  rows.batch = args.batch;
  rows.tokens = rows.destinations = args.tokens;
  rows.channels = args.channels;
  rows.dtype = args.dtype;
  std::vector<float> squares(args.batch * args.tokens), packed(args.batch * padded * (args.channels + 2));
  cpu::MatchScratch scratch;
  scratch.squares = squares.data();
  scratch.tiles = packed.data();
  scratch.mul = packed.data() + args.batch * padded * args.channels;
  scratch.add = scratch.mul + args.batch * padded;
  torch::stable::parallel_for(
      0, args.batch * args.tokens, grain_of(args.channels * 4), [&](int64_t begin, int64_t end) {
        kernels.squares(args.x, args.x_stride, args.channels, args.dtype, args.tokens, begin, end, squares.data());
      });
  for_items(args.batch * tiles, grain_of(kernels.shape.tile * args.channels * 4), 0,
            [&](int64_t item, float*) { kernels.match_pack(rows, scratch, item / tiles, item % tiles); });
  for_items(args.batch * panels, 1, kernels.shape.panel * (args.channels + args.k), [&](int64_t item, float* space) {
    kernels.knn_density(args, scratch, item / panels, item % panels, space);
  });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& x, KnnDensityArgs& args) {
  Tensor workspace = torch::stable::new_empty(x, {knn_density_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(x, "knn_density", knn_density_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, KnnDensityArgs&);

template <Run kRun>
Tensor run(const Tensor& x, int64_t k) {
  KnnDensityArgs args;
  args.dtype = check_values(x, "x");
  STD_TORCH_CHECK(k >= 1 && (k <= x.size(1) || x.size(1) == 0), "k: expected 1 to ", x.size(1), ", got ", k);
  args.x = x.data_ptr();
  copy_used_strides(x, args.x_stride);
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.channels = static_cast<int32_t>(x.size(2));
  args.k = static_cast<int32_t>(k);
  Tensor out = torch::stable::new_empty(x, {args.batch, args.tokens}, ScalarType::Float);
  args.out = data_of<float>(out);
  if (args.batch * args.tokens > 0) kRun(x, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("knn_density", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("knn_density", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
