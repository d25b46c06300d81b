// Launch declarations of block_pool on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../block_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t block_pool_workspace_cuda(const BlockPoolArgs& args);

// Writes out [B, H, blocks, D] on `stream`, a cudaStream_t of the current device. float32, float16 and bfloat16.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* block_pool_cuda(const BlockPoolArgs& args, void* stream);

}  // namespace saccade
