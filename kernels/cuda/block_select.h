// Launch declarations of block_select on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../block_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t block_select_workspace_cuda(const BlockSelectArgs& args);

// Writes the lists on `stream`, a cudaStream_t of the current device. At most 16384 key blocks.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* block_select_cuda(const BlockSelectArgs& args, void* stream);

}  // namespace saccade
