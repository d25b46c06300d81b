// Host: how the kernels that walk over heads cut a problem into blocks. Only shapes decide, never the device, so that
// the same call is cut, and summed, the same way everywhere.
#pragma once
#include "phase.cuh"

namespace saccade {

constexpr int64_t kTableBytes = 16 * 1024;  // lets several blocks share a multiprocessor on every architecture
constexpr int64_t kItemsPerThread = 8;      // what pays for the table
#ifndef SACCADE_ENOUGH_BLOCKS  // the emulation takes few, so that small problems meet the same decisions as large ones
#define SACCADE_ENOUGH_BLOCKS 1024
#endif
constexpr int64_t kEnoughBlocks = SACCADE_ENOUGH_BLOCKS;  // several waves on the largest GPU
constexpr int64_t kMaxTokens = 32;

struct Tiling {
  int32_t tokens = 1, groups = 1;           // of a block
  int32_t head_slots = 1, group_slots = 1;  // walked side by side
  int32_t parts = 1;                        // blocks that share the heads of a group
  int64_t tiles = 0;                        // of a batch entry
};

// `lanes` threads work on one head of one token; `group_items` heads share a group's angles, `row_bytes` in the table.
inline Tiling make_tiling(const RopeArgs& rope, int64_t threads, int64_t lanes, int64_t group_items,
                          int64_t row_bytes) {
  const int64_t all_groups = rope.angles.groups, work = group_items * all_groups * lanes;
  row_bytes = most(row_bytes, 1);
  int64_t tokens = 1;
  while (tokens < kMaxTokens && tokens * 2 * lanes <= threads && tokens * 2 * row_bytes <= kTableBytes &&
         tokens * work < kItemsPerThread * threads && rope.batch * ceil_div(rope.tokens, tokens * 2) >= kEnoughBlocks) {
    tokens *= 2;
  }
  Tiling tiling;
  tiling.tokens = static_cast<int32_t>(tokens);
  tiling.tiles = ceil_div(rope.tokens, tokens);
  const int64_t blocks = most(rope.batch * tiling.tiles, 1);

  // Groups share nothing but positions: they may go to different blocks at no cost.
  const int64_t slots = most(threads / (tokens * lanes), 1);
  int64_t groups = most(least(all_groups, kTableBytes / (row_bytes * tokens)), 1);
  while (groups > 1 && groups * group_items > slots && blocks * ceil_div(all_groups, groups) < kEnoughBlocks) {
    groups = ceil_div(groups, 2);
  }
  tiling.groups = static_cast<int32_t>(groups);
  tiling.group_slots = static_cast<int32_t>(least(groups, slots));
  tiling.head_slots = static_cast<int32_t>(most(least(slots / tiling.group_slots, group_items), 1));

  // Few tokens: the heads of a group go to several blocks, each of which computes the angles again.
  if (groups == 1) {
    const int64_t wanted = kEnoughBlocks / (blocks * all_groups);
    tiling.parts = static_cast<int32_t>(most(least(ceil_div(group_items, tiling.head_slots), wanted), 1));
  }
  return tiling;
}

}  // namespace saccade
