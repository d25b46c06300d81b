// Gradient of merge: dx of every token out of dy of the row it was merged into. Specification reference/merge.py.
//
//   mean, sum, replace   a token reads its row's dy: a gather, kGradUnroll tokens of a thread in flight
//   max                  a row looks, column by column, for the first member that attains its maximum, then writes dx
//                        of all its members; tokens of no row are written by whoever holds their number
#pragma once
#include "../merge_args.h"
#include "prim/rows.cuh"

namespace saccade {

constexpr int kGradUnroll = 2;
constexpr int kMaxUnroll = 4;

template <typename T, int kAccess>
__global__ void __launch_bounds__(kRowThreads)
    merge_bwd_kernel(const __grid_constant__ MergeGradArgs args, const __grid_constant__ RowPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RowPlace place = row_place<kVector>(plan, args.tokens, args.width);
  const int64_t plan_batch = args.plan.shared ? 0 : place.batch;
  const int32_t* inverse = args.plan.inverse + plan_batch * args.tokens;  // [N]
  const int32_t* head = args.plan.head + plan_batch * args.rows;          // [M]
  const Bits* dy = static_cast<const Bits*>(args.dy) + place.batch * args.dy_stride[0] + place.column;
  Bits* dx = static_cast<Bits*>(args.dx) + place.batch * args.tokens * args.width + place.column;

#pragma unroll 1
  for (uint32_t first = place.row; first < place.end; first += plan.slots * kGradUnroll) {
    int32_t row[kGradUnroll];
    float scale[kGradUnroll];
    Vector raw[kGradUnroll];  // [kVector]
#pragma unroll
    for (int u = 0; u < kGradUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      row[u] = token < place.end ? inverse[token] : -1;
      scale[u] = 1.0f;
    }
#pragma unroll
    for (int u = 0; u < kGradUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      if (args.mode == Reduce::kReplace && row[u] >= 0 && head[row[u]] != static_cast<int32_t>(token)) row[u] = -1;
      raw[u] = load<T, kAccess>(dy + row[u] * args.dy_stride[1], row[u] >= 0 ? place.count : 0);
      if (args.mode == Reduce::kMean && row[u] >= 0) {
        const float weight = args.weight == nullptr ? 1.0f : args.weight[place.batch * args.weight_stride + token];
        const float total = args.total[place.batch * args.rows + row[u]];
        scale[u] = weight / (total == 0.0f ? 1.0f : total);
      }
    }
#pragma unroll
    for (int u = 0; u < kGradUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      if (token >= place.end) continue;
      if (row[u] >= 0 && args.mode == Reduce::kMean) {
        float value[kVector];
        unpack<T>(raw[u], value);
#pragma unroll
        for (int i = 0; i < kVector; ++i) value[i] *= scale[u];
        raw[u] = pack<T>(value);
      }
      store<T, kAccess>(dx + token * args.width, raw[u], place.count);
    }
  }
}

// The elements of `v` in the columns whose winner is `token`, 0 in the others.
template <typename T>
__device__ __forceinline__ Vector keep_won(const Vector& v, const int32_t (&winner)[T::kVector], int32_t token) {
  Vector kept;
  constexpr int kPerWord = T::kVector / 4;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      const uint32_t element = kPerWord == 1 ? 0xffffffffu : 0xffffu << (i * 16);
      if (winner[w * kPerWord + i] == token) mask |= element;
    }
    kept.word[w] = v.word[w] & mask;
  }
  return kept;
}

// One place for every row, and one for every token beyond the rows.
template <typename T, int kAccess>
__global__ void __launch_bounds__(kRowThreads)
    merge_max_bwd_kernel(const __grid_constant__ MergeGradArgs args, const __grid_constant__ RowPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const int64_t places = args.rows > args.tokens ? args.rows : args.tokens;
  const RowPlace place = row_place<kVector>(plan, places, args.width);
  const int64_t plan_batch = args.plan.shared ? 0 : place.batch;
  const int32_t* ptr = args.plan.ptr + plan_batch * (args.rows + 1);          // [M + 1]
  const int32_t* all_members = args.plan.members + plan_batch * args.tokens;  // [N]
  const int32_t* inverse = args.plan.inverse + plan_batch * args.tokens;      // [N]
  const Bits* x = static_cast<const Bits*>(args.x) + place.batch * args.x_stride[0] + place.column;
  const Bits* dy = static_cast<const Bits*>(args.dy) + place.batch * args.dy_stride[0] + place.column;
  Bits* dx = static_cast<Bits*>(args.dx) + place.batch * args.tokens * args.width + place.column;

#pragma unroll 1
  for (uint32_t row = place.row; row < place.end; row += plan.slots) {
    if (row < args.tokens && inverse[row] < 0) {  // as a token
      store<T, kAccess>(dx + row * args.width, {{0u, 0u, 0u, 0u}}, place.count);
    }
    if (row >= args.rows) continue;
    const int32_t* members = all_members + ptr[row];
    const uint32_t length = ptr[row + 1] - ptr[row];
    const Vector given = load<T, kAccess>(dy + row * args.dy_stride[1], place.count);

    float best[kVector];
    int32_t winner[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) best[i] = -INFINITY, winner[i] = -1;
#pragma unroll 1
    for (uint32_t first = 0; first < length; first += kMaxUnroll) {
      int32_t token[kMaxUnroll];
      Vector raw[kMaxUnroll];  // [kVector]
#pragma unroll
      for (int u = 0; u < kMaxUnroll; ++u) token[u] = first + u < length ? members[first + u] : -1;
#pragma unroll
      for (int u = 0; u < kMaxUnroll; ++u) {
        raw[u] = load<T, kAccess>(x + token[u] * args.x_stride[1], token[u] >= 0 ? place.count : 0);
      }
#pragma unroll
      for (int u = 0; u < kMaxUnroll; ++u) {
        if (token[u] < 0) continue;
        float value[kVector];
        unpack<T>(raw[u], value);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const bool first_nan = value[i] != value[i] && best[i] == best[i];  // beats every number
          if (value[i] > best[i] || first_nan || first + u == 0) {
            best[i] = value[i];
            winner[i] = token[u];
          }
        }
      }
    }
#pragma unroll 1
    for (uint32_t m = 0; m < length; ++m) {
      const int32_t token = members[m];
      store<T, kAccess>(dx + token * args.width, keep_won<T>(given, winner, token), place.count);
    }
  }
}

}  // namespace saccade
