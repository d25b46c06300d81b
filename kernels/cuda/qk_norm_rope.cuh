// qk_norm_rope: RMS normalisation, weight and rotation in one pass; specification
// python/saccade/reference/qk_norm_rope.py. Units, lanes and the plan: prim/norm_unit.cuh. Angles: prim/phase.cuh.
//
//   head kernel      normalises over D. Runs of `lanes` lanes share a head and add up by shuffles.
//   row kernel       normalises over H * D. One thread per unit of the row, which stays in registers: every byte is
//   read
//                    once. The next token's row is loaded before the current one is summed.
//   long row kernel  rows of more than kRowThreads units, or unaligned: a block per token, which reads the row twice.
#pragma once
#include "prim/norm_unit.cuh"

namespace saccade {

constexpr int kHeadThreads = 256;
constexpr int kRowThreads = 512;
// As if row kernels had more threads: it keeps them at 96 registers, so that two blocks of 320 (5120 columns) fit.
constexpr int kRowBound = 640;

template <int kVector>
__device__ __forceinline__ float sum_of_squares(const float (&a)[kVector], const float (&b)[kVector]) {
  float sum_a = 0.0f, sum_b = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    sum_a = fmaf(a[i], a[i], sum_a);
    sum_b = fmaf(b[i], b[i], sum_b);
  }
  return sum_a + sum_b;
}

template <typename T, bool kInterleaved>
__device__ __forceinline__ void normalise_and_rotate(Vector (&x)[2], float reciprocal, const float (&w)[2][T::kVector],
                                                     const CosSin (&angle)[T::kVector], bool some_still) {
  float a[T::kVector], b[T::kVector];
  unpack<T>(x[0], a);
  unpack<T>(x[1], b);
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) {
    a[i] = a[i] * reciprocal * w[0][i];
    b[i] = b[i] * reciprocal * w[1][i];
  }
  rotate<kInterleaved>(angle, some_still, a, b);
  x[0] = pack<T>(a);
  x[1] = pack<T>(b);
}

// grid: (tiles of tokens, groups, parts of q's heads then parts of k's)
template <typename T, int kAccess, bool kInterleaved, int kUnits>
__global__ void __launch_bounds__(kHeadThreads, kUnits == 1 ? 3 : 1)
    qk_norm_rope_head_kernel(const __grid_constant__ NormArgs args, const __grid_constant__ NormPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.rope;
  const Angles& angles = rope.angles;

  const int kTokens = plan.table.tokens;
  const int64_t batch = blockIdx.x / plan.tiles;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % plan.tiles) * kTokens;
  const int count = static_cast<int>(rope.tokens - first_token < kTokens ? rope.tokens - first_token : kTokens);
  const int first_group = blockIdx.y * plan.table.groups;
  const int groups = min(plan.table.groups, angles.groups - first_group);
  const int z = blockIdx.z;
  const bool is_q = z < plan.parts;
  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);                     // [A, kTokens]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes * kTokens);  // [kTokens, groups, width]
  float* weights =
      reinterpret_cast<float*>(table + kTokens * plan.table.groups * plan.table.width);  // [kVector / 2, units, 4]
  share_weights<kVector, kInterleaved>(is_q ? args.q_weight : args.k_weight, args.weight_dtype, 1, plan.units,
                                       angles.pairs, rope.head_dim, weights);
  build_table<kVector>(angles, plan.table, batch, first_token, count, first_group, groups, positions, table);

  // thread = ((group_slot * head_slots + head_slot) * kTokens + token) * lanes + lane; threads without work only
  // shuffle
  int rest = threadIdx.x;
  const int lane = rest % plan.lanes;
  rest /= plan.lanes;
  const int token = rest % kTokens;
  rest /= kTokens;
  const int head_slot = rest;

  const NormTensor tensor = norm_tensor(args, plan, is_q ? 0 : 1);
  const int heads = groups * tensor.group_heads;  // of the block, before they are shared out
  const int part_heads = (heads + plan.parts - 1) / plan.parts;
  const int first_item = (is_q ? z : z - plan.parts) * part_heads;
  const int end_item = min(heads, first_item + part_heads);

  Unit unit[kUnits];
#pragma unroll
  for (int n = 0; n < kUnits; ++n) {
    unit[n] = norm_unit<kVector, kInterleaved>(lane + n * plan.lanes, angles.pairs, rope.head_dim);
    const bool exists = lane + n * plan.lanes < plan.units && token < count && head_slot < plan.head_slots;
    if (!exists) unit[n].length[0] = unit[n].length[1] = 0;
  }
  const int64_t place = first_token + token;
  const int64_t first_head = first_group * tensor.group_heads + first_item + head_slot;
  const Bits* from = static_cast<const Bits*>(tensor.heads.x) + batch * tensor.heads.x_stride[0] +
                     place * tensor.heads.x_stride[2] + first_head * tensor.heads.x_stride[1];
  Bits* to = static_cast<Bits*>(tensor.heads.y) + batch * tensor.heads.y_stride[0] + place * tensor.heads.y_stride[2] +
             first_head * tensor.heads.y_stride[1];
  const CosSin* token_rows = table + min(token, count - 1) * plan.table.groups * plan.table.width;

  Vector next[kUnits][2];  // [kVector] each
  auto load_next = [&](bool exists) {
#pragma unroll
    for (int n = 0; n < kUnits; ++n) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        next[n][v] = load<T, kAccess>(from + unit[n].column[v], exists ? unit[n].length[v] : 0);
      }
    }
    from += plan.head_slots * tensor.heads.x_stride[1];
  };
  load_next(first_item + head_slot < end_item);
  for (int walked = first_item; walked < end_item; walked += plan.head_slots) {
    const int item = walked + head_slot;
    Vector x[kUnits][2];
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kUnits; ++n) x[n][0] = next[n][0], x[n][1] = next[n][1];
    load_next(item + plan.head_slots < end_item);  // on its way while this head is worked on
#pragma unroll
    for (int n = 0; n < kUnits; ++n) {
      float a[kVector], b[kVector];
      unpack<T>(x[n][0], a);
      unpack<T>(x[n][1], b);
      sum += sum_of_squares(a, b);
    }
    const float reciprocal = reciprocal_rms(lane_sum(sum, plan.lanes), tensor.per_element, args.eps);
    const int group = groups == 1 ? 0 : min(item / tensor.group_heads, groups - 1);
#pragma unroll
    for (int n = 0; n < kUnits; ++n) {
      // Weights and angles are read again for every head: 32 registers fewer than keeping them, and so more blocks at
      // a time.
      float w[2][kVector];
      const int slot = min(lane + n * plan.lanes, plan.units - 1);
      load_weights(weights, slot, plan.units, 0, w[0]);
      load_weights(weights, slot, plan.units, 1, w[1]);
      CosSin angle[kVector];
      const bool some_still = unit_angles(token_rows + group * plan.table.width, unit[n].pair, plan.table.width, angle);
      normalise_and_rotate<T, kInterleaved>(x[n], reciprocal, w, angle, some_still);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        store<T, kAccess>(to + unit[n].column[v], x[n][v], item < end_item ? unit[n].length[v] : 0);
      }
    }
    to += plan.head_slots * tensor.heads.y_stride[1];
  }
}

template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kRowBound, 1)
    qk_norm_rope_row_kernel(const __grid_constant__ NormArgs args, const __grid_constant__ NormPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.rope;
  const Angles& angles = rope.angles;

  const int kTokens = plan.table.tokens;
  const int64_t batch = blockIdx.x / plan.tiles;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % plan.tiles) * kTokens;
  const int count = static_cast<int>(rope.tokens - first_token < kTokens ? rope.tokens - first_token : kTokens);

  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);                     // [A, kTokens]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes * kTokens);  // [kTokens, G, width]
  build_table<kVector>(angles, plan.table, batch, first_token, count, 0, angles.groups, positions, table);

  const int head = threadIdx.x / plan.units;
  const Unit shape = norm_unit<kVector, kInterleaved>(threadIdx.x - head * plan.units, angles.pairs, rope.head_dim);
  int turn = 0;
  for (int index = 0; index < 2; ++index) {
    const NormTensor tensor = norm_tensor(args, plan, index);
    if (tensor.heads.heads == 0) continue;
    Unit unit = shape;
    if (head >= tensor.heads.heads) unit.length[0] = unit.length[1] = 0;
    const int group = min(head / tensor.group_heads, angles.groups - 1);
    float w[2][kVector];
    unit_weights(tensor.weight, args.weight_dtype, static_cast<int64_t>(head) * rope.head_dim, unit, 0, w[0]);
    unit_weights(tensor.weight, args.weight_dtype, static_cast<int64_t>(head) * rope.head_dim, unit, 1, w[1]);
    const Bits* source = static_cast<const Bits*>(tensor.heads.x) + batch * tensor.heads.x_stride[0] +
                         head * tensor.heads.x_stride[1] + first_token * tensor.heads.x_stride[2];
    Bits* target = static_cast<Bits*>(tensor.heads.y) + batch * tensor.heads.y_stride[0] +
                   head * tensor.heads.y_stride[1] + first_token * tensor.heads.y_stride[2];
    Vector next[2] = {load<T, kVector>(source + unit.column[0], unit.length[0]),
                      load<T, kVector>(source + unit.column[1], unit.length[1])};
    for (int token = 0; token < count; ++token) {
      Vector x[2] = {next[0], next[1]};
      if (token + 1 < count) {
        source += tensor.heads.x_stride[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) next[v] = load<T, kVector>(source + unit.column[v], unit.length[v]);
      }
      float a[kVector], b[kVector];
      unpack<T>(x[0], a);
      unpack<T>(x[1], b);
      float sum[1] = {sum_of_squares(a, b)};
      block_sum(sum, turn);
      turn ^= 1;
      const float reciprocal = reciprocal_rms(sum[0], tensor.per_element, args.eps);
      CosSin angle[kVector];
      const CosSin* row = table + (token * plan.table.groups + group) * plan.table.width;
      const bool some_still = unit_angles(row, unit.pair, plan.table.width, angle);
      normalise_and_rotate<T, kInterleaved>(x, reciprocal, w, angle, some_still);
#pragma unroll
      for (int v = 0; v < 2; ++v) store<T, kVector>(target + unit.column[v], x[v], unit.length[v]);
      target += tensor.heads.y_stride[2];
    }
  }
}

template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kRowThreads, 1)
    qk_norm_rope_long_row_kernel(const __grid_constant__ NormArgs args, const __grid_constant__ NormPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.rope;
  const Angles& angles = rope.angles;
  const int64_t batch = blockIdx.x / plan.tiles, token = blockIdx.x % plan.tiles;

  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);           // [A, 1]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes);  // [1, groups, width]

  float q_reciprocal = 0.0f, k_reciprocal = 0.0f;
#pragma unroll 1
  for (int index = 0; index < 2; ++index) {
    const NormTensor tensor = norm_tensor(args, plan, index);
    const Bits* source =
        static_cast<const Bits*>(tensor.heads.x) + batch * tensor.heads.x_stride[0] + token * tensor.heads.x_stride[2];
    float sum[1] = {0.0f};
    for (int n = threadIdx.x; n < tensor.group_heads * angles.groups * plan.units; n += blockDim.x) {
      const int head = n / plan.units;
      const Unit unit = norm_unit<kVector, kInterleaved>(n - head * plan.units, angles.pairs, rope.head_dim);
      float x[2][kVector];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Bits* p = source + head * tensor.heads.x_stride[1] + unit.column[v];
        unpack<T>(load_any<T, 0>(p, unit.length[v], plan.access), x[v]);
      }
      sum[0] += sum_of_squares(x[0], x[1]);
    }
    block_sum(sum, index);
    (index == 0 ? q_reciprocal : k_reciprocal) = reciprocal_rms(sum[0], tensor.per_element, args.eps);
  }

  for (int first_group = 0; first_group < angles.groups; first_group += plan.table.groups) {
    const int groups = min(plan.table.groups, angles.groups - first_group);
    build_table<kVector>(angles, plan.table, batch, token, 1, first_group, groups, positions, table);
#pragma unroll
#pragma unroll 1
    for (int index = 0; index < 2; ++index) {
      const NormTensor tensor = norm_tensor(args, plan, index);
      const int group_heads = tensor.group_heads;
      const int64_t from = batch * tensor.heads.x_stride[0] + token * tensor.heads.x_stride[2];
      const int64_t to = batch * tensor.heads.y_stride[0] + token * tensor.heads.y_stride[2];
      for (int n = threadIdx.x; n < groups * group_heads * plan.units; n += blockDim.x) {
        const int local = n / plan.units, head = first_group * group_heads + local;
        const Unit unit = norm_unit<kVector, kInterleaved>(n - local * plan.units, angles.pairs, rope.head_dim);
        Vector x[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const Bits* p = static_cast<const Bits*>(tensor.heads.x) + from + head * tensor.heads.x_stride[1];
          x[v] = load_any<T, 0>(p + unit.column[v], unit.length[v], plan.access);
        }
        float w[2][kVector];
        unit_weights(tensor.weight, args.weight_dtype, static_cast<int64_t>(head) * rope.head_dim, unit, 0, w[0]);
        unit_weights(tensor.weight, args.weight_dtype, static_cast<int64_t>(head) * rope.head_dim, unit, 1, w[1]);
        CosSin angle[kVector];
        const CosSin* row = table + local / group_heads * plan.table.width;
        const bool some_still = unit_angles(row, unit.pair, plan.table.width, angle);
        normalise_and_rotate<T, kInterleaved>(x, index == 0 ? q_reciprocal : k_reciprocal, w, angle, some_still);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          Bits* p = static_cast<Bits*>(tensor.heads.y) + to + head * tensor.heads.y_stride[1];
          store_any<T, 0>(p + unit.column[v], x[v], unit.length[v], plan.access);
        }
      }
    }
  }
}

}  // namespace saccade
