// Products of small fp32 matrices that lie in the cache: the one loop that attention spends its time in.
//
//   C [m, n] = alpha_i C + A [m, k] B [k, n]      the product is summed from zero, then added: more accurate than one
//   long sum
//
// A is read one value at a time, at a + row * lda + step or, transposed, at a + step * lda + row. B and C have rows of
// whole vectors, side by side. Rows of A are a register each, so any m is fine: nothing beyond is read or written.
#pragma once
#include <utility>

#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

enum class Into { kStore, kAdd, kScaleAdd };

// kRows x kVecs accumulators, the vectors of a row of B and a broadcast value fill the registers.
#if defined(__AVX512F__)
constexpr int kMaxVecs = 4;
constexpr int kRowsOf[kMaxVecs + 1] = {0, 14, 12, 8, 6};
#else
constexpr int kMaxVecs = 3;
constexpr int kRowsOf[kMaxVecs + 1] = {0, 8, 6, 4};
#endif

constexpr int64_t kLongestSum = 64;  // terms of one running sum

// Terms of each running sum of k.
constexpr int64_t stretch_of_sum(int64_t k, int64_t longest = kLongestSum) {
  const int64_t stretches = (k + longest - 1) / longest;
  return stretches <= 1 ? k : (k + stretches - 1) / stretches;
}
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
// Columns of a row of whole vectors.
constexpr int64_t padded(int64_t columns) { return round_up(columns, kLanes); }

// The value in every lane, as one load: `broadcast` adds it to 0.
inline VecF splat(float x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (VecF)_mm256_set1_ps(x);
#else
  return VecF{x, x, x, x};
#endif
}

template <int kRows, int kVecs, bool kTransposed, Into kInto>
__attribute__((noinline)) void product_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                                            float* c, int64_t ldc, const float* alpha) {
  VecF sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = VecF{};
  auto step = [&](const float* a_step, const float* b_step) __attribute__((always_inline)) {
    VecF row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load_raw<VecF>(b_step + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const VecF x = splat(kTransposed ? a_step[r] : a_step[r * lda]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += x * row[v];
    }
  };
  const int64_t a_next = kTransposed ? lda : 1;
  for (int64_t i = 0; i < k; ++i, a += a_next, b += ldb) step(a, b);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* out = c + r * ldc;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      VecF x = sum[r][v];
      if (kInto == Into::kAdd) x += load_raw<VecF>(out + v * kLanes);
      if (kInto == Into::kScaleAdd) x += splat(alpha[r]) * load_raw<VecF>(out + v * kLanes);
      store_raw(out + v * kLanes, x);
    }
  }
}

namespace detail {

using Tile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, const float*);

// Tiles of 1 .. kRowsOf[kVecs] rows.
template <int kVecs, bool kTransposed, Into kInto, int... kRows>
inline Tile pick(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr Tile table[] = {product_tile<kRows + 1, kVecs, kTransposed, kInto>...};
  return table[rows - 1];
}

// Rows in tiles of nearly the same height: a last tile of one row would wait for its additions.
template <int kVecs, bool kTransposed, Into kInto>
inline void product_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                            int64_t ldc, const float* alpha) {
  constexpr int kMost = kRowsOf[kVecs];
  const int64_t a_row = kTransposed ? 1 : lda;
  for (int64_t i = 0, tiles = (m + kMost - 1) / kMost; tiles > 0; --tiles) {
    const int rows = static_cast<int>((m - i + tiles - 1) / tiles);
    pick<kVecs, kTransposed, kInto>(rows, std::make_integer_sequence<int, kMost>())(
        k, a + i * a_row, lda, b, ldb, c + i * ldc, ldc, alpha == nullptr ? nullptr : alpha + i);
    i += rows;
  }
}

template <bool kTransposed, Into kInto>
inline void product_stretch(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                            float* c, int64_t ldc, const float* alpha) {
  int64_t vecs = n / kLanes;
  for (int64_t strips = (vecs + kMaxVecs - 1) / kMaxVecs; strips > 0; --strips) {
    const int64_t width = (vecs + strips - 1) / strips;  // strips of nearly the same width
    if (width == 1) product_columns<1, kTransposed, kInto>(m, k, a, lda, b, ldb, c, ldc, alpha);
    if (width == 2) product_columns<2, kTransposed, kInto>(m, k, a, lda, b, ldb, c, ldc, alpha);
    if (width == 3) product_columns<3, kTransposed, kInto>(m, k, a, lda, b, ldb, c, ldc, alpha);
    if constexpr (kMaxVecs > 3)
      if (width == 4) product_columns<4, kTransposed, kInto>(m, k, a, lda, b, ldb, c, ldc, alpha);
    vecs -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

}  // namespace detail

// n whole vectors; k >= 1. alpha [m] for kScaleAdd alone.
template <bool kTransposed, Into kInto>
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, const float* alpha = nullptr, int64_t longest = kLongestSum) {
  const int64_t stretch = stretch_of_sum(k, longest);
  detail::product_stretch<kTransposed, kInto>(m, n, stretch, a, lda, b, ldb, c, ldc, alpha);
  for (int64_t i = stretch; i < k; i += stretch)
    detail::product_stretch<kTransposed, Into::kAdd>(m, n, k - i < stretch ? k - i : stretch,
                                                     a + i * (kTransposed ? lda : 1), lda, b + i * ldb, ldb, c, ldc,
                                                     nullptr);
}

}  // namespace saccade::cpu::SACCADE_ISA
