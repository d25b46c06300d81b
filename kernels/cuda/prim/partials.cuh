// Second stage of the deterministic reductions: adds up the partial sums that blocks left in memory.
#pragma once
#include "launch.cuh"

namespace saccade {

constexpr int kAddColumns = 32, kAddRows = 16;

// out[column] = sum over rows of partial [rows, columns], in an order that rows alone decides.
static __global__ void __launch_bounds__(kAddColumns* kAddRows)
    add_partials_kernel(const float* partial, int64_t rows, int64_t columns, float* out) {
  __shared__ double sums[kAddRows][kAddColumns];
  const int lane = threadIdx.x % kAddColumns, row = threadIdx.x / kAddColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAddColumns + lane;
  double sum = 0.0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t r = row; r < rows; r += kAddRows) sum += partial[r * columns + column];
  }
  sums[row][lane] = sum;
  __syncthreads();
  if (row == 0 && column < columns) {
    for (int r = 1; r < kAddRows; ++r) sum += sums[r][lane];
    out[column] = static_cast<float>(sum);
  }
}

inline const char* add_partials(const float* partial, int64_t rows, int64_t columns, void* out, void* stream) {
  if (columns == 0) return nullptr;
  return launch(add_partials_kernel, dim3(static_cast<unsigned>(ceil_div(columns, kAddColumns))),
                kAddColumns * kAddRows, 0, stream, partial, rows, columns, static_cast<float*>(out));
}

}  // namespace saccade
