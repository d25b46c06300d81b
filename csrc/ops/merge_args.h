// From torch tensors to the plain arguments of the merging kernels, with the checks that keep memory safe. The Python
// functions have refused bad input with better words before; these hold for direct callers of the raw ops.
#pragma once
#include <initializer_list>

#include "../../kernels/merge_args.h"
#include "../util/tensor.h"

namespace saccade {

// x [B, N, D] of a dtype that the kernels take, last stride 1
inline Dtype check_values(const Tensor& x, const char* name, int64_t dims = 3) {
  STD_TORCH_CHECK(x.dim() == dims, name, ": expected ", dims, " dimensions, got ", x.dim());
  check_dense_columns(x, name);
  return kernel_dtype(x, name);
}

// A contiguous tensor of a given type on the device of `like`; -1 accepts any size. Returns its batch stride: 0 for one
// entry.
inline int64_t check_table(const Tensor& t, ScalarType type, const Tensor& like, const char* name,
                           std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.device() == like.device(), name,
                  ": expected a contiguous tensor of its dtype on the device of the values");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ", sizes.size(), " dimensions");
  int64_t axis = 0, inner = 1;
  for (int64_t size : sizes) {
    const bool batch = axis == 0 && sizes.size() > 1;
    STD_TORCH_CHECK(size < 0 || t.size(axis) == size || (batch && t.size(0) == 1), name, ": expected size ", size,
                    " on axis ", axis, ", got ", t.size(axis));
    if (axis > 0) inner *= t.size(axis);
    ++axis;
  }
  return t.size(0) == 1 ? 0 : inner;
}

inline Reduce reduce_of(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 3, "mode: expected 0 to 3, got ", mode);
  return static_cast<Reduce>(mode);
}

inline const float* weights_of(const OptionalTensor& weight, const Tensor& x, int64_t tokens, int64_t& stride) {
  if (!weight.has_value()) return nullptr;
  stride = check_table(*weight, ScalarType::Float, x, "weight", {x.size(0), tokens});
  return data_of<const float>(*weight);
}

// ptr [Bp, M + 1], members [Bp, N], head [Bp, M]; Bp = 1 or the batch of x
inline PlanView plan_of(const Tensor& x, const Tensor& ptr, const Tensor& members, const Tensor& head, int64_t batch) {
  const int64_t plans = head.size(0);
  STD_TORCH_CHECK(plans == 1 || plans == batch, "head: expected a plan for 1 or ", batch, " samples, got ", plans);
  check_table(head, ScalarType::Int, x, "head", {plans, -1});
  check_table(ptr, ScalarType::Int, x, "ptr", {plans, head.size(1) + 1});
  check_table(members, ScalarType::Int, x, "members", {plans, -1});
  STD_TORCH_CHECK(ptr.size(0) == plans && members.size(0) == plans, "ptr, members: expected the batch of head");
  PlanView plan;
  plan.ptr = data_of<const int32_t>(ptr);
  plan.members = data_of<const int32_t>(members);
  plan.head = data_of<const int32_t>(head);
  plan.shared = plans == 1;
  return plan;
}

}  // namespace saccade
