// Launch of axial_attention: 6 kernels (dtype x head dim), then the terms of the prefix are joined.
#include "axial_attention.cuh"
#include "axial_attention.h"

namespace saccade {
namespace {

int64_t term_rows(const AxialAttentionArgs& args) {
  const AxialPlan plan = axial_plan(args, false);
  if (plan.prefix_tiles == 0) return 0;
  return args.batch * args.heads * plan.parts * args.geometry.prefix;
}

template <typename T, int kDepth>
const char* launch_axial(const AxialAttentionArgs& args, void* stream) {
  const int64_t entries = args.batch * args.heads, prefix = args.geometry.prefix;
  AxialPlan plan = axial_plan(args, false);
  plan.aligned = axial_alignment(args).access() == 8;
  AxialTerms terms = {args.geometry.mean ? static_cast<float*>(args.group_out) : static_cast<float*>(args.workspace),
                      nullptr};
  if (!args.geometry.mean) terms.lse = terms.out + term_rows(args) * args.head_dim;
  if (plan.per_entry > 0) {
    const dim3 grid(static_cast<unsigned>(entries * plan.per_entry));
    const char* error = launch(axial_attention_kernel<T, kDepth>, grid, kAttentionThreads,
                               AxialShared<T, kDepth>::bytes(), stream, args, plan, terms);
    if (error != nullptr) return error;
  }
  if (prefix == 0) return nullptr;
  AxialJoin join =
      axial_join(args, terms.out, args.geometry.mean ? plan.box_count : plan.parts, args.out, args.out_stride);
  join.factor = plan.box_share;
  join.lse = terms.lse;
  join.out_lse = args.lse;
  return launch_join<T>(join, entries, stream);
}

}  // namespace

int64_t axial_attention_workspace_cuda(const AxialAttentionArgs& args) {
  return term_rows(args) * (args.head_dim + 1) * static_cast<int64_t>(sizeof(float));
}

const char* axial_attention_cuda(const AxialAttentionArgs& args, void* stream) {
  if (const char* refusal = axial_refusal(args)) return refusal;
  if (args.batch == 0 || args.heads == 0 || args.tokens == 0) return nullptr;
  return with_axial_depth(args, [&](auto type, auto depth) {
    return launch_axial<typename decltype(type)::type, decltype(depth)::value>(args, stream);
  });
}

}  // namespace saccade
