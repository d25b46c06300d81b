// What attention_rows and attention_columns share: rows of q or k side by side, and tiles of scores in registers.
#pragma once
#include <limits>

#include "exp.h"
#include "panels.h"
#include "planning_kernels.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

template <class T>
inline const T* head_of(const void* base, const int64_t (&stride)[3], int64_t heads, int64_t head) {
  return static_cast<const T*>(base) + head / heads * stride[0] + head % heads * stride[1];
}

// Query `row` of the rows asked for, null where there is none.
template <class T>
inline const T* query_at(const AttentionMapArgs& a, const T* q, int64_t row) {
  if (row >= a.row_count) return nullptr;
  const int64_t query = a.rows == nullptr ? row : a.rows[row];
  return query < 0 || query >= a.in.q_len ? nullptr : q + query * a.in.q_stride[2];
}

template <class T>
inline const T* key_at(const AttentionMapArgs& a, const T* k, int64_t key) {
  return key >= a.in.k_len ? nullptr : k + key * a.in.k_stride[2];
}

inline VecI lane_numbers() {
  VecI n;
  for (int i = 0; i < kLanes; ++i) n[i] = i;
  return n;
}

inline bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int l = 0; l < kLanes; ++l) all |= mask[l];
  return all != 0;
#endif
}

}  // namespace saccade::cpu::SACCADE_ISA
