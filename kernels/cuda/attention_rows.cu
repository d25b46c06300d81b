// Launch of attention_rows: tiles of queries, parts of keys, and the 5 kernels (dtype x rows of a tile).
#include "attention_rows.cuh"
#include "attention_rows.h"

namespace saccade {

int64_t attention_rows_workspace_cuda(const AttentionMapArgs& args) {
  const PairPlan plan = pair_plan(args, args.row_count, args.in.k_len);
  if (plan.parts == 1) return 0;
  return args.in.batch * args.in.heads * args.row_count * plan.parts * static_cast<int64_t>(sizeof(RowStatistics));
}

const char* attention_rows_cuda(const AttentionMapArgs& args, void* stream) {
  const AttentionInputs& in = args.in;
  if (in.head_dim > kPairDim) return "attention_rows: the GPU kernels take head_dim up to 256";
  const int64_t rows = in.batch * in.heads * args.row_count;
  if (rows == 0) return nullptr;
  const PairPlan plan = pair_plan(args, args.row_count, in.k_len);
  const int64_t grid = in.batch * in.heads * plan.tiles * plan.parts;
  if (grid > 0x7fffffff) return "attention_rows: more than 2^31 - 1 blocks";
  const char* refusal = "attention_rows: the GPU kernels take float32, float16 and bfloat16";
  const char* error = with_pair_kind(args, args.row_count, refusal, [&](auto type, auto tile_rows) {
    using T = typename decltype(type)::type;
    constexpr int kRows = decltype(tile_rows)::value;
    const size_t shared = PairKind<T, kRows>::Stream::bytes(plan);
    return launch(attention_rows_kernel<T, kRows>, dim3(static_cast<unsigned>(grid)), kGramThreads, shared, stream,
                  args, plan);
  });
  if (error != nullptr || plan.parts == 1) return error;
  return launch(join_rows_kernel, dim3(static_cast<unsigned>(ceil_div(rows, kGramThreads))), kGramThreads, 0, stream,
                static_cast<const RowStatistics*>(args.workspace), plan.parts, rows, args.lse, args.entropy);
}

}  // namespace saccade
