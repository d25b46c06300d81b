// |row|^2 of every token, for match and knn_density: summed in an order that the number of channels alone decides.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace saccade {

constexpr int kSquareThreads = 256;

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

struct Squares {
  const void* x;      // [B, N, C]
  int64_t stride[2];  // batch, token
  int64_t batch, tokens;
  int32_t channels;
  int32_t lanes;    // that share a row, a power of two
  bool aligned;     // 16-byte accesses are allowed
  float* out;       // [B, N]
  float* best;      // [B, N], set to -inf, or null
  int32_t* target;  // [B, N], set to -1, and to -2 where the row is not finite
};

template <typename T>
__global__ void __launch_bounds__(kSquareThreads) squares_kernel(const __grid_constant__ Squares args) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kSquareThreads + threadIdx.x) / args.lanes;
  const int lane = threadIdx.x % args.lanes;
  float sum = 0.0f;
  if (row < args.batch * args.tokens) {
    const int64_t batch = row / args.tokens, token = row - batch * args.tokens;
    const typename T::Bits* x =
        static_cast<const typename T::Bits*>(args.x) + batch * args.stride[0] + token * args.stride[1];
#pragma unroll 2
    for (int c = lane * T::kVector; c < args.channels; c += args.lanes * T::kVector) {
      const int count = min(T::kVector, args.channels - c);
      const bool whole = args.aligned && count == T::kVector;
      float value[T::kVector];
      unpack<T>(whole ? load<T, T::kVector>(x + c, count) : load<T, 1>(x + c, count), value);
#pragma unroll
      for (int i = 0; i < T::kVector; ++i) sum = fmaf(value[i], value[i], sum);
    }
  }
  sum = lane_sum(sum, args.lanes);
  if (row >= args.batch * args.tokens || lane != 0) return;
  args.out[row] = sum;
  if (args.best != nullptr) {
    args.best[row] = __uint_as_float(0xff800000u);
    args.target[row] = is_finite(sum) ? -1 : -2;
  }
}

template <typename T>
const char* launch_squares(Squares args, void* stream) {
  args.lanes = 1;
  while (args.lanes < kWarp && args.lanes * T::kVector < args.channels) args.lanes *= 2;
  const int64_t blocks = ceil_div(args.batch * args.tokens * args.lanes, kSquareThreads);
  return launch(squares_kernel<T>, dim3(static_cast<unsigned>(blocks)), kSquareThreads, 0, stream, args);
}

// Whether rows of x [B, N, C] start at multiples of 16 bytes. A stride along a length of 1 is never used.
inline bool rows_aligned(const void* x, const int64_t (&stride)[2], int64_t batch, int64_t tokens, Dtype dtype) {
  uint64_t bits = reinterpret_cast<uintptr_t>(x);
  if (batch > 1) bits |= static_cast<uint64_t>(stride[0]) * element_bytes(dtype);
  if (tokens > 1) bits |= static_cast<uint64_t>(stride[1]) * element_bytes(dtype);
  return bits % 16 == 0;
}

}  // namespace saccade
