// Launch of sparse_attention: row tiles, and the 14 kernels (dtype x head dim x rows of a tile).
#include "prim/attention_launch.cuh"
#include "sparse_attention.cuh"
#include "sparse_attention.h"

namespace saccade {
namespace {

template <typename T, int kDepth, int kFrags>
const char* launch_rows(const SparseAttentionArgs& args, bool aligned, void* stream) {
  using Shared = AttentionShared<T, kDepth, kFrags>;
  const int64_t tiles = ceil_div(query_positions(args.in), Shared::kRows),
                programs = tiles * args.in.heads * args.in.batch;
  if (programs > kMostPrograms) return "sparse_attention: more query blocks than one launch has programs";
  AttentionPlan plan;
  plan.row_tiles = static_cast<int32_t>(tiles);
  plan.row_shift = args.in.layout.q_block > Shared::kRows;
  plan.aligned = aligned;
  plan.scale_log2 = args.in.scale * kLog2E;
  return launch(sparse_attention_kernel<T, kDepth, kFrags>, dim3(static_cast<unsigned>(programs)), kAttentionThreads,
                Shared::bytes(), stream, args, plan);
}

}  // namespace

int64_t sparse_attention_workspace_cuda(const SparseAttentionArgs&) { return 0; }

const char* sparse_attention_cuda(const SparseAttentionArgs& args, void* stream) {
  if (const char* refusal = attention_refusal(args.in)) return refusal;
  if (args.in.batch == 0 || args.in.heads == 0 || args.in.q_len == 0) return nullptr;
  WideAccess access(args.in);
  access.queries(args.out, args.out_stride);
  return with_tile(args.in, [&](auto type, auto depth) {
    using T = decltype(type);
    // 128 rows of 256 channels have no room beside a tile of k and one of v.
    if constexpr (depth <= 128) {
      if (args.in.layout.q_block == 128) return launch_rows<T, depth, 2>(args, access.allowed(), stream);
    }
    return launch_rows<T, depth, 1>(args, access.allowed(), stream);
  });
}

}  // namespace saccade
