// Launch declarations of sparse_attention_bwd on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../attention_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t sparse_attention_bwd_workspace_cuda(const SparseAttentionGradArgs& args);

// Writes dq, dk, dv, delta and, where it is given, dkey_bias on `stream`, a cudaStream_t of the current device, in
// three launches. float16 and bfloat16, head_dim a multiple of 8 up to 256. Never waits, allocates nothing, and can be
// captured in a CUDA graph. Returns null, or a text that says why nothing was launched.
const char* sparse_attention_bwd_cuda(const SparseAttentionGradArgs& args, void* stream);

}  // namespace saccade
