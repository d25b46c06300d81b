// The gradients of axial_attention; specification python/saccade/reference/axial_attention.py.
//
// First delta = rowsum(dout * out) of every query. Then one kernel gives dk and dv, another dq; they differ in what is
// a row and what a column (prim/axial_map.cuh):
//
//              rows (64 of a program)     columns (a tile: 64, or 32 of many channels)
//   kOfKeys    a: k, b: v                 a: q, b: dout
//   else       a: q, b: dout              a: k, b: v
//
//   s = a_row a_col^T, dp = b_row b_col^T, p = 2^(s * scale_log2 + shift), ds = p * (weight * dp - delta)
//   db += weight * p b_col (kOfKeys), da += ds a_col
//
// weight is 1 / G of a virtual query, whose dout is that of its token. Every sum has one owner and one order; rows of
// the prefix leave terms in fp32, for axial_join_kernel. What is not finite in the columns of a packed tile is set to
// 0, and the exponents of its column to NaN.
#pragma once
#include "prim/axial_map.cuh"
#include "prim/reduce.cuh"

namespace saccade {

struct AxialGradTerms {
  float* delta;    // [entries, tokens + virtual queries]
  int64_t deltas;  // of a sample and head
  float *dq, *dk, *dv;
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

// A warp for each query.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads)
    axial_delta_kernel(const __grid_constant__ AxialAttentionGradArgs args, const __grid_constant__ AxialPlan plan,
                       const __grid_constant__ AxialGradTerms terms) {
  const AxialAttentionArgs& forward = args.forward;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kWarp) + warp_of_block();
  if (index >= forward.batch * forward.heads * terms.deltas) return;  // whole warps
  const int64_t entry = index / terms.deltas, row = index - entry * terms.deltas;
  const int64_t batch = entry / forward.heads, head = entry - batch * forward.heads;
  const bool is_virtual = row >= forward.tokens;
  const int64_t token = is_virtual ? (row - forward.tokens) % forward.geometry.prefix : row;
  const int channel = lane_of_warp() * 8, count = max(0, min(8, forward.head_dim - channel));
  const auto read = [&](const void* x, const int64_t (&stride)[3], float (&values)[8]) {
    const typename T::Bits* from =
        static_cast<const typename T::Bits*>(x) + batch * stride[0] + head * stride[1] + token * stride[2];
    from += count > 0 ? channel : 0;
    unpack<T>(plan.aligned ? load<T, 8>(from, count) : load<T, 1>(from, count), values);
  };
  float dout[8], out[8] = {}, sum = 0.0f;
  read(args.dout, args.dout_stride, dout);
  if (is_virtual) {
    const int64_t at = entry * (terms.deltas - forward.tokens) + row - forward.tokens;
    const float* from = static_cast<const float*>(forward.group_out) + at * forward.head_dim + channel;
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? from[i] : 0.0f;
  } else {
    read(forward.out, forward.out_stride, out);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(dout[i], out[i], sum);
  sum = lane_sum(sum, kWarp);
  if (lane_of_warp() == 0) terms.delta[index] = is_virtual ? sum * plan.box_share : sum;
}

template <typename T, int kDepth, bool kOfKeys>
struct AxialGradShared {
  using Tile = AttentionTile<T, kDepth>;
  static constexpr int kColumns = kDepth <= (kOfKeys ? 64 : 128) ? 64 : 32, kRing = 3;
  static constexpr int kSplit = kOfKeys && kDepth > 128 ? 2 : 1;  // programs that share the channels of da and db
  static constexpr int kRowBytes = 64 * Tile::kRowBytes, kColumnBytes = kColumns * Tile::kRowBytes;
  using Columns = AxialColumns<kColumns>;
  unsigned char *row_a, *row_b, *a, *b;
  Columns* columns;  // [kRing]
  int32_t* rows;     // [64] tokens

  __device__ __forceinline__ explicit AxialGradShared(unsigned char* base) {
    row_a = base;
    row_b = row_a + kRowBytes;
    a = row_b + kRowBytes;
    b = a + kColumnBytes;
    columns = reinterpret_cast<Columns*>(b + kColumnBytes);
    rows = reinterpret_cast<int32_t*>(columns + kRing);
  }
  static size_t bytes() { return 2 * kRowBytes + 2 * kColumnBytes + kRing * sizeof(Columns) + 64 * 4; }
};

// What the backward pass knows of a query; shift is minus its lse. One that sees nothing gives no gradient.
struct AxialQuery {
  float shift = 0.0f, delta = 0.0f, weight = 1.0f;
  bool sees = false;

  __device__ __forceinline__ void load(const AxialAttentionArgs& forward, const AxialPlan& plan,
                                       const AxialGradTerms& terms, int64_t entry, const AxialPlace& place) {
    if (place.token < 0) return;
    const int64_t virtuals = terms.deltas - forward.tokens;
    const bool is_virtual = place.virtual_row >= 0;
    const float lse = is_virtual ? forward.group_lse[entry * virtuals + place.virtual_row]
                                 : forward.lse[entry * forward.tokens + place.token];
    shift = lse * -kLog2E;
    delta = terms.delta[entry * terms.deltas + (is_virtual ? forward.tokens + place.virtual_row : place.token)];
    if (is_virtual) weight = plan.box_share;
    sees = !(lse == negative_infinity());  // a row of NaN sees
  }
};

template <typename T, int kDepth, bool kOfKeys>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    axial_attention_bwd_kernel(const __grid_constant__ AxialAttentionGradArgs args,
                               const __grid_constant__ AxialPlan plan, const __grid_constant__ AxialGradTerms terms) {
  using Shared = AxialGradShared<T, kDepth, kOfKeys>;
  using Tile = typename Shared::Tile;
  using Bits = typename T::Bits;
  constexpr int kColumns = Shared::kColumns, kProducts = kColumns / 8, kChannels = kDepth / 8 / Shared::kSplit;
  SACCADE_SHARED(base);
  const Shared shared(base);
  const AxialAttentionArgs& forward = args.forward;
  const AxialGeometry& geometry = forward.geometry;
  const int lane = lane_of_warp(), warp = warp_of_block();
  const int split = Shared::kSplit == 1 ? 0 : static_cast<int>(blockIdx.x % Shared::kSplit);
  const AxialProgram program(plan, blockIdx.x / Shared::kSplit, forward.heads);
  const bool packed = plan.pack > 1 && !program.of_prefix;
  const int64_t columns_count = axial_columns<kOfKeys>(geometry, plan, program);
  const int32_t tiles = static_cast<int32_t>((columns_count + kColumns - 1) / kColumns);
  const auto of_head = [&](const void* x, const int64_t (&stride)[3]) {
    return static_cast<const Bits*>(x) + program.batch * stride[0] + program.head * stride[1];
  };

  AxialPlace place;
  AxialQuery query;
  const auto find_column = [&](int32_t tile) {
    place = {}, query = {};
    if (threadIdx.x >= kColumns || tile >= tiles) return;
    place = axial_column<kOfKeys>(geometry, plan, program, int64_t{tile} * kColumns + threadIdx.x);
    if constexpr (kOfKeys) {
      query.load(forward, plan, terms, program.entry, place);
      if (!query.sees) place.token = -1;
    }
  };
  const auto store_column = [&](int32_t tile) {
    if (threadIdx.x >= kColumns) return;  // whole warps
    typename Shared::Columns& columns = shared.columns[tile % Shared::kRing];
    columns.token[threadIdx.x] = place.token;
    columns.group[threadIdx.x] = place.group;
    columns.shift[threadIdx.x] = query.shift;
    columns.delta[threadIdx.x] = query.delta;
    columns.weight[threadIdx.x] = query.weight;
    const unsigned exists = __ballot_sync(0xffffffffu, place.token >= 0);
    if (lane == 0) columns.exists[warp] = exists;
  };
  const auto load_columns = [&](int32_t tile, unsigned char* to, const Bits* from, int64_t stride) {
    if (tile < tiles) {
      Tile::template load<kColumns>(to, shared.columns[tile % Shared::kRing].token, from, stride, forward.head_dim,
                                    plan.aligned);
    }
    copy_async_commit();
  };
  const auto load_a = [&](int32_t tile) {
    if constexpr (kOfKeys) {
      load_columns(tile, shared.a, of_head(forward.q, forward.q_stride), forward.q_stride[2]);
    } else {
      load_columns(tile, shared.a, of_head(forward.k, forward.k_stride), forward.k_stride[2]);
    }
  };
  const auto load_b = [&](int32_t tile) {
    if constexpr (kOfKeys) {
      load_columns(tile, shared.b, of_head(args.dout, args.dout_stride), args.dout_stride[2]);
    } else {
      load_columns(tile, shared.b, of_head(forward.v, forward.v_stride), forward.v_stride[2]);
    }
  };

  if (threadIdx.x < 64) shared.rows[threadIdx.x] = axial_row<kOfKeys>(geometry, plan, program, threadIdx.x).token;
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    find_column(t);
    store_column(t);
  }
  tile_barrier();
  if constexpr (kOfKeys) {
    Tile::template load<64>(shared.row_a, shared.rows, of_head(forward.k, forward.k_stride), forward.k_stride[2],
                            forward.head_dim, plan.aligned);
    Tile::template load<64>(shared.row_b, shared.rows, of_head(forward.v, forward.v_stride), forward.v_stride[2],
                            forward.head_dim, plan.aligned);
  } else {
    Tile::template load<64>(shared.row_a, shared.rows, of_head(forward.q, forward.q_stride), forward.q_stride[2],
                            forward.head_dim, plan.aligned);
    Tile::template load<64>(shared.row_b, shared.rows, of_head(args.dout, args.dout_stride), args.dout_stride[2],
                            forward.head_dim, plan.aligned);
  }
  load_a(0);
  load_b(0);

  float da[1][kChannels][4], db[1][kOfKeys ? kChannels : 1][4];
#pragma unroll
  for (int n = 0; n < kChannels; ++n) da[0][n][0] = da[0][n][1] = da[0][n][2] = da[0][n][3] = 0.0f;
#pragma unroll
  for (int n = 0; n < (kOfKeys ? kChannels : 1); ++n) db[0][n][0] = db[0][n][1] = db[0][n][2] = db[0][n][3] = 0.0f;
  AxialQuery row[2];
  int32_t row_group[2];
  uint32_t rows_seen = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const AxialPlace mine = axial_row<kOfKeys>(geometry, plan, program, warp * 16 + lane / 4 + i * 8);
    row_group[i] = mine.group;
    bool sees = mine.token >= 0;
    if constexpr (!kOfKeys) {
      row[i].load(forward, plan, terms, program.entry, mine);
      sees = row[i].sees;
    }
    if (!sees) rows_seen &= i == 0 ? 0xccccccccu : 0x33333333u;
  }

#pragma unroll 1
  for (int32_t t = 0; t < tiles; ++t) {
    typename Shared::Columns& columns = shared.columns[t % Shared::kRing];
    copy_async_wait<0>();
    if (packed) {
      Tile::template contain<kColumns>(shared.a, columns.shift);
      Tile::template contain<kColumns>(shared.b, columns.shift);
    }
    tile_barrier();
    find_column(t + 2);
    float s[1][kProducts][4], dp[1][kProducts][4];
    Tile::scores(s, shared.row_a, warp * 16, shared.a);
    store_column(t + 2);
    const uint32_t seen = rows_seen & axial_seen<kProducts>(columns, row_group, packed, lane);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float shift = columns.shift[n * 8 + lane % 4 * 2 + i % 2] + row[i / 2].shift;
        const float p = power_of_two(fmaf(s[0][n][i], plan.scale_log2, shift));
        s[0][n][i] = seen >> (n * 4 + i) & 1 ? p : 0.0f;
      }
    }
    if constexpr (kOfKeys) {
      uint32_t weights[kProducts / 2][1][4];
      if (geometry.mean) {
#pragma unroll
        for (int n = 0; n < kProducts; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[0][n][i] = s[0][n][i] * columns.weight[n * 8 + lane % 4 * 2 + i % 2];
        }
        Tile::round_weights(weights, dp);
      } else {
        Tile::round_weights(weights, s);
      }
      Tile::accumulate(db, weights, shared.b, split * (kChannels / 2));
    }
    Tile::scores(dp, shared.row_b, warp * 16, shared.b);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = n * 8 + lane % 4 * 2 + i % 2;
        const float delta = kOfKeys ? columns.delta[at] : row[i / 2].delta;
        const float weight = kOfKeys ? columns.weight[at] : row[i / 2].weight;
        const float ds = s[0][n][i] * fmaf(weight, dp[0][n][i], -delta);
        dp[0][n][i] = seen >> (n * 4 + i) & 1 ? ds : 0.0f;
      }
    }
    column_barrier();  // b may be overwritten
    load_b(t + 1);
    uint32_t weights[kProducts / 2][1][4];
    Tile::round_weights(weights, dp);
    Tile::accumulate(da, weights, shared.a, split * (kChannels / 2));
    column_barrier();  // a may be overwritten
    load_a(t + 1);
  }
  copy_async_wait<0>();
  tile_barrier();  // rows of no tile are still on their way

  int64_t term[2] = {-1, -1};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const AxialPlace mine = axial_row<kOfKeys>(geometry, plan, program, warp * 16 + lane / 4 + i * 8);
    if (mine.token < 0 || (mine.virtual_row < 0 && !program.of_prefix)) continue;
    const int64_t count = mine.virtual_row >= 0 ? plan.box_count : plan.parts;
    const int64_t inner =
        mine.virtual_row >= 0 ? mine.virtual_row : int64_t{program.part} * geometry.prefix + mine.token;
    term[i] = (program.entry * count * geometry.prefix + inner) * forward.head_dim;
    if (lane % 4 == 0) shared.rows[warp * 16 + lane / 4 + i * 8] = -1;
  }
  const auto store = [&](const float (&sum)[kChannels][4], float factor, void* out, const int64_t (&stride)[3],
                         float* wide) {
    const float factors[2] = {factor, factor};
    float* const rows[2] = {term[0] < 0 ? nullptr : wide + term[0], term[1] < 0 ? nullptr : wide + term[1]};
    store_floats(sum, factors, rows, split * kChannels * 8, forward.head_dim, lane);
    Bits* const to = static_cast<Bits*>(out) + program.batch * stride[0] + program.head * stride[1];
    Tile::store(sum, factors, shared.row_a + warp * 16 * Tile::kRowBytes, shared.rows + warp * 16, to, stride[2],
                split * kChannels * 8, forward.head_dim, plan.aligned);
  };
  if constexpr (kOfKeys) {
    store(da[0], forward.scale, args.dk, args.dk_stride, terms.dk);
    store(db[0], 1.0f, args.dv, args.dv_stride, terms.dv);
  } else {
    store(da[0], forward.scale, args.dq, args.dq_stride, terms.dq);
  }
}

}  // namespace saccade
