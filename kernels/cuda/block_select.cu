// Launch of block_select: how many rows a block of threads takes.
#include "block_select.cuh"
#include "block_select.h"

namespace saccade {
namespace {

#ifndef SACCADE_CHOOSE_KEYS  // the emulation takes few, so that small problems meet both kernels
#define SACCADE_CHOOSE_KEYS 2048
#endif

template <int kRows>
const char* launch_choose(const BlockSelectArgs& args, void* stream) {
  BlockSelectPlan plan = {};
  plan.row_tiles = static_cast<int32_t>(ceil_div(args.q_blocks, kRows));
  plan.aligned = args.head_dim % 4 == 0 && reinterpret_cast<uintptr_t>(args.k) % 16 == 0;
  const int64_t grid = args.batch * args.heads * plan.row_tiles;
  if (grid > 0x7fffffff) return "block_select: more than 2^31 - 1 blocks";
  const int depth = static_cast<int>(ceil_div(args.head_dim, kChooseDepth)) * kChooseDepth;
  const size_t shared = choose_shared_bytes<kRows>(args.k_blocks, depth);
  return launch(block_select_kernel<kRows>, dim3(static_cast<unsigned>(grid)), kChooseThreads, shared, stream, args,
                plan);
}

}  // namespace

int64_t block_select_workspace_cuda(const BlockSelectArgs&) { return 0; }

const char* block_select_cuda(const BlockSelectArgs& args, void* stream) {
  if (args.k_blocks > kChooseKeys) return "block_select: the GPU kernels take at most 16384 key blocks";
  if (args.head_dim < 1 || args.head_dim > kChooseDim) return "block_select: the GPU kernels take head_dim 1 to 512";
  if (args.batch == 0 || args.heads == 0 || args.q_blocks == 0) return nullptr;
  if (args.k_blocks <= SACCADE_CHOOSE_KEYS) return launch_choose<kChooseWarps>(args, stream);
  return launch_choose<1>(args, stream);
}

}  // namespace saccade
