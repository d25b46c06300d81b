// Scores of block_select on the CPU: one row of products of pooled tokens, each summed in the same order wherever it
// is.
#include "planning_kernels.h"
#include "rows.h"

namespace saccade::cpu::SACCADE_ISA {

void block_scores(const BlockSelectArgs& a, int64_t batch, int64_t head, int64_t row, float* scores) {
  const int64_t width = a.head_dim, whole = width / kLanes * kLanes;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const float* q = a.q + ((batch * a.heads + head) * a.q_blocks + row) * width;
  const float* k = a.k + (batch * a.kv_heads + kv_head) * a.k_blocks * width;
  for (int64_t j = 0; j < a.k_blocks; ++j, k += width) {
    float sum = dot(q, k, static_cast<int>(whole));
    for (int64_t c = whole; c < width; ++c) sum += q[c] * k[c];
    scores[j] = sum * a.scale;
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
