// The native CPU kernels of token merging. As in kernels.h: one source for every instruction set, a kernel handles one
// work item on the calling thread, and results do not depend on how items are spread over threads.
#pragma once
#include <cstdint>

#include "merge_args.h"

namespace saccade::cpu {

// match and knn_density multiply rows with rows: the rows of one side lie in panels, each of `kTileRows` rows side by
// side, so that a vector instruction handles the same column of several.
struct PanelShape {
  int64_t panel = 0, tile = 0;  // rows of a panel (the side that stays), and of a tile (the side that streams)
};

// Scratch of match and knn_density, for all samples: float32, laid out by the kernels.
struct MatchScratch {
  float* squares = nullptr;  // [B, N] squared norms; not finite where the row may take no part
  float* tiles = nullptr;    // [B, tiles of K, C, tile]
  float* mul = nullptr;      // [B, tiles of K * tile] epilogue: dot * mul + add
  float* add = nullptr;
};

struct MergeKernels {
  PanelShape shape;
  void (*squares)(const void* x, const int64_t (&stride)[2], int32_t channels, Dtype dtype, int64_t tokens,
                  int64_t begin, int64_t end, float* out);
  void (*match_pack)(const MatchArgs&, const MatchScratch&, int64_t batch, int64_t tile);
  void (*match)(const MatchArgs&, const MatchScratch&, int64_t batch, int64_t panel, float* space);
  void (*knn_density)(const KnnDensityArgs&, const MatchScratch&, int64_t batch, int64_t panel, float* space);
  void (*merge)(const MergeArgs&, int64_t batch, int64_t row, float* space);
  void (*merge_bwd)(const MergeGradArgs&, int64_t batch, int64_t token);
  void (*merge_max_bwd)(const MergeGradArgs&, int64_t batch, int64_t row, float* space);
  void (*unmerge)(const UnmergeArgs&, int64_t batch, int64_t token);
  void (*prompt_pool3d)(const PromptPoolArgs&, int64_t batch, int64_t window, float* space);
  void (*prompt_pool3d_bwd_windows)(const PromptPoolGradArgs&, int64_t batch, int64_t window);
  void (*prompt_pool3d_bwd)(const PromptPoolGradArgs&, int64_t batch, int64_t token);
  void (*row_similarity)(const RowSimilarityArgs&, int64_t batch, int64_t row);
};

namespace baseline {
extern const MergeKernels kMergeKernels;
}
namespace avx2 {
extern const MergeKernels kMergeKernels;
}
namespace avx512 {
extern const MergeKernels kMergeKernels;
}

const MergeKernels& merge_kernels();

// Whole numbers alone: one source serves every processor.
void merge_plan_cut(const MergePlanArgs&, int64_t group, uint32_t* cut, int64_t* ties);
int64_t merge_plan_ties(const MergePlanArgs&, int64_t batch, uint32_t cut);  // candidates that equal the cut
void merge_plan(const MergePlanArgs&, int64_t batch, uint32_t cut, int64_t ties);
void keep_top(const KeepTopArgs&, int64_t batch);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace saccade::cpu
