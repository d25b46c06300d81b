// From torch tensors to the plain arguments that the rotary kernels take, with the checks that keep memory safe. The
// Python functions have refused bad input with better words before; these hold for direct callers of the raw ops.
#pragma once
#include "../util/tensor.h"
#include "rope_args.h"

namespace saccade {

inline void copy_strides(const Tensor& t, int64_t (&out)[3]) {
  for (int i = 0; i < 3; ++i) out[i] = t.stride(i);
}

inline void check_heads(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions [B, H, S, D], got ", t.dim());
  check_dense_columns(t, name);
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_heads(t, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.device() == x.device(), name,
                  ": expected the dtype and device of q");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(t.size(i) == x.size(i), name, ": expected the shape of its input");
}

inline Heads heads_of(const Tensor& x, const Tensor& y) {
  Heads h;
  h.x = x.data_ptr();
  h.y = y.data_ptr();
  h.heads = x.size(1);
  copy_strides(x, h.x_stride);
  copy_strides(y, h.y_stride);
  return h;
}

struct AngleOptions {
  int64_t shift, begin, end;
  bool interleaved;
  double scale;
  bool inverse;
};

// The common part: shapes and angles; q.y and k.y point at the outputs.
inline RopeArgs rope_args(const Tensor& q, const OptionalTensor& k, const Tensor& q_out, const OptionalTensor& k_out,
                          const Tensor& positions) {
  check_heads(q, "q");
  RopeArgs args;
  args.batch = q.size(0);
  args.tokens = q.size(2);
  args.head_dim = static_cast<int32_t>(q.size(3));
  args.dtype = dtype_of(q, "q");
  args.q = heads_of(q, q_out);
  if (k.has_value()) {
    check_heads(*k, "k");
    STD_TORCH_CHECK(k->scalar_type() == q.scalar_type() && k->device() == q.device(),
                    "k: expected the dtype and device of q");
    STD_TORCH_CHECK(k->size(0) == q.size(0) && k->size(2) == q.size(2) && k->size(3) == q.size(3),
                    "k: expected the batch, length and head_dim of q");
    args.k = heads_of(*k, *k_out);
  }
  STD_TORCH_CHECK(positions.dim() == 3 && (positions.size(1) == 1 || positions.size(1) == q.size(0)) &&
                      positions.size(2) == q.size(2) && positions.size(0) >= 1 && positions.size(0) <= 8,
                  "positions: expected [A, B or 1, S] with at most 8 axes");
  STD_TORCH_CHECK(positions.device() == q.device(), "positions: expected the device of q");
  Angles& a = args.angles;
  a.positions = positions.data_ptr();
  copy_strides(positions, a.position_stride);
  if (positions.size(1) == 1) a.position_stride[1] = 0;
  a.axes = static_cast<int32_t>(positions.size(0));
  switch (positions.scalar_type()) {
    case ScalarType::Int:
      a.position_dtype = PositionDtype::kInt32;
      break;
    case ScalarType::Long:
      a.position_dtype = PositionDtype::kInt64;
      break;
    case ScalarType::Float:
      a.position_dtype = PositionDtype::kFloat32;
      break;
    case ScalarType::Double:
      a.position_dtype = PositionDtype::kFloat64;
      break;
    default:
      STD_TORCH_CHECK(false, "positions: expected int32, int64, float32 or float64");
  }
  return args;
}

inline void check_groups(const RopeArgs& args) {
  const Angles& a = args.angles;
  STD_TORCH_CHECK(a.groups >= 1 && args.q.heads % a.groups == 0 && args.k.heads % a.groups == 0,
                  "steps: their head groups must divide the heads of q and k");
  STD_TORCH_CHECK(a.pairs >= 0 && 2 * a.pairs <= args.head_dim && args.head_dim <= 512,
                  "steps: expected at most head_dim / 2 pairs, and head_dim at most 512");
}

inline void set_angles(RopeArgs& args, const Tensor& q, const Tensor& steps, const AngleOptions& o) {
  Angles& a = args.angles;
  STD_TORCH_CHECK(steps.dim() == 3 && steps.scalar_type() == ScalarType::Long && steps.is_contiguous() &&
                      steps.device() == q.device() && steps.size(0) == a.axes,
                  "steps: expected contiguous int64 [A, G, R] on the device of q");
  a.steps = data_of<const int64_t>(steps);
  a.groups = static_cast<int32_t>(steps.size(1));
  a.pairs = static_cast<int32_t>(steps.size(2));
  check_groups(args);
  STD_TORCH_CHECK(0 <= o.begin && o.begin <= o.end && o.end <= a.pairs, "begin, end: expected a range of pairs");
  STD_TORCH_CHECK(0 <= o.shift && o.shift <= 32, "shift: expected 0 to 32");
  a.shift = static_cast<int32_t>(o.shift);
  a.begin = static_cast<int32_t>(o.begin);
  a.end = static_cast<int32_t>(o.end);
  a.interleaved = o.interleaved;
  a.inverse = o.inverse;
  a.scale = static_cast<float>(o.scale);
}

// An output laid out like x; empty where there is no x.
inline Tensor output_like(const OptionalTensor& x, const Tensor& q) {
  return x.has_value() ? torch::stable::empty_like(*x) : torch::stable::new_empty(q, {0});
}

inline bool is_empty(const RopeArgs& args) {
  return args.batch == 0 || args.tokens == 0 || args.head_dim == 0 || args.q.heads + args.k.heads == 0;
}

}  // namespace saccade
