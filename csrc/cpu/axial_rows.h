// What forward and backward of axial attention share: the tokens of a box, rows as floats, scratch memory, scores.
#pragma once
#include "axial_plan.h"
#include "axial_tile.h"

namespace saccade::cpu::SACCADE_ISA {

// Where a box has more queries than a vector: rows whose scores are computed at once, keys against which, and queries
// that pass over all keys together.
constexpr int64_t kQueryRows = 24, kKeyRows = 512, kKeyRowsBwd = 256, kQueryChunk = 240;

// Pieces of one allocation, each at a multiple of 64 bytes.
class Space {
 public:
  explicit Space(float* at) : at_(reinterpret_cast<uintptr_t>(at)) {}
  template <class V = float>
  V* take(int64_t count) {
    at_ = (at_ + 63) / 64 * 64;
    V* piece = reinterpret_cast<V*>(at_);
    at_ += sizeof(V) * static_cast<size_t>(count);
    return piece;
  }

 private:
  uintptr_t at_;
};
// Measures instead.
class Measure {
 public:
  template <class V = float>
  V* take(int64_t count) {
    floats_ += (static_cast<int64_t>(sizeof(V)) * count + 63) / 64 * 16;
    return nullptr;
  }
  int64_t floats() const { return floats_ + 16; }

 private:
  int64_t floats_ = 0;
};

// Rows of one head.
template <class T>
struct Head {
  T* base;
  int64_t stride;
};
template <class T>
inline Head<const T> head_of(const void* base, const int64_t* stride, int64_t batch, int64_t head) {
  return {static_cast<const T*>(base) + batch * stride[0] + head * stride[1], stride[2]};
}
template <class T>
inline Head<T> head_of(void* base, const int64_t* stride, int64_t batch, int64_t head) {
  return {static_cast<T*>(base) + batch * stride[0] + head * stride[1], stride[2]};
}

// Whether a row of the tensor is a row as the arithmetic wants it.
template <class T>
inline bool in_place(int64_t columns) {
  return std::is_same_v<T, float> && columns % kLanes == 0;
}

// Pointers to the rows of `tokens`: in the tensor, or in `buffer`, as floats and padded with 0.
template <class T>
inline void read_rows(Head<const T> x, const int32_t* tokens, int64_t count, int64_t columns, float* buffer,
                      const float** rows) {
  const bool there = in_place<T>(columns);
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = x.base + tokens[i] * x.stride;
    if (there) {
      rows[i] = reinterpret_cast<const float*>(row);
    } else {
      rows[i] = buffer + i * width;
      load_row(row, columns, buffer + i * width);
    }
  }
}
// The rows side by side.
template <class T>
inline void copy_rows(Head<const T> x, const int32_t* tokens, int64_t count, int64_t columns, float* rows) {
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < count; ++i) load_row(x.base + tokens[i] * x.stride, columns, rows + i * width);
}
// Where to write rows; `flush_rows` moves them on.
template <class T>
inline void aim_rows(Head<T> x, const int32_t* tokens, int64_t count, int64_t columns, float* buffer, float** rows) {
  const bool there = in_place<T>(columns);
  const int64_t width = padded(columns);
  for (int64_t i = 0; i < count; ++i)
    rows[i] = there ? reinterpret_cast<float*>(x.base + tokens[i] * x.stride) : buffer + i * width;
}
template <class T>
inline void flush_rows(Head<T> x, const int32_t* tokens, int64_t count, int64_t columns, float* const* rows) {
  if (in_place<T>(columns)) return;
  for (int64_t i = 0; i < count; ++i) store_row(rows[i], columns, x.base + tokens[i] * x.stride);
}

// Tokens of box g, ascending; returns how many.
inline int64_t box_tokens(const AxialGeometry& m, const AxialPlan& plan, int64_t g, int32_t* tokens) {
  int64_t from[3], to[3];
  for (int i = 2; i >= 0; --i) {
    from[i] = g % plan.boxes[i] * m.box[i];
    to[i] = least(from[i] + m.box[i], m.grid[i]);
    g /= plan.boxes[i];
  }
  int64_t n = 0;
  for (int64_t t = from[0]; t < to[0]; ++t)
    for (int64_t y = from[1]; y < to[1]; ++y) {
      const int64_t row = m.prefix + (t * m.grid[1] + y) * m.grid[2];
      for (int64_t x = from[2]; x < to[2]; ++x) tokens[n++] = static_cast<int32_t>(row + x);
    }
  return n;
}

// rows [count, columns] to out [columns, stride], zeros from `count` up to a whole number of vectors; zeros: a row of
// them.
inline void transpose(const float* rows, int64_t count, int64_t columns, float* out, int64_t stride,
                      const float* zeros) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const float* these[kLanes];
    for (int n = 0; n < kLanes; ++n) these[n] = i + n < count ? rows + (i + n) * columns : zeros;
    transpose_rows(these, columns, out + i, stride);
  }
}

inline void fill(float* p, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

}  // namespace saccade::cpu::SACCADE_ISA
