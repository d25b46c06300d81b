// row_similarity on the CPU: three sums in one pass over both rows.
#include <cmath>
#include <limits>

#include "merge_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

template <class T>
float cosine(const T* x, const T* y, int64_t channels) {
  using S = Span<T>;
  VecF xy[S::kVecs] = {}, xx[S::kVecs] = {}, yy[S::kVecs] = {};
  S::each(channels, [&](int64_t c, int64_t n) {
    VecF a[S::kVecs], b[S::kVecs];
    S::at(x + c, n, a);
    S::at(y + c, n, b);
    for (int i = 0; i < S::kVecs; ++i) {
      xy[i] += a[i] * b[i];
      xx[i] += a[i] * a[i];
      yy[i] += b[i] * b[i];
    }
  });
  for (int i = 1; i < S::kVecs; ++i) {
    xy[0] += xy[i];
    xx[0] += xx[i];
    yy[0] += yy[i];
  }
  const float dot = sum_lanes(xy[0]), x2 = sum_lanes(xx[0]), y2 = sum_lanes(yy[0]);
  if (!(x2 - x2 == 0.0f && y2 - y2 == 0.0f)) return std::numeric_limits<float>::quiet_NaN();
  if (x2 == 0.0f || y2 == 0.0f) return 0.0f;
  return dot * (1.0f / std::sqrt(x2)) * (1.0f / std::sqrt(y2));
}

}  // namespace

void row_similarity(const RowSimilarityArgs& a, int64_t batch, int64_t row) {
  SACCADE_BY_TYPE(a.dtype, a.out[batch * a.tokens + row] = cosine(row_at<T>(a.x, a.x_stride, batch, row),
                                                                  row_at<T>(a.y, a.y_stride, batch, row), a.channels));
}

}  // namespace saccade::cpu::SACCADE_ISA
