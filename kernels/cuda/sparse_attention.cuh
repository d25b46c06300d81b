// sparse_attention: softmax attention over the blocks of a layout; specification
// python/saccade/reference/sparse_attention.py.
//
//   row tile      64 * kFrags queries of a block; each of 4 warps has 16 of every 64
//   column tile   kKeys keys, 64 or 32, of a block; full blocks first, then partial ones
//
// A program keeps its queries and goes over its key tiles with an online softmax in powers of two. Scores come from
// tensor cores, weights are rounded in registers to the left factor of the second product. Two barriers a tile: behind
// the first, k has come and v may be overwritten; behind the second, v has come and k may be overwritten. So v travels
// during the scores, and the next k during the softmax and the second product.
//
// A pair that is not visible has the exponent -inf, whatever it holds. That is not enough for v, as 0 * NaN is NaN: in
// a partial tile what is not finite in v is set to 0, and every visible score of its key to NaN.
//
// grid: row tiles, then heads, then samples, so that neighbouring blocks read the same k and v.
#pragma once
#include "prim/attention_columns.cuh"

namespace saccade {

struct AttentionPlan {
  int32_t row_tiles = 0;    // of a head
  int32_t row_shift = 0;    // log2 of the row tiles of a query block
  bool aligned = false;     // 16-byte accesses are allowed
  float scale_log2 = 0.0f;  // scale * log2(e)
};

__device__ inline void key_barrier() {
#ifndef SACCADE_MUTANT_NO_KEY_BARRIER
  __syncthreads();
#endif
}
__device__ inline void value_barrier() {
#ifndef SACCADE_MUTANT_NO_VALUE_BARRIER
  __syncthreads();
#endif
}

// Where a program reads and writes. It lies in shared memory: registers are for sums.
template <typename T, int kKeys>
struct AttentionProgram {
  AttentionView<T> view;
  TileList<kKeys> list;
  PartMask mask;
  typename T::Bits* out;
  float* lse;
};

template <typename T, int kDepth, int kFrags>
struct AttentionShared {
  using Tile = AttentionTile<T, kDepth>;
  // 128 x 64 scores beside 128 x 128 sums are more than the registers hold.
  static constexpr int kRows = 64 * kFrags, kKeys = kFrags == 2 && kDepth > 96 ? 32 : 64;
  static constexpr int kTileBytes = kKeys * Tile::kRowBytes;
  using Program = AttentionProgram<T, kKeys>;
  using Columns = ColumnInfo<kKeys>;
  static constexpr bool kResident = kFrags == 1 && kDepth <= 128;  // queries stay in registers
  unsigned char *k, *v;
  unsigned char* q;  // where v goes later, if the queries stay in registers
  Columns* columns;  // [2]
  Program* program;
  int32_t* rows;  // [kRows] tokens

  __device__ __forceinline__ explicit AttentionShared(unsigned char* base) {
    k = base;
    v = k + kTileBytes;
    q = kResident ? v : v + kTileBytes;
    columns = reinterpret_cast<Columns*>(q + kRows * Tile::kRowBytes);
    program = reinterpret_cast<Program*>(columns + 2);
    rows = reinterpret_cast<int32_t*>(program + 1);
  }

  static size_t bytes() {
    return kTileBytes + (kResident ? 0 : kTileBytes) + kRows * Tile::kRowBytes + 2 * sizeof(Columns) + sizeof(Program) +
           kRows * sizeof(int32_t);
  }
};

template <typename T, int kDepth, int kFrags>
__device__ __forceinline__ void attention_block(const SparseAttentionArgs& args, const AttentionPlan& plan,
                                                unsigned char* base) {
  using Shared = AttentionShared<T, kDepth, kFrags>;
  using Tile = typename Shared::Tile;
  using Bits = typename T::Bits;
  constexpr int kKeys = Shared::kKeys, kProducts = kKeys / 8, kChannels = kDepth / 8;
  const AttentionInputs& in = args.in;
  const Shared shared(base);
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int64_t program = blockIdx.x / plan.row_tiles, batch = program / in.heads;
  const int row_tile = static_cast<int>(blockIdx.x - program * plan.row_tiles);
  const int head = static_cast<int>(program - batch * in.heads);
  if (threadIdx.x == 0) {
    *shared.program = {{in, batch, head, head / (in.heads / in.kv_heads)},
                       {in.layout.full, in.layout.partial, batch, head, row_tile >> plan.row_shift, in.layout.k_block},
                       {in.layout, batch, head},
                       static_cast<Bits*>(args.out) + batch * args.out_stride[0] + head * args.out_stride[1],
                       args.lse + program * in.q_len};
  }
  __syncthreads();
  const AttentionView<T>& view = shared.program->view;
  const TileList<kKeys>& list = shared.program->list;
  const PartMask& mask = shared.program->mask;
  const int32_t first_row = row_tile * Shared::kRows;

  if (threadIdx.x < Shared::kRows) {
    shared.rows[threadIdx.x] = token_at(view.q_order, first_row + static_cast<int>(threadIdx.x), in.q_len);
  }
  int32_t first = list.first(0);
  MyColumn<kKeys> column;
  if (list.tiles > 0) column.load_key(view, first, in.k_len);
  column.store(shared.columns[0]);
  __syncthreads();
  const auto load_k = [&](const typename Shared::Columns& columns) {
    Tile::template load<kKeys>(shared.k, columns.token, view.k, in.k_stride[2], in.head_dim, plan.aligned);
    copy_async_commit();
  };
  Tile::template load<Shared::kRows>(shared.q, shared.rows, view.q, in.q_stride[2], in.head_dim, plan.aligned);
  load_k(shared.columns[0]);

  RunningRow running[kFrags][2];
  float out[kFrags][kChannels][4];
#pragma unroll
  for (int m = 0; m < kFrags; ++m) {
    running[m][0].clear(), running[m][1].clear();
#pragma unroll
    for (int n = 0; n < kChannels; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
  }
  uint32_t q[Shared::kResident ? Tile::kChunks : 1][kFrags][4];
  if constexpr (Shared::kResident) {
    copy_async_wait<0>();
    __syncthreads();
    const int left = Tile::left_place(warp * 16);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      load_matrices(q[chunk][0], Tile::chunk_at(shared.q, left, chunk));
    }
  }

  const bool plain = view.bias == nullptr && view.key_bias == nullptr && plan.scale_log2 > 0.0f;
  int32_t next = list.first(1);
#pragma unroll 1
  for (int32_t t = 0; t < list.tiles; ++t) {
    typename Shared::Columns& columns = shared.columns[t & 1];
    const int32_t later = list.first(t + 2);
    copy_async_wait<0>();
    key_barrier();
    Tile::template load<kKeys>(shared.v, columns.token, view.v, in.v_stride[2], in.head_dim, plan.aligned);
    copy_async_commit();
    column = {};
    if (t + 1 < list.tiles) column.load_key(view, next, in.k_len);

    float s[kFrags][kProducts][4];
    if constexpr (Shared::kResident) {
      Tile::scores(s, q, shared.k);
    } else {
      Tile::scores(s, shared.q, warp * 16, shared.k);
    }

    column.store(shared.columns[(t & 1) ^ 1]);
    copy_async_wait<0>();
    if (list.is_partial(t)) Tile::template contain<kKeys>(shared.v, columns.shift);
    value_barrier();
    if (t + 1 < list.tiles) load_k(shared.columns[(t & 1) ^ 1]);

    // Exponents are s * factor.
    float factor = plan.scale_log2;
    if (list.is_partial(t) || !columns.complete() || !plain) {
      factor = 1.0f;
#pragma unroll
      for (int m = 0; m < kFrags; ++m) {
        uint32_t seen = seen_columns<kProducts>(columns.exists, lane);
        if (list.is_partial(t)) {
          seen &= mask.template seen<false, kProducts>(first_row + m * 64 + warp * 16 + lane / 4, first + lane % 4 * 2,
                                                       list.id(t));
        }
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[m][n][i] = fmaf(s[m][n][i], plan.scale_log2, columns.shift[n * 8 + lane % 4 * 2 + i % 2]);
          }
        }
        if (view.bias != nullptr) {
          view.template add_bias<false>(s[m], seen, shared.rows + m * 64 + warp * 16, columns.token, lane);
        }
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if ((seen >> (n * 4 + i) & 1) == 0) s[m][n][i] = negative_infinity();
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kFrags; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = negative_infinity(), least;
#pragma unroll
        for (int n = 0; n < kProducts; ++n) largest = fmaxf(largest, fmaxf(s[m][n][i * 2], s[m][n][i * 2 + 1]));
        RunningRow& row = running[m][i];
        const float shrink = row.raise(largest * factor, least);
        if (__ballot_sync(0xffffffffu, shrink != 1.0f) != 0) {  // seldom, but for the first tiles
#pragma unroll
          for (int n = 0; n < kChannels; ++n) out[m][n][i * 2] *= shrink, out[m][n][i * 2 + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
#pragma unroll
          for (int j = i * 2; j < i * 2 + 2; ++j) {
            s[m][n][j] = power_of_two(fmaf(s[m][n][j], factor, -least));
            row.sum += s[m][n][j];
          }
        }
      }
    }
    uint32_t weights[kProducts / 2][kFrags][4];
    Tile::round_weights(weights, s);
    Tile::accumulate(out, weights, shared.v);
    first = next, next = later;
  }
  copy_async_wait<0>();  // k of no tile, and q

  float* const lse = shared.program->lse;
  if constexpr (!Shared::kResident) __syncthreads();  // where there is no tile, q is still on its way to other rows
#pragma unroll
  for (int m = 0; m < kFrags; ++m) {
    const int first = m * 64 + warp * 16;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = row_sum(running[m][i].sum);
      inverse[i] = sum == 0.0f ? 0.0f : reciprocal(sum);
      const int32_t row = shared.rows[first + lane / 4 + i * 8];
      if (lane % 4 == 0 && row >= 0) {
        const float top = running[m][i].top;
        lse[row] = sum == 0.0f ? negative_infinity() : (top + log2f(sum)) * kLn2;
      }
    }
    unsigned char* const stage = (Shared::kResident ? shared.k : shared.q) + first * Tile::kRowBytes;
    Tile::store(out[m], inverse, stage, shared.rows + first, shared.program->out, args.out_stride[2], 0, in.head_dim,
                plan.aligned);
  }
}

template <typename T, int kDepth, int kFrags>
__global__ void __launch_bounds__(kAttentionThreads)
    sparse_attention_kernel(const __grid_constant__ SparseAttentionArgs args,
                            const __grid_constant__ AttentionPlan plan) {
  SACCADE_SHARED(shared);
  attention_block<T, kDepth, kFrags>(args, plan, shared);
}

}  // namespace saccade
