// What the ops ask of a tensor, and what they take from it.
#pragma once
#include "dtype.h"

namespace saccade {

inline void check_dense_columns(const Tensor& x, const char* name) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, name,
                  ": expected a last dimension of stride 1");
}

// The kernels take fp32 and below; float64 goes to the reference.
inline Dtype kernel_dtype(const Tensor& x, const char* name) {
  const Dtype dtype = dtype_of(x, name);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64, name, ": expected float32, float16 or bfloat16");
  return dtype;
}

// A stride that is never used is 0.
inline int64_t stride_of(const Tensor& x, int64_t axis) { return x.size(axis) > 1 ? x.stride(axis) : 0; }

// Those of the first axes, as many as `out` holds.
template <int kAxes>
inline void copy_used_strides(const Tensor& x, int64_t (&out)[kAxes]) {
  for (int i = 0; i < kAxes; ++i) out[i] = stride_of(x, i);
}

template <class T>
inline T* data_of(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A size or number that kernels hold in 32 bits.
inline int32_t small(int64_t n, const char* name, int64_t from = 0) {
  STD_TORCH_CHECK(from <= n && n <= INT32_MAX, name, ": expected ", from, " to 2^31 - 1, got ", n);
  return static_cast<int32_t>(n);
}

// An output laid out like x [B, H, S, D], its last stride 1.
inline Tensor output_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0 || y.size(3) == 1 || y.stride(3) == 1) return y;
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

}  // namespace saccade
