// Launch declarations of match on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t match_workspace_cuda(const MatchArgs& args);

// Writes best and target [B, N] on `stream`, a cudaStream_t of the current device, in two launches.
// float32, float16 and bfloat16. Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* match_cuda(const MatchArgs& args, void* stream);

}  // namespace saccade
