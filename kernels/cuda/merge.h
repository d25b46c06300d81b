// Launch declarations of merge and its gradient on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Writes y, total and log_total on `stream`, a cudaStream_t of the current device. float32, float16 and bfloat16.
// Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* merge_cuda(const MergeArgs& args, void* stream);

// Writes dx, all of it, in the same way.
const char* merge_bwd_cuda(const MergeGradArgs& args, void* stream);

}  // namespace saccade
