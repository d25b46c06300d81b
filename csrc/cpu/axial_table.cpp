// The function table of axial attention, of one instruction set.
#include "axial_kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

int64_t axial_attention_space(const AxialAttentionArgs&);
void axial_attention(const AxialAttentionArgs&, int64_t, float*);
void axial_prefix_chunk(const AxialAttentionArgs&, int64_t, float*);
void axial_prefix_end(const AxialAttentionArgs&, int64_t, float*);
int64_t axial_attention_bwd_space(const AxialAttentionGradArgs&);
void axial_attention_bwd(const AxialAttentionGradArgs&, int64_t, float*);
void axial_prefix_end_bwd(const AxialAttentionGradArgs&, int64_t, float*);

extern const AxialKernels kAxialKernels;
const AxialKernels kAxialKernels{axial_attention_space,     axial_attention,     axial_prefix_chunk,  axial_prefix_end,
                                 axial_attention_bwd_space, axial_attention_bwd, axial_prefix_end_bwd};

}  // namespace saccade::cpu::SACCADE_ISA
