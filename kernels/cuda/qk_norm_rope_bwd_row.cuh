// Gradient of qk_norm_rope with norm="row"; the formulas and what the kernels share: qk_norm_rope_bwd.cuh.
#pragma once
#include "qk_norm_rope_bwd.cuh"

namespace saccade {

template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kRowGradBound, 1)
    qk_norm_rope_bwd_row_kernel(const __grid_constant__ NormGradArgs args,
                                const __grid_constant__ NormGradPlan grad_plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.norm.rope;
  const Angles& angles = rope.angles;
  const NormPlan& plan = grad_plan.norm;
  const NormGradTensor tensor = grad_tensor(args, grad_plan);
  const Heads& heads = tensor.x.heads;
  const int kTokens = plan.table.tokens;

  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);                     // [A, kTokens]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes * kTokens);  // [kTokens, G, width]
  float* weights = reinterpret_cast<float*>(table + kTokens * angles.groups * plan.table.width);
  const int row_heads = static_cast<int>(heads.heads), row_units = row_heads * plan.units;
  share_weights<kVector, kInterleaved>(tensor.x.weight, args.norm.weight_dtype, row_heads, plan.units, angles.pairs,
                                       rope.head_dim, weights);  // [kVector / 2, row_units, 4]

  const int head = threadIdx.x / plan.units;
  Unit unit = norm_unit<kVector, kInterleaved>(threadIdx.x - head * plan.units, angles.pairs, rope.head_dim);
  if (head >= heads.heads) unit.length[0] = unit.length[1] = 0;
  const int group = min(head / tensor.x.group_heads, angles.groups - 1);
  float dweight[2][kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) dweight[0][i] = dweight[1][i] = 0.0f;

  const int slot = min(static_cast<int>(threadIdx.x), row_units - 1);
  auto load_w = [=](int v, float (&w)[kVector]) { load_weights(weights, slot, row_units, v, w); };

  int turn = 0;
  const uint32_t first_tile = blockIdx.x * plan.tiles_per_block;
  const uint32_t end_tile = min(static_cast<uint32_t>(rope.batch) * plan.tiles, first_tile + plan.tiles_per_block);
#pragma unroll 1
  for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
    const uint32_t batch = tile / plan.tiles;
    const int64_t first_token = static_cast<int64_t>(tile % plan.tiles) * kTokens;
    const int count = static_cast<int>(rope.tokens - first_token < kTokens ? rope.tokens - first_token : kTokens);
    build_table<kVector>(angles, plan.table, batch, first_token, count, 0, angles.groups, positions, table);
    const Bits* from = static_cast<const Bits*>(heads.x) + batch * heads.x_stride[0] + head * heads.x_stride[1] +
                       first_token * heads.x_stride[2];
    const Bits* dy_from = static_cast<const Bits*>(tensor.dy) + batch * tensor.dy_stride[0] +
                          head * tensor.dy_stride[1] + first_token * tensor.dy_stride[2];
    Bits* to = static_cast<Bits*>(heads.y) + batch * heads.y_stride[0] + head * heads.y_stride[1] +
               first_token * heads.y_stride[2];
#pragma unroll 1
    for (int token = 0; token < count; ++token) {
      Vector x[2], dy[2];  // [kVector] each
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        x[v] = load<T, kVector>(from + unit.column[v], unit.length[v]);
        dy[v] = load<T, kVector>(dy_from + unit.column[v], unit.length[v]);
      }
      float g[2][kVector], sum[2] = {0.0f, 0.0f};
      const CosSin* row = table + (token * plan.table.groups + group) * plan.table.width;
      rotate_back<T, kInterleaved>(x, dy, row, unit.pair, plan.table.width, load_w, g, sum);
      block_sum(sum, turn);
      turn ^= 1;
      const float reciprocal = reciprocal_rms(sum[0], tensor.x.per_element, args.norm.eps);
      unit_gradient<T>(x, g, load_w, reciprocal, sum[1] * reciprocal * tensor.x.per_element);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        store<T, kVector>(to + unit.column[v], x[v], unit.length[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) dweight[v][i] += g[v][i];
      }
      from += heads.x_stride[2];
      dy_from += tensor.dy_stride[2];
      to += heads.y_stride[2];
    }
  }
  if (tensor.partial == nullptr) return;
  float* out = tensor.partial + static_cast<int64_t>(blockIdx.x) * tensor.width + head * rope.head_dim;
#pragma unroll
  for (int v = 0; v < 2; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < unit.length[v]) out[unit.column[v] + i] = dweight[v][i];
    }
  }
}

// Two walks over the row of every token: the sums, then dx. A thread meets the same units for every token, so it may
// add its share of dweight to the block's partial sums in memory.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(kRowGradThreads, 1)
    qk_norm_rope_bwd_long_row_kernel(const __grid_constant__ NormGradArgs args,
                                     const __grid_constant__ NormGradPlan grad_plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.norm.rope;
  const Angles& angles = rope.angles;
  const NormPlan& plan = grad_plan.norm;
  const NormGradTensor tensor = grad_tensor(args, grad_plan);
  const Heads& heads = tensor.x.heads;
  const int group_heads = tensor.x.group_heads;

  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);           // [A, 1]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes);  // [1, groups, width]

  const uint32_t first = blockIdx.x * plan.tiles_per_block;  // tiles of one token
  const uint32_t end = min(static_cast<uint32_t>(rope.batch) * plan.tiles, first + plan.tiles_per_block);
  int turn = 0;
#pragma unroll 1
  for (uint32_t at = first; at < end; ++at) {
    const uint32_t batch = at / plan.tiles, token = at % plan.tiles;
    const Bits* from = static_cast<const Bits*>(heads.x) + batch * heads.x_stride[0] + token * heads.x_stride[2];
    const Bits* dy_from =
        static_cast<const Bits*>(tensor.dy) + batch * tensor.dy_stride[0] + token * tensor.dy_stride[2];
    Bits* to = static_cast<Bits*>(heads.y) + batch * heads.y_stride[0] + token * heads.y_stride[2];
    float reciprocal = 0.0f, mean = 0.0f, sum[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int walk = 0; walk < 2; ++walk) {
#pragma unroll 1
      for (int first_group = 0; first_group < angles.groups; first_group += plan.table.groups) {
        const int groups = min(plan.table.groups, angles.groups - first_group);
        build_table<kVector>(angles, plan.table, batch, token, 1, first_group, groups, positions, table);
#pragma unroll 1
        for (int n = threadIdx.x; n < groups * group_heads * plan.units; n += blockDim.x) {
          const int local = n / plan.units, head = first_group * group_heads + local;
          const Unit unit = norm_unit<kVector, kInterleaved>(n - local * plan.units, angles.pairs, rope.head_dim);
          Vector x[2], dy[2];  // [kVector] each
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            x[v] = load_any<T, 0>(from + head * heads.x_stride[1] + unit.column[v], unit.length[v], plan.access);
            dy[v] = load_any<T, 0>(dy_from + head * tensor.dy_stride[1] + unit.column[v], unit.length[v], plan.access);
          }
          float g[2][kVector];
          const int64_t first_column = static_cast<int64_t>(head) * rope.head_dim;
          auto load_w = [&](int v, float (&w)[kVector]) {
            unit_weights(tensor.x.weight, args.norm.weight_dtype, first_column, unit, v, w);
          };
          const CosSin* row = table + local / group_heads * plan.table.width;
          rotate_back<T, kInterleaved>(x, dy, row, unit.pair, plan.table.width, load_w, g, sum);
          if (walk == 0) continue;
          unit_gradient<T>(x, g, load_w, reciprocal, mean);
          float* partial = tensor.partial + static_cast<int64_t>(blockIdx.x) * tensor.width + first_column;
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            store_any<T, 0>(to + head * heads.y_stride[1] + unit.column[v], x[v], unit.length[v], plan.access);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              if (tensor.partial == nullptr || i >= unit.length[v]) continue;
              float& out = partial[unit.column[v] + i];
              out = at == first ? g[v][i] : out + g[v][i];
            }
          }
        }
      }
      if (walk == 0) {
        block_sum(sum, turn);
        turn ^= 1;
        reciprocal = reciprocal_rms(sum[0], tensor.x.per_element, args.norm.eps);
        mean = sum[1] * reciprocal * tensor.x.per_element;
      }
    }
  }
}

}  // namespace saccade
