// Launch declarations of apply_rope on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../rope_args.h"

namespace saccade {

// Rotates q and k (k.heads == 0: q alone) on `stream`, a cudaStream_t of the current device; x == y works in place.
// float32, float16 and bfloat16. Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* apply_rope_cuda(const RopeArgs& args, void* stream);

}  // namespace saccade
