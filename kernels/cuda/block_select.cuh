// block_select: the key blocks of each query block; specification python/saccade/reference/block_select.py.
//
// A block of threads takes kRows query blocks, one for each warp or, where there are many key blocks, 1. It keeps a key
// for every score, whose order is that of the scores, in shared memory: nothing of the score map goes to memory. Then a
// team of warps, or one, works on a row:
//
//   cut     the key of the last candidate that is taken, found bit by bit, from counts of candidates or sums of their
//           weights, and how many of that key are taken: the first ones
//   lists   chosen blocks in order, by ballots
//
// Sums have one order, whatever is summed, so a sum over more candidates is never smaller. grid: (rows / kRows) x heads
// x samples.
#pragma once
#include "../block_args.h"
#include "prim/select.cuh"
#include "prim/softmax.cuh"
#include "prim/vec.cuh"

namespace saccade {

#ifndef SACCADE_CHOOSE_THREADS  // the emulation takes few: every thread costs it dearly
#define SACCADE_CHOOSE_THREADS 256
#endif
constexpr int kChooseThreads = SACCADE_CHOOSE_THREADS, kChooseWarps = kChooseThreads / kWarp;
constexpr int kChooseDepth = 16;    // channels of keys in shared memory at a time
constexpr int kChooseDim = 512;     // channels of a query
constexpr int kChooseKeys = 16384;  // scores in shared memory

struct BlockSelectPlan {
  int32_t row_tiles;  // of a head
  bool aligned;       // 16-byte accesses to k are allowed
};

__device__ inline void choose_barrier() {
#ifndef SACCADE_MUTANT_NO_CHOOSE_BARRIER
  __syncthreads();
#endif
}

// Candidates above `key` are taken, and the first `left` of those equal to it.
struct RowCut {
  uint32_t key, left;
  __device__ __forceinline__ bool smaller_than(const RowCut& other) const {
    return key > other.key || (key == other.key && left < other.left);
  }
};

__device__ __forceinline__ float score_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The warps that work on a row, and its keys.
template <int kTeam>
struct RowTeam {
  const uint32_t* keys;  // [items]; 0: no candidate
  int items;
  float* exchange;  // [2, kTeam]
  float best;       // score
  float need;       // of the weights
  int turn = 0;

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp % kTeam; }

  // A value of each warp, to all of them, in order.
  template <typename V, typename Join>
  __device__ __forceinline__ V joined(V value, Join join) {
    if constexpr (kTeam == 1) {
      return value;
    } else {
      static_assert(sizeof(V) == 4);
      V* place = reinterpret_cast<V*>(exchange + turn * kTeam);
      turn ^= 1;
      if (threadIdx.x % kWarp == 0) place[warp()] = value;
      choose_barrier();
      V all = place[0];
      for (int w = 1; w < kTeam; ++w) all = join(all, place[w]);
      return all;
    }
  }
  template <typename V, typename Of, typename Join>
  __device__ __forceinline__ V over_items(V value, Of of, Join join) {
    for (int i = warp() * kWarp + static_cast<int>(threadIdx.x) % kWarp; i < items; i += kTeam * kWarp) {
      value = join(value, of(keys[i]));
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      value = join(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return joined(value, join);
  }
  template <typename Where>
  __device__ __forceinline__ uint32_t count(Where where) {
    return over_items(
        0u, [&](uint32_t key) { return where(key) ? 1u : 0u; }, [](uint32_t a, uint32_t b) { return a + b; });
  }
  __device__ __forceinline__ float weight(uint32_t key) const {
    const float score = score_of_key(key);
    return score == best ? 1.0f : power_of_two((score - best) * kLog2E);
  }
  __device__ __forceinline__ float mass(uint32_t least) {
    return over_items(
        0.0f, [&](uint32_t key) { return key >= least ? weight(key) : 0.0f; }, [](float a, float b) { return a + b; });
  }

  // The largest key at which `enough` of all keys from it on; low and high are the extremes of the candidates.
  template <typename Enough>
  __device__ __forceinline__ uint32_t search(uint32_t low, uint32_t high, Enough enough) {
    int bit = -1;
    while (bit < 31 && (low ^ high) >> (bit + 1) != 0) ++bit;  // the highest in which keys differ
    uint32_t found = bit == 31 ? 0u : high >> (bit + 1) << (bit + 1);
#pragma unroll 1
    for (; bit >= 0; --bit) {
      if (enough(found | 1u << bit)) found |= 1u << bit;
    }
    return found;
  }

  __device__ __forceinline__ RowCut cut(Choose mode, uint32_t keep, float p) {
    const auto above = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    const uint32_t high = over_items(0u, [](uint32_t key) { return key; }, above);
    const uint32_t low = ~over_items(0u, [](uint32_t key) { return key == 0 ? 0u : ~key; }, above);
    const uint32_t candidates = count([](uint32_t key) { return key != 0; });
    RowCut taken = {0xffffffffu, 0};
    best = score_of_key(high);
    need = not_a_number();
    if (candidates == 0) return taken;
    if (keep >= candidates || (mode == Choose::kShare && p >= 1.0f)) return {0, 0};
    if (keep > 0) {
      taken.key =
          search(low, high, [&](uint32_t least) { return count([&](uint32_t key) { return key >= least; }) >= keep; });
      taken.left = keep - count([&](uint32_t key) { return key > taken.key; });
    }
    if (mode == Choose::kTop) return taken;
    need = p * mass(1);
    if (mode == Choose::kThreshold || !(need > 0.0f)) return taken;
    RowCut share;
    share.key = search(low, high, [&](uint32_t least) { return mass(least) >= need; });
    const float rest = need - mass(share.key + 1);
    const uint32_t equal = count([&](uint32_t key) { return key == share.key; });
    share.left = static_cast<uint32_t>(min(max(ceilf(rest / weight(share.key)), 1.0f), static_cast<float>(equal)));
    return taken.smaller_than(share) ? share : taken;
  }
};

// Where a warp is in its row, and what it has met: of the key of the cut, in the full list, in the partial one.
struct RowPlaces {
  uint32_t equal = 0, full = 0, partial = 0;
};

// Visits the 32 items from `first` on: visit(item, class of the chosen, place in its list).
template <int kTeam, typename Visit>
__device__ __forceinline__ void choose_items(const RowTeam<kTeam>& team, const RowCut& cut, bool threshold,
                                             const uint8_t* classes, int first, int end, RowPlaces& at, Visit visit) {
  const int item = first + static_cast<int>(threadIdx.x) % kWarp;
  const uint32_t key = item < end ? team.keys[item] : 0;
  const int kind = item >= end ? 0 : classes == nullptr ? 1 : classes[item];
  const unsigned equal = __ballot_sync(kFullWarp, key != 0 && key == cut.key);
  bool taken = key > cut.key || (key == cut.key && at.equal + __popc(equal & lanes_below()) < cut.left);
  if (threshold && key != 0) taken = taken || team.weight(key) >= team.need;
  taken = (taken && key != 0) || kind >= 3;
  const bool is_full = taken && kind % 2 == 1;
  const unsigned full = __ballot_sync(kFullWarp, is_full), partial = __ballot_sync(kFullWarp, taken && !is_full);
  if (taken)
    visit(item, is_full,
          is_full ? at.full + __popc(full & lanes_below()) : at.partial + __popc(partial & lanes_below()));
  at.equal += __popc(equal);
  at.full += __popc(full);
  at.partial += __popc(partial);
}

template <int kTeam>
__device__ __forceinline__ void write_lists(const BlockSelectArgs& args, RowTeam<kTeam>& team, const RowCut& cut,
                                            const uint8_t* classes, int64_t row) {
  const bool threshold = args.mode == Choose::kThreshold;
  const int length = (args.k_blocks + kTeam * kWarp - 1) / (kTeam * kWarp) * kWarp;
  const int begin = team.warp() * length, end = min(args.k_blocks, begin + length);
  RowPlaces at, all;
  if constexpr (kTeam > 1) {                                                 // what the warps before this one meet
    uint32_t* met = reinterpret_cast<uint32_t*>(team.exchange) + 2 * kTeam;  // [3, kTeam]
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = team.warp();
    uint32_t equal = 0;
    for (int i = begin + lane; i < end; i += kWarp) equal += team.keys[i] != 0 && team.keys[i] == cut.key;
    equal = warp_scan(equal);
    if (lane == kWarp - 1) met[warp] = equal;
    choose_barrier();
    for (int w = 0; w < warp; ++w) at.equal += met[w];
    RowPlaces mine = at;
    for (int first = begin; first < end; first += kWarp) {
      choose_items(team, cut, threshold, classes, first, end, mine, [](int, bool, uint32_t) {});
    }
    if (lane == 0) met[kTeam + warp] = mine.full, met[2 * kTeam + warp] = mine.partial;
    choose_barrier();
    for (int w = 0; w < kTeam; ++w) {
      if (w < warp) at.full += met[kTeam + w], at.partial += met[2 * kTeam + w];
      all.full += met[kTeam + w], all.partial += met[2 * kTeam + w];
    }
  }
  int32_t* indices = args.indices + row * args.width;
  int32_t* p_indices = args.p_indices == nullptr ? nullptr : args.p_indices + row * args.width;
#pragma unroll 1
  for (int first = begin; first < end; first += kWarp) {
    choose_items(team, cut, threshold, classes, first, end, at,
                 [&](int item, bool is_full, uint32_t place) { (is_full ? indices : p_indices)[place] = item; });
  }
  if constexpr (kTeam == 1) all = at;
  const int me = team.warp() * kWarp + static_cast<int>(threadIdx.x) % kWarp;
  for (int i = static_cast<int>(all.full) + me; i < args.width; i += kTeam * kWarp) indices[i] = 0;
  if (me == 0) args.counts[row] = static_cast<int32_t>(all.full);
  if (p_indices == nullptr) return;
  for (int i = static_cast<int>(all.partial) + me; i < args.width; i += kTeam * kWarp) p_indices[i] = 0;
  if (me == 0) args.p_counts[row] = static_cast<int32_t>(all.partial);
}

// Part p of row r of the panel of keys, [kChooseThreads, 4 parts of 16 bytes]: 8 neighbouring rows without conflicts.
__device__ __forceinline__ int choose_place(int row, int part) { return row * 64 + (part ^ (row / 2 & 3)) * 16; }

template <int kRows>
constexpr int choose_shared_bytes(int k_blocks, int depth) {
  return kChooseThreads * 64 + kRows * (k_blocks + depth) * 4 + 5 * kChooseWarps * 4;
}

template <int kRows>
__global__ void __launch_bounds__(kChooseThreads)
    block_select_kernel(const __grid_constant__ BlockSelectArgs args, const __grid_constant__ BlockSelectPlan plan) {
  SACCADE_SHARED(panel);
  constexpr int kTeam = kChooseWarps / kRows;
  const int depth = (args.head_dim + kChooseDepth - 1) / kChooseDepth * kChooseDepth;
  float* queries = reinterpret_cast<float*>(panel + kChooseThreads * 64);    // [kRows, depth]
  uint32_t* keys = reinterpret_cast<uint32_t*>(queries + kRows * depth);     // [kRows, k_blocks]
  float* exchange = reinterpret_cast<float*>(keys + kRows * args.k_blocks);  // [5, kTeam], kRows times
  const int64_t entry = blockIdx.x / plan.row_tiles, batch = entry / args.heads;
  const int32_t head = static_cast<int32_t>(entry - batch * args.heads);
  const int32_t first_row = static_cast<int32_t>(blockIdx.x - entry * plan.row_tiles) * kRows;
  const int64_t kv_entry = batch * args.kv_heads + head / (args.heads / args.kv_heads);
  const float* k = args.k + kv_entry * args.k_blocks * args.head_dim;
  const uint8_t* classes = args.classes;
  if (classes != nullptr) classes += batch * args.class_stride[0] + head * args.class_stride[1];

  for (int i = threadIdx.x; i < kRows * depth; i += kChooseThreads) {
    const int row = i / depth, channel = i - row * depth;
    const bool exists = first_row + row < args.q_blocks && channel < args.head_dim;
    queries[i] = exists ? args.q[(entry * args.q_blocks + first_row + row) * args.head_dim + channel] : 0.0f;
  }

  // Scores: a thread has one key at a time. The next channels travel while these are multiplied.
  const int chunks = depth / kChooseDepth, tiles = (args.k_blocks + kChooseThreads - 1) / kChooseThreads;
  Vector next[4];
  const auto fetch = [&](int step) {
    const int tile = step / chunks, channel = (step - tile * chunks) * kChooseDepth + threadIdx.x % 4 * 4;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int key = tile * kChooseThreads + static_cast<int>(threadIdx.x) / 4 + n * (kChooseThreads / 4);
      const int count = key < args.k_blocks ? min(4, args.head_dim - channel) : 0;
      const uint32_t* from = reinterpret_cast<const uint32_t*>(k);
      if (count > 0) from += static_cast<int64_t>(key) * args.head_dim + channel;
      next[n] = plan.aligned ? load<Float32, 4>(from, count) : load<Float32, 1>(from, count);
    }
  };
  float sum[kRows];
  if (tiles > 0) fetch(0);
#pragma unroll 1
  for (int step = 0; step < tiles * chunks; ++step) {
    const int tile = step / chunks, chunk = step - tile * chunks;
    if (chunk == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = 0.0f;
    }
    choose_barrier();  // the channels before have been read
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int row = static_cast<int>(threadIdx.x) / 4 + n * (kChooseThreads / 4);
      *reinterpret_cast<Vector*>(panel + choose_place(row, threadIdx.x % 4)) = next[n];
    }
    choose_barrier();
    if (step + 1 < tiles * chunks) fetch(step + 1);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const Vector b = *reinterpret_cast<const Vector*>(panel + choose_place(threadIdx.x, part));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Vector a = *reinterpret_cast<const Vector*>(queries + r * depth + chunk * kChooseDepth + part * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[r] = fmaf(__uint_as_float(a.word[i]), __uint_as_float(b.word[i]), sum[r]);
        }
      }
    }
    const int key = tile * kChooseThreads + static_cast<int>(threadIdx.x);
    if (chunk + 1 < chunks || key >= args.k_blocks) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first_row + r;
      int kind = 1;
      if (classes != nullptr) kind = row < args.q_blocks ? classes[row * args.k_blocks + key] : 0;
      const float score = sum[r] * args.scale;
      const bool candidate = kind == 1 || kind == 2;
      keys[r * args.k_blocks + key] = candidate ? select_key(score == score ? score : negative_infinity()) : 0u;
    }
  }
  choose_barrier();

  const int r = static_cast<int>(threadIdx.x) / kWarp / kTeam;
  const int64_t row = first_row + r;
  if (row >= args.q_blocks) return;  // whole teams
  RowTeam<kTeam> team = {keys + r * args.k_blocks, args.k_blocks, exchange + r * 5 * kTeam, 0.0f, 0.0f};
  const RowCut cut = team.cut(args.mode, static_cast<uint32_t>(args.keep), args.p);
  write_lists(args, team, cut, classes == nullptr ? nullptr : classes + row * args.k_blocks,
              entry * args.q_blocks + row);
}

}  // namespace saccade
