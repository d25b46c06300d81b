// Launch declarations of attention_bias_grad on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../attention_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t attention_bias_grad_workspace_cuda(const AttentionBiasGradArgs& args);

// Writes dbias on `stream`, a cudaStream_t of the current device. q, k, v and dout float16 or bfloat16, head_dim a
// multiple of 8 up to 256; the bias and its gradient of the same type or float32.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* attention_bias_grad_cuda(const AttentionBiasGradArgs& args, void* stream);

}  // namespace saccade
