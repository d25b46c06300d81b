// Launch of match: tiles of sources, and the 10 kernels (dtype x rows of a tile x ranges).
#include "match.cuh"
#include "match.h"

namespace saccade {
namespace {

#ifndef SACCADE_MATCH_BLOCKS  // the emulation takes few, so that small problems meet the large tile
#define SACCADE_MATCH_BLOCKS 128
#endif
constexpr int64_t kMatchBlocks = SACCADE_MATCH_BLOCKS;  // about one for each multiprocessor

template <typename T, int kRows>
const char* launch_rows(const MatchArgs& args, bool aligned, void* stream) {
  using Chosen = MatchTile<T, kRows>;
  using Tile = typename Chosen::Tile;
  static_assert(Tile::kRows == kRows, "the tile that kRows names");
  MatchPlan plan = {};
  plan.row_tiles = ceil_div(args.sources, kRows);
  plan.chunks = static_cast<int32_t>(most(ceil_div(args.channels, kPanelDepth<T>), 1));
  plan.resident = static_cast<int64_t>(plan.chunks) * kRows * kPanelBytes <= kResidentBytes;
  plan.aligned = aligned;
  const auto kernel = args.ranges != nullptr ? match_kernel<T, kRows, true> : match_kernel<T, kRows, false>;
  const size_t shared = MatchShared<Tile, Chosen::kStages>::bytes(plan);
  const dim3 grid(static_cast<unsigned>(plan.row_tiles * args.batch));
  return launch(kernel, grid, kGramThreads, shared, stream, args, plan);
}

template <typename T>
const char* launch_dtype(const MatchArgs& args, void* stream) {
  Squares squares = {};
  squares.x = args.metric;
  for (int i = 0; i < 2; ++i) squares.stride[i] = args.metric_stride[i];
  squares.batch = args.batch;
  squares.tokens = args.tokens;
  squares.channels = args.channels;
  squares.aligned = rows_aligned(args.metric, args.metric_stride, args.batch, args.tokens, args.dtype);
  squares.out = static_cast<float*>(args.workspace);
  squares.best = args.best;
  squares.target = args.target;
  if (const char* error = launch_squares<T>(squares, stream)) return error;
  if (args.sources == 0 || args.destinations == 0) return nullptr;
  if constexpr (T::kVector == 4) {
    return launch_rows<T, 64>(args, squares.aligned, stream);
  } else if (args.batch * ceil_div(args.sources, 128) >= kMatchBlocks) {
    return launch_rows<T, 128>(args, squares.aligned, stream);
  } else {
    return launch_rows<T, 32>(args, squares.aligned, stream);
  }
}

}  // namespace

int64_t match_workspace_cuda(const MatchArgs& args) {
  return args.batch * args.tokens * static_cast<int64_t>(sizeof(float));
}

const char* match_cuda(const MatchArgs& args, void* stream) {
  const bool known = args.dtype == Dtype::kFloat32 || args.dtype == Dtype::kFloat16 || args.dtype == Dtype::kBFloat16;
  if (!known) return "match: the GPU kernels take float32, float16 and bfloat16";
  if (args.batch == 0 || args.tokens == 0) return nullptr;
  if (args.dtype == Dtype::kFloat32) return launch_dtype<Float32>(args, stream);
  if (args.dtype == Dtype::kFloat16) return launch_dtype<Float16>(args, stream);
  return launch_dtype<BFloat16>(args, stream);
}

}  // namespace saccade
