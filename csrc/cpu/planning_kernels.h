// The native CPU kernels of planning and of attention maps. As in kernels.h: one source for every instruction set, a
// kernel handles one work item on the calling thread, and results do not depend on how items are spread over threads.
#pragma once
#include "../../kernels/block_args.h"
#include "merge_kernels.h"

namespace saccade::cpu {

constexpr int kPoolChains = 4;
inline int64_t pool_pitch(int64_t head_dim) { return ceil_div(head_dim, 32) * 32; }

// Scratch of attention_rows and attention_columns for a run of heads: the side that streams, side by side in tiles.
// Heads count through the batch: b * H + h, of keys b * Hk + h.
struct MapScratch {
  float* tiles = nullptr;   // [heads, tiles, D, tile]
  float* add = nullptr;     // [heads, tiles * tile]: key_bias of a key, lse of a query
  int32_t* sees = nullptr;  // [heads, tiles * tile] keys that a query sees; columns alone
  int64_t first = 0;        // head of the run
};

// The keys that a query sees are the first ones: so many. `row` counts through `rows`; 0 for one that does not exist.
inline int64_t sees_of(const AttentionMapArgs& a, int64_t row) {
  if (row >= a.row_count) return 0;
  const int64_t query = a.rows == nullptr ? row : a.rows[row], keys = a.in.k_len;
  if (query < 0 || query >= a.in.q_len) return 0;
  const int64_t last = a.causal ? query + keys - a.in.q_len + 1 : keys;
  return last < 0 ? 0 : last < keys ? last : keys;
}

struct PlanningKernels {
  PanelShape map_shape;
  void (*block_pool)(const BlockPoolArgs&, int64_t batch, int64_t head, int64_t block, float* space);
  void (*block_scores)(const BlockSelectArgs&, int64_t batch, int64_t head, int64_t row, float* scores);
  void (*attention_rows_pack)(const AttentionMapArgs&, const MapScratch&, int64_t kv_head, int64_t tile);
  void (*attention_rows)(const AttentionMapArgs&, const MapScratch&, int64_t head, int64_t panel, float* space);
  void (*attention_columns_pack)(const AttentionMapArgs&, const MapScratch&, int64_t head, int64_t tile);
  void (*attention_columns)(const AttentionMapArgs&, const MapScratch&, int64_t head, int64_t panel, float* space);
};

namespace baseline {
extern const PlanningKernels kPlanningKernels;
}
namespace avx2 {
extern const PlanningKernels kPlanningKernels;
}
namespace avx512 {
extern const PlanningKernels kPlanningKernels;
}

const PlanningKernels& planning_kernels();

// From a row of scores [k_blocks], which it may change, to lists; space for one int32 a key block. And whole numbers
// alone: one source serves every processor.
void block_select(const BlockSelectArgs&, int64_t batch, int64_t head, int64_t row, float* scores, int32_t* space);
int64_t block_transpose_count(const BlockTransposeArgs&, int64_t group);  // entries; -1 where one is out of place
void block_transpose(const BlockTransposeArgs&, int64_t group, int64_t begin);

}  // namespace saccade::cpu
