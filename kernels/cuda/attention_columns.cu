// Launch of attention_columns: tiles of keys, parts of queries, and the 5 kernels (dtype x keys of a tile).
#include "attention_columns.cuh"
#include "attention_columns.h"

namespace saccade {

int64_t attention_columns_workspace_cuda(const AttentionMapArgs& args) {
  const PairPlan plan = pair_plan(args, args.in.k_len, args.row_count);
  if (plan.parts == 1) return 0;
  return args.in.batch * args.in.heads * args.in.k_len * plan.parts * static_cast<int64_t>(sizeof(float));
}

const char* attention_columns_cuda(const AttentionMapArgs& args, void* stream) {
  const AttentionInputs& in = args.in;
  if (in.head_dim > kPairDim) return "attention_columns: the GPU kernels take head_dim up to 256";
  const int64_t keys = in.batch * in.heads * in.k_len;
  if (keys == 0) return nullptr;
  const PairPlan plan = pair_plan(args, in.k_len, args.row_count);
  const int64_t grid = in.batch * in.heads * plan.tiles * plan.parts;
  if (grid > 0x7fffffff) return "attention_columns: more than 2^31 - 1 blocks";
  const char* refusal = "attention_columns: the GPU kernels take float32, float16 and bfloat16";
  const char* error = with_pair_kind(args, in.k_len, refusal, [&](auto type, auto tile_rows) {
    using T = typename decltype(type)::type;
    constexpr int kRows = decltype(tile_rows)::value;
    const size_t shared = PairKind<T, kRows>::Stream::bytes(plan);
    return launch(attention_columns_kernel<T, kRows>, dim3(static_cast<unsigned>(grid)), kGramThreads, shared, stream,
                  args, plan);
  });
  if (error != nullptr || plan.parts == 1) return error;
  return launch(join_columns_kernel, dim3(static_cast<unsigned>(ceil_div(keys, kGramThreads))), kGramThreads, 0, stream,
                static_cast<const float*>(args.workspace), plan.parts, keys, args.columns);
}

}  // namespace saccade
