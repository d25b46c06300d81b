// match: the best destination of every source; specification python/saccade/reference/match.py.
//
//   tile      kRows sources of one sample x kColumns places of the destination list
//   chunk     128 bytes of channels; a step is one chunk of one tile, kStages steps are in flight
//   segment   places that a block visits: all, or one range index of its sources, from the lowest `from` to the highest
//             `to` of any of them; each source looks at its own range only
//
// A block keeps its sources (in shared memory where they fit) and goes over the destinations. Every thread keeps the
// best score and its place for each of its rows. Places come in ascending order, so that of equals the first stays;
// threads that share a row are compared at the end, by score and then by place: no order of arrival counts.
// Per pair the score is dot * mul + add, with mul and add of the destination. add is NaN for whatever cannot be
// chosen: no comparison with NaN is true. grid: (tiles of sources x samples).
#pragma once
#include "../merge_args.h"
#include "prim/gram.cuh"
#include "prim/squares.cuh"

namespace saccade {

constexpr int kResidentBytes = 48 * 1024;  // sources that stay in shared memory: 192 channels of 128 rows of 16 bits

struct MatchPlan {
  int64_t row_tiles;  // of a sample
  int32_t chunks;
  bool resident;  // all chunks of the sources stay in shared memory
  bool aligned;   // 16-byte accesses are allowed
};

struct Column {
  float mul, add;
};

__device__ inline void match_barrier() {
#ifndef SACCADE_MUTANT_NO_TILE_BARRIER
  __syncthreads();
#endif
}

template <class Tile, int kStages>
struct MatchShared {
  static constexpr int kRing = kStages + 1;  // tiles whose columns are known: one is in use, kStages are on their way
  static constexpr int kRowBytes = Tile::kRows * kPanelBytes, kColumnBytes = Tile::kColumns * kPanelBytes;
  unsigned char* sources;  // [chunks] panels, where resident
  unsigned char* stages;   // [kStages] panels of destinations, followed by one of sources where these are not resident
  int stage_bytes;
  Column* columns;        // [kRing, kColumns]
  int32_t* tokens;        // [kRing, kColumns]
  int32_t* row_tokens;    // [kRows]
  int32_t* range_from;    // [kRows]
  int32_t* range_length;  // [kRows]
  int32_t* bounds;        // lowest from and highest to of the rows

  __device__ __forceinline__ MatchShared(unsigned char* base, const MatchPlan& plan) {
    sources = base;
    stages = base + (plan.resident ? plan.chunks * kRowBytes : 0);
    stage_bytes = kColumnBytes + (plan.resident ? 0 : kRowBytes);
    columns = reinterpret_cast<Column*>(stages + kStages * stage_bytes);
    tokens = reinterpret_cast<int32_t*>(columns + kRing * Tile::kColumns);
    row_tokens = tokens + kRing * Tile::kColumns;
    range_from = row_tokens + Tile::kRows;
    range_length = range_from + Tile::kRows;
    bounds = range_length + Tile::kRows;
  }

  static size_t bytes(const MatchPlan& plan) {
    const int panels = plan.resident ? plan.chunks * kRowBytes : kStages * kRowBytes;
    return panels + kStages * kColumnBytes + kRing * Tile::kColumns * (sizeof(Column) + sizeof(int32_t)) +
           (3 * Tile::kRows + 2) * sizeof(int32_t);
  }
};

// What a block knows of its sample.
struct MatchSample {
  const int32_t *src, *dst, *ranges;
  const uint8_t* protect;
  const float* squares;
  int64_t tokens;  // before it, in best and target

  __device__ __forceinline__ MatchSample(const MatchArgs& args, int64_t batch)
      : src(args.src + batch * args.src_stride),
        dst(args.dst + batch * args.dst_stride),
        ranges(args.ranges + batch * args.ranges_stride),
        protect(args.protect == nullptr ? nullptr : args.protect + batch * args.protect_stride),
        squares(static_cast<const float*>(args.workspace) + batch * args.tokens),
        tokens(batch * args.tokens) {}

  __device__ __forceinline__ bool usable(int token, float square) const {
    return is_finite(square) && (protect == nullptr || protect[token] == 0);
  }
};

__device__ __forceinline__ float inverse_norm(float square) { return square > 0.0f ? __frsqrt_rn(square) : 0.0f; }

// The destination at a place of the list; the token is -1 where it cannot be chosen and its row need not be read.
struct Destination {
  int32_t token = -1;
  float square = 0.0f;
};

__device__ __forceinline__ Destination match_destination(const MatchArgs& args, const MatchSample& sample,
                                                         uint32_t place) {
  Destination found;
  if (place >= static_cast<uint32_t>(args.destinations)) return found;
  const int32_t token = sample.dst[place];
  found.square = sample.squares[token];
  if (sample.usable(token, found.square)) found.token = token;
  return found;
}

__device__ __forceinline__ Column match_column(Score score, Destination found) {
  if (found.token < 0) return {0.0f, __uint_as_float(0x7fc00000u)};
  if (score == Score::kCosine) return {inverse_norm(found.square), 0.0f};
  return score == Score::kDot ? Column{1.0f, 0.0f} : Column{2.0f, -found.square};
}

// The best of what a thread has seen, for each of its rows.
template <class Tile>
struct Running {
  float best[Tile::kMyRows];
  uint32_t place[Tile::kMyRows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kMyRows; ++i) best[i] = __uint_as_float(0xff800000u), place[i] = 0xffffffffu;
  }

  // `first` is the place of the tile's column 0; from and length [kRows]: the ranges of the rows.
  template <bool kRanges>
  __device__ __forceinline__ void take(const Tile& tile, const Column* columns, uint32_t first, const int32_t* from,
                                       const int32_t* length) {
    const uint32_t mine = first + Tile::column();
    int winner[Tile::kMyRows];
    uint32_t before[Tile::kMyRows], allowed[Tile::kMyRows];
#pragma unroll
    for (int i = 0; i < Tile::kMyRows; ++i) {
      winner[i] = -1;
      before[i] = kRanges ? from[Tile::row(i)] : 0;
      allowed[i] = kRanges ? length[Tile::row(i)] : 0;
    }
#pragma unroll
    for (int j = 0; j < Tile::kMyColumns; ++j) {
      const Column column = columns[Tile::column() + Tile::offset(j)];
#pragma unroll
      for (int i = 0; i < Tile::kMyRows; ++i) {
        const float score = fmaf(tile.value(i, j), column.mul, column.add);
        bool better = score > best[i];
        if constexpr (kRanges) better = better && mine + Tile::offset(j) - before[i] < allowed[i];
        if (better) best[i] = score, winner[i] = Tile::offset(j);
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kMyRows; ++i) {
      if (winner[i] >= 0) place[i] = mine + winner[i];
    }
  }
};

// Range `index` of the block's sources: of each row, and from the lowest `from` to the highest `to`. Ends with a
// barrier.
template <class Tile, int kStages>
__device__ __forceinline__ void match_ranges(const MatchArgs& args, const MatchSample& sample, int64_t first_row,
                                             int index, const MatchShared<Tile, kStages>& shared) {
  match_barrier();  // the rows of the last range are still being read
  if (threadIdx.x == 0) shared.bounds[0] = 0x7fffffff, shared.bounds[1] = 0;
  match_barrier();
  if (threadIdx.x < Tile::kRows) {
    const int64_t row = first_row + threadIdx.x;
    int from = 0, to = 0;
    if (row < args.sources) {
      const int32_t* range = sample.ranges + (row * args.range_count + index) * 2;
      from = max(range[0], 0);
      to = static_cast<int>(min(static_cast<int64_t>(range[1]), args.destinations));
    }
    shared.range_from[threadIdx.x] = from;
    shared.range_length[threadIdx.x] = max(to - from, 0);
    if (to > from) {
      atomicMin(&shared.bounds[0], from);
      atomicMax(&shared.bounds[1], to);
    }
  }
  match_barrier();
}

template <class Tile, int kStages, bool kRanges>
__device__ __forceinline__ void match_block(const MatchArgs& args, const MatchPlan& plan, unsigned char* base) {
  using T = typename Tile::T;
  using Shared = MatchShared<Tile, kStages>;
  const Shared shared(base, plan);
  const int64_t batch = blockIdx.x / plan.row_tiles, first_row = (blockIdx.x - batch * plan.row_tiles) * Tile::kRows;
  const MatchSample sample(args, batch);
  const typename T::Bits* metric = static_cast<const typename T::Bits*>(args.metric) + batch * args.metric_stride[0];
  const bool is_row = threadIdx.x < Tile::kRows && first_row + threadIdx.x < args.sources;

  // A source of norm 0 has the cosine 0 with everything, even where the products do not vanish as its norm does.
  if (threadIdx.x < Tile::kRows) {
    int32_t token = -1;
    if (is_row) {
      token = sample.src[first_row + threadIdx.x];
      const float square = sample.squares[token];
      if (!is_finite(square) || (args.score == Score::kCosine && square == 0.0f)) token = -1;
    }
    shared.row_tokens[threadIdx.x] = token;
  }
  match_barrier();
  if (plan.resident) {
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      load_panel<T, Tile::kRows>(shared.sources + chunk * Shared::kRowBytes, shared.row_tokens, metric,
                                 args.metric_stride[1], chunk * kPanelDepth<T>, args.channels, plan.aligned);
    }
  }

  Running<Tile> running;
  running.clear();
  const int segments = kRanges ? args.range_count : 1;
#pragma unroll 1
  for (int segment = 0; segment < segments; ++segment) {
    uint32_t begin = 0, end = static_cast<uint32_t>(args.destinations);
    if constexpr (kRanges) {
      match_ranges(args, sample, first_row, segment, shared);
      begin = shared.bounds[0], end = shared.bounds[1];
      if (begin >= end) continue;
    }
    for (int at = threadIdx.x; at < kStages * Tile::kColumns; at += kGramThreads) {
      const Destination found = match_destination(args, sample, begin + at);
      shared.columns[at] = match_column(args.score, found);
      shared.tokens[at] = found.token;
    }
    match_barrier();

    const uint32_t tiles = (end - begin + Tile::kColumns - 1) / Tile::kColumns, steps = tiles * plan.chunks;
    int load_chunk = 0, load_slot = 0, load_stage = 0;  // of the step that is brought in next
    uint32_t load_step = 0;
    const auto load_next = [&] {
      if (load_step < steps) {
        unsigned char* stage = shared.stages + load_stage * shared.stage_bytes;
        const int channel = load_chunk * kPanelDepth<T>;
        load_panel<T, Tile::kColumns>(stage, shared.tokens + load_slot * Tile::kColumns, metric, args.metric_stride[1],
                                      channel, args.channels, plan.aligned);
        if (!plan.resident) {
          load_panel<T, Tile::kRows>(stage + Shared::kColumnBytes, shared.row_tokens, metric, args.metric_stride[1],
                                     channel, args.channels, plan.aligned);
        }
        ++load_step;
        if (++load_stage == kStages) load_stage = 0;
        if (++load_chunk == plan.chunks) {
          load_chunk = 0;
          if (++load_slot == Shared::kRing) load_slot = 0;
        }
      }
      copy_async_commit();  // also where there is nothing left, so that the groups can be counted
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load_next();

    Tile tile;
    int stage = 0, slot = 0;
#pragma unroll 1
    for (uint32_t t = 0; t < tiles; ++t) {
      const uint32_t first = begin + t * Tile::kColumns;
      tile.clear();
      Destination later;
#pragma unroll 1
      for (int chunk = 0; chunk < plan.chunks; ++chunk) {
        copy_async_wait<kStages - 2>();
        match_barrier();  // this step has come, and the last one has been read by all
        load_next();
        if (chunk == 0 && threadIdx.x < Tile::kColumns && t + kStages < tiles) {
          later = match_destination(args, sample, first + kStages * Tile::kColumns + threadIdx.x);
        }
        const unsigned char* b = shared.stages + stage * shared.stage_bytes;
        tile.multiply(plan.resident ? shared.sources + chunk * Shared::kRowBytes : b + Shared::kColumnBytes, b);
        if (++stage == kStages) stage = 0;
        if (chunk == 0 && threadIdx.x < Tile::kColumns) {  // the columns of the tile before this one are done with
          const int at = (slot == 0 ? kStages : slot - 1) * Tile::kColumns + threadIdx.x;
          shared.columns[at] = match_column(args.score, later);
          shared.tokens[at] = later.token;
        }
      }
      running.template take<kRanges>(tile, shared.columns + slot * Tile::kColumns, first, shared.range_from,
                                     shared.range_length);
      if (++slot == Shared::kRing) slot = 0;
    }
    match_barrier();  // the columns and stages are written anew
  }
  copy_async_commit();  // of the sources, where there was no segment
  copy_async_wait<0>();

  float* bests = reinterpret_cast<float*>(shared.stages);                              // [kRows, kSlots]
  uint32_t* places = reinterpret_cast<uint32_t*>(bests + Tile::kRows * Tile::kSlots);  // [kRows, kSlots]
#pragma unroll
  for (int i = 0; i < Tile::kMyRows; ++i) {
    const int at = Tile::row(i) * Tile::kSlots + Tile::slot();
    bests[at] = running.best[i];
    places[at] = running.place[i];
  }
  match_barrier();
  if (!is_row) return;
  float best = __uint_as_float(0xff800000u);
  uint32_t place = 0xffffffffu;
#pragma unroll 1
  for (int s = 0; s < Tile::kSlots; ++s) {
    const int at = threadIdx.x * Tile::kSlots + s;
    if (bests[at] > best || (bests[at] == best && places[at] < place)) best = bests[at], place = places[at];
  }
  const int32_t token = sample.src[first_row + threadIdx.x];
  const float square = sample.squares[token];
  if (place == 0xffffffffu || !sample.usable(token, square)) return;  // squares_kernel has written what there is to say
  if (args.score == Score::kCosine) best *= inverse_norm(square);
  if (args.score == Score::kL2) best = min(best - square, 0.0f);
  args.best[sample.tokens + token] = best;
  args.target[sample.tokens + token] = sample.dst[place];
}

// kRows 128: 4 x 2 warps of 32 x 64, two steps in flight. kRows 32: 2 x 4 warps of 16 x 32 and four steps, where there
// are too few sources to give every multiprocessor 128 of them.
template <typename T, int kRows>
struct MatchTile;
template <typename T>
struct MatchTile<T, 128> {
  using Tile = MmaTile<T, 4, 2, 2, 8>;
  static constexpr int kStages = 2;
};
template <typename T>
struct MatchTile<T, 32> {
  using Tile = MmaTile<T, 2, 4, 1, 4>;
  static constexpr int kStages = 4;
};
template <>
struct MatchTile<Float32, 64> {
  using Tile = SimtTile;
  static constexpr int kStages = 2;
};

template <typename T, int kRows, bool kRanges>
__global__ void __launch_bounds__(kGramThreads, 2)
    match_kernel(const __grid_constant__ MatchArgs args, const __grid_constant__ MatchPlan plan) {
  using Chosen = MatchTile<T, kRows>;
  SACCADE_SHARED(shared);
  match_block<typename Chosen::Tile, Chosen::kStages, kRanges>(args, plan, shared);
}

}  // namespace saccade
