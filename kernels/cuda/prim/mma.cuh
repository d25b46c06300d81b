// Tensor-core products of 16-bit values, with fp32 sums. A PTX body and a host body side by side.
#pragma once
#include "vec.cuh"

namespace saccade {

// Four 8 x 8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix l / 8
// (16 bytes, aligned) and gets, of every matrix, elements 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
#else
  emulation::load_matrices(matrix, row);
#endif
}

// The same of the transposed matrices: the lane gets elements 2 * (l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_transposed(uint32_t (&matrix)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
#else
  emulation::load_transposed(matrix, row);
#endif
}

// sum += a b, for a [16, 16] (matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15), b [16, 8] by columns,
// sum [16, 8]: lane l holds columns 2 * (l % 4) and the next of rows l / 4 and l / 4 + 8.
template <typename T>
__device__ __forceinline__ void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (T::kIsHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulation::multiply_matrices<T::kIsHalf>(sum, a, b0, b1);
#endif
}

}  // namespace saccade
