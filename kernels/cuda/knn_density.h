// Launch declarations of knn_density on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t knn_density_workspace_cuda(const KnnDensityArgs& args);

// Writes out [B, N] on `stream`, a cudaStream_t of the current device, in two launches; 1 <= k <= 32.
// float32, float16 and bfloat16. Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* knn_density_cuda(const KnnDensityArgs& args, void* stream);

}  // namespace saccade
