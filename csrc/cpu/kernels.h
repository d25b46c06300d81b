// The native CPU kernels. One source is compiled for every instruction set; kernels() picks at run time.
//
// A kernel handles one work item (a tile of tokens of one batch entry) on the calling thread; the caller spreads the
// items over threads. Results do not depend on how: the tiles are fixed by the shape alone.
#pragma once
#include <cstdint>

#include "rope_args.h"

namespace saccade::cpu {

constexpr int64_t kTileTokens = 64;  // cos and sin of 64 tokens and 64 pairs: 32 KiB
constexpr int64_t kSumBlocks = 64;   // partial sums of a weight gradient: a fixed number, whatever the thread count

struct Kernels {
  const char* name;
  void (*apply_rope)(const RopeArgs&, int64_t item);
  void (*qk_norm_rope)(const NormArgs&, int64_t item);
  void (*qk_norm_rope_bwd)(const NormGradArgs&, int64_t block, int64_t blocks);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

// float64: plain loops, compiled once.
extern const Kernels kFloat64Kernels;

// The best instruction set this processor has; SACCADE_CPU_CAPABILITY=baseline|avx2|avx512 lowers it.
const Kernels& kernels(Dtype dtype);

// Any dtype: the partial sums are float64, so one source serves all.
void rope_freq_grad(const FreqGradArgs&, int64_t block, int64_t blocks, double* partial /* [A, G, R] */);

inline int64_t tiles(const RopeArgs& a) { return a.batch * ((a.tokens + kTileTokens - 1) / kTileTokens); }

}  // namespace saccade::cpu
