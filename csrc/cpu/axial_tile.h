// The arithmetic of attention over few rows that lie anywhere: dot products of rows with rows, weighted sums of rows,
// and what softmax needs. Rows are floats, a whole number of vectors long, and reached by pointers.
#pragma once
#include "exp.h"
#include "gemm.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {

// ---- sums of lanes --------------------------------------------------------------------------------------------------
// Within each 128-bit block: the sums of the blocks of a, b, c and d side by side.
inline VecF sum_blocks(VecF a, VecF b, VecF c, VecF d) {
  const VecF ab = zip_low(a, b) + zip_high(a, b), cd = zip_low(c, d) + zip_high(c, d);
#if defined(__AVX512F__)
  const __m512d x = (__m512d)ab, y = (__m512d)cd;
  return (VecF)_mm512_unpacklo_pd(x, y) + (VecF)_mm512_unpackhi_pd(x, y);
#elif defined(__AVX2__)
  const __m256d x = (__m256d)ab, y = (__m256d)cd;
  return (VecF)_mm256_unpacklo_pd(x, y) + (VecF)_mm256_unpackhi_pd(x, y);
#else
  return __builtin_shuffle(ab, cd, VecI{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, VecI{2, 3, 6, 7});
#endif
}

// Lane i is the sum of the lanes of v[i].
inline VecF sum_each(const VecF (&v)[kLanes]) {
#if defined(__AVX512F__)
  __m512 x[4];
  for (int i = 0; i < 4; ++i) x[i] = (__m512)sum_blocks(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  auto halve = [](__m512 a, __m512 b) {
    return (__m512)((VecF)_mm512_shuffle_f32x4(a, b, 0x88) + (VecF)_mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (VecF)halve(halve(x[0], x[1]), halve(x[2], x[3]));
#elif defined(__AVX2__)
  const __m256 x = (__m256)sum_blocks(v[0], v[1], v[2], v[3]), y = (__m256)sum_blocks(v[4], v[5], v[6], v[7]);
  return (VecF)_mm256_permute2f128_ps(x, y, 0x20) + (VecF)_mm256_permute2f128_ps(x, y, 0x31);
#else
  return sum_blocks(v[0], v[1], v[2], v[3]);
#endif
}

// out[c * stride + i] = rows[i][c] for kLanes rows and `columns` columns, a whole number of vectors.
inline void transpose_rows(const float* const* rows, int64_t columns, float* out, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kLanes, out += kLanes * stride) {
    VecF x[4][kLanes / 4];  // [column of a block][rows, by four]
    for (int i = 0; i < kLanes / 4; ++i) {
      VecF r[4];
      for (int n = 0; n < 4; ++n) r[n] = load_raw<VecF>(rows[4 * i + n] + c);
      const VecF a = zip_low(r[0], r[1]), b = zip_low(r[2], r[3]), d = zip_high(r[0], r[1]), e = zip_high(r[2], r[3]);
#if defined(__AVX512F__)
      x[0][i] = (VecF)_mm512_unpacklo_pd((__m512d)a, (__m512d)b),
      x[1][i] = (VecF)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
      x[2][i] = (VecF)_mm512_unpacklo_pd((__m512d)d, (__m512d)e),
      x[3][i] = (VecF)_mm512_unpackhi_pd((__m512d)d, (__m512d)e);
#elif defined(__AVX2__)
      x[0][i] = (VecF)_mm256_unpacklo_pd((__m256d)a, (__m256d)b),
      x[1][i] = (VecF)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
      x[2][i] = (VecF)_mm256_unpacklo_pd((__m256d)d, (__m256d)e),
      x[3][i] = (VecF)_mm256_unpackhi_pd((__m256d)d, (__m256d)e);
#else
      x[0][i] = __builtin_shuffle(a, b, VecI{0, 1, 4, 5}), x[1][i] = __builtin_shuffle(a, b, VecI{2, 3, 6, 7});
      x[2][i] = __builtin_shuffle(d, e, VecI{0, 1, 4, 5}), x[3][i] = __builtin_shuffle(d, e, VecI{2, 3, 6, 7});
#endif
    }
    for (int n = 0; n < 4; ++n) {
#if defined(__AVX512F__)
      const __m512 lo = _mm512_shuffle_f32x4((__m512)x[n][0], (__m512)x[n][1], 0x44);
      const __m512 hi = _mm512_shuffle_f32x4((__m512)x[n][0], (__m512)x[n][1], 0xee);
      const __m512 lo2 = _mm512_shuffle_f32x4((__m512)x[n][2], (__m512)x[n][3], 0x44);
      const __m512 hi2 = _mm512_shuffle_f32x4((__m512)x[n][2], (__m512)x[n][3], 0xee);
      store_raw(out + n * stride, (VecF)_mm512_shuffle_f32x4(lo, lo2, 0x88));
      store_raw(out + (4 + n) * stride, (VecF)_mm512_shuffle_f32x4(lo, lo2, 0xdd));
      store_raw(out + (8 + n) * stride, (VecF)_mm512_shuffle_f32x4(hi, hi2, 0x88));
      store_raw(out + (12 + n) * stride, (VecF)_mm512_shuffle_f32x4(hi, hi2, 0xdd));
#elif defined(__AVX2__)
      store_raw(out + n * stride, (VecF)_mm256_permute2f128_ps((__m256)x[n][0], (__m256)x[n][1], 0x20));
      store_raw(out + (4 + n) * stride, (VecF)_mm256_permute2f128_ps((__m256)x[n][0], (__m256)x[n][1], 0x31));
#else
      store_raw(out + n * stride, x[n][0]);
#endif
    }
  }
}

// Products of kWide rows x with kLanes / kWide rows y: lane j * kWide + i is x[i] . y[j].
template <int kWide, int kVecs>
inline VecF dots(const float* const* x, const float* const* y, int64_t columns) {
  constexpr int kTall = kLanes / kWide;
  VecF sum[kLanes];
  const int64_t end = kVecs > 0 ? kVecs * kLanes : columns;
#pragma GCC unroll 16
  for (int i = 0; i < kWide; ++i) {
    const float* row = x[i];
#pragma GCC unroll 16
    for (int j = 0; j < kTall; ++j) sum[j * kWide + i] = load_raw<VecF>(row) * load_raw<VecF>(y[j]);
#pragma GCC unroll 16
    for (int64_t c = kLanes; c < end; c += kLanes) {
      const VecF v = load_raw<VecF>(row + c);
#pragma GCC unroll 16
      for (int j = 0; j < kTall; ++j) sum[j * kWide + i] += v * load_raw<VecF>(y[j] + c);
    }
  }
  return sum_each(sum);
}
template <int kWide>
inline VecF dots(const float* const* x, const float* const* y, int64_t columns) {
  if (columns == 64) return dots<kWide, 64 / kLanes>(x, y, columns);
  return dots<kWide, 0>(x, y, columns);
}

// out[j * wide + i] = x[i] . y[j] for `rows` rows y; x has `wide` rows, 4, 8 or kLanes. Writes whole vectors.
template <int kWide>
inline void dot_rows(const float* const* x, const float* const* y, int64_t rows, int64_t columns, float* out) {
  constexpr int kTall = kLanes / kWide;
  int64_t j = 0;
  for (; j + kTall <= rows; j += kTall) store_raw(out + j * kWide, dots<kWide>(x, y + j, columns));
  if (j == rows) return;
  const float* last[kTall];
  for (int i = 0; i < kTall; ++i) last[i] = y[j + i < rows ? j + i : rows - 1];
  store_raw(out + j * kWide, dots<kWide>(x, last, columns));
}
inline void dot_rows(int wide, const float* const* x, const float* const* y, int64_t rows, int64_t columns,
                     float* out) {
  if (wide == kLanes) return dot_rows<kLanes>(x, y, rows, columns, out);
#if defined(__AVX512F__)
  if (wide == 8) return dot_rows<8>(x, y, rows, columns, out);
#endif
  return dot_rows<4>(x, y, rows, columns, out);
}
// Rows side by side that hold `rows` of them: 4, 8 or kLanes.
inline int width_of(int64_t rows) { return rows <= 4 ? 4 : rows <= 8 && kLanes > 8 ? 8 : kLanes; }

// ---- weighted sums of rows ------------------------------------------------------------------------------------------
// Weight of row x in sum i: a[i * of_sum + x * of_row].
struct Weights {
  const float* a;
  int64_t of_sum, of_row;
  Weights from(int64_t sum, int64_t row) const { return {a + sum * of_sum + row * of_row, of_sum, of_row}; }
};

#if defined(__AVX512F__)
constexpr int kSumVecs = 4;
#else
constexpr int kSumVecs = 2;
#endif

template <int kSums, int kVecs>
inline void add_rows(Weights w, int64_t count, const float* const* rows, int64_t column, float* const* out, bool add) {
  VecF sum[kSums][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[i][v] = add ? load_raw<VecF>(out[i] + column + v * kLanes) : VecF{};
  const float* a = w.a;
  for (int64_t x = 0; x < count; ++x, a += w.of_row) {
    const float* row = rows[x] + column;
    VecF b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = load_raw<VecF>(row + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      const VecF s = broadcast(a[i * w.of_sum]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] += s * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_raw(out[i] + column + v * kLanes, sum[i][v]);
}

template <int kVecs>
inline void add_columns(Weights w, int64_t sums, int64_t count, const float* const* rows, int64_t column,
                        float* const* out, bool add) {
  int64_t i = 0;
  for (; i + 6 <= sums; i += 6) add_rows<6, kVecs>(w.from(i, 0), count, rows, column, out + i, add);
  if (i + 4 <= sums) add_rows<4, kVecs>(w.from(i, 0), count, rows, column, out + i, add), i += 4;
  if (i + 2 <= sums) add_rows<2, kVecs>(w.from(i, 0), count, rows, column, out + i, add), i += 2;
  if (i < sums) add_rows<1, kVecs>(w.from(i, 0), count, rows, column, out + i, add);
}

// out[i] = sum of weight(i, x) rows[x] over x < count (onto out[i] where `add`), for i < sums; rows of `columns`, a
// whole number of vectors. Summed in the order of x.
inline void weighted_sums(Weights w, int64_t sums, int64_t count, const float* const* rows, int64_t columns,
                          float* const* out, bool add) {
  if (sums <= 0) return;
  int64_t c = 0;
  for (; c + kSumVecs * kLanes <= columns; c += kSumVecs * kLanes)
    add_columns<kSumVecs>(w, sums, count, rows, c, out, add);
#if defined(__AVX512F__)
  if (c + 2 * kLanes <= columns) add_columns<2>(w, sums, count, rows, c, out, add), c += 2 * kLanes;
#endif
  if (c < columns) add_columns<1>(w, sums, count, rows, c, out, add);
}

// ---- softmax
// --------------------------------------------------------------------------------------------------------- Natural
// logarithm of x >= 0: -inf of 0, NaN of NaN; not for subnormal x.
inline VecF log_of(VecF x) {
  const VecI bits = (VecI)x, e = (bits - 0x3f3504f3) >> 23;
  const VecF f = (VecF)(bits - (e << 23)) - broadcast(1.0f), n = __builtin_convertvector(e, VecF);
  VecF y = broadcast(7.0376836292e-2f);
  y = y * f + broadcast(-1.1514610310e-1f);
  y = y * f + broadcast(1.1676998740e-1f);
  y = y * f + broadcast(-1.2420140846e-1f);
  y = y * f + broadcast(1.4249322787e-1f);
  y = y * f + broadcast(-1.6668057665e-1f);
  y = y * f + broadcast(2.0000714765e-1f);
  y = y * f + broadcast(-2.4999993993e-1f);
  y = y * f + broadcast(3.3333331174e-1f);
  const VecF square = f * f;
  y = y * f * square + n * broadcast(-2.12194440e-4f);
  y = y - broadcast(0.5f) * square + f + n * broadcast(0.693359375f);
  y = x == VecF{} ? broadcast(-__builtin_inff()) : y;
  return x != x ? x : y;
}

// Lane i as lane i + shift of the cycle.
inline VecF turned(VecF v, int shift) {
  VecI from;
  for (int i = 0; i < kLanes; ++i) from[i] = (i + shift) % kLanes;
  return __builtin_shuffle(v, from);
}
inline VecI lane_numbers() {
  VecI n;
  for (int i = 0; i < kLanes; ++i) n[i] = i;
  return n;
}

// ---- rows of tensors as floats --------------------------------------------------------------------------------------
inline VecF load_floats(const float* p) { return load_raw<VecF>(p); }
inline VecF load_floats(const Half* p) { return from_half(load_raw<VecH>(p)); }
inline VecF load_floats(const BFloat16* p) { return (VecF)(__builtin_convertvector(load_raw<VecH>(p), VecU) << 16); }
inline void store_floats(float* p, VecF v) { store_raw(p, v); }
inline void store_floats(Half* p, VecF v) { store_raw(p, to_half(v)); }
inline void store_floats(BFloat16* p, VecF v) {
  VecU u = (VecU)v;
  const VecU rounded = u + 0x7fffu + ((u >> 16) & 1u);
  u = v != v ? u | 0x400000u : rounded;
  store_raw(p, __builtin_convertvector(u >> 16, VecH));
}

template <class T>
inline void load_row(const T* from, int64_t columns, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) store_raw(to + c, load_floats(from + c));
  if (c == columns) return;
  T rest[kLanes] = {};
  std::memcpy(rest, from + c, sizeof(T) * static_cast<size_t>(columns - c));
  store_raw(to + c, load_floats(rest));
}
template <class T>
inline void store_row(const float* from, int64_t columns, T* to) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) store_floats(to + c, load_raw<VecF>(from + c));
  if (c == columns) return;
  T rest[kLanes];
  store_floats(rest, load_raw<VecF>(from + c));
  std::memcpy(to + c, rest, sizeof(T) * static_cast<size_t>(columns - c));
}

}  // namespace saccade::cpu::SACCADE_ISA
