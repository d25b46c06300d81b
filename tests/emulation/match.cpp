// match on the CPU, from the very sources that nvcc compiles: a shared library for ctypes, and a program that
// ThreadSanitizer can watch.
#define SACCADE_MATCH_BLOCKS 3
#include "../../kernels/cuda/match.cu"

#include "problem.h"

extern "C" const char* emulated_match(const saccade::MatchArgs* args) { return saccade::match_cuda(*args, nullptr); }

extern "C" int64_t emulated_match_workspace(const saccade::MatchArgs* args) {
  return saccade::match_workspace_cuda(*args);
}

namespace saccade {

// Every second token is a destination; three batch entries meet the large tile. `skew` leads to unaligned accesses.
const char* match_once(Dtype dtype, int batch, int tokens, int channels, bool with_ranges, int skew) {
  std::vector<uint32_t> metric(batch * tokens * channels + skew, dtype == Dtype::kFloat32 ? 0x3f800000 : 0x3c003c00);
  std::vector<int32_t> src, dst, ranges;
  for (int i = 0; i < tokens; ++i) (i % 2 ? dst : src).push_back(i);
  for (int i = 0; i < static_cast<int>(src.size()); ++i) {
    for (int r = 0; r < 2; ++r) ranges.push_back(r * i), ranges.push_back(r * i + 9);
  }
  std::vector<float> best(batch * tokens), workspace(batch * tokens);
  std::vector<int32_t> target(batch * tokens);
  MatchArgs args;
  args.metric = reinterpret_cast<unsigned char*>(metric.data()) + (dtype == Dtype::kFloat32 ? 4 : 2) * skew;
  args.metric_stride[0] = tokens * channels;
  args.metric_stride[1] = channels;
  args.src = src.data();
  args.dst = dst.data();
  if (with_ranges) args.ranges = ranges.data();
  args.range_count = 2;
  args.batch = batch;
  args.tokens = tokens;
  args.sources = static_cast<int64_t>(src.size());
  args.destinations = static_cast<int64_t>(dst.size());
  args.channels = channels;
  args.dtype = dtype;
  args.best = best.data();
  args.target = target.data();
  args.workspace = workspace.data();
  return match_cuda(args, nullptr);
}

}  // namespace saccade

int main() {
  using saccade::Dtype;
  const char* errors[] = {
      saccade::match_once(Dtype::kFloat16, 1, 150, 72, false, 0),
      saccade::match_once(Dtype::kBFloat16, 3, 41, 72, true, 0),
      saccade::match_once(Dtype::kFloat16, 1, 41, 72, false, 1),
      saccade::match_once(Dtype::kFloat32, 1, 300, 40, true, 0),
  };
  for (const char* error : errors) {
    if (error != nullptr) return std::puts(error), 2;
  }
  return 0;
}
