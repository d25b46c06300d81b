// How the kernels that give every row of a [B, rows, D] tensor a run of lanes cut it into blocks.
//
//   lanes   threads that share a row: one vector each, of a tile of at most 32 vectors (512 bytes)
//   slots   rows that a block walks side by side
//   tile    the vectors of a row that a block takes; tiles of the same rows are neighbours in the grid, so that whole
//           rows of memory are open at a time
//
// Nothing is summed over lanes: which thread holds a vector never changes a result.
#pragma once
#include "tiling.cuh"
#include "vec.cuh"

namespace saccade {

constexpr int kRowThreads = 256;

struct RowPlan {
  int64_t units;  // vectors of a row
  int32_t lanes, slots;
  uint32_t rows;         // of a block: a multiple of slots
  uint32_t tiles;        // of a row
  uint32_t row_blocks;   // of a batch entry
  int64_t total_blocks;  // of the grid
};

// What a thread takes.
struct RowPlace {
  uint32_t batch;
  uint32_t first, end;  // rows of the block, all slots of it
  uint32_t row;         // first row of the thread, `end` where it has none; the others are `slots` apart
  int32_t count;        // elements of its vector that exist
  int64_t column;       // of its vector
  int32_t slot, lane;
  bool leads;  // the one thread of its row
};

template <int kVector>
__device__ __forceinline__ RowPlace row_place(const RowPlan& plan, int64_t rows, int64_t width) {
  RowPlace place;
  const uint32_t tile = blockIdx.x % plan.tiles, rest = blockIdx.x / plan.tiles;
  place.batch = rest / plan.row_blocks;
  place.first = rest % plan.row_blocks * plan.rows;
  place.end = min(static_cast<uint32_t>(rows), place.first + plan.rows);
  place.slot = threadIdx.x / plan.lanes;
  place.lane = threadIdx.x - place.slot * plan.lanes;
  const bool works = place.slot < plan.slots;
  place.row = works ? place.first + place.slot : place.end;
  place.column = (static_cast<int64_t>(tile) * plan.lanes + place.lane) * kVector;
  const int64_t left = width - place.column;
  place.count = !works || left <= 0 ? 0 : left < kVector ? static_cast<int32_t>(left) : kVector;
  place.leads = works && place.lane == 0 && tile == 0;
  return place;
}

// --- host ---

inline RowPlan make_row_plan(Dtype dtype, int64_t batch, int64_t rows, int64_t width, int64_t rows_per_thread) {
  RowPlan plan = {};
  plan.units = ceil_div(width, 16 / element_bytes(dtype));
  plan.lanes = static_cast<int32_t>(most(least(plan.units, kWarp), 1));
  plan.slots = kRowThreads / plan.lanes;
  plan.tiles = static_cast<uint32_t>(most(ceil_div(plan.units, plan.lanes), 1));
  int64_t walked = 1;  // a thread with several rows costs fewer blocks, where enough remain
  while (walked < rows_per_thread && batch * ceil_div(rows, plan.slots * walked * 2) * plan.tiles >= kEnoughBlocks) {
    walked *= 2;
  }
  plan.rows = static_cast<uint32_t>(plan.slots * walked);
  plan.row_blocks = static_cast<uint32_t>(ceil_div(rows, plan.rows));
  plan.total_blocks = batch * plan.row_blocks * plan.tiles;
  return plan;
}

inline int row_plan_threads(const RowPlan& plan) {
  return static_cast<int>(ceil_div(static_cast<int64_t>(plan.lanes) * plan.slots, kWarp) * kWarp);
}

// A [B, rows, D] tensor, or nothing where it is null.
inline void align_rows(Alignment& alignment, const void* base, const int64_t (&stride)[2], int64_t batch,
                       int64_t rows) {
  if (base != nullptr) alignment.tensor(base, {stride[0], 0, stride[1]}, batch, 1, rows);
}

// A storage type and an access width, as a value.
template <typename Type, int kElements>
struct Storage {
  using T = Type;
  static constexpr int kAccess = kElements;
};

// start(Storage<T, kAccess>) for a dtype and the access width that Alignment found; `refusal` where there is no kernel.
template <typename Start>
const char* with_storage(Dtype dtype, int access, const char* refusal, Start start) {
  switch (dtype) {
    case Dtype::kFloat32:
      return access == 4 ? start(Storage<Float32, 4>{}) : start(Storage<Float32, 1>{});
    case Dtype::kFloat16:
      if (access == 8) return start(Storage<Float16, 8>{});
      return access == 4 ? start(Storage<Float16, 4>{}) : start(Storage<Float16, 1>{});
    case Dtype::kBFloat16:
      if (access == 8) return start(Storage<BFloat16, 8>{});
      return access == 4 ? start(Storage<BFloat16, 4>{}) : start(Storage<BFloat16, 1>{});
    default:
      return refusal;
  }
}

}  // namespace saccade
