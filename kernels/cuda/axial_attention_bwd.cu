// Launch of the gradients of axial_attention: delta first, then dk and dv, then dq; 12 kernels for these (dtype x head
// dim x what the rows are). Then the terms of the prefix are joined.
#include "axial_attention_bwd.cuh"
#include "axial_attention_bwd.h"

namespace saccade {
namespace {

struct TermCounts {
  int64_t entries, deltas, queries, keys;  // deltas of a sample and head; terms of a prefix row, 0 without a prefix
  int64_t delta_floats, query_floats, key_floats;

  explicit TermCounts(const AxialAttentionArgs& args) {
    const AxialPlan of_queries = axial_plan(args, false), of_keys = axial_plan(args, true);
    const int64_t prefix = args.geometry.prefix;
    entries = args.batch * args.heads;
    deltas = args.tokens + (args.geometry.mean ? of_queries.box_count * prefix : 0);
    queries = args.geometry.mean ? of_queries.box_count : of_queries.parts;
    keys = of_keys.parts;
    delta_floats = ceil_div(entries * deltas, 4) * 4;
    query_floats = entries * queries * prefix * args.head_dim;
    key_floats = entries * keys * prefix * args.head_dim;
  }
};

template <typename T, int kDepth, bool kOfKeys>
const char* launch_rows(const AxialAttentionGradArgs& args, bool aligned, const AxialGradTerms& terms, void* stream) {
  using Shared = AxialGradShared<T, kDepth, kOfKeys>;
  AxialPlan plan = axial_plan(args.forward, kOfKeys);
  plan.aligned = aligned;
  const int64_t programs = args.forward.batch * args.forward.heads * plan.per_entry * Shared::kSplit;
  if (programs == 0) return nullptr;
  return launch(axial_attention_bwd_kernel<T, kDepth, kOfKeys>, dim3(static_cast<unsigned>(programs)),
                kAttentionThreads, Shared::bytes(), stream, args, plan, terms);
}

template <typename T, int kDepth>
const char* launch_all(const AxialAttentionGradArgs& args, bool aligned, void* stream) {
  const AxialAttentionArgs& forward = args.forward;
  const TermCounts counts(forward);
  AxialGradTerms terms = {};
  terms.delta = static_cast<float*>(args.workspace);
  terms.deltas = counts.deltas;
  terms.dq = terms.delta + counts.delta_floats;
  terms.dk = terms.dq + counts.query_floats;
  terms.dv = terms.dk + counts.key_floats;
  AxialPlan plan = axial_plan(forward, false);
  plan.aligned = aligned;
  const int64_t blocks = ceil_div(counts.entries * counts.deltas, kAttentionThreads / kWarp);
  if (blocks > 0x7fffffff) return "axial_attention_bwd: more rows than one launch takes";
  const dim3 grid(static_cast<unsigned>(blocks));
  if (const char* error = launch(axial_delta_kernel<T>, grid, kAttentionThreads, 0, stream, args, plan, terms)) {
    return error;
  }
  if (const char* error = launch_rows<T, kDepth, true>(args, aligned, terms, stream)) return error;
  if (const char* error = launch_rows<T, kDepth, false>(args, aligned, terms, stream)) return error;
  if (forward.geometry.prefix == 0) return nullptr;
  const auto join = [&](const float* from, int64_t count, void* out, const int64_t (&stride)[3]) {
    return launch_join<T>(axial_join(forward, from, count, out, stride), counts.entries, stream);
  };
  if (const char* error = join(terms.dq, counts.queries, args.dq, args.dq_stride)) return error;
  if (const char* error = join(terms.dk, counts.keys, args.dk, args.dk_stride)) return error;
  return join(terms.dv, counts.keys, args.dv, args.dv_stride);
}

}  // namespace

int64_t axial_attention_bwd_workspace_cuda(const AxialAttentionGradArgs& args) {
  const TermCounts counts(args.forward);
  return (counts.delta_floats + counts.query_floats + 2 * counts.key_floats) * static_cast<int64_t>(sizeof(float));
}

const char* axial_attention_bwd_cuda(const AxialAttentionGradArgs& args, void* stream) {
  const AxialAttentionArgs& forward = args.forward;
  if (const char* refusal = axial_refusal(forward)) return refusal;
  if (forward.batch == 0 || forward.heads == 0 || forward.tokens == 0) return nullptr;
  Alignment all = axial_alignment(forward);
  all.tensor(args.dout, args.dout_stride, forward.batch, forward.heads, forward.tokens);
  all.tensor(args.dq, args.dq_stride, forward.batch, forward.heads, forward.tokens);
  all.tensor(args.dk, args.dk_stride, forward.batch, forward.heads, forward.tokens);
  all.tensor(args.dv, args.dv_stride, forward.batch, forward.heads, forward.tokens);
  const bool aligned = all.access() == 8;
  return with_axial_depth(forward, [&](auto type, auto depth) {
    return launch_all<typename decltype(type)::type, decltype(depth)::value>(args, aligned, stream);
  });
}

}  // namespace saccade
