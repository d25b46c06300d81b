// From torch tensors to the plain arguments of the planning and attention-map kernels, with the checks that keep memory
// safe. The Python functions have refused bad input with better words before.
#pragma once
#include "../../kernels/block_args.h"
#include "../util/tensor.h"

namespace saccade {

// x [B, H, S, D] of a dtype that the kernels take, last stride 1; unused strides are 0
inline Dtype check_rows(const Tensor& x, const char* name, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions [B, H, S, D], got ", x.dim());
  check_dense_columns(x, name);
  copy_used_strides(x, stride);
  return kernel_dtype(x, name);
}

inline void check_dense(const Tensor& t, ScalarType type, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.device() == like.device(), name,
                  ": expected a contiguous tensor of its dtype on the device of the others");
}

// [1|B, 1|H, ...] contiguous: batch and head stride, 0 where one entry serves all
inline void shared_strides(const Tensor& t, int64_t batch, int64_t heads, const char* name, int64_t (&stride)[2]) {
  STD_TORCH_CHECK((t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads), name,
                  ": expected 1 or ", batch, " samples and 1 or ", heads, " heads");
  int64_t inner = 1;
  for (int64_t i = 2; i < t.dim(); ++i) inner *= t.size(i);
  stride[0] = t.size(0) == 1 ? 0 : t.size(1) * inner;
  stride[1] = t.size(1) == 1 ? 0 : inner;
}

}  // namespace saccade
