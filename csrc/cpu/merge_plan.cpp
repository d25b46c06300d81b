// merge_plan on the CPU: selection, row numbers and the members of every row, in a few passes over the tokens.
#include <algorithm>
#include <vector>

#include "merge_kernels.h"
#include "select.h"

namespace saccade::cpu {
namespace {

bool is_candidate(const MergePlanArgs& a, int64_t i) {
  return a.target[i] >= 0 && a.target[i] < a.tokens && a.score[i] >= a.threshold;
}

}  // namespace

// Group: a sample, or the whole batch.
void merge_plan_cut(const MergePlanArgs& a, int64_t group, uint32_t* cut, int64_t* ties) {
  const int64_t n = a.whole_batch ? a.batch * a.tokens : a.tokens, first = group * n;
  const Cut found = select_largest(
      n, a.r, [&](int64_t i) { return order_key(a.score[first + i]); },
      [&](int64_t i) { return !is_candidate(a, first + i); });
  *cut = found.key;
  *ties = found.ties;
}

int64_t merge_plan_ties(const MergePlanArgs& a, int64_t batch, uint32_t cut) {
  int64_t count = 0;
  for (int64_t i = batch * a.tokens; i < (batch + 1) * a.tokens; ++i)
    count += is_candidate(a, i) && order_key(a.score[i]) == cut;
  return count;
}

// `ties`: how many of this sample's candidates that equal the cut are merged.
void merge_plan(const MergePlanArgs& a, int64_t batch, uint32_t cut, int64_t ties) {
  const int64_t n = a.tokens, first = batch * n;
  const float* score = a.score + first;
  const int32_t* target = a.target + first;
  int32_t* inverse = a.inverse + first;
  int32_t* ptr = a.ptr + batch * (a.rows + 1);
  int32_t* members = a.members + first;
  int32_t* head = a.head + batch * a.rows;

  std::vector<uint8_t> merged(n);
  int64_t kept = n;
  for (int64_t i = 0; i < n; ++i) {
    if (!is_candidate(a, first + i)) continue;
    const uint32_t key = order_key(score[i]);
    const bool take = key > cut || (key == cut && ties-- > 0);
    merged[i] = take;
    kept -= take;
  }
  int64_t excess = std::max<int64_t>(kept - a.rows, 0), row = 0;
  for (int64_t i = 0; i < n; ++i) {
    inverse[i] = -1;
    if (merged[i]) continue;
    if (excess > 0 && target[i] == -2) {
      --excess;
      continue;
    }
    if (row >= a.rows) continue;
    head[row] = static_cast<int32_t>(i);
    inverse[i] = static_cast<int32_t>(row++);
  }
  a.counts[batch] = static_cast<int32_t>(row);
  std::fill(head + row, head + a.rows, -1);
  std::fill(ptr, ptr + a.rows + 1, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (merged[i]) inverse[i] = inverse[target[i]];
    if (inverse[i] >= 0) ++ptr[inverse[i] + 1];
  }
  for (int64_t m = 0; m < a.rows; ++m) ptr[m + 1] += ptr[m];
  std::vector<int32_t> next(ptr, ptr + a.rows);
  for (int64_t i = 0; i < n; ++i)
    if (inverse[i] >= 0) members[next[inverse[i]]++] = static_cast<int32_t>(i);
  std::fill(members + ptr[a.rows], members + n, -1);
}

}  // namespace saccade::cpu
