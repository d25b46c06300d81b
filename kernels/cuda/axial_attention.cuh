// axial_attention: attention inside the boxes of a grid; specification python/saccade/reference/axial_attention.py.
//
// A program keeps 64 queries of a pack of boxes, or of the prefix, and goes over its keys (prim/axial_map.cuh) in tiles
// with an online softmax. Boxes are read where they lie. Small boxes share a tile: the scores are block-diagonal, and
// what is not finite in v is set to 0 and the exponents of its key to NaN, as 0 * NaN is NaN.
//
// Rows of the prefix leave terms in fp32, for axial_join_kernel: over boxes with `mean`, over parts of the keys
// without. grid: programs x heads x samples.
#pragma once
#include "prim/axial_map.cuh"

namespace saccade {

struct AxialTerms {
  float* out;  // [entries, terms, prefix, head_dim]
  float* lse;  // [entries, terms, prefix], in powers of two; null with `mean`
};

__device__ inline void axial_barrier() {
#ifndef SACCADE_MUTANT_NO_AXIAL_BARRIER
  __syncthreads();
#endif
}

template <typename T, int kDepth>
struct AxialShared {
  using Tile = AttentionTile<T, kDepth>;
  static constexpr int kColumns = kDepth <= 128 ? 64 : 32;
  static constexpr bool kResident = kDepth <= 128;  // queries stay in registers
  static constexpr int kTileBytes = kColumns * Tile::kRowBytes;
  using Columns = AxialColumns<kColumns>;
  unsigned char *k, *v;
  unsigned char* q;  // where v goes later, if the queries stay in registers
  Columns* columns;  // [2]
  int32_t* rows;     // [64] tokens

  __device__ __forceinline__ explicit AxialShared(unsigned char* base) {
    k = base;
    v = k + kTileBytes;
    q = kResident ? v : v + kTileBytes;
    columns = reinterpret_cast<Columns*>(q + 64 * Tile::kRowBytes);
    rows = reinterpret_cast<int32_t*>(columns + 2);
  }
  static size_t bytes() {
    return kTileBytes + (kResident ? 0 : kTileBytes) + 64 * Tile::kRowBytes + 2 * sizeof(Columns) + 64 * 4;
  }
};

// Column threadIdx.x of a tile of keys; threads beyond the tile have none.
template <int kColumns>
__device__ __forceinline__ void store_keys(AxialColumns<kColumns>& columns, const AxialPlace& place) {
  if (threadIdx.x >= kColumns) return;  // whole warps
  columns.token[threadIdx.x] = place.token;
  columns.group[threadIdx.x] = place.group;
  columns.shift[threadIdx.x] = 0.0f;
  const unsigned exists = __ballot_sync(0xffffffffu, place.token >= 0);
  if (lane_of_warp() == 0) columns.exists[warp_of_block()] = exists;
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kAttentionThreads)
    axial_attention_kernel(const __grid_constant__ AxialAttentionArgs args, const __grid_constant__ AxialPlan plan,
                           const __grid_constant__ AxialTerms terms) {
  using Shared = AxialShared<T, kDepth>;
  using Tile = typename Shared::Tile;
  using Bits = typename T::Bits;
  constexpr int kColumns = Shared::kColumns, kProducts = kColumns / 8, kChannels = kDepth / 8;
  SACCADE_SHARED(base);
  const Shared shared(base);
  const AxialGeometry& geometry = args.geometry;
  const AxialProgram program(plan, blockIdx.x, args.heads);
  const int lane = lane_of_warp(), warp = warp_of_block();
  const bool packed = plan.pack > 1 && !program.of_prefix;
  const auto of_head = [&](const void* x, const int64_t (&stride)[3]) {
    return static_cast<const Bits*>(x) + program.batch * stride[0] + program.head * stride[1];
  };
  const Bits *q = of_head(args.q, args.q_stride), *k = of_head(args.k, args.k_stride),
             *v = of_head(args.v, args.v_stride);

  const int64_t keys = axial_columns<false>(geometry, plan, program);
  const int32_t tiles = static_cast<int32_t>((keys + kColumns - 1) / kColumns);
  AxialPlace column;
  const auto find_column = [&](int32_t tile) {
    column = {};
    if (threadIdx.x < kColumns) {
      column = axial_column<false>(geometry, plan, program, int64_t{tile} * kColumns + threadIdx.x);
    }
  };
  if (threadIdx.x < 64) shared.rows[threadIdx.x] = axial_row<false>(geometry, plan, program, threadIdx.x).token;
  find_column(0);
  store_keys(shared.columns[0], column);
  axial_barrier();
  const auto load_k = [&](int32_t tile) {
    if (tile < tiles) {
      Tile::template load<kColumns>(shared.k, shared.columns[tile & 1].token, k, args.k_stride[2], args.head_dim,
                                    plan.aligned);
    }
    copy_async_commit();
  };
  Tile::template load<64>(shared.q, shared.rows, q, args.q_stride[2], args.head_dim, plan.aligned);
  load_k(0);

  int32_t row_group[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row_group[i] = axial_row<false>(geometry, plan, program, warp * 16 + lane / 4 + i * 8).group;
  }
  RunningRow running[2];
  running[0].clear(), running[1].clear();
  float out[1][kChannels][4];
#pragma unroll
  for (int n = 0; n < kChannels; ++n) out[0][n][0] = out[0][n][1] = out[0][n][2] = out[0][n][3] = 0.0f;
  uint32_t mine[Shared::kResident ? Tile::kChunks : 1][1][4];
  if constexpr (Shared::kResident) {
    copy_async_wait<0>();
    axial_barrier();
    const int left = Tile::left_place(warp * 16);
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      load_matrices(mine[chunk][0], Tile::chunk_at(shared.q, left, chunk));
    }
  }

#pragma unroll 1
  for (int32_t t = 0; t < tiles; ++t) {
    typename Shared::Columns& columns = shared.columns[t & 1];
    copy_async_wait<0>();
    axial_barrier();  // k has come, and v may be overwritten
    Tile::template load<kColumns>(shared.v, columns.token, v, args.v_stride[2], args.head_dim, plan.aligned);
    copy_async_commit();
    find_column(t + 1);
    float s[1][kProducts][4];
    if constexpr (Shared::kResident) {
      Tile::scores(s, mine, shared.k);
    } else {
      Tile::scores(s, shared.q, warp * 16, shared.k);
    }
    store_keys(shared.columns[(t & 1) ^ 1], column);
    copy_async_wait<0>();
    if (packed) Tile::template contain<kColumns>(shared.v, columns.shift);
    axial_barrier();  // v has come, and k may be overwritten
    load_k(t + 1);

    const uint32_t seen = axial_seen<kProducts>(columns, row_group, packed, lane);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = fmaf(s[0][n][i], plan.scale_log2, columns.shift[n * 8 + lane % 4 * 2 + i % 2]);
        s[0][n][i] = seen >> (n * 4 + i) & 1 ? x : negative_infinity();
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = negative_infinity(), least;
#pragma unroll
      for (int n = 0; n < kProducts; ++n) largest = fmaxf(largest, fmaxf(s[0][n][i * 2], s[0][n][i * 2 + 1]));
      const float shrink = running[i].raise(largest, least);
      if (__ballot_sync(0xffffffffu, shrink != 1.0f) != 0) {  // seldom, but for the first tiles
#pragma unroll
        for (int n = 0; n < kChannels; ++n) out[0][n][i * 2] *= shrink, out[0][n][i * 2 + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
#pragma unroll
        for (int j = i * 2; j < i * 2 + 2; ++j) {
          s[0][n][j] = power_of_two(s[0][n][j] - least);
          running[i].sum += s[0][n][j];
        }
      }
    }
    uint32_t weights[kProducts / 2][1][4];
    Tile::round_weights(weights, s);
    Tile::accumulate(out, weights, shared.v);
  }
  copy_async_wait<0>();
  axial_barrier();  // rows of no key are still on their way

  float inverse[2];
  float* wide[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + lane / 4 + i * 8;
    const float sum = row_sum(running[i].sum), top = running[i].top;
    inverse[i] = sum == 0.0f ? 0.0f : reciprocal(sum);
    const float lse = sum == 0.0f ? negative_infinity() : top + log2f(sum);
    wide[i] = nullptr;
    const AxialPlace place = axial_row<false>(geometry, plan, program, row);
    const int32_t token = place.token;
    if (token < 0) continue;
    const bool is_virtual = place.virtual_row >= 0;
    if (is_virtual || program.of_prefix) {
      const int64_t count = is_virtual ? plan.box_count : plan.parts;
      const int64_t at = program.entry * count * geometry.prefix +
                         (is_virtual ? place.virtual_row : int64_t{program.part} * geometry.prefix + token);
      wide[i] = terms.out + at * args.head_dim;
      if (lane % 4 == 0) {
        if (is_virtual) {
          args.group_lse[at] = lse * kLn2;
        } else {
          terms.lse[at] = lse;
        }
        shared.rows[row] = -1;
      }
    } else if (lane % 4 == 0) {
      args.lse[program.entry * args.tokens + token] = lse * kLn2;
    }
  }
  store_floats(out[0], inverse, wide, 0, args.head_dim, lane);
  unsigned char* const stage = (Shared::kResident ? shared.k : shared.q) + warp * 16 * Tile::kRowBytes;
  Bits* to = static_cast<Bits*>(args.out) + program.batch * args.out_stride[0] + program.head * args.out_stride[1];
  Tile::store(out[0], inverse, stage, shared.rows + warp * 16, to, args.out_stride[2], 0, args.head_dim, plan.aligned);
}

}  // namespace saccade
