// The function table of attention, of one instruction set.
#include "attention_kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

int64_t sparse_attention_space(const SparseAttentionArgs&);
void sparse_attention_mark(const SparseAttentionArgs&, const PackedKeys&, int64_t);
void sparse_attention_pack(const SparseAttentionArgs&, const PackedKeys&, int64_t);
void sparse_attention(const SparseAttentionArgs&, const PackedKeys&, int64_t, float*);
int64_t sparse_attention_bwd_space(const SparseAttentionGradArgs&);
void sparse_attention_bwd_rows(const SparseAttentionGradArgs&, const PackedQueries&, int64_t);
void sparse_attention_bwd(const SparseAttentionGradArgs&, const PackedQueries&, int64_t, float*);
void sparse_attention_bwd_sum(const SparseAttentionGradArgs&, const PackedQueries&, int64_t);
int64_t attention_bias_grad_space(const AttentionBiasGradArgs&);
void attention_bias_grad(const AttentionBiasGradArgs&, float*, int64_t, int64_t, int64_t, float*);

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels{
    {kLanes, sparse_attention_space, sparse_attention_mark, sparse_attention_pack, sparse_attention},
    {sparse_attention_bwd_space, sparse_attention_bwd_rows, sparse_attention_bwd, sparse_attention_bwd_sum},
    {attention_bias_grad_space, attention_bias_grad}};

}  // namespace saccade::cpu::SACCADE_ISA
