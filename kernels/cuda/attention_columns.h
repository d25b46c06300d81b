// Launch declarations of attention_columns on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../attention_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t attention_columns_workspace_cuda(const AttentionMapArgs& args);

// Writes columns [B, H, Sk] on `stream`, a cudaStream_t of the current device. float32, float16 and bfloat16, head_dim
// up to 256. Never waits, allocates nothing, and can be captured in a CUDA graph. Returns null, or a text that says why
// nothing was launched.
const char* attention_columns_cuda(const AttentionMapArgs& args, void* stream);

}  // namespace saccade
