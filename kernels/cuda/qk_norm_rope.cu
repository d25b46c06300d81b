// Launch of qk_norm_rope: which kernel, and how the work is cut into blocks.
#include "prim/norm_plan.cuh"
#include "qk_norm_rope.cuh"
#include "qk_norm_rope.h"

namespace saccade {
namespace {

template <typename T, int kAccess, int kUnits>
const char* launch_head(const NormArgs& args, void* stream) {
  const RopeArgs& rope = args.rope;
  const NormPlan plan = head_plan(rope, kHeadThreads);
  const int64_t blocks = rope.batch * plan.tiles;
  if (blocks > INT32_MAX) return "qk_norm_rope: more than 2^31 - 1 tiles of tokens";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(rope.angles.groups, plan.table.groups)),
                  static_cast<unsigned>(rope.k.heads == 0 ? plan.parts : 2 * plan.parts));
  const auto kernel = rope.angles.interleaved ? qk_norm_rope_head_kernel<T, kAccess, true, kUnits>
                                              : qk_norm_rope_head_kernel<T, kAccess, false, kUnits>;
  return launch(kernel, grid, head_threads(plan), head_shared_bytes(plan, rope), stream, args, plan);
}

template <typename T>
const char* launch_row(const NormArgs& args, int access, void* stream) {
  const RopeArgs& rope = args.rope;
  const int64_t row_units = most(rope.q.heads, rope.k.heads) * norm_units(rope);
  const NormPlan plan = row_plan(rope, row_units, kRowThreads, access);
  const int64_t blocks = rope.batch * plan.tiles;
  if (blocks > INT32_MAX) return "qk_norm_rope: more than 2^31 - 1 tokens";
  const auto short_row = rope.angles.interleaved ? qk_norm_rope_row_kernel<T, true> : qk_norm_rope_row_kernel<T, false>;
  const auto long_row =
      rope.angles.interleaved ? qk_norm_rope_long_row_kernel<T, true> : qk_norm_rope_long_row_kernel<T, false>;
  return launch(row_fits<T>(row_units, kRowThreads, access) ? short_row : long_row, dim3(static_cast<unsigned>(blocks)),
                row_threads(row_units, kRowThreads), table_bytes(plan.table, rope.angles.axes), stream, args, plan);
}

template <typename T>
const char* launch_dtype(const NormArgs& args, void* stream) {
  const int access = norm_access(args.rope);
  if (args.row) return launch_row<T>(args, access, stream);
  if (access == T::kVector && norm_units(args.rope) <= kWarp) return launch_head<T, T::kVector, 1>(args, stream);
  if constexpr (T::kVector == 8) {
    if (access >= 4 && norm_units(args.rope) <= kWarp) return launch_head<T, 4, 1>(args, stream);
  }
  return launch_head<T, 1, kMostUnits<T>>(args, stream);
}

}  // namespace

const char* qk_norm_rope_cuda(const NormArgs& args, void* stream) {
  if (args.rope.batch == 0 || args.rope.tokens == 0 || args.rope.q.heads + args.rope.k.heads == 0) return nullptr;
  switch (args.rope.dtype) {
    case Dtype::kFloat32:
      return launch_dtype<Float32>(args, stream);
    case Dtype::kFloat16:
      return launch_dtype<Float16>(args, stream);
    case Dtype::kBFloat16:
      return launch_dtype<BFloat16>(args, stream);
    default:
      return "qk_norm_rope: the GPU kernels take float32, float16 and bfloat16";
  }
}

}  // namespace saccade
