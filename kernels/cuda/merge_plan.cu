// Launch of merge_plan: one block a sample, and the cut of the whole batch before it.
#include "merge_plan.cuh"
#include "merge_plan.h"

namespace saccade {
namespace {

int32_t sort_passes(int64_t rows) {  // keys are rows and, for what is dropped, `rows` itself
  int32_t passes = 1;
  while (rows >> (8 * passes) != 0) ++passes;
  return passes;
}

constexpr int64_t kCutBytes = 16;
static_assert(sizeof(Cut) <= kCutBytes, "the cut of the whole batch lies before the list");

}  // namespace

int64_t merge_plan_workspace_cuda(const MergePlanArgs& args) {
  const int64_t list = sort_passes(args.rows) > 1 ? args.batch * args.tokens : 0;
  return (args.whole_batch ? kCutBytes : 0) + list * static_cast<int64_t>(sizeof(int32_t));
}

const char* merge_plan_cuda(const MergePlanArgs& args, void* stream) {
  if (args.whole_batch && args.batch * args.tokens >= int64_t{1} << 32) {
    return "merge_plan: the samples of a whole batch must have fewer than 2^32 tokens together";
  }
  if (args.batch == 0) return nullptr;
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  PlanLaunch made = {};
  made.passes = sort_passes(args.rows);
  if (args.whole_batch) {
    made.whole_batch = reinterpret_cast<Cut*>(workspace);
    workspace += kCutBytes;
    if (const char* error = launch(merge_plan_cut_kernel, dim3(1), kSelectThreads, 0, stream, args, made.whole_batch)) {
      return error;
    }
  }
  if (made.passes > 1) made.list = reinterpret_cast<int32_t*>(workspace);
  return launch(merge_plan_kernel, dim3(static_cast<unsigned>(args.batch)), kSelectThreads, 0, stream, args, made);
}

}  // namespace saccade
