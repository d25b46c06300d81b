// Storage types that kernels know, on the CPU and on a GPU.
#pragma once
#include <cstdint>

namespace saccade {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

}  // namespace saccade
