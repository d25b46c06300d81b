// Launch declarations of qk_norm_rope and its gradient on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../rope_args.h"

namespace saccade {

// Normalises and rotates q and k (k.heads == 0: q alone) on `stream`, a cudaStream_t of the current device; x == y
// works in place. float32, float16 and bfloat16; weights in any of the three, whatever the dtype of q. Never waits,
// allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing was launched.
const char* qk_norm_rope_cuda(const NormArgs& args, void* stream);

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t qk_norm_rope_bwd_workspace_cuda(const NormGradArgs& args);

// Writes dx of q and k and, where q_dweight / k_dweight are not null, the weight gradients in float32 (zeros when there
// are no tokens). angles.inverse is ignored: the gradient turns backwards by itself. dx must not overlap x or dy.
const char* qk_norm_rope_bwd_cuda(const NormGradArgs& args, void* stream);

}  // namespace saccade
