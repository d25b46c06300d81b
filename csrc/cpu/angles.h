// cos and sin of a tile of tokens, from fixed-point turns (python/saccade/reference/turns.py).
#pragma once
#include <cmath>
#include <initializer_list>

#include "kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr int kMaxPairs = 256;  // head_dim up to 512
constexpr int kMaxAxes = 8;

struct Place {  // one token on one axis: position * 2^shift
  int64_t whole;
  uint32_t fraction;  // in 2^-32
  bool valid;         // finite and in range
};

inline Place place(const Angles& a, int64_t axis, int64_t batch, int64_t token) {
  const int64_t at = axis * a.position_stride[0] + batch * a.position_stride[1] + token * a.position_stride[2];
  double p;
  switch (a.position_dtype) {
    case PositionDtype::kInt32:
      return {static_cast<int64_t>(static_cast<const int32_t*>(a.positions)[at]) << a.shift, 0, true};
    case PositionDtype::kInt64:
      return {static_cast<int64_t>(static_cast<uint64_t>(static_cast<const int64_t*>(a.positions)[at]) << a.shift), 0,
              true};
    case PositionDtype::kFloat32:
      p = static_cast<const float*>(a.positions)[at];
      break;
    default:
      p = static_cast<const double*>(a.positions)[at];
  }
  p = std::ldexp(p, a.shift);
  if (!(std::fabs(p) < 0x1p62)) return {0, 0, false};
  const double whole = std::floor(p);
  return {static_cast<int64_t>(whole), static_cast<uint32_t>((p - whole) * 0x1p32), true};
}

// Lane order of a chunk, repeated: slot s of a table holds pair begin + order.
struct Order {
  int slots;                             // multiple of a chunk
  int16_t pair[kMaxPairs + 2 * kLanes];  // relative to begin; >= end - begin in the padding

  template <class C>
  static Order of(int pairs) {
    Order o;
    o.slots = (pairs + C::kPairs - 1) / C::kPairs * C::kPairs;
    for (int base = 0; base < o.slots; base += C::kPairs)
      for (int v = 0; v < C::kVecs; ++v)
        for (int lane = 0; lane < kLanes; ++lane)
          o.pair[base + v * kLanes + lane] = static_cast<int16_t>(base + C::order(v, lane));
    return o;
  }
};

// Signed turns in 2^-32 to cos and sin. Same operations, in the same order and without fused multiply-add, as the GPU
// kernels: the same bits everywhere. Largest error 7.6e-8.
inline void sincos_turns(VecI t, VecF& cos, VecF& sin) {
  const VecU u = (VecU)t;
  const VecU quadrant = (u + 0x20000000u) >> 30;
  const VecI r = (VecI)(u - (quadrant << 30));
  const VecI low = r & 63;
  const VecF x = __builtin_convertvector(r - low, VecF) * 0x1p-32f;
  const VecF d = __builtin_convertvector(low, VecF) * 0x1.921fb6p-30f;  // 2 pi 2^-32
  const VecF z = x * x;
  VecF p = 0x1.466012p+6f + z * -0x1.2dcaf2p+6f;
  p = -0x1.4abbbep+5f + z * p;
  p = -0x1.777a5cp-23f + z * p;
  VecF g = -0x1.55c64ap+6f + z * 0x1.d9f188p+5f;
  g = 0x1.03c1dep+6f + z * g;
  g = -0x1.f7e93ap-22f + z * g;
  const VecF h = z * 0x1.3bd3ccp+4f;
  const VecF w = 1.0f - h;
  const VecF rest = (1.0f - w) - h;
  const VecF c0 = w + (rest + z * g);
  const VecF s = x * 0x1.921fb6p+2f + (x * p + d * c0);
  const VecF c = w + (rest + (z * g - d * s));
  const VecI swap = (VecI)((quadrant & 1u) != 0);
  const VecF sin_value = swap ? c : s;
  const VecF cos_value = swap ? s : c;
  sin = (VecF)((VecU)sin_value ^ ((quadrant & 2u) << 30));
  cos = (VecF)((VecU)cos_value ^ (((quadrant + 1u) & 2u) << 30));
}

// One head group's steps in lane order.
struct Steps {
  alignas(64) int64_t step[kMaxAxes][kMaxPairs + 2 * kLanes];
  alignas(64) uint32_t low[kMaxAxes][kMaxPairs + 2 * kLanes];  // the halves of step
  alignas(64) uint32_t high[kMaxAxes][kMaxPairs + 2 * kLanes];
  int first[kMaxAxes], last[kMaxAxes];  // slots outside are zero
  bool one_axis;                        // no pair is turned by two axes

  void load(const Angles& a, const Order& order, int64_t group) {
    const int pairs = a.end - a.begin;
    one_axis = true;
    for (int axis = 0; axis < a.axes; ++axis) {
      const int64_t* row = a.steps + (axis * static_cast<int64_t>(a.groups) + group) * a.pairs + a.begin;
      first[axis] = order.slots;
      last[axis] = 0;
      for (int s = 0; s < order.slots; ++s) {
        const int64_t value = order.pair[s] < pairs ? row[order.pair[s]] : 0;
        step[axis][s] = value;
        low[axis][s] = static_cast<uint32_t>(value);
        high[axis][s] = static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32);
        if (value == 0) continue;
        for (int other = 0; other < axis; ++other) one_axis &= step[other][s] == 0;
        if (first[axis] == order.slots) first[axis] = s;
        last[axis] = s + 1;
      }
    }
  }
};

// Signed turns [slots] of one token in 2^-32; returns whether its position is valid.
inline bool turns_of(const Angles& a, const Steps& steps, int slots, int64_t batch, int64_t token, int32_t* turns) {
  alignas(64) int64_t phase[kMaxPairs + 2 * kLanes];
  for (int s = 0; s < slots; ++s) phase[s] = int64_t{1} << 31;  // rounds the shift below
  bool valid = true;
  for (int axis = 0; axis < a.axes; ++axis) {
    const Place p = place(a, axis, batch, token);
    valid &= p.valid;
    const int64_t* step = steps.step[axis];
    const uint64_t whole = static_cast<uint64_t>(p.whole);
    if (whole != 0)
      for (int s = steps.first[axis]; s < steps.last[axis]; ++s)
        phase[s] = static_cast<int64_t>(static_cast<uint64_t>(phase[s]) + static_cast<uint64_t>(step[s]) * whole);
    if (p.fraction == 0) continue;
    const int64_t f = p.fraction;
    for (int s = steps.first[axis]; s < steps.last[axis]; ++s)
      phase[s] += f * (step[s] >> 32) + ((f * ((step[s] & 0xffffffff) >> 1)) >> 31);
  }
  for (int s = 0; s < slots; ++s) turns[s] = static_cast<int32_t>(phase[s] >> 32);
  return valid;
}

#if defined(__AVX2__)
// The same for whole positions of 32 bits: the upper half of step * whole from two 32-bit products, half the
// instructions. Rounding is per axis here, so it holds only where one axis turns a pair.
inline bool small_turns_of(const Angles& a, const Steps& steps, int slots, int64_t batch, int64_t token,
                           int32_t* turns) {
  int32_t whole[kMaxAxes];
  for (int axis = 0; axis < a.axes; ++axis) {
    const Place p = place(a, axis, batch, token);
    whole[axis] = static_cast<int32_t>(p.whole);
    if (p.fraction != 0 || !p.valid || whole[axis] != p.whole) return false;
  }
  const __m256i half = _mm256_set1_epi64x(int64_t{1} << 31);
  for (int s = 0; s < slots; s += 8) {
    __m256i total = _mm256_setzero_si256();
    for (int axis = 0; axis < a.axes; ++axis) {
      if (s + 8 <= steps.first[axis] || s >= steps.last[axis]) continue;
      const __m256i w = _mm256_set1_epi32(whole[axis]);
      const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(steps.low[axis] + s));
      const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(steps.high[axis] + s));
      const __m256i even = _mm256_add_epi64(_mm256_mul_epu32(low, w), half);
      const __m256i odd = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(low, 32), w), half);
      const __m256i carried = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
      // The products took a negative position as 2^32 more than it is.
      const __m256i excess = _mm256_and_si256(low, _mm256_srai_epi32(w, 31));
      total = _mm256_add_epi32(total, _mm256_sub_epi32(_mm256_add_epi32(carried, _mm256_mullo_epi32(high, w)), excess));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(turns + s), total);
  }
  return true;
}
#endif

// cos and sin (scale and direction included) of one token in lane order; returns whether some sin is exactly 0.
inline bool fill_token(const Angles& a, const Steps& steps, int slots, int64_t batch, int64_t token, float* cos,
                       float* sin) {
  alignas(64) int32_t turns[kMaxPairs + 2 * kLanes];
  bool valid = true, done = false;
#if defined(__AVX2__)
  done = steps.one_axis && small_turns_of(a, steps, slots, batch, token, turns);
#endif
  if (!done) valid = turns_of(a, steps, slots, batch, token, turns);
  const VecF scale = broadcast(valid ? a.scale : __builtin_nanf(""));
  const VecF sign = broadcast(a.inverse ? -1.0f : 1.0f);
  VecI still{};
  for (int s = 0; s < slots; s += kLanes) {
    VecF c, n;
    sincos_turns(load_raw<VecI>(turns + s), c, n);
    n = n * sign;
    c = c * scale;
    n = n * scale;
    still |= (VecI)(n == 0.0f);
    store_raw(cos + s, c);
    store_raw(sin + s, n);
  }
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= still[i];
  return any != 0;
}

// cos and sin of up to kTileTokens tokens of one head group.
struct Table {
  int slots;
  bool still[kTileTokens];  // some sin of the token is exactly 0
  alignas(64) float cos[kTileTokens * (kMaxPairs + 2 * kLanes)];
  alignas(64) float sin[kTileTokens * (kMaxPairs + 2 * kLanes)];

  void fill(const Angles& a, const Order& order, int64_t group, int64_t batch, int64_t token, int count) {
    Steps steps;
    steps.load(a, order, group);
    slots = order.slots;
    for (int t = 0; t < count; ++t)
      still[t] = fill_token(a, steps, slots, batch, token + t, cos + t * slots, sin + t * slots);
  }
};

// y1 = c x1 - s x2, y2 = s x1 + c x2; where s is 0 its products are left out, so that the identity keeps every bit.
template <bool kStill>
inline void rotate(VecF c, VecF s, VecF& x1, VecF& x2) {
  VecF y1 = c * x1 - s * x2;
  VecF y2 = s * x1 + c * x2;
  if constexpr (kStill) {
    const VecI still = (VecI)(s == 0.0f);
    y1 = still ? c * x1 : y1;
    y2 = still ? c * x2 : y2;
  }
  x1 = y1;
  x2 = y2;
}

}  // namespace saccade::cpu::SACCADE_ISA
