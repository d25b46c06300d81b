// Launch of knn_density: squared norms first, then one block for every 64 rows.
#include "knn_density.cuh"
#include "knn_density.h"

namespace saccade {
namespace {

template <typename T>
const char* launch_dtype(const KnnDensityArgs& args, void* stream) {
  Squares squares = {};
  squares.x = args.x;
  for (int i = 0; i < 2; ++i) squares.stride[i] = args.x_stride[i];
  squares.batch = args.batch;
  squares.tokens = args.tokens;
  squares.channels = args.channels;
  squares.aligned = rows_aligned(args.x, args.x_stride, args.batch, args.tokens, args.dtype);
  squares.out = static_cast<float*>(args.workspace);
  if (const char* error = launch_squares<T>(squares, stream)) return error;
  KnnPlan plan = {};
  plan.row_tiles = ceil_div(args.tokens, kKnnRows);
  plan.chunks = static_cast<int32_t>(most(ceil_div(args.channels, kPanelDepth<T>), 1));
  plan.aligned = squares.aligned;
  return launch(knn_density_kernel<T>, dim3(static_cast<unsigned>(plan.row_tiles * args.batch)), kGramThreads,
                KnnShared::bytes(args.k), stream, args, plan);
}

}  // namespace

int64_t knn_density_workspace_cuda(const KnnDensityArgs& args) {
  return args.batch * args.tokens * static_cast<int64_t>(sizeof(float));
}

const char* knn_density_cuda(const KnnDensityArgs& args, void* stream) {
  if (args.k < 1 || args.k > kMostNeighbours) return "knn_density: the GPU kernels take k from 1 to 32";
  const bool known = args.dtype == Dtype::kFloat32 || args.dtype == Dtype::kFloat16 || args.dtype == Dtype::kBFloat16;
  if (!known) return "knn_density: the GPU kernels take float32, float16 and bfloat16";
  if (args.batch == 0 || args.tokens == 0) return nullptr;
  if (args.dtype == Dtype::kFloat32) return launch_dtype<Float32>(args, stream);
  if (args.dtype == Dtype::kFloat16) return launch_dtype<Float16>(args, stream);
  return launch_dtype<BFloat16>(args, stream);
}

}  // namespace saccade
