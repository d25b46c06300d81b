// The gradients of sparse_attention; specification python/saccade/reference/sparse_attention.py.
//
// One kernel gives dk and dv, another dq; they differ in what is a row and what a column:
//
//              rows (64 of a program)     columns (a tile: 64, or 32 of 256 channels)
//   kOfKeys    a: k, b: v                 a: q, b: dout; of every head of the group, in turn
//   else       a: q, b: dout              a: k, b: v
//
//   s = a_row a_col^T, dp = b_row b_col^T, p = 2^(s * scale_log2 + shift), ds = p * (dp - delta)
//   db += p b_col (kOfKeys), da += ds a_col
//
// A program keeps its rows and goes over the column tiles of its lists, by key block where the rows are keys; so every
// sum has one owner and one order. Behind the first barrier of a tile its columns have come; behind the second, b may
// be overwritten. With two stages a of the next tile travels all the while, with one it is asked for at the end: then
// more blocks fit on a multiprocessor. What is known of single columns is loaded two tiles ahead, into a ring of three.
//
// Pairs that are not visible have p = ds = 0. As 0 * NaN is NaN, what is not finite in the columns of a partial tile is
// set to 0, and the exponents of its column to NaN.
#pragma once
#include "prim/attention_columns.cuh"

namespace saccade {

struct AttentionGradPlan {
  int32_t row_tiles = 0;  // of a head
  int32_t row_shift = 0;  // log2 of the row tiles of a block
  int32_t stages = 1;     // of a
  bool aligned = false;   // 16-byte accesses are allowed
  float scale_log2 = 0.0f;
};

__device__ inline void tile_barrier() {
#ifndef SACCADE_MUTANT_NO_TILE_BARRIER
  __syncthreads();
#endif
}
__device__ inline void column_barrier() {
#ifndef SACCADE_MUTANT_NO_COLUMN_BARRIER
  __syncthreads();
#endif
}

template <typename T, int kColumns>
struct AttentionGradProgram {
  AttentionView<T> view;
  TileList<kColumns> list;
  PartMask mask;
  const typename T::Bits* dout;  // of the head, as the others
  const float *lse, *delta;

  // `row` is a key block where kOfKeys.
  template <bool kOfKeys>
  static __device__ __forceinline__ AttentionGradProgram make(const SparseAttentionGradArgs& args, int64_t batch,
                                                              int64_t head, int64_t kv_head, int64_t row) {
    const AttentionInputs& in = args.in;
    const BlockLayoutArgs& layout = in.layout;
    const int64_t rows = (batch * in.heads + head) * in.q_len;
    return {{in, batch, head, kv_head},
            {kOfKeys ? layout.t_full : layout.full, kOfKeys ? layout.t_partial : layout.partial, batch, head, row,
             kOfKeys ? layout.q_block : layout.k_block},
            {layout, batch, head},
            static_cast<const typename T::Bits*>(args.dout) + batch * args.dout_stride[0] + head * args.dout_stride[1],
            args.lse + rows,
            args.delta + rows};
  }
};

template <typename T, int kDepth, bool kOfKeys>
struct AttentionGradShared {
  using Tile = AttentionTile<T, kDepth>;
  static constexpr int kRows = 64, kColumns = kDepth <= 128 ? 64 : 32, kRing = 3;
  static constexpr int kSplit = kOfKeys && kDepth > 128 ? 2 : 1;  // programs that share the channels of da and db
  static constexpr int kRowBytes = kRows * Tile::kRowBytes, kColumnBytes = kColumns * Tile::kRowBytes;
  using Columns = ColumnInfo<kColumns>;
  using Program = AttentionGradProgram<T, kColumns>;
  unsigned char *row_a, *row_b, *b, *a;  // a: [stages]
  Columns* columns;                      // [kRing]
  Program* program;
  int32_t* rows;     // [kRows] tokens
  float* row_shift;  // [kRows]

  __device__ __forceinline__ AttentionGradShared(unsigned char* base, int stages) {
    row_a = base;
    row_b = row_a + kRowBytes;
    b = row_b + kRowBytes;
    a = b + kColumnBytes;
    columns = reinterpret_cast<Columns*>(a + stages * kColumnBytes);
    program = reinterpret_cast<Program*>(columns + kRing);
    rows = reinterpret_cast<int32_t*>(program + 1);
    row_shift = reinterpret_cast<float*>(rows + kRows);
  }

  static size_t bytes(int stages) {
    return 2 * kRowBytes + (1 + stages) * kColumnBytes + kRing * sizeof(Columns) + sizeof(Program) +
           kRows * (sizeof(int32_t) + sizeof(float));
  }
};

template <int kCount>
__device__ __forceinline__ void clear(float (&sum)[1][kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) sum[0][n][0] = sum[0][n][1] = sum[0][n][2] = sum[0][n][3] = 0.0f;
}

// 0 wherever a pair is not seen.
template <int kCount>
__device__ __forceinline__ void keep_seen(float (&sum)[1][kCount][4], uint32_t seen) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((seen >> (n * 4 + i) & 1) == 0) sum[0][n][i] = 0.0f;
    }
  }
}

template <typename T, int kDepth, bool kOfKeys>
__device__ __forceinline__ void attention_grad_block(const SparseAttentionGradArgs& args, const AttentionGradPlan& plan,
                                                     unsigned char* base) {
  using Shared = AttentionGradShared<T, kDepth, kOfKeys>;
  using Tile = typename Shared::Tile;
  using Bits = typename T::Bits;
  constexpr int kColumns = Shared::kColumns, kProducts = kColumns / 8, kChannels = kDepth / 8 / Shared::kSplit;
  constexpr uint32_t kAll = 0xffffffffu;
  const AttentionInputs& in = args.in;
  const Shared shared(base, plan.stages);
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int split = Shared::kSplit == 1 ? 0 : static_cast<int>(blockIdx.x % Shared::kSplit);
  const int64_t index = blockIdx.x / Shared::kSplit, program = index / plan.row_tiles;
  const int row_tile = static_cast<int>(index - program * plan.row_tiles);
  const int row_heads = kOfKeys ? in.kv_heads : in.heads, group = in.heads / in.kv_heads;
  const int64_t batch = program / row_heads;
  const int row_head = static_cast<int>(program - batch * row_heads);
  const int32_t first_row = row_tile * Shared::kRows;
  const AttentionView<T>& view = shared.program->view;
  const TileList<kColumns>& list = shared.program->list;

  float da[1][kChannels][4], db[1][kOfKeys ? kChannels : 1][4];
  clear(da);
  clear(db);
  float row_delta[2] = {};
  uint32_t rows_seen = kAll;

#pragma unroll 1
  for (int member = 0; member < (kOfKeys ? group : 1); ++member) {
    const int head = kOfKeys ? row_head * group + member : row_head;
    __syncthreads();  // all have left the last head
    if (threadIdx.x == 0) {
      *shared.program = Shared::Program::template make<kOfKeys>(args, batch, head, kOfKeys ? row_head : head / group,
                                                                row_tile >> plan.row_shift);
    }
    __syncthreads();
    MyColumn<kColumns> column;
    const auto load_column = [&](int32_t t) {
      column = {};
      if (t >= list.tiles) return;
      if constexpr (kOfKeys) {
        column.load_query(view, list.first(t), in.q_len, shared.program->lse, shared.program->delta);
      } else {
        column.load_key(view, list.first(t), in.k_len);
      }
    };
    const auto load_a = [&](int32_t t) {
      if (t < list.tiles) {
        Tile::template load<kColumns>(shared.a + (plan.stages == 2 && t % 2 ? Shared::kColumnBytes : 0),
                                      shared.columns[t % Shared::kRing].token, kOfKeys ? view.q : view.k,
                                      kOfKeys ? in.q_stride[2] : in.k_stride[2], in.head_dim, plan.aligned);
      }
      copy_async_commit();
    };
    const auto load_b = [&](int32_t t) {
      if (t < list.tiles) {
        Tile::template load<kColumns>(shared.b, shared.columns[t % Shared::kRing].token,
                                      kOfKeys ? shared.program->dout : view.v,
                                      kOfKeys ? args.dout_stride[2] : in.v_stride[2], in.head_dim, plan.aligned);
      }
      copy_async_commit();
    };
    if (member == 0 && threadIdx.x < Shared::kRows) {
      const int32_t position = first_row + static_cast<int>(threadIdx.x);
      shared.rows[threadIdx.x] =
          kOfKeys ? token_at(view.k_order, position, in.k_len) : token_at(view.q_order, position, in.q_len);
    }
#pragma unroll 1
    for (int t = 0; t < 2; ++t) {
      load_column(t);
      column.store(shared.columns[t]);
    }
    __syncthreads();
    if (member == 0) {
      Tile::template load<Shared::kRows>(shared.row_a, shared.rows, kOfKeys ? view.k : view.q,
                                         kOfKeys ? in.k_stride[2] : in.q_stride[2], in.head_dim, plan.aligned);
      Tile::template load<Shared::kRows>(shared.row_b, shared.rows, kOfKeys ? view.v : shared.program->dout,
                                         kOfKeys ? in.v_stride[2] : args.dout_stride[2], in.head_dim, plan.aligned);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp * 16 + lane / 4 + i * 8;
        const int32_t token = shared.rows[row];
        float shift = 0.0f;
        bool seen = token >= 0;
        if constexpr (kOfKeys) {
          if (seen && view.key_bias != nullptr) shift = view.key_bias[token] * kLog2E;
        } else {
          if (seen) {
            shift = shared.program->lse[token] * -kLog2E;
            row_delta[i] = shared.program->delta[token];
            seen = !(shift == -negative_infinity());  // a row of NaN sees
          }
          if (!seen) rows_seen &= i == 0 ? 0xccccccccu : 0x33333333u;
        }
        if (lane % 4 == 0) shared.row_shift[row] = shift;  // seen by its warp behind the next barrier
      }
    }
    load_a(0);
    load_b(0);

    float key_sum[2] = {};
#pragma unroll 1
    for (int32_t t = 0; t < list.tiles; ++t) {
      typename Shared::Columns& columns = shared.columns[t % Shared::kRing];
      unsigned char* const a = shared.a + (plan.stages == 2 && t % 2 ? Shared::kColumnBytes : 0);
      const bool partial = list.is_partial(t);
      copy_async_wait<0>();
      if (partial) {
        Tile::template contain<kColumns>(a, columns.shift);
        Tile::template contain<kColumns>(shared.b, columns.shift);
      }
      tile_barrier();
      if (plan.stages == 2) load_a(t + 1);
      load_column(t + 2);

      float s[1][kProducts][4], dp[1][kProducts][4];
      Tile::scores(s, shared.row_a, warp * 16, a);
      column.store(shared.columns[(t + 2) % Shared::kRing]);
      uint32_t seen = rows_seen;
      if (!columns.complete()) seen &= seen_columns<kProducts>(columns.exists, lane);
      if (partial) {
        seen &= shared.program->mask.template seen<kOfKeys, kProducts>(first_row + warp * 16 + lane / 4,
                                                                       list.first(t) + lane % 4 * 2, list.id(t));
      }
      const float shift_0 = shared.row_shift[warp * 16 + lane / 4],
                  shift_8 = shared.row_shift[warp * 16 + lane / 4 + 8];
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float shift = columns.shift[n * 8 + lane % 4 * 2 + i % 2] + (i < 2 ? shift_0 : shift_8);
          s[0][n][i] = fmaf(s[0][n][i], plan.scale_log2, shift);
        }
      }
      if (view.bias != nullptr) {
        view.template add_bias<kOfKeys>(s[0], seen, shared.rows + warp * 16, columns.token, lane);
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][n][i] = power_of_two(s[0][n][i]);
      }
      if (seen != kAll) keep_seen(s, seen);
      if constexpr (kOfKeys) {
        uint32_t weights[kProducts / 2][1][4];
        Tile::round_weights(weights, s);
        Tile::accumulate(db, weights, shared.b, split * (kChannels / 2));
      }
      Tile::scores(dp, shared.row_b, warp * 16, shared.b);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float delta = kOfKeys ? columns.delta[n * 8 + lane % 4 * 2 + i % 2] : row_delta[i / 2];
          dp[0][n][i] = s[0][n][i] * (dp[0][n][i] - delta);
        }
      }
      if (seen != kAll) keep_seen(dp, seen);
      if constexpr (kOfKeys) {
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) key_sum[i / 2] += dp[0][n][i];
        }
      }
      column_barrier();
      load_b(t + 1);
      uint32_t weights[kProducts / 2][1][4];
      Tile::round_weights(weights, dp);
      Tile::accumulate(da, weights, a, split * (kChannels / 2));
      if (plan.stages == 1) {
        column_barrier();
        load_a(t + 1);
      }
    }
    if (kOfKeys && args.dkey_bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float sum = row_sum(key_sum[i]);
        const int32_t token = shared.rows[warp * 16 + lane / 4 + i * 8];
        if (token >= 0 && lane % 4 == 0 && split == 0) {
          args.dkey_bias[(batch * in.heads + head) * in.k_len + token] = sum;
        }
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // rows of no tile are still on their way

  const auto store = [&](const auto& sum, float factor, void* out, const int64_t (&stride)[3]) {
    Bits* const to = static_cast<Bits*>(out) + batch * stride[0] + row_head * stride[1];
    const float factors[2] = {factor, factor};
    Tile::store(sum[0], factors, shared.row_a + warp * 16 * Tile::kRowBytes, shared.rows + warp * 16, to, stride[2],
                split * kChannels * 8, in.head_dim, plan.aligned);
  };
  if constexpr (kOfKeys) {
    store(da, in.scale, args.dk, args.dk_stride);
    store(db, 1.0f, args.dv, args.dv_stride);
  } else {
    store(da, in.scale, args.dq, args.dq_stride);
  }
}

template <typename T, int kDepth, bool kOfKeys>
__global__ void __launch_bounds__(kAttentionThreads)
    sparse_attention_bwd_kernel(const __grid_constant__ SparseAttentionGradArgs args,
                                const __grid_constant__ AttentionGradPlan plan) {
  SACCADE_SHARED(shared);
  attention_grad_block<T, kDepth, kOfKeys>(args, plan, shared);
}

}  // namespace saccade
