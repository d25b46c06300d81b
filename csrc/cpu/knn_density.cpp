// knn_density on the CPU: the k smallest distances of every row, kept sorted while the products stream by.
#include <cmath>
#include <limits>

#include "merge_kernels.h"
#include "panels.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr float kFar = std::numeric_limits<float>::infinity();

// nearest [k], ascending
inline void insert(float* nearest, int k, float distance) {
  int at = k - 1;
  for (; at > 0 && nearest[at - 1] > distance; --at) nearest[at] = nearest[at - 1];
  nearest[at] = distance;
}

template <class T>
void one_panel(const KnnDensityArgs& a, const MatchScratch& s, int64_t batch, int64_t index, float* space) {
  const int64_t first = index * kPanel, tiles = ceil_div(a.tokens, kTile);
  const int count = static_cast<int>(a.tokens - first < kPanel ? a.tokens - first : kPanel), k = a.k;
  const float* squares = s.squares + batch * a.tokens;
  float *panel = space, *nearest = space + kPanel * a.channels;  // [kPanel, k]
  auto row = [&](int i) { return i < count ? row_at<T>(a.x, a.x_stride, batch, first + i) : nullptr; };
  interleave<T>(row, kPanel, a.channels, panel);
  for (int64_t i = 0; i < static_cast<int64_t>(kPanel) * k; ++i) nearest[i] = kFar;
  for (int64_t t = 0; t < tiles; ++t) {
    Products p;
    multiply(panel, s.tiles + (batch * tiles + t) * kTile * a.channels, a.channels, p);
    for (int j = 0; j < kTile && t * kTile + j < a.tokens; ++j) {
      const int64_t other = t * kTile + j;
      if (!(squares[other] - squares[other] == 0.0f)) continue;
      for (int i = 0; i < count; ++i) {
        float d = squares[first + i] + squares[other] - 2.0f * p[j][i / kLanes][i % kLanes];
        if (d < 0.0f || other == first + i) d = 0.0f;
        if (d < nearest[i * k + k - 1]) insert(nearest + i * k, k, d);
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    double sum = 0.0;
    int found = 0;
    for (int n = 0; n < k && nearest[i * k + n] < kFar; ++n, ++found) sum += nearest[i * k + n];
    const bool finite = squares[first + i] - squares[first + i] == 0.0f;
    a.out[batch * a.tokens + first + i] =
        finite ? static_cast<float>(sum / (found > 0 ? found : 1) / a.channels) : kFar;
  }
}

}  // namespace

void knn_density(const KnnDensityArgs& a, const MatchScratch& s, int64_t batch, int64_t panel, float* space) {
  SACCADE_BY_TYPE(a.dtype, one_panel<T>(a, s, batch, panel, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
