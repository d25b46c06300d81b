// The function table of token merging, of one instruction set.
#include "merge_kernels.h"
#include "panels.h"

namespace saccade::cpu::SACCADE_ISA {

void squares(const void*, const int64_t (&)[2], int32_t, Dtype, int64_t, int64_t, int64_t, float*);
void match_pack(const MatchArgs&, const MatchScratch&, int64_t, int64_t);
void match(const MatchArgs&, const MatchScratch&, int64_t, int64_t, float*);
void knn_density(const KnnDensityArgs&, const MatchScratch&, int64_t, int64_t, float*);
void merge(const MergeArgs&, int64_t, int64_t, float*);
void merge_bwd(const MergeGradArgs&, int64_t, int64_t);
void merge_max_bwd(const MergeGradArgs&, int64_t, int64_t, float*);
void unmerge(const UnmergeArgs&, int64_t, int64_t);
void prompt_pool3d(const PromptPoolArgs&, int64_t, int64_t, float*);
void prompt_pool3d_bwd_windows(const PromptPoolGradArgs&, int64_t, int64_t);
void prompt_pool3d_bwd(const PromptPoolGradArgs&, int64_t, int64_t);
void row_similarity(const RowSimilarityArgs&, int64_t, int64_t);

extern const MergeKernels kMergeKernels;
const MergeKernels kMergeKernels{{kPanel, kTile},
                                 squares,
                                 match_pack,
                                 match,
                                 knn_density,
                                 merge,
                                 merge_bwd,
                                 merge_max_bwd,
                                 unmerge,
                                 prompt_pool3d,
                                 prompt_pool3d_bwd_windows,
                                 prompt_pool3d_bwd,
                                 row_similarity};

}  // namespace saccade::cpu::SACCADE_ISA
