// block_select on the CPU: from a row of scores to lists.
#include <algorithm>
#include <cmath>
#include <limits>

#include "planning_kernels.h"
#include "select.h"

namespace saccade::cpu {
namespace {

constexpr uint8_t kPartial = 2, kAlways = 3, kAlwaysPartial = 4;

bool candidate(uint8_t c) { return c == 1 || c == kPartial; }

// Weight of a candidate: also where scores are infinite.
double weight(float score, float best) { return score == best ? 1.0 : std::exp(static_cast<double>(score - best)); }

// How many of the first are taken. `ranked` [candidates]: their places, the best first.
int64_t share(const BlockSelectArgs& a, const float* score, const int32_t* ranked, int64_t candidates) {
  if (a.p >= 1.0f) return candidates;
  double total = 0.0;
  for (int64_t i = 0; i < candidates; ++i) total += weight(score[ranked[i]], score[ranked[0]]);
  const double need = static_cast<double>(a.p) * total;
  double sum = 0.0;
  int64_t taken = 0;
  for (; taken < candidates && sum < need; ++taken) sum += weight(score[ranked[taken]], score[ranked[0]]);
  return taken;
}

}  // namespace

void block_select(const BlockSelectArgs& a, int64_t batch, int64_t head, int64_t row, float* score, int32_t* ranked) {
  const int64_t columns = a.k_blocks, at = (batch * a.heads + head) * a.q_blocks + row;
  const uint8_t* classes = a.classes;
  if (classes != nullptr) classes += batch * a.class_stride[0] + head * a.class_stride[1] + row * columns;
  const auto is_candidate = [&](int64_t j) { return classes == nullptr || candidate(classes[j]); };
  float best = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < columns; ++j) {
    if (!(score[j] == score[j])) score[j] = -std::numeric_limits<float>::infinity();
    if (is_candidate(j) && score[j] > best) best = score[j];
  }

  int64_t keep = a.keep;
  double least = std::numeric_limits<double>::infinity();  // of a weight that is taken whatever its rank
  if (a.mode == Choose::kShare) {
    int64_t candidates = 0;
    for (int64_t j = 0; j < columns; ++j)
      if (is_candidate(j)) ranked[candidates++] = static_cast<int32_t>(j);
    std::sort(ranked, ranked + candidates,
              [&](int32_t i, int32_t j) { return score[i] != score[j] ? score[i] > score[j] : i < j; });
    keep = std::max(keep, share(a, score, ranked, candidates));
  } else if (a.mode == Choose::kThreshold) {
    double total = 0.0;
    for (int64_t j = 0; j < columns; ++j)
      if (is_candidate(j)) total += weight(score[j], best);
    least = static_cast<double>(a.p) * total;
  }
  const Cut cut = select_largest(
      columns, keep, [&](int64_t j) { return order_key(score[j]); }, [&](int64_t j) { return !is_candidate(j); });

  int32_t* lists[2] = {a.indices + at * a.width, a.p_indices == nullptr ? nullptr : a.p_indices + at * a.width};
  int64_t counts[2] = {}, ties = cut.ties;
  for (int64_t j = 0; j < columns; ++j) {
    const uint8_t c = classes == nullptr ? 1 : classes[j];
    bool chosen = c == kAlways || c == kAlwaysPartial;
    if (candidate(c)) {
      const uint32_t key = order_key(score[j]);
      chosen = key > cut.key || (key == cut.key && ties-- > 0);
      if (!chosen && a.mode == Choose::kThreshold) chosen = weight(score[j], best) >= least;
    }
    if (!chosen) continue;
    const int list = c == kPartial || c == kAlwaysPartial;
    lists[list][counts[list]++] = static_cast<int32_t>(j);
  }
  for (int list = 0; list < (classes == nullptr ? 1 : 2); ++list) {
    for (int64_t n = counts[list]; n < a.width; ++n) lists[list][n] = 0;
    (list == 0 ? a.counts : a.p_counts)[at] = static_cast<int32_t>(counts[list]);
  }
}

}  // namespace saccade::cpu
