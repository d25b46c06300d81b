// exp of a vector of float, about one unit in the last place, without the library and without branches.
#pragma once
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

// exp(x) = 2^n (1 + r + r^2 q(r)), n = round(x / ln 2), |r| <= ln(2) / 2; q is the minimax polynomial of degree 4.
// 0 below the smallest normal number, -inf included; NaN stays, +inf gives NaN. For x <= 88.
__attribute__((always_inline)) inline VecF exp_of(VecF x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the whole number in the low bits
  const VecF shifted = x * 0x1.715476p0f + kRound;
  const VecF n = shifted - kRound;
  VecF r = x - n * 0.693359375f;  // ln 2 in two parts, the first short enough for n times it to be exact
  r = r + n * 2.12194440e-4f;
  VecF q = r * 0x1.6a2256p-10f + 0x1.123b02p-7f;
  q = q * r + 0x1.5558f8p-5f;
  q = q * r + 0x1.55549p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const VecF y = q * (r * r) + (r + 1.0f);
  const VecF scaled = (VecF)((VecI)y + ((VecI)shifted << 23)) + (x - x);  // whatever the bits of a NaN
  return x < -87.3365f ? VecF{} : scaled;
}

// b where either is NaN
inline VecF max_of(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float max_lanes(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
  const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
#endif
}

}  // namespace saccade::cpu::SACCADE_ISA
