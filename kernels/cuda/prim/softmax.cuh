// Softmax of rows that tensor cores spread over four neighbouring lanes, in powers of two.
#pragma once
#include "launch.cuh"

namespace saccade {

constexpr float kLog2E = 0x1.715476p+0f;  // log2(e)
constexpr float kLn2 = 0x1.62e43p-1f;

// 2^x to 2^-22; 0 below 2^-126, 0 of -inf, NaN of NaN.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

__device__ __forceinline__ float negative_infinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// The largest that is a number, and the sum, over the four lanes that share a row, to all of them.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// One row of a softmax that goes over its keys in tiles: `top` the largest exponent so far, `sum` this lane's share of
// the sum of 2^(exponent - top).
struct RunningRow {
  float top, sum;

  __device__ __forceinline__ void clear() { top = negative_infinity(), sum = 0.0f; }

  // Takes the largest exponent of a tile; returns what to multiply earlier terms by. `base` is then subtracted from
  // the exponents: the largest, or 0 where all are -inf.
  __device__ __forceinline__ float raise(float largest, float& base) {
    const float before = top;
    top = fmaxf(top, row_max(largest));
    base = top == negative_infinity() ? 0.0f : top;
    const float factor = power_of_two(before - base);
    sum *= factor;
    return factor;
  }
};

}  // namespace saccade
