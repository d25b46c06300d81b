// knn_density on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#include "../../kernels/cuda/knn_density.cu"

#include "problem.h"

extern "C" const char* emulated_knn_density(const saccade::KnnDensityArgs* args) {
  return saccade::knn_density_cuda(*args, nullptr);
}

extern "C" int64_t emulated_knn_density_workspace(const saccade::KnnDensityArgs* args) {
  return saccade::knn_density_workspace_cuda(*args);
}

namespace saccade {

// `skew` leads to unaligned accesses.
const char* density_once(Dtype dtype, int tokens, int channels, int skew) {
  std::vector<uint32_t> x(tokens * channels + skew, dtype == Dtype::kFloat32 ? 0x3f800000 : 0x3c003c00);
  std::vector<float> out(tokens), workspace(tokens);
  KnnDensityArgs args;
  args.x = reinterpret_cast<unsigned char*>(x.data()) + (dtype == Dtype::kFloat32 ? 4 : 2) * skew;
  args.x_stride[1] = channels;
  args.batch = 1;
  args.tokens = tokens;
  args.channels = channels;
  args.k = 5;
  args.dtype = dtype;
  args.out = out.data();
  args.workspace = workspace.data();
  return knn_density_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  using saccade::Dtype;
  const char* errors[] = {
      saccade::density_once(Dtype::kBFloat16, 70, 136, 0),
      saccade::density_once(Dtype::kFloat16, 20, 40, 1),
      saccade::density_once(Dtype::kFloat32, 100, 72, 0),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
