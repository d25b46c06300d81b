// unmerge on the CPU: a gather, with residual and gate in the same pass.
#include "merge_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

template <class T>
void one_token(const UnmergeArgs& a, int64_t batch, int64_t token, bool stream) {
  using S = Span<T>;
  const int32_t row = a.inverse[(a.shared ? 0 : batch * a.tokens) + token];
  T* out = static_cast<T*>(a.out) + (batch * a.tokens + token) * a.width;
  const T* residual = a.residual == nullptr ? nullptr : row_at<T>(a.residual, a.residual_stride, batch, token);
  const T* gate = a.gate == nullptr ? nullptr : row_at<T>(a.gate, a.gate_stride, batch, token);
  const size_t bytes = sizeof(T) * static_cast<size_t>(a.width);
  if (row < 0) return (void)(residual == nullptr ? std::memset(out, 0, bytes) : std::memcpy(out, residual, bytes));
  const T* y = row_at<T>(a.y, a.y_stride, batch, row);
  if (residual == nullptr && gate == nullptr) return copy_row(out, y, static_cast<int64_t>(bytes), stream);
  S::each(a.width, [&](int64_t c, int64_t n) {
    VecF v[S::kVecs], w[S::kVecs];
    S::at(y + c, n, v);
    if (gate != nullptr) {
      S::at(gate + c, n, w);
      for (int i = 0; i < S::kVecs; ++i) v[i] *= w[i];
    }
    if (residual != nullptr) {
      S::at(residual + c, n, w);
      for (int i = 0; i < S::kVecs; ++i) v[i] += w[i];
    }
    S::put(out + c, n, v, stream);
  });
}

}  // namespace

void unmerge(const UnmergeArgs& a, int64_t batch, int64_t token) {
  SACCADE_BY_TYPE(a.dtype, {
    const bool stream = streams(a.out, a.batch * a.tokens, a.width * static_cast<int64_t>(sizeof(T)));
    one_token<T>(a, batch, token, stream);
    if (stream) end_stream();
  });
}

}  // namespace saccade::cpu::SACCADE_ISA
