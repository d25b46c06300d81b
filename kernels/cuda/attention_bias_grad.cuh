// attention_bias_grad: the gradient of a bias that samples and heads share; specification
// python/saccade/reference/attention_bias_grad.py.
//
//   tile   64 queries x kColumns keys (64, or 32 of 256 channels) of one bias; a program owns it
//   item   a sample and head that share the bias, in ascending order
//
// A program looks its key block up in the lists of every item (each thread in those of one), and goes over the items
// that see it: p = 2^(q k^T * scale_log2 + shift), sum += p * (dout v^T - delta), which stays in registers and is
// written once. Two groups of copies are on their way in turn: q and k of the next item during the second product, dout
// and v of the next item during the first. Elements meet no others, so a pair that is not visible needs only to be left
// out.
#pragma once
#include "prim/attention_columns.cuh"

namespace saccade {

struct BiasGradPlan {
  int32_t row_tiles = 0, column_tiles = 0;  // of a bias
  int32_t row_shift = 0, column_shift = 0;  // log2 of the tiles of a block
  int32_t samples = 1, heads = 1;           // that share a bias
  int32_t first = 0, items = 0;             // those of this launch
  float* sum = nullptr;                     // where to add, or null: the launch writes dbias
  bool aligned = false;                     // 16-byte accesses are allowed
  float scale_log2 = 0.0f;
};

__device__ inline void tile_barrier() {
#ifndef SACCADE_MUTANT_NO_TILE_BARRIER
  __syncthreads();
#endif
}
__device__ inline void pair_barrier() {
#ifndef SACCADE_MUTANT_NO_PAIR_BARRIER
  __syncthreads();
#endif
}

constexpr int32_t kNotSeen = -1, kSeenWhole = -2;  // else seen in part: the row of bits

// Where `block` stands in a list, -1 where it does not.
__device__ inline int32_t place_in_list(const int32_t* list, int32_t count, int32_t block) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (list[middle] < block) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && list[low] == block ? low : -1;
}

__device__ inline int32_t find_block(const BlockLayoutArgs& layout, int64_t batch, int64_t head, int64_t row,
                                     int32_t block) {
  const TileList<64> list(layout.full, layout.partial, batch, head, row, 64);  // one tile a block
  if (place_in_list(list.full, list.full_tiles, block) >= 0) return kSeenWhole;
  const int32_t at = place_in_list(list.partial, list.tiles - list.full_tiles, block);
  if (at < 0) return kNotSeen;
  return list.ids == nullptr ? 0 : list.ids[at];
}

template <typename T, int kDepth>
struct BiasGradShared {
  using Tile = AttentionTile<T, kDepth>;
  static constexpr int kRows = 64, kColumns = kDepth <= 128 ? 64 : 32, kItems = kAttentionThreads;
  static constexpr int kRowBytes = kRows * Tile::kRowBytes, kColumnBytes = kColumns * Tile::kRowBytes;
  struct Item {
    ColumnInfo<kColumns> columns;
    ColumnInfo<kRows> rows;
  };
  unsigned char *q, *dout, *k, *v;
  Item* info;      // [2]
  int32_t* found;  // [kItems]

  __device__ __forceinline__ explicit BiasGradShared(unsigned char* base) {
    q = base;
    dout = q + kRowBytes;
    k = dout + kRowBytes;
    v = k + kColumnBytes;
    info = reinterpret_cast<Item*>(v + kColumnBytes);
    found = reinterpret_cast<int32_t*>(info + 2);
  }

  static size_t bytes() { return 2 * (kRowBytes + kColumnBytes) + 2 * sizeof(Item) + kItems * sizeof(int32_t); }
};

template <typename T>
__device__ __forceinline__ void store_bias_grad(const AttentionBiasGradArgs& args, const BiasGradPlan& plan, int64_t at,
                                                float sum) {
  if (plan.sum != nullptr) {
    plan.sum[at] += sum;
  } else if (args.in.bias_dtype == Dtype::kFloat32) {
    static_cast<float*>(args.dbias)[at] = sum;
  } else {
    static_cast<uint16_t*>(args.dbias)[at] = static_cast<uint16_t>(round_two<T>(sum, 0.0f));
  }
}

template <typename T, int kDepth>
__device__ __forceinline__ void bias_grad_block(const AttentionBiasGradArgs& args, const BiasGradPlan& plan,
                                                unsigned char* base) {
  using Shared = BiasGradShared<T, kDepth>;
  using Tile = typename Shared::Tile;
  using Bits = typename T::Bits;
  constexpr int kColumns = Shared::kColumns, kProducts = kColumns / 8, kItems = Shared::kItems;
  const AttentionInputs& in = args.in;
  const Shared shared(base);
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int64_t row_program = blockIdx.x / plan.column_tiles, bias = row_program / plan.row_tiles;
  const int column_tile = static_cast<int>(blockIdx.x - row_program * plan.column_tiles);
  const int row_tile = static_cast<int>(row_program - bias * plan.row_tiles);
  const int32_t first_row = row_tile * Shared::kRows, first_column = column_tile * kColumns;
  const int64_t bias_sample = bias / args.bias_heads;
  const int bias_head = static_cast<int>(bias - bias_sample * args.bias_heads);
  const int group = in.heads / in.kv_heads;
  const auto sample_of = [&](int item) { return bias_sample + item / plan.heads; };
  const auto head_of = [&](int item) { return bias_head + item % plan.heads; };

  float sum[kProducts][4];
#pragma unroll
  for (int n = 0; n < kProducts; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
  bool any = false;

#pragma unroll 1
  for (int chunk = 0; chunk < plan.items; chunk += kItems) {
    const int items = min(kItems, plan.items - chunk), first = plan.first + chunk;
    __syncthreads();  // the last chunk has been read
    if (threadIdx.x < items) {
      const int item = first + static_cast<int>(threadIdx.x);
      shared.found[threadIdx.x] = find_block(in.layout, sample_of(item), head_of(item), row_tile >> plan.row_shift,
                                             column_tile >> plan.column_shift);
    }
    __syncthreads();
    const auto next_seen = [&](int n) {
      while (n < items && shared.found[n] == kNotSeen) ++n;
      return n;
    };
    const auto load_info = [&](int n, int slot) {
      if (n >= items) return;
      const int head = head_of(first + n);
      const int64_t sample = sample_of(first + n), rows = (sample * in.heads + head) * in.q_len;
      const AttentionView<T> view(in, sample, head, head / group);
      MyColumn<kColumns> column;
      column.load_key(view, first_column, in.k_len);
      column.store(shared.info[slot].columns);
      MyColumn<Shared::kRows> row;
      row.load_query(view, first_row, in.q_len, args.lse + rows, args.delta + rows);
      row.store(shared.info[slot].rows);
    };
    const auto load_first = [&](int n, int slot) {
      if (n < items) {
        const int head = head_of(first + n);
        const AttentionView<T> view(in, sample_of(first + n), head, head / group);
        const auto& info = shared.info[slot];
        Tile::template load<Shared::kRows>(shared.q, info.rows.token, view.q, in.q_stride[2], in.head_dim,
                                           plan.aligned);
        Tile::template load<kColumns>(shared.k, info.columns.token, view.k, in.k_stride[2], in.head_dim, plan.aligned);
      }
      copy_async_commit();
    };
    const auto load_second = [&](int n, int slot) {
      if (n < items) {
        const int head = head_of(first + n);
        const int64_t sample = sample_of(first + n);
        const AttentionView<T> view(in, sample, head, head / group);
        const auto& info = shared.info[slot];
        const Bits* dout = static_cast<const Bits*>(args.dout) + sample * args.dout_stride[0] +
                           static_cast<int64_t>(head) * args.dout_stride[1];
        Tile::template load<Shared::kRows>(shared.dout, info.rows.token, dout, args.dout_stride[2], in.head_dim,
                                           plan.aligned);
        Tile::template load<kColumns>(shared.v, info.columns.token, view.v, in.v_stride[2], in.head_dim, plan.aligned);
      }
      copy_async_commit();
    };

    int slot = 0, n = next_seen(0);
    if (n == items) continue;
    any = true;
    load_info(n, 0);
    __syncthreads();
    load_first(n, 0);
    load_second(n, 0);
#pragma unroll 1
    while (n < items) {
      const int next = next_seen(n + 1);
      const auto& info = shared.info[slot];
      load_info(next, slot ^ 1);
      copy_async_wait<1>();
      tile_barrier();  // q and k have come
      float s[1][kProducts][4], dp[1][kProducts][4];
      Tile::scores(s, shared.q, warp * 16, shared.k);
      pair_barrier();  // and have been read
      load_first(next, slot ^ 1);

      const int row = warp * 16 + lane / 4;
      uint32_t seen = seen_columns<kProducts>(info.columns.exists, lane);
      if (info.rows.token[row] < 0) seen &= 0xccccccccu;
      if (info.rows.token[row + 8] < 0) seen &= 0x33333333u;
      const int32_t found = shared.found[n];
      const int head = head_of(first + n);
      if (found != kSeenWhole) {
        const PartMask mask(in.layout, sample_of(first + n), head);
        seen &= mask.template seen<false, kProducts>(first_row + row, first_column + lane % 4 * 2, found);
      }
      const float shift_0 = info.rows.shift[row], shift_8 = info.rows.shift[row + 8];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float shift = info.columns.shift[j * 8 + lane % 4 * 2 + i % 2] + (i < 2 ? shift_0 : shift_8);
          s[0][j][i] = fmaf(s[0][j][i], plan.scale_log2, shift);
        }
      }
      const AttentionView<T> view(in, sample_of(first + n), head, head / group);
      view.template add_bias<false>(s[0], seen, info.rows.token + warp * 16, info.columns.token, lane);

      copy_async_wait<1>();
      tile_barrier();  // dout and v have come
      Tile::scores(dp, shared.dout, warp * 16, shared.v);
      const float delta_0 = info.rows.delta[row], delta_8 = info.rows.delta[row + 8];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float term = power_of_two(s[0][j][i]) * (dp[0][j][i] - (i < 2 ? delta_0 : delta_8));
          if (seen >> (j * 4 + i) & 1) sum[j][i] += term;
        }
      }
      pair_barrier();
      load_second(next, slot ^ 1);
      n = next, slot ^= 1;
    }
    copy_async_wait<0>();
  }
  if (plan.sum != nullptr && !any) return;

  const int head = head_of(plan.first);
  const AttentionView<T> view(in, sample_of(plan.first), head, head / group);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t query = token_at(view.q_order, first_row + warp * 16 + lane / 4 + i * 8, in.q_len);
    if (query < 0) continue;
    const int64_t line = (bias * in.q_len + query) * in.k_len;
#pragma unroll
    for (int j = 0; j < kProducts * 2; ++j) {
      const int32_t key = token_at(view.k_order, first_column + j / 2 * 8 + lane % 4 * 2 + j % 2, in.k_len);
      if (key >= 0) store_bias_grad<T>(args, plan, line + key, sum[j / 2][i * 2 + j % 2]);
    }
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bias_grad_kernel(const __grid_constant__ AttentionBiasGradArgs args,
                               const __grid_constant__ BiasGradPlan plan) {
  SACCADE_SHARED(shared);
  bias_grad_block<T, kDepth>(args, plan, shared);
}

constexpr int kFillThreads = 256;

// Where sums of several launches are collected, and what tokens without a position have: 0.
template <int kBytes>
__global__ void __launch_bounds__(kFillThreads) bias_grad_clear_kernel(void* out, int64_t count) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (at >= count) return;
  if constexpr (kBytes == 4) {
    static_cast<uint32_t*>(out)[at] = 0;
  } else {
    static_cast<uint16_t*>(out)[at] = 0;
  }
}

template <typename T>
__global__ void __launch_bounds__(kFillThreads) bias_grad_round_kernel(const float* sum, int64_t count, uint16_t* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (at < count) out[at] = static_cast<uint16_t>(round_two<T>(sum[at], 0.0f));
}

}  // namespace saccade
