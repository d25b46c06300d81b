// Chooses the instruction set once.
#include <cstdlib>
#include <cstring>

#include "attention_kernels.h"
#include "axial_kernels.h"
#include "kernels.h"
#include "merge_kernels.h"
#include "planning_kernels.h"

namespace saccade::cpu {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa detect() {
#if defined(__x86_64__)
  const char* limit = std::getenv("SACCADE_CPU_CAPABILITY");
  const bool allow_avx2 = limit == nullptr || std::strcmp(limit, "baseline") != 0;
  const bool allow_avx512 = allow_avx2 && (limit == nullptr || std::strcmp(limit, "avx2") != 0);
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allow_avx512 && has_avx512) return Isa::kAvx512;
  if (allow_avx2 && has_avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// One of three tables, for the instruction set found at the first call.
template <class Table>
const Table& choose(const Table& baseline, const Table& avx2, const Table& avx512) {
  static const Isa isa = detect();
  return isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : baseline;
}

}  // namespace

#if defined(__x86_64__)
#define SACCADE_CHOOSE(table) choose(baseline::table, avx2::table, avx512::table)
#else
#define SACCADE_CHOOSE(table) choose(baseline::table, baseline::table, baseline::table)
#endif

const Kernels& kernels(Dtype dtype) { return dtype == Dtype::kFloat64 ? kFloat64Kernels : SACCADE_CHOOSE(kKernels); }

const MergeKernels& merge_kernels() { return SACCADE_CHOOSE(kMergeKernels); }

const PlanningKernels& planning_kernels() { return SACCADE_CHOOSE(kPlanningKernels); }

const AxialKernels& axial_kernels() { return SACCADE_CHOOSE(kAxialKernels); }

const AttentionKernels& attention_kernels() { return SACCADE_CHOOSE(kAttentionKernels); }

}  // namespace saccade::cpu
