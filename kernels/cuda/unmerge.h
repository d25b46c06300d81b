// Launch declaration of unmerge on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Writes out on `stream`, a cudaStream_t of the current device. float32, float16 and bfloat16.
// Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* unmerge_cuda(const UnmergeArgs& args, void* stream);

}  // namespace saccade
