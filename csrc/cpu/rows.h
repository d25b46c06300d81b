// A row of D columns as floats in lane order: [first columns | second columns | columns beyond the pairs], each part
// padded with zeros to whole vectors. Tables of cos and sin, weights and sums share this order.
#pragma once
#include "angles.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr int kMaxRow = 512 + 6 * kLanes;

struct RowLayout {
  int pairs, slots, rest, rest_slots;
  int length() const { return 2 * slots + rest_slots; }
};

template <class T>
inline float to_float(T x);
template <>
inline float to_float(float x) {
  return x;
}
template <>
inline float to_float(Half x) {
  VecH h{};
  h[0] = x.bits;
  return from_half(h)[0];
}
template <>
inline float to_float(BFloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
template <class T>
inline T from_float(float x);
template <>
inline float from_float(float x) {
  return x;
}
template <>
inline Half from_float(float x) {
  return {to_half(broadcast(x))[0]};
}
template <>
inline BFloat16 from_float(float x) {
  return {static_cast<uint16_t>(join_words(broadcast(x), VecF{})[0])};
}

inline float sum_lanes(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

template <class T, bool kInterleaved>
struct Rows {
  using C = Chunk<T, kInterleaved>;
  static constexpr int kStep = C::kPairs, kColumns = kInterleaved ? 2 * kStep : kStep;

  static RowLayout layout(int head_dim, int pairs) {
    const int rest = head_dim - 2 * pairs;
    return {pairs, (pairs + kStep - 1) / kStep * kStep, rest, (rest + kLanes - 1) / kLanes * kLanes};
  }

  // x [D] -> row [length]
  static void load(const RowLayout& l, const T* x, float* row) {
    const T *x1 = x, *x2 = x + l.pairs;
    int i = 0;
    VecF a[C::kVecs], b[C::kVecs];
    auto put = [&] {
      for (int v = 0; v < C::kVecs; ++v) {
        store_raw(row + i + v * kLanes, a[v]);
        store_raw(row + l.slots + i + v * kLanes, b[v]);
      }
    };
    for (; i + kStep <= l.pairs; i += kStep) {
      const int at = kInterleaved ? 2 * i : i;
      C::load(x1 + at, x2 + at, a, b);
      put();
    }
    if (i < l.pairs) {
      load_tail(l, x, i, a, b);
      put();
    }
    float* tail = row + 2 * l.slots;
    for (int j = 0; j < l.rest_slots; ++j) tail[j] = j < l.rest ? to_float(x[2 * l.pairs + j]) : 0.0f;
  }

  static float squares(const RowLayout& l, const T* x) {
    VecF sum[2 * C::kVecs] = {};
    const T *x1 = x, *x2 = x + l.pairs;
    int64_t left = l.pairs;
    for (; left >= kStep; left -= kStep, x1 += kColumns, x2 += kColumns) {
      VecF a[C::kVecs], b[C::kVecs];
      C::load(x1, x2, a, b);
      for (int v = 0; v < C::kVecs; ++v) {
        sum[v] += a[v] * a[v];
        sum[C::kVecs + v] += b[v] * b[v];
      }
    }
    if (left > 0) {
      VecF a[C::kVecs], b[C::kVecs];
      load_tail(l, x, l.pairs - static_cast<int>(left), a, b);
      for (int v = 0; v < C::kVecs; ++v) sum[v] += a[v] * a[v] + b[v] * b[v];
    }
    VecF all = sum[0] + sum[1];
    for (int v = 2; v < 2 * C::kVecs; ++v) all += sum[v];
    double total = sum_lanes(all);
    for (int j = 0; j < l.rest; ++j) {
      const double value = to_float(x[2 * l.pairs + j]);
      total += value * value;
    }
    return static_cast<float>(total);
  }

  // y = rotation of x * r * weight (lane order). The arrays of the loop must not be those of the tail: their address
  // would escape, and every vector would go through memory.
  template <bool kStill>
  static void normalise(const RowLayout& l, const T* x, T* y, float r, const float* weight, const float* cos,
                        const float* sin) {
    const float *w1 = weight, *w2 = weight + l.slots;
    const T *x1 = x, *x2 = x + l.pairs;
    T *y1 = y, *y2 = y + l.pairs;
    int64_t left = l.pairs;
    for (; left >= kStep; left -= kStep) {
      VecF a[C::kVecs], b[C::kVecs];
      C::load(x1, x2, a, b);
      turn<kStill>(a, b, r, w1, w2, cos, sin);
      C::store(y1, y2, a, b);
      x1 += kColumns;
      x2 += kColumns;
      y1 += kColumns;
      y2 += kColumns;
      w1 += kStep;
      w2 += kStep;
      cos += kStep;
      sin += kStep;
    }
    if (left > 0) {
      const int done = l.pairs - static_cast<int>(left);
      VecF a[C::kVecs], b[C::kVecs];
      load_tail(l, x, done, a, b);
      turn<kStill>(a, b, r, w1, w2, cos, sin);
      store_tail(l, y, done, a, b);
    }
    const float* tail = weight + 2 * l.slots;
    for (int j = 0; j < l.rest; ++j) y[2 * l.pairs + j] = from_float<T>(to_float(x[2 * l.pairs + j]) * (r * tail[j]));
  }

  template <bool kStill>
  static void turn(VecF* a, VecF* b, float r, const float* w1, const float* w2, const float* cos, const float* sin) {
    for (int v = 0; v < C::kVecs; ++v) {
      a[v] = a[v] * (r * load_raw<VecF>(w1 + v * kLanes));
      b[v] = b[v] * (r * load_raw<VecF>(w2 + v * kLanes));
      rotate<kStill>(load_raw<VecF>(cos + v * kLanes), load_raw<VecF>(sin + v * kLanes), a[v], b[v]);
    }
  }

  // The last, partial chunk goes through a buffer: the same arithmetic and no access beyond the row.
  static void load_tail(const RowLayout& l, const T* x, int i, VecF* a, VecF* b) {
    T first[kColumns] = {}, second[kColumns] = {};
    std::memcpy(first, x + (kInterleaved ? 2 * i : i), tail_bytes(l, i));
    if (!kInterleaved) std::memcpy(second, x + l.pairs + i, tail_bytes(l, i));
    C::load(first, second, a, b);
  }
  static void store_tail(const RowLayout& l, T* y, int i, const VecF* a, const VecF* b) {
    T first[kColumns], second[kColumns];
    C::store(first, second, a, b);
    std::memcpy(y + (kInterleaved ? 2 * i : i), first, tail_bytes(l, i));
    if (!kInterleaved) std::memcpy(y + l.pairs + i, second, tail_bytes(l, i));
  }
  static size_t tail_bytes(const RowLayout& l, int i) {
    return sizeof(T) * (kInterleaved ? 2 : 1) * static_cast<size_t>(l.pairs - i);
  }

  // row [length] -> y [D]
  static void store(const RowLayout& l, const float* row, T* y) {
    T *y1 = y, *y2 = y + l.pairs;
    int i = 0;
    VecF a[C::kVecs], b[C::kVecs];
    auto get = [&] {
      for (int v = 0; v < C::kVecs; ++v) {
        a[v] = load_raw<VecF>(row + i + v * kLanes);
        b[v] = load_raw<VecF>(row + l.slots + i + v * kLanes);
      }
    };
    for (; i + kStep <= l.pairs; i += kStep) {
      const int at = kInterleaved ? 2 * i : i;
      get();
      C::store(y1 + at, y2 + at, a, b);
    }
    if (i < l.pairs) {
      get();
      store_tail(l, y, i, a, b);
    }
    const float* tail = row + 2 * l.slots;
    for (int j = 0; j < l.rest; ++j) y[2 * l.pairs + j] = from_float<T>(tail[j]);
  }

  // Lane order back to columns, for sums kept in lane order.
  static void to_columns(const RowLayout& l, const float* row, float* columns) {
    for (int s = 0; s < l.slots; ++s) {
      const int pair = s / kStep * kStep + C::order(s % kStep / kLanes, s % kLanes);
      if (pair >= l.pairs) continue;
      columns[kInterleaved ? 2 * pair : pair] = row[s];
      columns[kInterleaved ? 2 * pair + 1 : l.pairs + pair] = row[l.slots + s];
    }
    for (int j = 0; j < l.rest; ++j) columns[2 * l.pairs + j] = row[2 * l.slots + j];
  }
  // columns [D] of float -> row [length]
  static void from_columns(const RowLayout& l, const float* columns, float* row) {
    for (int s = 0; s < l.slots; ++s) {
      const int pair = s / kStep * kStep + C::order(s % kStep / kLanes, s % kLanes);
      row[s] = pair < l.pairs ? columns[kInterleaved ? 2 * pair : pair] : 0.0f;
      row[l.slots + s] = pair < l.pairs ? columns[kInterleaved ? 2 * pair + 1 : l.pairs + pair] : 0.0f;
    }
    for (int j = 0; j < l.rest_slots; ++j) row[2 * l.slots + j] = j < l.rest ? columns[2 * l.pairs + j] : 0.0f;
  }
};

// sum_i a[i] * b[i] over whole vectors, four chains to hide the latency of the addition
inline float dot(const float* a, const float* b, int length) {
  VecF sum[4] = {};
  int i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sum[j] += load_raw<VecF>(a + i + j * kLanes) * load_raw<VecF>(b + i + j * kLanes);
  for (; i < length; i += kLanes) sum[0] += load_raw<VecF>(a + i) * load_raw<VecF>(b + i);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Turn the pairs of a row in lane order.
template <bool kStill>
inline void rotate_slots(float* row, int slots, const float* cos, const float* sin) {
  for (int s = 0; s < slots; s += kLanes) {
    VecF a = load_raw<VecF>(row + s), b = load_raw<VecF>(row + slots + s);
    rotate<kStill>(load_raw<VecF>(cos + s), load_raw<VecF>(sin + s), a, b);
    store_raw(row + s, a);
    store_raw(row + slots + s, b);
  }
}
inline void rotate_slots(float* row, const Table& table, int t) {
  const float *cos = table.cos + t * table.slots, *sin = table.sin + t * table.slots;
  table.still[t] ? rotate_slots<true>(row, table.slots, cos, sin) : rotate_slots<false>(row, table.slots, cos, sin);
}

}  // namespace saccade::cpu::SACCADE_ISA
