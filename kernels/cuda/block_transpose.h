// Launch declarations of block_transpose on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../block_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t block_transpose_workspace_cuda(const BlockTransposeArgs& args);

// Writes the lists by column on `stream`, a cudaStream_t of the current device.
// Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why nothing
// was launched.
const char* block_transpose_cuda(const BlockTransposeArgs& args, void* stream);

}  // namespace saccade
