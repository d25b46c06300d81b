// Host: launch plans of qk_norm_rope and its gradient.
#pragma once
#include "norm_unit.cuh"
#include "tiling.cuh"

namespace saccade {

// Units that a lane must hold for 512 columns, however they split into rotary and other ones.
template <typename T>
constexpr int kMostUnits = T::kVector == 4 ? 3 : 2;

inline int32_t table_width(const RopeArgs& rope) {
  const int vector = 16 / element_bytes(rope.dtype);
  return static_cast<int32_t>(ceil_div(rope.angles.pairs, vector) * vector);
}

// Elements per memory access that x and y allow.
inline Alignment norm_alignment(const RopeArgs& rope) {
  Alignment alignment(rope.dtype);
  for (const Heads* heads : {&rope.q, &rope.k}) {
    if (heads->heads == 0) continue;
    alignment.tensor(heads->x, heads->x_stride, rope.batch, heads->heads, rope.tokens);
    alignment.tensor(heads->y, heads->y_stride, rope.batch, heads->heads, rope.tokens);
  }
  alignment.columns(rope.head_dim);
  if (!rope.angles.interleaved) alignment.columns(rope.angles.pairs);
  return alignment;
}

inline int norm_access(const RopeArgs& rope) { return norm_alignment(rope).access(); }

inline void describe_tensors(const RopeArgs& rope, bool row, NormPlan& plan) {
  const int64_t heads[2] = {rope.q.heads, rope.k.heads};
  for (int i = 0; i < 2; ++i) {
    const int64_t elements = most((row ? heads[i] : 1) * rope.head_dim, 1);
    plan.group_heads[i] = static_cast<int32_t>(heads[i] / rope.angles.groups);
    plan.per_element[i] = static_cast<float>(1.0 / static_cast<double>(elements));
  }
}

inline NormPlan head_plan(const RopeArgs& rope, int64_t threads) {
  NormPlan plan = {};
  describe_tensors(rope, /*row=*/false, plan);
  plan.units = static_cast<int32_t>(norm_units(rope));
  plan.lanes = 1;
  while (plan.lanes < plan.units && plan.lanes < kWarp) plan.lanes *= 2;
  const int64_t width = table_width(rope);
  const int64_t group_items = most(rope.q.heads, rope.k.heads) / rope.angles.groups;  // q and k go to different blocks
  const Tiling tiling = make_tiling(rope, threads, plan.lanes, group_items, width * sizeof(CosSin));
  plan.table = {tiling.tokens, tiling.groups, 0, static_cast<int32_t>(width)};
  plan.tiles = static_cast<uint32_t>(tiling.tiles);
  plan.head_slots = tiling.head_slots * tiling.group_slots;
  plan.parts = tiling.parts;
  return plan;
}

// Table and weights in shared memory.
inline size_t head_shared_bytes(const NormPlan& plan, const RopeArgs& rope) {
  return table_bytes(plan.table, rope.angles.axes) + sizeof(float) * plan.units * 2 * (16 / element_bytes(rope.dtype));
}

inline int head_threads(const NormPlan& plan) {
  const int64_t threads = static_cast<int64_t>(plan.lanes) * plan.table.tokens * plan.head_slots;
  return static_cast<int>(ceil_div(threads, kWarp) * kWarp);
}

template <typename T>
bool row_fits(int64_t row_units, int64_t threads, int access) {
  return row_units <= threads && access == T::kVector;
}

inline int row_threads(int64_t row_units, int64_t threads) {
  return static_cast<int>(least(ceil_div(row_units, kWarp) * kWarp, threads));
}

// Rows that do not fit in registers are taken one token at a time, and their table in groups.
inline NormPlan row_plan(const RopeArgs& rope, int64_t row_units, int64_t threads, int access) {
  NormPlan plan = {};
  describe_tensors(rope, /*row=*/true, plan);
  plan.units = static_cast<int32_t>(norm_units(rope));
  plan.access = access;
  const int64_t width = table_width(rope), row_bytes = width * sizeof(CosSin), all_groups = rope.angles.groups;
  const bool fits = row_units <= threads && access == 16 / element_bytes(rope.dtype);
  int64_t tokens = 1, groups = all_groups;
  if (fits) {
    while (tokens < 8 && tokens * 2 * groups * row_bytes <= kTableBytes &&
           rope.batch * ceil_div(rope.tokens, tokens * 2) >= kEnoughBlocks) {
      tokens *= 2;
    }
  } else {
    groups = most(least(all_groups, kTableBytes / row_bytes), 1);
  }
  plan.table = {static_cast<int32_t>(tokens), static_cast<int32_t>(groups), 0, static_cast<int32_t>(width)};
  plan.tiles = static_cast<uint32_t>(ceil_div(rope.tokens, tokens));
  return plan;
}

}  // namespace saccade
