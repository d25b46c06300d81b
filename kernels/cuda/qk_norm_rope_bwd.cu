// Launch of the gradient of qk_norm_rope: which kernel, and how the work is cut into blocks.
#include "prim/norm_plan.cuh"
#include "prim/partials.cuh"
#include "qk_norm_rope.h"
#include "qk_norm_rope_bwd.cuh"
#include "qk_norm_rope_bwd_row.cuh"
namespace saccade {
namespace {

// Rows of partial sums: enough blocks for the largest GPU, few enough that the second pass stays short.
constexpr int64_t kHeadPartials = 2 * kEnoughBlocks;
constexpr int64_t kRowPartials = kEnoughBlocks / 2;

struct Launch {
  NormGradPlan plan;
  int64_t blocks;
};

int64_t row_units(const RopeArgs& rope) { return most(rope.q.heads, rope.k.heads) * norm_units(rope); }

// The same number of blocks for any alignment: the workspace is sized before the tensors exist.
Launch make_launch(const NormGradArgs& args, int access) {
  const RopeArgs& rope = args.norm.rope;
  const bool row = args.norm.row;
  Launch result = {};
  NormPlan& plan = result.plan.norm;
  plan = row ? row_plan(rope, row_units(rope), kRowGradThreads, access) : head_plan(rope, kHeadGradThreads);
  const int64_t tiles = rope.batch * plan.tiles;
  const int64_t wanted = row ? kRowPartials : kHeadPartials;
  plan.tiles_per_block = static_cast<uint32_t>(most(ceil_div(tiles, wanted), 1));
  result.blocks = ceil_div(tiles, plan.tiles_per_block);
  result.plan.width[0] = static_cast<int32_t>(row ? rope.q.heads * rope.head_dim : rope.head_dim);
  result.plan.width[1] = static_cast<int32_t>(row ? rope.k.heads * rope.head_dim : rope.head_dim);
  result.plan.k_partial = result.blocks * result.plan.width[0];
  return result;
}

template <typename T, int kAccess, int kUnits>
const char* launch_head(const NormGradArgs& args, const Launch& made, dim3 grid, void* stream) {
  const NormPlan& plan = made.plan.norm;
  const RopeArgs& rope = args.norm.rope;
  const size_t sums = sizeof(float) * (kHeadGradThreads / kWarp) * plan.lanes * kUnits * 2 * T::kVector;
  const size_t shared = head_shared_bytes(plan, rope);
  const auto kernel = rope.angles.interleaved ? qk_norm_rope_bwd_head_kernel<T, kAccess, true, kUnits>
                                              : qk_norm_rope_bwd_head_kernel<T, kAccess, false, kUnits>;
  return launch(kernel, grid, head_threads(plan), shared > sums ? shared : sums, stream, args, made.plan);
}

template <typename T>
const char* launch_dtype(const NormGradArgs& args, const Launch& made, int access, void* stream) {
  const RopeArgs& rope = args.norm.rope;
  const dim3 grid(static_cast<unsigned>(made.blocks), rope.k.heads == 0 ? 1 : 2);
  if (args.norm.row) {
    const auto short_row =
        rope.angles.interleaved ? qk_norm_rope_bwd_row_kernel<T, true> : qk_norm_rope_bwd_row_kernel<T, false>;
    const auto long_row = rope.angles.interleaved ? qk_norm_rope_bwd_long_row_kernel<T, true>
                                                  : qk_norm_rope_bwd_long_row_kernel<T, false>;
    const bool fits = row_fits<T>(row_units(rope), kRowGradThreads, access);
    const size_t weights = fits ? sizeof(float) * 2 * T::kVector * row_units(rope) : 0;
    return launch(fits ? short_row : long_row, grid, row_threads(row_units(rope), kRowGradThreads),
                  table_bytes(made.plan.norm.table, rope.angles.axes) + weights, stream, args, made.plan);
  }
  if (access == T::kVector && norm_units(rope) <= kWarp) return launch_head<T, T::kVector, 1>(args, made, grid, stream);
  if constexpr (T::kVector == 8) {
    if (access >= 4 && norm_units(rope) <= kWarp) return launch_head<T, 4, 1>(args, made, grid, stream);
  }
  return launch_head<T, 1, kMostUnits<T>>(args, made, grid, stream);
}

}  // namespace

int64_t qk_norm_rope_bwd_workspace_cuda(const NormGradArgs& args) {
  const RopeArgs& rope = args.norm.rope;
  if (rope.batch == 0 || rope.tokens == 0) return 0;
  const int64_t width = (args.norm.row ? rope.q.heads + rope.k.heads : 2) * rope.head_dim;
  int64_t blocks = 0;
  for (int access : {1, 16 / element_bytes(rope.dtype)}) blocks = most(blocks, make_launch(args, access).blocks);
  return blocks * width * static_cast<int64_t>(sizeof(float));
}

const char* qk_norm_rope_bwd_cuda(const NormGradArgs& given, void* stream) {
  NormGradArgs args = given;
  args.norm.rope.angles.inverse = true;
  const RopeArgs& rope = args.norm.rope;
  const bool empty = rope.batch == 0 || rope.tokens == 0;
  Launch made = {};
  const char* error = nullptr;
  if (!empty) {
    Alignment alignment = norm_alignment(rope);
    alignment.tensor(args.q_dy, args.q_dy_stride, rope.batch, rope.q.heads, rope.tokens);
    if (rope.k.heads != 0) alignment.tensor(args.k_dy, args.k_dy_stride, rope.batch, rope.k.heads, rope.tokens);
    const int access = alignment.access();
    made = make_launch(args, access);
    if (rope.batch * ceil_div(rope.tokens, made.plan.norm.table.tokens) > INT32_MAX) {
      return "qk_norm_rope_bwd: more than 2^31 - 1 tiles of tokens";
    }
    switch (rope.dtype) {
      case Dtype::kFloat32:
        error = launch_dtype<Float32>(args, made, access, stream);
        break;
      case Dtype::kFloat16:
        error = launch_dtype<Float16>(args, made, access, stream);
        break;
      case Dtype::kBFloat16:
        error = launch_dtype<BFloat16>(args, made, access, stream);
        break;
      default:
        return "qk_norm_rope: the GPU kernels take float32, float16 and bfloat16";
    }
  }
  const float* partial = static_cast<const float*>(args.workspace);
  if (error == nullptr && args.q_dweight != nullptr) {
    error = add_partials(partial, made.blocks, args.norm.row ? rope.q.heads * rope.head_dim : rope.head_dim,
                         args.q_dweight, stream);
  }
  if (error == nullptr && args.k_dweight != nullptr) {
    error = add_partials(partial + made.plan.k_partial, made.blocks,
                         args.norm.row ? rope.k.heads * rope.head_dim : rope.head_dim, args.k_dweight, stream);
  }
  return error;
}

}  // namespace saccade
