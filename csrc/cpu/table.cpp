// The function table of one instruction set.
#include "kernels.h"

namespace saccade::cpu::SACCADE_ISA {

void apply_rope(const RopeArgs&, int64_t item);
void qk_norm_rope(const NormArgs&, int64_t item);
void qk_norm_rope_bwd(const NormGradArgs&, int64_t block, int64_t blocks);

#define SACCADE_TEXT(x) #x
#define SACCADE_NAME(x) SACCADE_TEXT(x)
extern const Kernels kKernels;
const Kernels kKernels{SACCADE_NAME(SACCADE_ISA), apply_rope, qk_norm_rope, qk_norm_rope_bwd};

}  // namespace saccade::cpu::SACCADE_ISA
