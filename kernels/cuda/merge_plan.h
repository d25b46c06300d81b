// Launch declarations of merge_plan on a GPU. Plain C++: no torch, no CUDA header.
#pragma once
#include "../merge_args.h"

namespace saccade {

// Bytes that `workspace` must hold (16-byte aligned, contents arbitrary). Depends on shapes alone, never on the device.
int64_t merge_plan_workspace_cuda(const MergePlanArgs& args);

// Writes inverse, ptr, members, head and counts on `stream`, a cudaStream_t of the current device: in one launch, two
// where r counts over the whole batch. Never waits, allocates nothing, and can be captured in a CUDA graph.
// Returns null, or a text that says why nothing was launched.
const char* merge_plan_cuda(const MergePlanArgs& args, void* stream);

}  // namespace saccade
