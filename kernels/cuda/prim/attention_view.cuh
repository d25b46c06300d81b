// What a program of an attention kernel reads of its sample and head.
#pragma once
#include "../../attention_args.h"
#include "block_mask.cuh"
#include "softmax.cuh"
#include "vec.cuh"

namespace saccade {

// The token at a position, -1 for none.
__device__ __forceinline__ int32_t token_at(const int32_t* order, int64_t position, int64_t length) {
  if (order != nullptr) return order[position];
  return position < length ? static_cast<int32_t>(position) : -1;
}

template <typename T>
struct AttentionView {
  using Bits = typename T::Bits;
  const Bits *q, *k, *v;
  const void* bias;
  int64_t bias_stride;
  bool bias_is_float;
  const float* key_bias;
  const int32_t *q_order, *k_order;

  __device__ __forceinline__ AttentionView(const AttentionInputs& in, int64_t batch, int64_t head, int64_t kv_head)
      : q(static_cast<const Bits*>(in.q) + batch * in.q_stride[0] + head * in.q_stride[1]),
        k(static_cast<const Bits*>(in.k) + batch * in.k_stride[0] + kv_head * in.k_stride[1]),
        v(static_cast<const Bits*>(in.v) + batch * in.v_stride[0] + kv_head * in.v_stride[1]),
        bias(nullptr),
        bias_stride(in.bias_stride[2]),
        bias_is_float(in.bias_dtype == Dtype::kFloat32),
        key_bias(in.key_bias == nullptr ? nullptr : in.key_bias + batch * in.key_bias_stride),
        q_order(of_sample(in.layout.q_order, batch, head)),
        k_order(of_sample(in.layout.k_order, batch, kv_head)) {
    if (in.bias != nullptr) {
      const int64_t offset = batch * in.bias_stride[0] + head * in.bias_stride[1];
      bias = static_cast<const unsigned char*>(in.bias) + offset * (bias_is_float ? 4 : 2);
    }
  }

  __device__ __forceinline__ float bias_at(int32_t query, int32_t key) const {
    const int64_t at = query * bias_stride + key;
    if (bias_is_float) return static_cast<const float*>(bias)[at];
    const uint16_t bits = static_cast<const uint16_t*>(bias)[at];
    if constexpr (T::kIsHalf) return half_to_float(bits);
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }

  // sum += bias * log2(e) where `seen`. rows: the tokens of the warp's 16 rows, columns: those of the tile.
  template <bool kRowsAreKeys, int kProducts>
  __device__ __forceinline__ void add_bias(float (&sum)[kProducts][4], uint32_t seen, const int32_t* rows,
                                           const int32_t* columns, int lane) const {
    const int32_t row_0 = max(rows[lane / 4], 0), row_8 = max(rows[lane / 4 + 8], 0);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((seen >> (n * 4 + i) & 1) == 0) continue;
        const int32_t row = i < 2 ? row_0 : row_8, column = columns[n * 8 + lane % 4 * 2 + i % 2];
        const float bias = kRowsAreKeys ? bias_at(column, row) : bias_at(row, column);
        sum[n][i] = fmaf(bias, kLog2E, sum[n][i]);
      }
    }
  }
};

}  // namespace saccade
