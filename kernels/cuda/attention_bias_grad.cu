// Launch of attention_bias_grad: one pass over the items that share a bias, or one for each item where every item has
// an order of its own, so that their tiles are other tokens; 8 kernels (dtype x head dim) and those that clear and
// round.
#include "attention_bias_grad.cuh"
#include "attention_bias_grad.h"
#include "prim/attention_launch.cuh"

namespace saccade {
namespace {

int64_t elements(const AttentionBiasGradArgs& args) {
  return args.bias_batch * args.bias_heads * args.in.q_len * args.in.k_len;
}

// Whether samples or heads that share a bias differ in the token at a position.
bool orders_differ(const AttentionBiasGradArgs& args) {
  const AttentionInputs& in = args.in;
  const bool samples = args.bias_batch == 1 && in.batch > 1, heads = args.bias_heads == 1 && in.heads > 1;
  const bool kv_heads = args.bias_heads == 1 && in.kv_heads > 1;
  const auto differs = [&](const PositionTable& order, bool over_heads) {
    return order.data != nullptr && ((samples && order.stride[0] != 0) || (over_heads && order.stride[1] != 0));
  };
  return differs(in.layout.q_order, heads) || differs(in.layout.k_order, kv_heads);
}

bool sums_in_workspace(const AttentionBiasGradArgs& args) {
  return orders_differ(args) && args.in.bias_dtype != Dtype::kFloat32;
}

const char* clear(void* out, Dtype dtype, int64_t count, void* stream) {
  const int64_t blocks = ceil_div(count, kFillThreads);
  if (blocks > kMostPrograms) return "attention_bias_grad: the bias has more elements than one launch clears";
  const auto kernel = dtype == Dtype::kFloat32 ? bias_grad_clear_kernel<4> : bias_grad_clear_kernel<2>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kFillThreads, 0, stream, out, count);
}

template <typename T, int kDepth>
const char* launch_items(const AttentionBiasGradArgs& args, bool aligned, void* stream) {
  using Shared = BiasGradShared<T, kDepth>;
  const AttentionInputs& in = args.in;
  const int64_t rows = ceil_div(query_positions(in), Shared::kRows);
  const int64_t columns = ceil_div(key_positions(in), Shared::kColumns);
  const int64_t biases = args.bias_batch * args.bias_heads, programs = biases * rows * columns;
  const int64_t count = elements(args);
  const bool ordered = in.layout.q_order.data != nullptr || in.layout.k_order.data != nullptr;
  const bool separate = orders_differ(args), rounded = sums_in_workspace(args);
  if (programs > kMostPrograms) return "attention_bias_grad: more pairs of blocks than one launch has programs";
  BiasGradPlan plan;
  plan.row_tiles = static_cast<int32_t>(rows);
  plan.column_tiles = static_cast<int32_t>(columns);
  plan.row_shift = in.layout.q_block > Shared::kRows;
  while (Shared::kColumns << plan.column_shift < in.layout.k_block) ++plan.column_shift;
  plan.samples = args.bias_batch == 1 ? static_cast<int32_t>(in.batch) : 1;
  plan.heads = args.bias_heads == 1 ? in.heads : 1;
  plan.aligned = aligned;
  plan.scale_log2 = in.scale * kLog2E;
  if (separate) {
    plan.sum = static_cast<float*>(rounded ? args.workspace : args.dbias);
    if (const char* error = clear(plan.sum, Dtype::kFloat32, count, stream)) return error;
  } else if (ordered) {
    if (const char* error = clear(args.dbias, in.bias_dtype, count, stream)) return error;
  }
  const int32_t items = plan.samples * plan.heads, each = separate ? 1 : items;
  plan.items = each;
  for (plan.first = 0; plan.first < items; plan.first += each) {
    const char* error = launch(attention_bias_grad_kernel<T, kDepth>, dim3(static_cast<unsigned>(programs)),
                               kAttentionThreads, Shared::bytes(), stream, args, plan);
    if (error != nullptr) return error;
  }
  if (!rounded) return nullptr;
  return launch(bias_grad_round_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, kFillThreads))), kFillThreads, 0,
                stream, plan.sum, count, static_cast<uint16_t*>(args.dbias));
}

}  // namespace

int64_t attention_bias_grad_workspace_cuda(const AttentionBiasGradArgs& args) {
  return sums_in_workspace(args) ? elements(args) * static_cast<int64_t>(sizeof(float)) : 0;
}

const char* attention_bias_grad_cuda(const AttentionBiasGradArgs& args, void* stream) {
  const AttentionInputs& in = args.in;
  if (const char* refusal = attention_refusal(in)) return refusal;
  if (elements(args) == 0) return nullptr;
  if (in.batch == 0 || in.heads == 0) return clear(args.dbias, in.bias_dtype, elements(args), stream);
  WideAccess access(in);
  access.queries(args.dout, args.dout_stride);
  return with_tile(
      in, [&](auto type, auto depth) { return launch_items<decltype(type), depth>(args, access.allowed(), stream); });
}

}  // namespace saccade
