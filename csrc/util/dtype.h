// The storage type of a tensor, as kernels name it.
#pragma once
#include "../../kernels/dtype.h"
#include "torch.h"

namespace saccade {

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16, bfloat16 or float64");
  }
}

}  // namespace saccade
