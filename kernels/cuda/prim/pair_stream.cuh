// Products of a tile of rows that stays in shared memory with the rows of a list that passes by, for attention_rows and
// attention_columns.
//
//   resident   kRows rows, all their chunks of 128 bytes
//   streamed   tiles of kColumns rows, a chunk at a time, kStages steps in flight
//   column     what belongs to a streamed row: a value, and where it lies or up to where it sees
//
// Tiles and sums come in one order.
#pragma once
#include <type_traits>

#include "../../attention_args.h"
#include "gram.cuh"
#include "softmax.cuh"

namespace saccade {

constexpr int32_t kNowhere = 0x7fffffff;  // place of what nobody sees

struct PairPlan {
  int32_t tiles, parts;  // of resident rows, and of the list: of a head
  int64_t part_length;   // of the list
  int32_t chunks;
  bool aligned;      // 16-byte accesses are allowed
  float scale_log2;  // scale * log2(e)
};

struct PairColumn {
  float value;
  int32_t at;
};

// Rows of memory: of one sample and head.
template <typename T>
struct PairRows {
  const typename T::Bits* base;
  int64_t stride;
};

__device__ inline void pair_barrier() {
#ifndef SACCADE_MUTANT_NO_PAIR_BARRIER
  __syncthreads();
#endif
}

// Up to which key an entry of `rows` sees; -1: none.
__device__ __forceinline__ int32_t last_seen(const AttentionMapArgs& args, int64_t entry, int32_t& token) {
  token = -1;
  if (entry >= args.row_count) return -1;
  const int64_t row = args.rows == nullptr ? entry : args.rows[entry];
  if (row < 0 || row >= args.in.q_len) return -1;
  token = static_cast<int32_t>(row);
  const int64_t last = args.causal ? row + args.in.k_len - args.in.q_len : args.in.k_len - 1;
  return static_cast<int32_t>(last < -1 ? -1 : last);
}

template <typename TileType, int kInFlight>
struct PairStream {
  using Tile = TileType;
  using T = typename Tile::T;
  static constexpr int kStages = kInFlight,
                       kRing = kStages + 1;  // tiles whose columns are known
  static constexpr int kRowBytes = Tile::kRows * kPanelBytes, kColumnBytes = Tile::kColumns * kPanelBytes;
  unsigned char* resident;  // [chunks] panels
  unsigned char* stages;    // [kStages] panels
  PairColumn* columns;      // [kRing, kColumns]
  int32_t* tokens;          // [kRing, kColumns]
  int32_t* row_tokens;      // [kRows]
  PairColumn* rows;         // [kRows]

  __device__ __forceinline__ PairStream(unsigned char* base, const PairPlan& plan) {
    resident = base;
    stages = base + plan.chunks * kRowBytes;
    columns = reinterpret_cast<PairColumn*>(stages + kStages * kColumnBytes);
    rows = columns + kRing * Tile::kColumns;
    tokens = reinterpret_cast<int32_t*>(rows + Tile::kRows);
    row_tokens = tokens + kRing * Tile::kColumns;
  }
  static size_t bytes(const PairPlan& plan) {
    return plan.chunks * kRowBytes + kStages * kColumnBytes +
           (kRing * Tile::kColumns + Tile::kRows) * (sizeof(PairColumn) + sizeof(int32_t));
  }

  // Rows row_tokens, against places [begin, end) of the list: column_of(place, token) gives what is at a place, and
  // take(tile, columns) gets every tile. Begins and ends with a barrier.
  template <typename ColumnOf, typename Take>
  __device__ __forceinline__ void run(const PairPlan& plan, int channels, const PairRows<T>& held,
                                      const PairRows<T>& list, int64_t begin, int64_t end, ColumnOf column_of,
                                      Take take) const {
    pair_barrier();
    const auto column_at = [&](int64_t place, int32_t& token) {
      token = -1;
      return place < end ? column_of(place, token) : PairColumn{0.0f, -1};
    };
    if (begin < end) {
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        load_panel<T, Tile::kRows>(resident + chunk * kRowBytes, row_tokens, held.base, held.stride,
                                   chunk * kPanelDepth<T>, channels, plan.aligned);
      }
      for (int at = threadIdx.x; at < kStages * Tile::kColumns; at += kGramThreads) {
        columns[at] = column_at(begin + at, tokens[at]);
      }
    }
    pair_barrier();
    const int64_t tile_count = begin < end ? (end - begin + Tile::kColumns - 1) / Tile::kColumns : 0;
    const int64_t steps = tile_count * plan.chunks;
    int64_t load_step = 0;
    int load_chunk = 0, load_slot = 0, load_stage = 0;
    const auto load_next = [&] {
      if (load_step < steps) {
        load_panel<T, Tile::kColumns>(stages + load_stage * kColumnBytes, tokens + load_slot * Tile::kColumns,
                                      list.base, list.stride, load_chunk * kPanelDepth<T>, channels, plan.aligned);
        ++load_step;
        if (++load_stage == kStages) load_stage = 0;
        if (++load_chunk == plan.chunks) {
          load_chunk = 0;
          if (++load_slot == kRing) load_slot = 0;
        }
      }
      copy_async_commit();  // also where there is nothing left, so that the groups can be counted
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load_next();

    Tile tile;
    int stage = 0, slot = 0;
#pragma unroll 1
    for (int64_t t = 0; t < tile_count; ++t) {
      tile.clear();
      PairColumn later = {};
      int32_t later_token = -1;
#pragma unroll 1
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        copy_async_wait<kStages - 2>();
        pair_barrier();  // this step has come, and the last one has been read by all
        load_next();
        if (chunk == 0 && threadIdx.x < Tile::kColumns) {
          later = column_at(begin + (t + kStages) * Tile::kColumns + threadIdx.x, later_token);
        }
        tile.multiply(resident + chunk * kRowBytes, stages + stage * kColumnBytes);
        if (++stage == kStages) stage = 0;
        if (chunk == 0 && threadIdx.x < Tile::kColumns) {  // the columns of the tile before this one are done with
          const int at = (slot == 0 ? kStages : slot - 1) * Tile::kColumns + threadIdx.x;
          columns[at] = later;
          tokens[at] = later_token;
        }
      }
      take(tile, columns + slot * Tile::kColumns);
      if (++slot == kRing) slot = 0;
    }
    copy_async_wait<0>();
    pair_barrier();  // the stages may be written
  }
};

// kRows 128: 4 x 2 warps of 32 x 64; 32: 2 x 4 warps of 16 x 32, for few rows and for many channels.
template <typename T, int kRows>
struct PairKind;
template <typename T>
struct PairKind<T, 128> {
  using Stream = PairStream<MmaTile<T, 4, 2, 2, 8>, 2>;
};
template <typename T>
struct PairKind<T, 32> {
  using Stream = PairStream<MmaTile<T, 2, 4, 1, 4>, 3>;
};
template <>
struct PairKind<Float32, 64> {
  using Stream = PairStream<SimtTile, 2>;
};

// What a block of the grid (parts x tiles x heads x samples) works on.
template <typename T>
struct PairPlace {
  int64_t part, entry, first, batch;  // of the streaming side; head of a sample; first row of the tile; sample
  PairRows<T> q, k;
};

template <typename T, int kRows>
__device__ __forceinline__ PairPlace<T> pair_place(const AttentionInputs& in, const PairPlan& plan) {
  using Bits = typename T::Bits;
  const int64_t item = blockIdx.x / plan.parts, entry = item / plan.tiles;
  const int64_t batch = entry / in.heads, head = entry - batch * in.heads, kv_head = head / (in.heads / in.kv_heads);
  const Bits* q = static_cast<const Bits*>(in.q) + batch * in.q_stride[0] + head * in.q_stride[1];
  const Bits* k = static_cast<const Bits*>(in.k) + batch * in.k_stride[0] + kv_head * in.k_stride[1];
  return {blockIdx.x - item * plan.parts,
          entry,
          (item - entry * plan.tiles) * kRows,
          batch,
          {q, in.q_stride[2]},
          {k, in.k_stride[2]}};
}

// --- host ---

constexpr int64_t kPairDim = 256;   // head_dim
constexpr int64_t kPairTiles = 64;  // about half the multiprocessors of a large GPU
constexpr int64_t kMost128 = 192;   // channels of 128 resident rows that fit
#ifndef SACCADE_PAIR_PART           // the emulation takes few
#define SACCADE_PAIR_PART 1024
#endif

inline int pair_rows(Dtype dtype, int64_t rows, int64_t channels) {
  if (dtype == Dtype::kFloat32) return 64;
  return rows <= 32 || channels > kMost128 ? 32 : 128;
}

// Lengths and channels alone decide, so that a head's result is the same whatever else there is.
inline PairPlan pair_plan(const AttentionMapArgs& args, int64_t rows, int64_t list) {
  const AttentionInputs& in = args.in;
  PairPlan plan = {};
  plan.tiles = static_cast<int32_t>(ceil_div(rows, pair_rows(in.dtype, rows, in.head_dim)));
  const int64_t wanted = ceil_div(kPairTiles, most(plan.tiles, 1));
  plan.parts = static_cast<int32_t>(most(least(wanted, list / SACCADE_PAIR_PART), 1));
  plan.part_length = ceil_div(ceil_div(list, plan.parts), 128) * 128;
  plan.chunks = static_cast<int32_t>(most(ceil_div(in.head_dim, in.dtype == Dtype::kFloat32 ? 32 : 64), 1));
  Alignment alignment(in.dtype);
  alignment.tensor(in.q, in.q_stride, in.batch, in.heads, in.q_len);
  alignment.tensor(in.k, in.k_stride, in.batch, in.kv_heads, in.k_len);
  plan.aligned = alignment.bits % 16 == 0;
  plan.scale_log2 = in.scale * kLog2E;
  return plan;
}

// start(PairKind) for the dtype and the rows of a tile.
template <typename Start>
const char* with_pair_kind(const AttentionMapArgs& args, int64_t rows, const char* refusal, Start start) {
  const Dtype dtype = args.in.dtype;
  const bool few = pair_rows(dtype, rows, args.in.head_dim) == 32;
  if (dtype == Dtype::kFloat32) return start(Same<Float32>{}, std::integral_constant<int, 64>{});
  if (dtype == Dtype::kFloat16) {
    return few ? start(Same<Float16>{}, std::integral_constant<int, 32>{})
               : start(Same<Float16>{}, std::integral_constant<int, 128>{});
  }
  if (dtype != Dtype::kBFloat16) return refusal;
  return few ? start(Same<BFloat16>{}, std::integral_constant<int, 32>{})
             : start(Same<BFloat16>{}, std::integral_constant<int, 128>{});
}

}  // namespace saccade
