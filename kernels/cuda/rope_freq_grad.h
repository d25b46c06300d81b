// Launch declarations of rope_freq_grad on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../rope_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t rope_freq_grad_workspace_cuda(const FreqGradArgs& args);

// Writes out [A, G, R] float32 on `stream`, a cudaStream_t of the current device; zeros when there are no tokens.
// float32, float16 and bfloat16. Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* rope_freq_grad_cuda(const FreqGradArgs& args, void* stream);

}  // namespace saccade
