// unmerge: every token takes the row it was merged into; specification python/saccade/reference/unmerge.py.
//
// A gather with gate and residual in the same pass: each byte of the residual and of the output moves once. A thread
// keeps one vector of columns and walks over tokens, kUnmergeUnroll in flight; a gate that all tokens share is read
// once.
#pragma once
#include "../merge_args.h"
#include "prim/rows.cuh"

namespace saccade {

constexpr int kUnmergeUnroll = 2;

template <typename T, int kAccess>
__global__ void __launch_bounds__(kRowThreads)
    unmerge_kernel(const __grid_constant__ UnmergeArgs args, const __grid_constant__ RowPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RowPlace place = row_place<kVector>(plan, args.tokens, args.width);
  const int32_t* inverse = args.inverse + (args.shared ? 0 : place.batch * args.tokens);  // [N]
  const Bits* y = static_cast<const Bits*>(args.y) + place.batch * args.y_stride[0] + place.column;
  const Bits* residual = static_cast<const Bits*>(args.residual) + place.batch * args.residual_stride[0] + place.column;
  const Bits* gate = static_cast<const Bits*>(args.gate) + place.batch * args.gate_stride[0] + place.column;
  Bits* out = static_cast<Bits*>(args.out) + place.batch * args.tokens * args.width + place.column;
  const int residual_count = args.residual == nullptr ? 0 : place.count;
  const bool one_gate = args.gate_stride[1] == 0;
  const int gate_count = args.gate == nullptr || one_gate ? 0 : place.count;  // of each token
  const Vector all_gates = load<T, kAccess>(gate, args.gate != nullptr && one_gate ? place.count : 0);

#pragma unroll 1
  for (uint32_t first = place.row; first < place.end; first += plan.slots * kUnmergeUnroll) {
    int32_t row[kUnmergeUnroll];
    Vector from_y[kUnmergeUnroll], from_residual[kUnmergeUnroll], from_gate[kUnmergeUnroll];  // [kVector] each
#pragma unroll
    for (int u = 0; u < kUnmergeUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      row[u] = token < place.end ? inverse[token] : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnmergeUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      const bool exists = token < place.end;
      from_y[u] = load<T, kAccess>(y + row[u] * args.y_stride[1], row[u] >= 0 ? place.count : 0);
      from_residual[u] = load<T, kAccess>(residual + token * args.residual_stride[1], exists ? residual_count : 0);
      from_gate[u] = load<T, kAccess>(gate + token * args.gate_stride[1], exists ? gate_count : 0);
    }
#pragma unroll
    for (int u = 0; u < kUnmergeUnroll; ++u) {
      const uint32_t token = first + u * plan.slots;
      if (token >= place.end) continue;
      float value[kVector], factor[kVector], added[kVector];
      unpack<T>(from_y[u], value);
      unpack<T>(from_residual[u], added);
      if (args.gate != nullptr) {
#pragma unroll
        for (int w = 0; w < 4; ++w) from_gate[u].word[w] = one_gate ? all_gates.word[w] : from_gate[u].word[w];
        unpack<T>(from_gate[u], factor);
#pragma unroll
        for (int i = 0; i < kVector; ++i) value[i] *= factor[i];
      }
      if (args.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) value[i] += added[i];
      }
      store<T, kAccess>(out + token * args.width, pack<T>(value), place.count);
    }
  }
}

}  // namespace saccade
