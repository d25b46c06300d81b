// Launch declaration of keep_top on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Writes out [B, k] on `stream`, a cudaStream_t of the current device, in one launch; 0 <= k <= tokens.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* keep_top_cuda(const KeepTopArgs& args, void* stream);

}  // namespace saccade
