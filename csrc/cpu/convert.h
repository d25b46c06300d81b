// Rows of storage types to and from rows of float, columns in their order; and rows to columns.
#pragma once
#include "rows.h"

namespace saccade::cpu::SACCADE_ISA {

inline VecF wide(const float* p) { return load_raw<VecF>(p); }
inline VecF wide(const Half* p) { return from_half(load_raw<VecH>(p)); }
inline VecF wide(const BFloat16* p) { return (VecF)(__builtin_convertvector(load_raw<VecH>(p), VecU) << 16); }

inline void narrow(VecF x, float* p) { store_raw(p, x); }
inline void narrow(VecF x, Half* p) { store_raw(p, to_half(x)); }
inline void narrow(VecF x, BFloat16* p) {
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_raw(p, __builtin_convertvector(x == x ? rounded : VecU{} + 0x7fc0u, VecH));
}

// n values from p, the lanes behind them 0
template <class T>
inline VecF wide(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, sizeof(T) * static_cast<size_t>(n));
  return wide(buffer);
}
template <class T>
inline void narrow(VecF x, T* p, int64_t n) {
  T buffer[kLanes];
  narrow(x, buffer);
  std::memcpy(p, buffer, sizeof(T) * static_cast<size_t>(n));
}

// row [n] -> out [n rounded up to whole vectors], padded with zeros. Returns a vector that is NaN in some lane where
// the row is not finite, and else 0.
template <class T>
inline VecF widen_row(const T* row, int64_t n, float* out) {
  VecF odd{};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const VecF x = wide(row + c);
    odd += x - x;
    store_raw(out + c, x);
  }
  if (c < n) {
    const VecF x = wide(row + c, n - c);
    odd += x - x;
    store_raw(out + c, x);
  }
  return odd;
}

inline bool any_nan(VecF x) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q)) != 0;
#else
  bool any = false;
  for (int i = 0; i < kLanes; ++i) any |= x[i] != x[i];
  return any;
#endif
}

// n columns of row * factor, rounded once
template <class T>
inline void narrow_row(const float* row, float factor, int64_t n, T* out) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) narrow(load_raw<VecF>(row + c) * factor, out + c);
  if (c < n) narrow(load_raw<VecF>(row + c) * factor, out + c, n - c);
}

// kLanes x kLanes values, rows `from_step` apart, to their transpose.
__attribute__((always_inline)) inline void transpose_square(const float* from, int64_t from_step, float* to,
                                                            int64_t to_step) {
  VecF x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = load_raw<VecF>(from + i * from_step);
  // Exchange off-diagonal blocks of 1, 2, 4, .. lanes.
#define SACCADE_EXCHANGE(h)                                     \
  if constexpr (h < kLanes) {                                   \
    VecI low{}, high{};                                         \
    _Pragma("GCC unroll 16") for (int l = 0; l < kLanes; ++l) { \
      low[l] = (l & h) == 0 ? l : l - h + kLanes;               \
      high[l] = (l & h) == 0 ? l + h : l + kLanes;              \
    }                                                           \
    _Pragma("GCC unroll 16") for (int i = 0; i < kLanes; ++i) { \
      if ((i & h) != 0) continue;                               \
      const VecF a = x[i], b = x[i + h];                        \
      x[i] = __builtin_shuffle(a, b, low);                      \
      x[i + h] = __builtin_shuffle(a, b, high);                 \
    }                                                           \
  }
  SACCADE_EXCHANGE(1)
  SACCADE_EXCHANGE(2)
  SACCADE_EXCHANGE(4)
  SACCADE_EXCHANGE(8)
#undef SACCADE_EXCHANGE
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_raw(to + i * to_step, x[i]);
}

// from [rows, columns], rows `from_step` apart -> to [columns, rows]; rows and columns whole vectors.
inline void transpose_rows(const float* from, int64_t from_step, int64_t rows, int64_t columns, float* to,
                           int64_t to_step) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes)
      transpose_square(from + r * from_step + c, from_step, to + c * to_step + r, to_step);
}

}  // namespace saccade::cpu::SACCADE_ISA
