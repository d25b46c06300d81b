// The columns of a tile of scores: what a program must know of each of its keys, or queries.
#pragma once
#include "attention_tile.cuh"
#include "attention_view.cuh"

namespace saccade {

template <int kColumns>
struct alignas(16) ColumnInfo {
  int32_t token[kColumns];  // -1 for none
  float shift[kColumns];    // added to the exponents of the column
  float delta[kColumns];    // of queries, in the backward pass alone
  uint32_t exists[kColumns / 32];

  __device__ __forceinline__ bool complete() const {
    uint32_t all = exists[0];
#pragma unroll
    for (int i = 1; i < kColumns / 32; ++i) all &= exists[i];
    return all == 0xffffffffu;
  }
};

// Column threadIdx.x of a tile; threads beyond the tile have none.
template <int kColumns>
struct MyColumn {
  int32_t token = -1;
  float shift = 0.0f, delta = 0.0f;

  template <typename T>
  __device__ __forceinline__ void load_key(const AttentionView<T>& view, int32_t first, int64_t k_len) {
    if (threadIdx.x >= kColumns) return;
    token = token_at(view.k_order, first + static_cast<int>(threadIdx.x), k_len);
    if (view.key_bias != nullptr && token >= 0) shift = view.key_bias[token] * kLog2E;
  }

  // A query that sees nothing does not exist: it gives no gradient.
  template <typename T>
  __device__ __forceinline__ void load_query(const AttentionView<T>& view, int32_t first, int64_t q_len,
                                             const float* lse, const float* deltas) {
    if (threadIdx.x >= kColumns) return;
    token = token_at(view.q_order, first + static_cast<int>(threadIdx.x), q_len);
    if (token < 0) return;
    shift = lse[token] * -kLog2E;
    delta = deltas[token];
    if (shift == -negative_infinity()) token = -1;
  }

  __device__ __forceinline__ void store(ColumnInfo<kColumns>& columns) const {
    if (threadIdx.x >= kColumns) return;  // whole warps
    columns.token[threadIdx.x] = token;
    columns.shift[threadIdx.x] = shift;
    columns.delta[threadIdx.x] = delta;
    const unsigned exists = __ballot_sync(0xffffffffu, token >= 0);
    if (lane_of_warp() == 0) columns.exists[warp_of_block()] = exists;
  }
};

}  // namespace saccade
