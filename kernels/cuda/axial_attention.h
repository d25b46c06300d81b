// Launch declarations of axial_attention on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../axial_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t axial_attention_workspace_cuda(const AxialAttentionArgs& args);

// Writes out and lse, and group_out and group_lse with `mean`, on `stream`, a cudaStream_t of the current device.
// float16 and bfloat16, head_dim a multiple of 8 up to 256.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* axial_attention_cuda(const AxialAttentionArgs& args, void* stream);

}  // namespace saccade
