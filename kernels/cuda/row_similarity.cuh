// row_similarity: cosine of matching rows; specification python/saccade/reference/row_similarity.py.
//
// A run of lanes (a power of two, a warp at most) takes a row: each lane adds up every lanes-th vector, then the lanes
// add up in a tree. Both orders follow from the channels and the dtype alone, so equal rows have equal bits wherever
// they stand and however the memory is aligned.
#pragma once
#include "../merge_args.h"
#include "prim/reduce.cuh"
#include "prim/vec.cuh"

namespace saccade {

constexpr int kSimilarityThreads = 256;
constexpr int kSimilarityUnroll = 2;
constexpr int kSums = 2 * kSimilarityUnroll;  // that a lane keeps of each product: short sums err less

struct SimilarityPlan {
  int32_t lanes;        // of a row
  int32_t slots;        // rows of a block
  uint32_t row_blocks;  // of a batch entry
};

// 1 / sqrt(square), and 0 for a row of zeros.
__device__ __forceinline__ float reciprocal_norm(float square) { return square > 0.0f ? __frsqrt_rn(square) : 0.0f; }

template <typename T, int kAccess>
__global__ void __launch_bounds__(kSimilarityThreads)
    row_similarity_kernel(const __grid_constant__ RowSimilarityArgs args, const __grid_constant__ SimilarityPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const int64_t batch = blockIdx.x / plan.row_blocks;
  const int64_t row = static_cast<int64_t>(blockIdx.x % plan.row_blocks) * plan.slots + threadIdx.x / plan.lanes;
  const int lane = threadIdx.x % plan.lanes;
  const bool exists = row < args.tokens;  // lanes without a row shuffle all the same
  const Bits* x = static_cast<const Bits*>(args.x) + batch * args.x_stride[0] + row * args.x_stride[1];  // [C]
  const Bits* y = static_cast<const Bits*>(args.y) + batch * args.y_stride[0] + row * args.y_stride[1];  // [C]

  float dots[kSums], xxs[kSums], yys[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) dots[s] = xxs[s] = yys[s] = 0.0f;
#pragma unroll 1
  for (int64_t first = lane * kVector; exists && first < args.channels;
       first += kSimilarityUnroll * plan.lanes * kVector) {
    Vector raw_x[kSimilarityUnroll], raw_y[kSimilarityUnroll];  // [kVector]
#pragma unroll
    for (int u = 0; u < kSimilarityUnroll; ++u) {
      const int64_t column = first + u * plan.lanes * kVector, left = args.channels - column;
      const int count = left <= 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
      raw_x[u] = load<T, kAccess>(x + column, count);  // what does not exist is 0, and adds nothing
      raw_y[u] = load<T, kAccess>(y + column, count);
    }
#pragma unroll
    for (int u = 0; u < kSimilarityUnroll; ++u) {
      float a[kVector], b[kVector];
      unpack<T>(raw_x[u], a);
      unpack<T>(raw_y[u], b);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int s = u * 2 + i % 2;
        dots[s] = fmaf(a[i], b[i], dots[s]);
        xxs[s] = fmaf(a[i], a[i], xxs[s]);
        yys[s] = fmaf(b[i], b[i], yys[s]);
      }
    }
  }
  const float dot = lane_sum((dots[0] + dots[1]) + (dots[2] + dots[3]), plan.lanes);
  const float xx = lane_sum((xxs[0] + xxs[1]) + (xxs[2] + xxs[3]), plan.lanes);
  const float yy = lane_sum((yys[0] + yys[1]) + (yys[2] + yys[3]), plan.lanes);
  if (!exists || lane != 0) return;
  const bool finite = xx < INFINITY && yy < INFINITY;  // also false for NaN
  args.out[batch * args.tokens + row] = finite ? dot * reciprocal_norm(xx) * reciprocal_norm(yy) : NAN;
}

}  // namespace saccade
