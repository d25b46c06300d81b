// Launch of apply_rope: how the work is cut into blocks, and the 16 kernels (dtype x access width x pairing).
#include "apply_rope.cuh"
#include "apply_rope.h"
#include "prim/tiling.cuh"

namespace saccade {
namespace {

bool in_place(const Heads& heads) { return heads.heads == 0 || heads.x == heads.y; }

int access_elements(const RopeArgs& args) {
  const Angles& angles = args.angles;
  Alignment alignment(args.dtype);
  for (const Heads* heads : {&args.q, &args.k}) {
    if (heads->heads == 0) continue;
    alignment.tensor(heads->x, heads->x_stride, args.batch, heads->heads, args.tokens);
    alignment.tensor(heads->y, heads->y_stride, args.batch, heads->heads, args.tokens);
  }
  const int columns_per_pair = angles.interleaved ? 2 : 1;
  alignment.columns(angles.begin * columns_per_pair);
  alignment.columns(angles.end * columns_per_pair);
  if (!angles.interleaved) alignment.columns(angles.pairs);
  if (!in_place(args.q) || !in_place(args.k)) alignment.columns(args.head_dim);
  return alignment.access();
}

RopePlan make_plan(const RopeArgs& args) {
  const Angles& angles = args.angles;
  const int vector = 16 / element_bytes(args.dtype);
  const int pairs_per_unit = angles.interleaved ? vector / 2 : vector;
  const int turning = angles.end - angles.begin;
  RopePlan plan = {};
  plan.turn_units = static_cast<int32_t>(ceil_div(turning, pairs_per_unit));
  plan.units = plan.turn_units;
  if (!in_place(args.q) || !in_place(args.k)) {
    if (angles.interleaved) {
      plan.copied[0] = {0, 2 * angles.begin};
      plan.copied[1] = {2 * angles.end, args.head_dim};
    } else {
      plan.copied[0] = {0, angles.begin};
      plan.copied[1] = {angles.end, angles.pairs + angles.begin};
      plan.copied[2] = {angles.pairs + angles.end, args.head_dim};
    }
    for (const Columns& range : plan.copied) {
      plan.units += static_cast<int32_t>(ceil_div(range.end - range.begin, vector));
    }
  }
  if (plan.units == 0) return plan;

  const int64_t group_items = (args.q.heads + args.k.heads) / angles.groups;
  const int64_t width = plan.turn_units * pairs_per_unit;
  const Tiling tiling = make_tiling(args, kRopeThreads, plan.units, group_items, width * sizeof(CosSin));
  plan.table = {tiling.tokens, tiling.groups, angles.begin, static_cast<int32_t>(width)};
  plan.tiles = static_cast<uint32_t>(tiling.tiles);
  plan.q_heads = static_cast<int32_t>(args.q.heads / angles.groups);
  plan.k_heads = static_cast<int32_t>(args.k.heads / angles.groups);
  plan.group_slots = tiling.group_slots;
  plan.head_slots = tiling.head_slots;
  plan.items = static_cast<int32_t>(ceil_div(group_items, tiling.parts));
  return plan;
}

template <typename T, int kAccess>
const char* launch_pairing(const RopeArgs& args, const RopePlan& plan, void* stream) {
  const int64_t group_items = (args.q.heads + args.k.heads) / args.angles.groups;
  const int64_t blocks = args.batch * plan.tiles;
  if (blocks > INT32_MAX) return "apply_rope: more than 2^31 - 1 tiles of tokens";
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(args.angles.groups, plan.table.groups)),
                  static_cast<unsigned>(ceil_div(group_items, plan.items)));
  const int64_t threads = static_cast<int64_t>(plan.group_slots) * plan.head_slots * plan.table.tokens * plan.units;
  const auto kernel =
      args.angles.interleaved ? apply_rope_kernel<T, kAccess, true> : apply_rope_kernel<T, kAccess, false>;
  return launch(kernel, grid, static_cast<int>(ceil_div(threads, kWarp) * kWarp),
                table_bytes(plan.table, args.angles.axes), stream, args, plan);
}

template <typename T>
const char* launch_access(const RopeArgs& args, const RopePlan& plan, void* stream) {
  switch (access_elements(args)) {
    case T::kVector:
      return launch_pairing<T, T::kVector>(args, plan, stream);
    case 4:
      return launch_pairing<T, 4>(args, plan, stream);
    default:
      return launch_pairing<T, 1>(args, plan, stream);
  }
}

// 8-byte accesses exist for the 16-bit types only.
template <>
const char* launch_access<Float32>(const RopeArgs& args, const RopePlan& plan, void* stream) {
  return access_elements(args) == Float32::kVector ? launch_pairing<Float32, Float32::kVector>(args, plan, stream)
                                                   : launch_pairing<Float32, 1>(args, plan, stream);
}

}  // namespace

const char* apply_rope_cuda(const RopeArgs& args, void* stream) {
  if (args.batch == 0 || args.tokens == 0 || args.q.heads + args.k.heads == 0) return nullptr;
  if (args.tokens > INT32_MAX) return "apply_rope: more than 2^31 - 1 tokens";
  const RopePlan plan = make_plan(args);
  if (plan.units == 0) return nullptr;  // in place, and every column is the identity
  switch (args.dtype) {
    case Dtype::kFloat32:
      return launch_access<Float32>(args, plan, stream);
    case Dtype::kFloat16:
      return launch_access<Float16>(args, plan, stream);
    case Dtype::kBFloat16:
      return launch_access<BFloat16>(args, plan, stream);
    default:
      return "apply_rope: the GPU kernels take float32, float16 and bfloat16";
  }
}

}  // namespace saccade
