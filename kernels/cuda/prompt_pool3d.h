// Launch declarations of prompt_pool3d and its gradient on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Writes y on `stream`, a cudaStream_t of the current device. float32, float16 and bfloat16.
// Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* prompt_pool3d_cuda(const PromptPoolArgs& args, void* stream);

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t prompt_pool3d_bwd_workspace_cuda(const PromptPoolGradArgs& args);

// Writes dx and dweights, all of both, in the same way.
const char* prompt_pool3d_bwd_cuda(const PromptPoolGradArgs& args, void* stream);

}  // namespace saccade
