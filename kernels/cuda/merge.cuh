// merge: one row out of the tokens that are its members; specification python/saccade/reference/merge.py.
//
//   kPick  the row takes one of its members, in every column (max, replace); else it adds them up (mean, sum)
//
// A thread keeps one vector of a row and walks over the members, four loads in flight. Members are taken in ascending
// order, in chunks of kChunk whose sums are added in order, whoever computes them: a row that is longer than a chunk is
// shared by all slots of its block, and has the same bits as if it were not.
#pragma once
#include "../merge_args.h"
#include "prim/rows.cuh"

namespace saccade {

constexpr int kChunk = 32;
constexpr int kMergeUnroll = 4;

__device__ inline void chunk_barrier() {
#ifndef SACCADE_MUTANT_NO_CHUNK_BARRIER
  __syncthreads();
#endif
}

// max, where NaN wins over everything.
__device__ __forceinline__ float larger(float best, float value) {
  return value > best || value != value ? value : best;
}

// Of some members: the sum or the maximum of their values, and the sum of their weights.
template <int kVector>
struct Gathered {
  float value[kVector];
  float total;
};

template <int kVector, bool kPick>
__device__ __forceinline__ Gathered<kVector> nothing_gathered() {
  Gathered<kVector> nothing;
#pragma unroll
  for (int i = 0; i < kVector; ++i) nothing.value[i] = kPick ? -INFINITY : 0.0f;
  nothing.total = 0.0f;
  return nothing;
}

template <int kVector, bool kPick>
__device__ __forceinline__ void join(Gathered<kVector>& all, const Gathered<kVector>& part) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    all.value[i] = kPick ? larger(all.value[i], part.value[i]) : all.value[i] + part.value[i];
  }
  all.total += part.total;
}

// x and weight of a batch entry, x at the thread's column.
template <typename T>
struct MergeSource {
  const typename T::Bits* x;  // [N, D]
  int64_t stride;             // of a token
  const float* weight;        // [N], or null: 1
  int32_t count;              // elements to read, 0 for none
  bool scales;                // values by their weight
};

// `length` members, kChunk at most.
template <typename T, int kAccess, bool kPick>
__device__ __forceinline__ Gathered<T::kVector> gather_chunk(const MergeSource<T>& from, const int32_t* members,
                                                             int length) {
  Gathered<T::kVector> all = nothing_gathered<T::kVector, kPick>();
  if (from.count == 0 && from.weight == nullptr) {  // nothing to read
    all.total = static_cast<float>(length);
    return all;
  }
#pragma unroll 1
  for (int first = 0; first < length; first += kMergeUnroll) {
    int32_t token[kMergeUnroll];
    Vector raw[kMergeUnroll];  // [kVector]
    float weight[kMergeUnroll];
#pragma unroll
    for (int u = 0; u < kMergeUnroll; ++u) token[u] = first + u < length ? members[first + u] : -1;
#pragma unroll
    for (int u = 0; u < kMergeUnroll; ++u) {
      raw[u] = load<T, kAccess>(from.x + token[u] * from.stride, token[u] >= 0 ? from.count : 0);
      weight[u] = from.weight != nullptr && token[u] >= 0 ? from.weight[token[u]] : 1.0f;
    }
#pragma unroll
    for (int u = 0; u < kMergeUnroll; ++u) {
      if (token[u] < 0) continue;
      float value[T::kVector];
      unpack<T>(raw[u], value);
      const float scale = from.scales ? weight[u] : 1.0f;
#pragma unroll
      for (int i = 0; i < T::kVector; ++i) {
        all.value[i] = kPick ? larger(all.value[i], value[i]) : fmaf(scale, value[i], all.value[i]);
      }
      all.total += weight[u];
    }
  }
  return all;
}

// A 16-bit result does not show the rounding of a reciprocal; one that is no normal number does.
template <typename T>
__device__ __forceinline__ void divide(float (&value)[T::kVector], float total) {
  const float size = fabsf(total);
  if (total == 0.0f || total == 1.0f) return;
  if (T::kVector == 4 || !(size > 0x1p-125f && size < 0x1p125f)) {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) value[i] /= total;
  } else {
    const float reciprocal = 1.0f / total;
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) value[i] *= reciprocal;
  }
}

template <typename T, int kAccess, bool kPick>
__global__ void __launch_bounds__(kRowThreads, kAccess == 1 ? 3 : 4)
    merge_kernel(const __grid_constant__ MergeArgs args, const __grid_constant__ RowPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RowPlace place = row_place<kVector>(plan, args.rows, args.width);
  const int64_t plan_batch = args.plan.shared ? 0 : place.batch;
  const int32_t* ptr = args.plan.ptr + plan_batch * (args.rows + 1);      // [rows + 1]
  const int32_t* members = args.plan.members + plan_batch * args.tokens;  // [N]
  const int32_t* head = args.plan.head + plan_batch * args.rows;          // [rows]
  const bool replaces = kPick && args.mode == Reduce::kReplace;

  MergeSource<T> from;
  from.x = static_cast<const Bits*>(args.x) + place.batch * args.x_stride[0] + place.column;
  from.stride = args.x_stride[1];
  from.weight = args.weight == nullptr ? nullptr : args.weight + place.batch * args.weight_stride;
  from.count = replaces ? 0 : place.count;
  from.scales = args.mode == Reduce::kMean;

  auto write = [&](uint32_t row, Gathered<kVector> all, bool empty) {
    const int64_t at = place.batch * args.rows + row;
    Vector out = {{0u, 0u, 0u, 0u}};
    if (replaces) {
      const int32_t token = head[row];
      out = load<T, kAccess>(from.x + token * from.stride, token >= 0 ? place.count : 0);
    } else if (!empty) {
      if (args.mode == Reduce::kMean) divide<T>(all.value, all.total);
      out = pack<T>(all.value);
    }
    store<T, kAccess>(static_cast<Bits*>(args.y) + at * args.width + place.column, out, place.count);
    if (place.leads) {
      args.total[at] = all.total;
      args.log_total[at] = logf(all.total);
    }
  };

  bool met_long_row = false;
#pragma unroll 1
  for (uint32_t row = place.row; row < place.end; row += plan.slots) {
    const int32_t begin = ptr[row], length = ptr[row + 1] - begin;
    if (length > kChunk) {
      met_long_row = true;
      continue;
    }
    Gathered<kVector> all = gather_chunk<T, kAccess, kPick>(from, members + begin, length);
    write(row, all, length <= 0);
  }
  if (!__syncthreads_or(met_long_row)) return;

  __shared__ Gathered<kVector> parts[kRowThreads];  // [slots, lanes]
  __shared__ Gathered<kVector> sums[kWarp];         // [lanes]
#pragma unroll 1
  for (uint32_t row = place.first; row < place.end; ++row) {
    const uint32_t length = ptr[row + 1] - ptr[row];
    if (length <= kChunk) continue;
    if (place.slot == 0) sums[place.lane] = nothing_gathered<kVector, kPick>();
#pragma unroll 1
    for (uint32_t first = 0; first < length; first += plan.slots * kChunk) {
      const uint32_t mine = first + place.slot * kChunk;
      if (place.slot < plan.slots && mine < length) {
        parts[threadIdx.x] = gather_chunk<T, kAccess, kPick>(from, members + ptr[row] + mine,
                                                             static_cast<int>(min(length - mine, uint32_t{kChunk})));
      }
      chunk_barrier();
      if (place.slot == 0) {
        Gathered<kVector> all = sums[place.lane];
        for (int slot = 0; slot < plan.slots && first + slot * kChunk < length; ++slot) {
          join<kVector, kPick>(all, parts[slot * plan.lanes + place.lane]);
        }
        sums[place.lane] = all;
      }
      __syncthreads();  // the parts have been read
    }
    if (place.slot == 0) write(row, sums[place.lane], false);
  }
}

}  // namespace saccade
