// From torch tensors to the plain arguments of the attention kernels, with the checks that keep memory safe. The Python
// functions have refused bad input with better words before; these hold for direct callers of the raw ops.
#pragma once
#include <initializer_list>
#include <utility>

#include "../../kernels/attention_args.h"
#include "../util/tensor.h"

namespace saccade {

using Sizes = std::initializer_list<int64_t>;

// A tensor of these sizes on the device of `like`; -1 accepts any.
inline void check_sizes(const Tensor& t, const Tensor& like, const char* name, Sizes sizes) {
  STD_TORCH_CHECK(t.device() == like.device(), name, ": expected the device of q");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(), " dimensions, got ",
                  t.dim());
  int64_t axis = 0;
  for (int64_t size : sizes) {
    STD_TORCH_CHECK(size < 0 || t.size(axis) == size, name, ": expected size ", size, " on axis ", axis, ", got ",
                    t.size(axis));
    ++axis;
  }
}

// Values with a last stride of 1; strides of batch, head and token.
inline void check_values(const Tensor& t, const char* name, Dtype dtype, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(dtype_of(t, name) == dtype, name, ": expected the dtype of q");
  check_dense_columns(t, name);
  copy_used_strides(t, stride);
}

inline float* check_floats(const Tensor& t, const Tensor& like, const char* name, Sizes sizes) {
  check_sizes(t, like, name, sizes);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name, ": expected contiguous float32");
  return data_of<float>(t);
}

inline const int32_t* check_whole(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.device() == like.device(), name,
                  ": expected contiguous int32 on the device of q");
  return data_of<const int32_t>(t);
}

// The tensors of a layout, in the order of the schema.
struct LayoutTensors {
  const Tensor &starts, &counts, &indices;
  const OptionalTensor &p_starts, &p_counts, &p_indices, &p_ids, &bits, &box, &at, &q_order, &k_order;
};

// Lists of `rows` rows.
inline BlockLists lists_of(const Tensor& q, const Tensor& starts, const Tensor& counts, const Tensor& indices,
                           int64_t rows, const char* name) {
  BlockLists lists;
  lists.starts = check_whole(starts, q, name);
  lists.counts = check_whole(counts, q, name);
  lists.indices = check_whole(indices, q, name);
  for (const Tensor* t : {&starts, &counts}) {
    check_sizes(*t, q, name, {-1, -1, rows});
    STD_TORCH_CHECK((t->size(0) == 1 || t->size(0) == q.size(0)) && (t->size(1) == 1 || t->size(1) == q.size(1)), name,
                    ": expected lists [1 or B, 1 or H, ", rows, "]");
    STD_TORCH_CHECK(t->size(0) == starts.size(0) && t->size(1) == starts.size(1), name,
                    ": expected starts and counts of one shape");
  }
  lists.stride[0] = starts.size(0) == 1 ? 0 : starts.size(1);
  lists.stride[1] = starts.size(1) == 1 ? 0 : 1;
  return lists;
}

inline void set_ids(BlockLists& lists, const Tensor& q, const Tensor& indices, const OptionalTensor& ids,
                    const char* name) {
  if (!ids.has_value()) return;
  STD_TORCH_CHECK(ids->numel() == indices.numel(), name, ": expected as many elements as the indices");
  lists.ids = check_whole(*ids, q, name);
}

// A table [1|B, 1|heads, ...] with `inner` elements for one sample and head.
inline PositionTable table_of(const Tensor& t, const Tensor& q, int64_t heads, int64_t inner, const char* name) {
  PositionTable table;
  table.data = check_whole(t, q, name);
  STD_TORCH_CHECK(t.dim() >= 3 && (t.size(0) == 1 || t.size(0) == q.size(0)) && (t.size(1) == 1 || t.size(1) == heads),
                  name, ": expected [1 or B, 1 or ", heads, ", ...]");
  STD_TORCH_CHECK(t.numel() == t.size(0) * t.size(1) * inner, name, ": expected ", inner,
                  " elements for each sample and head");
  table.stride[0] = t.size(0) == 1 ? 0 : t.size(1) * inner;
  table.stride[1] = t.size(1) == 1 ? 0 : inner;
  return table;
}

inline int32_t block_of(int64_t block, const char* name) {
  STD_TORCH_CHECK(block == 64 || block == 128, name, ": expected 64 or 128, got ", block);
  return static_cast<int32_t>(block);
}

inline void set_positions(BlockLayoutArgs& l, const AttentionInputs& in, const Tensor& q, const LayoutTensors& t) {
  STD_TORCH_CHECK(t.counts.dim() == 3, "counts: expected 3 dimensions");
  l.q_blocks = static_cast<int32_t>(t.counts.size(2));
  const int64_t q_positions = int64_t{l.q_blocks} * l.q_block;
  int64_t k_positions = in.k_len;
  if (t.q_order.has_value())
    l.q_order = table_of(*t.q_order, q, in.heads, q_positions, "q_order");
  else
    STD_TORCH_CHECK(q_positions >= in.q_len, "counts: expected query blocks for all ", in.q_len, " queries");
  if (t.k_order.has_value()) {
    STD_TORCH_CHECK(t.k_order->dim() == 3, "k_order: expected 3 dimensions");
    k_positions = t.k_order->size(2);
    STD_TORCH_CHECK(k_positions % l.k_block == 0, "k_order: expected whole blocks of positions");
    l.k_order = table_of(*t.k_order, q, in.kv_heads, k_positions, "k_order");
  }
  l.k_blocks = static_cast<int32_t>((k_positions + l.k_block - 1) / l.k_block);
}

inline void set_partial(BlockLayoutArgs& l, const AttentionInputs& in, const Tensor& q, const LayoutTensors& t) {
  if (!t.p_starts.has_value()) return;
  STD_TORCH_CHECK(t.p_counts.has_value() && t.p_indices.has_value(), "p_starts: expected p_counts and p_indices too");
  l.partial = lists_of(q, *t.p_starts, *t.p_counts, *t.p_indices, l.q_blocks, "p_starts, p_counts, p_indices");
  set_ids(l.partial, q, *t.p_indices, t.p_ids, "p_ids");
  if (t.bits.has_value()) {
    STD_TORCH_CHECK(t.p_ids.has_value(), "bits: expected p_ids too");
    check_sizes(*t.bits, q, "bits", {-1, l.q_block, l.k_block / 32});
    l.bits = check_whole(*t.bits, q, "bits");
    return;
  }
  STD_TORCH_CHECK(t.box.has_value() && t.at.has_value(), "p_starts: expected box and at, or bits");
  STD_TORCH_CHECK(t.at->dim() == 4 && t.box->dim() == 5 && t.box->size(2) == 2 && t.box->size(3) == t.at->size(2) &&
                      t.at->size(2) >= 1,
                  "box, at: expected [1|B, 1|H, 2, A, nQ * q_block] and [1|B, 1|H, A, nK * k_block]");
  l.axes = static_cast<int32_t>(t.at->size(2));
  l.box = table_of(*t.box, q, in.heads, int64_t{2} * l.axes * l.q_blocks * l.q_block, "box");
  l.at = table_of(*t.at, q, in.heads, int64_t{l.axes} * l.k_blocks * l.k_block, "at");
}

inline void set_bias(AttentionInputs& in, const Tensor& q, const OptionalTensor& bias, const OptionalTensor& key_bias) {
  if (bias.has_value()) {
    check_sizes(*bias, q, "bias", {-1, -1, in.q_len, in.k_len});
    STD_TORCH_CHECK(
        (bias->size(0) == 1 || bias->size(0) == in.batch) && (bias->size(1) == 1 || bias->size(1) == in.heads),
        "bias: expected [1 or B, 1 or H, Sq, Sk]");
    in.bias_dtype = dtype_of(*bias, "bias");
    STD_TORCH_CHECK(in.bias_dtype == in.dtype || in.bias_dtype == Dtype::kFloat32,
                    "bias: expected the dtype of q or float32");
    check_values(*bias, "bias", in.bias_dtype, in.bias_stride);
    in.bias = bias->data_ptr();
  }
  if (key_bias.has_value()) {
    in.key_bias = check_floats(*key_bias, q, "key_bias", {-1, in.k_len});
    STD_TORCH_CHECK(key_bias->size(0) == 1 || key_bias->size(0) == in.batch, "key_bias: expected [1 or B, Sk]");
    in.key_bias_stride = key_bias->size(0) == 1 ? 0 : in.k_len;
  }
}

inline AttentionInputs attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const LayoutTensors& layout,
                                        const OptionalTensor& bias, const OptionalTensor& key_bias, int64_t q_block,
                                        int64_t k_block, double scale) {
  AttentionInputs in;
  check_sizes(q, q, "q", {-1, -1, -1, -1});
  in.batch = q.size(0);
  in.heads = static_cast<int32_t>(q.size(1));
  in.q_len = q.size(2);
  in.head_dim = static_cast<int32_t>(q.size(3));
  check_sizes(k, q, "k", {in.batch, -1, -1, in.head_dim});
  in.kv_heads = static_cast<int32_t>(k.size(1));
  in.k_len = k.size(2);
  check_sizes(v, q, "v", {in.batch, in.kv_heads, in.k_len, in.head_dim});
  STD_TORCH_CHECK(in.heads == 0 || (in.kv_heads > 0 && in.heads % in.kv_heads == 0),
                  "k: expected a number of heads that divides the ", in.heads, " of q, got ", in.kv_heads);
  STD_TORCH_CHECK(in.head_dim % 8 == 0 && in.head_dim >= 8 && in.head_dim <= 256,
                  "q: expected a head_dim that is a multiple of 8, at most 256, got ", in.head_dim);
  in.dtype = kernel_dtype(q, "q");
  for (auto [t, name, stride] : {std::tuple<const Tensor*, const char*, int64_t (*)[3]>{&q, "q", &in.q_stride},
                                 {&k, "k", &in.k_stride},
                                 {&v, "v", &in.v_stride}})
    check_values(*t, name, in.dtype, *stride);
  in.q = q.data_ptr();
  in.k = k.data_ptr();
  in.v = v.data_ptr();
  in.scale = static_cast<float>(scale);
  BlockLayoutArgs& l = in.layout;
  l.q_block = block_of(q_block, "q_block");
  l.k_block = block_of(k_block, "k_block");
  set_positions(l, in, q, layout);
  l.full = lists_of(q, layout.starts, layout.counts, layout.indices, l.q_blocks, "starts, counts, indices");
  set_partial(l, in, q, layout);
  set_bias(in, q, bias, key_bias);
  return in;
}

inline bool is_empty(const AttentionInputs& in) { return in.batch == 0 || in.heads == 0; }

}  // namespace saccade
