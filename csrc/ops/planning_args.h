// From torch tensors to the plain arguments of the planning and attention-map kernels, with the checks that keep memory
// safe. The Python functions have refused bad input with better words before.
#pragma once
#include "../../kernels/block_args.h"
#include "../util/dtype.h"

namespace saccade {

// x [B, H, S, D] of a dtype that the kernels take, last stride 1; unused strides are 0
inline Dtype check_rows(const Tensor& x, const char* name, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions [B, H, S, D], got ", x.dim());
  STD_TORCH_CHECK(x.numel() == 0 || x.size(3) == 1 || x.stride(3) == 1, name,
                  ": expected a last dimension of stride 1");
  for (int i = 0; i < 3; ++i) stride[i] = x.size(i) > 1 ? x.stride(i) : 0;
  const Dtype dtype = dtype_of(x, name);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64, name, ": expected float32, float16 or bfloat16");
  return dtype;
}

inline int32_t small(int64_t n, const char* name) {
  STD_TORCH_CHECK(n >= 0 && n <= INT32_MAX, name, ": expected 0 to 2^31 - 1, got ", n);
  return static_cast<int32_t>(n);
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

template <class T>
inline T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

}  // namespace saccade
