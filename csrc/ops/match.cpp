// saccade::match
#include <limits>
#include <memory>

#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/match.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, MatchArgs& args) {
  const cpu::MergeKernels& kernels = cpu::merge_kernels();
  const int64_t tiles = cpu::ceil_div(args.destinations, kernels.shape.tile);
  const int64_t panels = cpu::ceil_div(args.sources, kernels.shape.panel), padded = tiles * kernels.shape.tile;
  std::vector<float> squares(args.batch * args.tokens);
  // Not value-initialised: what the kernels read, they have written.
  std::unique_ptr<float[]> packed(new float[args.batch * padded * (args.channels + 2)]);
  cpu::MatchScratch scratch;
  scratch.squares = squares.data();
  scratch.tiles = packed.get();
  scratch.mul = packed.get() + args.batch * padded * args.channels;
  scratch.add = scratch.mul + args.batch * padded;
  torch::stable::parallel_for(0, args.batch * args.tokens, grain_of(args.channels * 4),
                              [&](int64_t begin, int64_t end) {
                                kernels.squares(args.metric, args.metric_stride, args.channels, args.dtype, args.tokens,
                                                begin, end, squares.data());
                                for (int64_t row = begin; row < end; ++row) {
                                  args.best[row] = -std::numeric_limits<float>::infinity();
                                  args.target[row] = squares[row] - squares[row] == 0.0f ? -1 : -2;
                                }
                              });
  if (tiles == 0 || panels == 0) return;
  const int64_t tile_grain = grain_of(kernels.shape.tile * args.channels * 4);
  for_items(args.batch * tiles, tile_grain, 0,
            [&](int64_t item, float*) { kernels.match_pack(args, scratch, item / tiles, item % tiles); });
  for_items(args.batch * panels, 1, kernels.shape.panel * args.channels,
            [&](int64_t item, float* space) { kernels.match(args, scratch, item / panels, item % panels, space); });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& metric, MatchArgs& args) {
  Tensor workspace = torch::stable::new_empty(metric, {match_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(metric, "match", match_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, MatchArgs&);

template <Run kRun>
std::tuple<Tensor, Tensor> run(const Tensor& metric, const Tensor& src, const Tensor& dst, const OptionalTensor& ranges,
                               const OptionalTensor& protect, int64_t score) {
  MatchArgs args;
  args.dtype = check_values(metric, "metric");
  STD_TORCH_CHECK(score >= 0 && score <= 2, "score: expected 0 to 2, got ", score);
  args.score = static_cast<Score>(score);
  args.metric = metric.data_ptr();
  copy_used_strides(metric, args.metric_stride);
  args.batch = metric.size(0);
  args.tokens = metric.size(1);
  args.channels = static_cast<int32_t>(metric.size(2));
  args.src_stride = check_table(src, ScalarType::Int, metric, "src", {args.batch, -1});
  args.dst_stride = check_table(dst, ScalarType::Int, metric, "dst", {args.batch, -1});
  args.src = data_of<const int32_t>(src);
  args.dst = data_of<const int32_t>(dst);
  args.sources = src.size(1);
  args.destinations = dst.size(1);
  if (ranges.has_value()) {
    args.ranges_stride = check_table(*ranges, ScalarType::Int, metric, "ranges", {args.batch, args.sources, -1, 2});
    args.ranges = data_of<const int32_t>(*ranges);
    args.range_count = static_cast<int32_t>(ranges->size(2));
    if (args.range_count == 0) args.sources = 0;  // no source may choose anything
  }
  if (protect.has_value()) {
    args.protect_stride = check_table(*protect, ScalarType::Bool, metric, "protect", {args.batch, args.tokens});
    args.protect = data_of<const uint8_t>(*protect);
  }
  Tensor best = torch::stable::new_empty(metric, {args.batch, args.tokens}, ScalarType::Float);
  Tensor target = torch::stable::new_empty(metric, {args.batch, args.tokens}, ScalarType::Int);
  args.best = data_of<float>(best);
  args.target = data_of<int32_t>(target);
  if (args.batch * args.tokens > 0) kRun(metric, args);
  return {best, target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("match", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("match", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
