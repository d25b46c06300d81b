// Chooses the instruction set once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace saccade::cpu {
namespace {

const Kernels& detect() {
#if defined(__x86_64__)
  const char* limit = std::getenv("SACCADE_CPU_CAPABILITY");
  const bool allow_avx2 = limit == nullptr || std::strcmp(limit, "baseline") != 0;
  const bool allow_avx512 = allow_avx2 && (limit == nullptr || std::strcmp(limit, "avx2") != 0);
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allow_avx512 && has_avx512) return avx512::kKernels;
  if (allow_avx2 && has_avx2) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  static const Kernels& best = detect();
  return dtype == Dtype::kFloat64 ? kFloat64Kernels : best;
}

}  // namespace saccade::cpu
