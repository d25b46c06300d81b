// Rotation of a unit: two vectors of a row, whose pairs join a[i] with b[i] ("half" pairing) or neighbours
// ("interleaved", first those of a, then those of b).
#pragma once
#include "phase.cuh"

namespace saccade {

// The angles of a unit of kPairs pairs, from a row of the table that holds `units`. True where some sine is 0.
template <int kPairs>
__device__ __forceinline__ bool load_angles(const CosSin* row, int unit, int units, CosSin (&angle)[kPairs]) {
  struct alignas(16) Two {
    CosSin first, second;
  };
  bool some_still = false;
#pragma unroll
  for (int i = 0; i < kPairs; i += 2) {
    const Two two = *reinterpret_cast<const Two*>(row + (i / 2 * units + unit) * 2);
    angle[i] = two.first;
    angle[i + 1] = two.second;
    some_still |= two.first.sin == 0.0f || two.second.sin == 0.0f;
  }
  return some_still;
}

// Where the sine is 0 the product with it is left out: 0 * inf would be NaN, and -0 + 0 would be 0.
template <bool kSomeStill, bool kInterleaved, int kVector, int kPairs>
__device__ __forceinline__ void rotate_pairs(const CosSin (&angle)[kPairs], float (&a)[kVector], float (&b)[kVector]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    constexpr int kHalf = kVector / 2;
    float& first = !kInterleaved ? a[i] : i < kHalf ? a[i % kHalf * 2] : b[i % kHalf * 2];
    float& second = !kInterleaved ? b[i] : i < kHalf ? a[i % kHalf * 2 + 1] : b[i % kHalf * 2 + 1];
    const float c = angle[i].cos, s = angle[i].sin, x1 = first, x2 = second;
    const bool still = kSomeStill && s == 0.0f;
    first = still ? c * x1 : c * x1 - s * x2;
    second = still ? c * x2 : s * x1 + c * x2;
  }
}

// `some_still` (some sine may be 0) picks the careful version; it is false nearly everywhere.
template <bool kInterleaved, int kVector, int kPairs>
__device__ __forceinline__ void rotate(const CosSin (&angle)[kPairs], bool some_still, float (&a)[kVector],
                                       float (&b)[kVector]) {
  if (some_still) {
    rotate_pairs<true, kInterleaved>(angle, a, b);
  } else {
    rotate_pairs<false, kInterleaved>(angle, a, b);
  }
}

}  // namespace saccade
