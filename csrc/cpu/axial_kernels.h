// The native CPU kernels of axial attention. As in kernels.h: one source for every instruction set, a kernel handles
// one work item on the calling thread, and results do not depend on how items are spread over threads.
#pragma once
#include <cstdint>

#include "axial_args.h"

namespace saccade::cpu {

// Items are counted over all samples and heads; AxialPlan says how many there are of a head.
struct AxialKernels {
  int64_t (*space)(const AxialAttentionArgs&);                         // floats that an item or row needs
  void (*run)(const AxialAttentionArgs&, int64_t item, float* space);  // a run of boxes
  void (*see)(const AxialAttentionArgs&, int64_t item, float* space);  // prefix queries and a chunk of all keys
  void (*end)(const AxialAttentionArgs&, int64_t row, float* space);   // the prefix of a head
  int64_t (*space_bwd)(const AxialAttentionGradArgs&);
  void (*run_bwd)(const AxialAttentionGradArgs&, int64_t item, float* space);
  void (*end_bwd)(const AxialAttentionGradArgs&, int64_t row, float* space);
};

namespace baseline {
extern const AxialKernels kAxialKernels;
}
namespace avx2 {
extern const AxialKernels kAxialKernels;
}
namespace avx512 {
extern const AxialKernels kAxialKernels;
}

const AxialKernels& axial_kernels();

}  // namespace saccade::cpu
