// Vectors of float in the width of the instruction set being compiled, and how each dtype fills them.
//
// Only compiler vectors and a few intrinsics: no standard containers here, whose out-of-line code could be shared with
// a translation unit compiled for a lesser processor.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef SACCADE_ISA
#define SACCADE_ISA baseline
#endif

namespace saccade::cpu::SACCADE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

inline VecF broadcast(float x) { return VecF{} + x; }

template <class V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_raw(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// ---- fp16 ----------------------------------------------------------------------------------------------------------
inline VecF from_half(VecH h) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  VecF out;
  for (int i = 0; i < kLanes; ++i) {
    _Float16 x;
    const uint16_t bits = h[i];
    std::memcpy(&x, &bits, 2);
    out[i] = static_cast<float>(x);
  }
  return out;
#endif
}
inline VecH to_half(VecF x) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecH out;
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = static_cast<_Float16>(x[i]);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    out[i] = bits;
  }
  return out;
#endif
}

// ---- bf16: two elements fill a word, so the even one is the word shifted up and the odd one the word masked
// -------------- Rounding assumes that the low half of a NaN is zero, else it would overflow: true for NaN that come
// from bf16 and fp16 inputs or from arithmetic; weights are made so when they are loaded (quiet()).
inline void split_words(VecU w, VecF& even, VecF& odd) {
  even = (VecF)(w << 16);
  odd = (VecF)(w & 0xffff0000u);
}

// Round to nearest even. (low + 0x7fff + lowest bit of high) carries into high; averaging gives the carry in 16-bit
// lanes.
inline VecU join_words(VecF even, VecF odd) {
#if defined(__AVX512BW__)
  const __m512i e = (__m512i)even, o = (__m512i)odd;
  const __m512i high = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(e, 16), o);
  const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaau, e, _mm512_slli_epi32(o, 16));
  const __m512i half = _mm512_add_epi16(_mm512_and_si512(high, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7ffe));
  return (VecU)_mm512_add_epi16(high, _mm512_srli_epi16(_mm512_avg_epu16(low, half), 15));
#elif defined(__AVX2__)
  const __m256i e = (__m256i)even, o = (__m256i)odd;
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xaa);
  const __m256i low = _mm256_blend_epi16(e, _mm256_slli_epi32(o, 16), 0xaa);
  const __m256i half = _mm256_add_epi16(_mm256_and_si256(high, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
  return (VecU)_mm256_add_epi16(high, _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15));
#else
  const VecU e = (VecU)even, o = (VecU)odd;
  return ((e + 0x7fffu + ((e >> 16) & 1u)) >> 16) | ((o + 0x7fffu + ((o >> 16) & 1u)) & 0xffff0000u);
#endif
}

inline float quiet(float x) { return x == x ? x : __builtin_nanf(""); }

// ---- how a dtype fills vectors --------------------------------------------------------------------------------------
// A chunk is kPairs<T> consecutive pairs, held as kVecs<T> vectors of first and of second columns. The order of the
// pairs in the lanes is whatever is cheapest to load; order() tells it, and tables of cos, sin and weights are laid out
// alike.

template <class T, bool kInterleaved>
struct Chunk;  // load(first column pointer, second column pointer, first[], second[]), store, order(vec, lane)

template <>
struct Chunk<float, false> {
  static constexpr int kVecs = 1, kPairs = kLanes;
  static int order(int, int lane) { return lane; }
  static void load(const float* p, const float* q, VecF* a, VecF* b) {
    a[0] = load_raw<VecF>(p);
    b[0] = load_raw<VecF>(q);
  }
  static void store(float* p, float* q, const VecF* a, const VecF* b) {
    store_raw(p, a[0]);
    store_raw(q, b[0]);
  }
};

template <>
struct Chunk<Half, false> {
  static constexpr int kVecs = 1, kPairs = kLanes;
  static int order(int, int lane) { return lane; }
  static void load(const Half* p, const Half* q, VecF* a, VecF* b) {
    a[0] = from_half(load_raw<VecH>(p));
    b[0] = from_half(load_raw<VecH>(q));
  }
  static void store(Half* p, Half* q, const VecF* a, const VecF* b) {
    store_raw(p, to_half(a[0]));
    store_raw(q, to_half(b[0]));
  }
};

template <>
struct Chunk<BFloat16, false> {
  static constexpr int kVecs = 2, kPairs = 2 * kLanes;
  static int order(int vec, int lane) { return 2 * lane + vec; }
  static void load(const BFloat16* p, const BFloat16* q, VecF* a, VecF* b) {
    split_words(load_raw<VecU>(p), a[0], a[1]);
    split_words(load_raw<VecU>(q), b[0], b[1]);
  }
  static void store(BFloat16* p, BFloat16* q, const VecF* a, const VecF* b) {
    store_raw(p, join_words(a[0], a[1]));
    store_raw(q, join_words(b[0], b[1]));
  }
};

template <>
struct Chunk<BFloat16, true> {
  static constexpr int kVecs = 1, kPairs = kLanes;
  static int order(int, int lane) { return lane; }
  static void load(const BFloat16* p, const BFloat16*, VecF* a, VecF* b) { split_words(load_raw<VecU>(p), a[0], b[0]); }
  static void store(BFloat16* p, BFloat16*, const VecF* a, const VecF* b) { store_raw(p, join_words(a[0], b[0])); }
};

// Two vectors of interleaved columns (x0 y0 x1 y1 | ...) to one of x and one of y, each 128-bit lane by itself.
inline VecF evens(VecF lo, VecF hi) {
#if defined(__AVX512F__)
  return (VecF)_mm512_shuffle_ps((__m512)lo, (__m512)hi, 0x88);
#elif defined(__AVX2__)
  return (VecF)_mm256_shuffle_ps((__m256)lo, (__m256)hi, 0x88);
#else
  return __builtin_shuffle(lo, hi, VecI{0, 2, 4, 6});
#endif
}
inline VecF odds(VecF lo, VecF hi) {
#if defined(__AVX512F__)
  return (VecF)_mm512_shuffle_ps((__m512)lo, (__m512)hi, 0xdd);
#elif defined(__AVX2__)
  return (VecF)_mm256_shuffle_ps((__m256)lo, (__m256)hi, 0xdd);
#else
  return __builtin_shuffle(lo, hi, VecI{1, 3, 5, 7});
#endif
}
inline VecF zip_low(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return __builtin_shuffle(a, b, VecI{0, 4, 1, 5});
#endif
}
inline VecF zip_high(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return __builtin_shuffle(a, b, VecI{2, 6, 3, 7});
#endif
}
// Pair held by a lane after evens/odds: lane 4b+0,1 from `lo`, 4b+2,3 from `hi`, 128-bit block b.
inline int zipped_order(int lane) {
  const int block = lane / 4, within = lane % 4;
  return 2 * block + (within & 1) + (within < 2 ? 0 : kLanes / 2);
}

template <>
struct Chunk<float, true> {
  static constexpr int kVecs = 1, kPairs = kLanes;
  static int order(int, int lane) { return zipped_order(lane); }
  static void load(const float* p, const float*, VecF* a, VecF* b) {
    const VecF lo = load_raw<VecF>(p), hi = load_raw<VecF>(p + kLanes);
    a[0] = evens(lo, hi);
    b[0] = odds(lo, hi);
  }
  static void store(float* p, float*, const VecF* a, const VecF* b) {
    store_raw(p, zip_low(a[0], b[0]));
    store_raw(p + kLanes, zip_high(a[0], b[0]));
  }
};

template <>
struct Chunk<Half, true> {
  static constexpr int kVecs = 1, kPairs = kLanes;
  static int order(int, int lane) { return zipped_order(lane); }
  static void load(const Half* p, const Half*, VecF* a, VecF* b) {
    const VecF lo = from_half(load_raw<VecH>(p)), hi = from_half(load_raw<VecH>(p + kLanes));
    a[0] = evens(lo, hi);
    b[0] = odds(lo, hi);
  }
  static void store(Half* p, Half*, const VecF* a, const VecF* b) {
    store_raw(p, to_half(zip_low(a[0], b[0])));
    store_raw(p + kLanes, to_half(zip_high(a[0], b[0])));
  }
};

}  // namespace saccade::cpu::SACCADE_ISA
