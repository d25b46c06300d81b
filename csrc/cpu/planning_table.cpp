// The function table of planning and attention maps, of one instruction set.
#include "panels.h"
#include "planning_kernels.h"

namespace saccade::cpu::SACCADE_ISA {

void block_pool(const BlockPoolArgs&, int64_t, int64_t, int64_t, float*);
void block_scores(const BlockSelectArgs&, int64_t, int64_t, int64_t, float*);
void attention_rows_pack(const AttentionMapArgs&, const MapScratch&, int64_t, int64_t);
void attention_rows(const AttentionMapArgs&, const MapScratch&, int64_t, int64_t, float*);
void attention_columns_pack(const AttentionMapArgs&, const MapScratch&, int64_t, int64_t);
void attention_columns(const AttentionMapArgs&, const MapScratch&, int64_t, int64_t, float*);

extern const PlanningKernels kPlanningKernels;
const PlanningKernels kPlanningKernels{{kPanel, kTile},     block_pool,     block_scores,
                                       attention_rows_pack, attention_rows, attention_columns_pack,
                                       attention_columns};

}  // namespace saccade::cpu::SACCADE_ISA
