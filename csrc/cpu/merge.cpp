// merge and its gradient on the CPU: rows of tokens read once, written once.
#include <cmath>
#include <limits>

#include "merge_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr int64_t kChunk = 32;  // members of a long row are summed in chunks: more accurate than one running sum

struct Row {
  const int32_t* members;
  int64_t count;
};

Row row_of(const PlanView& plan, int64_t rows, int64_t tokens, int64_t batch, int64_t row) {
  const int64_t b = plan.shared ? 0 : batch;
  const int32_t* ptr = plan.ptr + b * (rows + 1) + row;
  return {plan.members + b * tokens + ptr[0], ptr[1] - ptr[0]};
}

template <class T>
using Vecs = VecF[Span<T>::kVecs];

// y = (w0 x0 + w1 x1) * scale: most rows that are merged at all have two members, and need no buffer.
template <class T>
void merge_two(const T* x0, const T* x1, float w0, float w1, float scale, int64_t width, bool stream, T* y) {
  using S = Span<T>;
  S::each(width, [&](int64_t c, int64_t n) {
    Vecs<T> a, b;
    S::at(x0 + c, n, a);
    S::at(x1 + c, n, b);
    for (int v = 0; v < S::kVecs; ++v) a[v] = (a[v] * w0 + b[v] * w1) * scale;
    S::put(y + c, n, a, stream);
  });
}

template <class T>
void add_row(const T* x, float w, int64_t width, float* sum) {
  using S = Span<T>;
  S::each(width, [&](int64_t c, int64_t n) {
    Vecs<T> a;
    S::at(x + c, n, a);
    for (int v = 0; v < S::kVecs; ++v) store_raw(sum + c + v * kLanes, load_raw<VecF>(sum + c + v * kLanes) + a[v] * w);
  });
}

template <class T>
void max_row(const T* x, int64_t width, float* top) {
  using S = Span<T>;
  S::each(width, [&](int64_t c, int64_t n) {
    Vecs<T> a;
    S::at(x + c, n, a);
    for (int v = 0; v < S::kVecs; ++v) {
      const VecF best = load_raw<VecF>(top + c + v * kLanes);
      store_raw(top + c + v * kLanes, (a[v] > best) | (a[v] != a[v]) ? a[v] : best);
    }
  });
}

void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

int64_t padded(int64_t width) { return ceil_div(width, 64) * 64; }

template <class T>
void one_row(const MergeArgs& a, int64_t batch, int64_t row, bool stream, float* space) {
  using S = Span<T>;
  const Row r = row_of(a.plan, a.rows, a.tokens, batch, row);
  const float* weight = a.weight == nullptr ? nullptr : a.weight + batch * a.weight_stride;
  auto weight_of = [&](int64_t i) { return weight == nullptr ? 1.0f : weight[r.members[i]]; };
  auto token = [&](int64_t i) { return row_at<T>(a.x, a.x_stride, batch, r.members[i]); };
  const int64_t at = batch * a.rows + row;
  T* y = static_cast<T*>(a.y) + at * a.width;
  float total = 0.0f;
  for (int64_t begin = 0; begin < r.count; begin += kChunk) {
    float part = 0.0f;
    for (int64_t i = begin; i < r.count && i < begin + kChunk; ++i) part += weight_of(i);
    total += part;
  }
  a.total[at] = total;
  a.log_total[at] = std::log(total);
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * a.width;
  if (r.count == 0) return (void)std::memset(y, 0, static_cast<size_t>(bytes));
  if (a.mode == Reduce::kReplace) {
    const int32_t head = a.plan.head[(a.plan.shared ? 0 : batch * a.rows) + row];
    return copy_row(y, row_at<T>(a.x, a.x_stride, batch, head), bytes, stream);
  }
  if (r.count == 1 && (a.mode != Reduce::kMean || total != 0.0f))  // w x / w is x
    return copy_row(y, token(0), bytes, stream);
  const bool mean = a.mode == Reduce::kMean;
  const float scale = mean && total != 0.0f ? 1.0f / total : 1.0f;
  if (r.count == 2 && a.mode != Reduce::kMax)
    return merge_two(token(0), token(1), mean ? weight_of(0) : 1.0f, mean ? weight_of(1) : 1.0f, scale, a.width, stream,
                     y);
  float *sum = space, *part = space + padded(a.width);
  if (a.mode == Reduce::kMax) {
    fill(sum, padded(a.width), -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < r.count; ++i) max_row(token(i), a.width, sum);
  } else {
    fill(sum, padded(a.width), 0.0f);
    for (int64_t begin = 0; begin < r.count; begin += kChunk) {
      float* into = r.count <= kChunk ? sum : part;
      if (into == part) fill(part, padded(a.width), 0.0f);
      for (int64_t i = begin; i < r.count && i < begin + kChunk; ++i)
        add_row(token(i), mean ? weight_of(i) : 1.0f, a.width, into);
      if (into == part)
        for (int64_t c = 0; c < padded(a.width); ++c) sum[c] += part[c];
    }
  }
  S::each(a.width, [&](int64_t c, int64_t n) {
    Vecs<T> v;
    for (int i = 0; i < S::kVecs; ++i) v[i] = load_raw<VecF>(sum + c + i * kLanes) * scale;
    S::put(y + c, n, v, stream);
  });
}

template <class T>
void one_token_bwd(const MergeGradArgs& a, int64_t batch, int64_t token, bool stream) {
  using S = Span<T>;
  const int64_t b = a.plan.shared ? 0 : batch;
  const int32_t row = a.plan.inverse[b * a.tokens + token];
  T* dx = static_cast<T*>(a.dx) + (batch * a.tokens + token) * a.width;
  const size_t bytes = sizeof(T) * static_cast<size_t>(a.width);
  if (row < 0 || (a.mode == Reduce::kReplace && a.plan.head[b * a.rows + row] != token))
    return (void)std::memset(dx, 0, bytes);
  const T* dy = row_at<T>(a.dy, a.dy_stride, batch, row);
  if (a.mode != Reduce::kMean) return copy_row(dx, dy, static_cast<int64_t>(bytes), stream);
  const float weight = a.weight == nullptr ? 1.0f : a.weight[batch * a.weight_stride + token];
  const float total = a.total[batch * a.rows + row];
  const float share = weight / (total == 0.0f ? 1.0f : total);  // as forward divides
  if (share == 1.0f) return copy_row(dx, dy, static_cast<int64_t>(bytes), stream);
  S::each(a.width, [&](int64_t c, int64_t n) {
    Vecs<T> v;
    S::at(dy + c, n, v);
    for (int i = 0; i < S::kVecs; ++i) v[i] *= share;
    S::put(dx + c, n, v, stream);
  });
}

// A column's gradient goes to the first member that attains the maximum.
template <class T>
void one_row_max_bwd(const MergeGradArgs& a, int64_t batch, int64_t row, float* space) {
  const Row r = row_of(a.plan, a.rows, a.tokens, batch, row);
  const T* dy = row_at<T>(a.dy, a.dy_stride, batch, row);
  float* top = space;
  fill(top, padded(a.width), -std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < r.count; ++i) max_row(row_at<T>(a.x, a.x_stride, batch, r.members[i]), a.width, top);
  auto* taken = reinterpret_cast<unsigned char*>(space + padded(a.width));
  std::memset(taken, 0, static_cast<size_t>(a.width));
  // Columns in the order of memory, as kernels above hold them only in steps: compare as floats one by one.
  float* plain = space + 2 * padded(a.width);
  Span<T>::each(a.width, [&](int64_t c, int64_t n) {
    Vecs<T> v;
    for (int i = 0; i < Span<T>::kVecs; ++i) v[i] = load_raw<VecF>(top + c + i * kLanes);
    T buffer[Span<T>::kStep];
    Span<T>::put(buffer, n, v);
    for (int64_t i = 0; i < n; ++i) plain[c + i] = to_float(buffer[i]);
  });
  for (int64_t i = 0; i < r.count; ++i) {
    const int64_t token = r.members[i];
    const T* x = row_at<T>(a.x, a.x_stride, batch, token);
    T* dx = static_cast<T*>(a.dx) + (batch * a.tokens + token) * a.width;
    for (int64_t c = 0; c < a.width; ++c) {
      const float value = to_float(x[c]);
      const bool attains = taken[c] == 0 && (value == plain[c] || (value != value && plain[c] != plain[c]));
      taken[c] |= attains;
      dx[c] = attains ? dy[c] : T{};
    }
  }
}

}  // namespace

void merge(const MergeArgs& a, int64_t batch, int64_t row, float* space) {
  SACCADE_BY_TYPE(a.dtype, {
    const bool stream = streams(a.y, a.batch * a.rows, a.width * static_cast<int64_t>(sizeof(T)));
    one_row<T>(a, batch, row, stream, space);
    if (stream) end_stream();
  });
}

void merge_bwd(const MergeGradArgs& a, int64_t batch, int64_t token) {
  SACCADE_BY_TYPE(a.dtype, {
    const bool stream = streams(a.dx, a.batch * a.tokens, a.width * static_cast<int64_t>(sizeof(T)));
    one_token_bwd<T>(a, batch, token, stream);
    if (stream) end_stream();
  });
}

void merge_max_bwd(const MergeGradArgs& a, int64_t batch, int64_t row, float* space) {
  SACCADE_BY_TYPE(a.dtype, one_row_max_bwd<T>(a, batch, row, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
