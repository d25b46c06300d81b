// Launch of keep_top: one block a sample.
#include "keep_top.cuh"
#include "keep_top.h"

namespace saccade {

const char* keep_top_cuda(const KeepTopArgs& args, void* stream) {
  if (args.k < 0 || args.k > args.tokens) return "keep_top: k must lie between 0 and the number of tokens";
  if (args.batch == 0 || args.k == 0) return nullptr;
  return launch(keep_top_kernel, dim3(static_cast<unsigned>(args.batch)), kSelectThreads, 0, stream, args);
}

}  // namespace saccade
