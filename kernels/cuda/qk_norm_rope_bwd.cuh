// Gradient of qk_norm_rope. With n = x * r the normalised row and g = m R(-phi) dy the gradient before the rotation:
//
//   dweight = sum over tokens (and heads) of g * n        dx = r * (g * weight - n * mean(g * weight * n))
//
// r is computed again from x: reading x twice would cost more than the arithmetic. Both sums that dx needs, of x^2 and
// of g * weight * x, are taken in one go. Every block adds dweight up over its tokens in registers and leaves one row
// of partial sums; a second pass (prim/partials.cuh) adds the rows in a fixed order.
//
// grid: (blocks of consecutive tiles of tokens, q or k). Kernels as in qk_norm_rope.cuh: head, row, long row.
#pragma once
#include "prim/norm_unit.cuh"

namespace saccade {

constexpr int kHeadGradThreads = 256;
constexpr int kRowGradThreads = 512;
constexpr int kRowGradBound = 640;  // keeps row kernels at 96 registers: two blocks of 320 threads (5120 columns) fit

struct NormGradTensor {
  NormTensor x;  // heads.x holds x, heads.y receives dx
  const void* dy;
  int64_t dy_stride[3];  // batch, head, token
  float* partial;        // [blocks, width], null where dweight is not wanted
  int32_t width;         // D or heads * D
};

struct NormGradPlan {
  NormPlan norm;
  int64_t k_partial;  // where the partial sums of k begin, in floats
  int32_t width[2];
};

__device__ __forceinline__ NormGradTensor grad_tensor(const NormGradArgs& args, const NormGradPlan& plan) {
  NormGradTensor tensor;
  const bool is_q = blockIdx.y == 0;
  tensor.x = norm_tensor(args.norm, plan.norm, is_q ? 0 : 1);
  tensor.dy = is_q ? args.q_dy : args.k_dy;
#pragma unroll
  for (int i = 0; i < 3; ++i) tensor.dy_stride[i] = is_q ? args.q_dy_stride[i] : args.k_dy_stride[i];
  float* const partial = static_cast<float*>(args.workspace) + (is_q ? 0 : plan.k_partial);
  tensor.partial = (is_q ? args.q_dweight : args.k_dweight) == nullptr ? nullptr : partial;
  tensor.width = is_q ? plan.width[0] : plan.width[1];
  return tensor;
}

// Turns dy back into g, in float32, and adds to the two sums. `load_w` reads the weights of one of the two vectors:
// late, to keep registers free.
template <typename T, bool kInterleaved, typename Weights>
__device__ __forceinline__ void rotate_back(const Vector (&x)[2], const Vector (&dy)[2], const CosSin* row, int pair,
                                            int width, Weights load_w, float (&g)[2][T::kVector], float (&sum)[2]) {
  CosSin angle[T::kVector];
  const bool some_still = unit_angles(row, pair, width, angle);
  unpack<T>(dy[0], g[0]);
  unpack<T>(dy[1], g[1]);
  rotate<kInterleaved>(angle, some_still, g[0], g[1]);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float value[T::kVector], w[T::kVector];
    load_w(v, w);
    unpack<T>(x[v], value);
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      sum[0] = fmaf(value[i], value[i], sum[0]);
      sum[1] = fmaf(g[v][i] * w[i], value[i], sum[1]);
    }
  }
}

// dx in place of x, and this row's share of dweight in place of g.
template <typename T, typename Weights>
__device__ __forceinline__ void unit_gradient(Vector (&x)[2], float (&g)[2][T::kVector], Weights load_w,
                                              float reciprocal, float mean) {
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    float value[T::kVector], w[T::kVector];
    load_w(v, w);
    unpack<T>(x[v], value);
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      const float n = value[i] * reciprocal;
      value[i] = reciprocal * (g[v][i] * w[i] - n * mean);
      g[v][i] *= n;
    }
    x[v] = pack<T>(value);
  }
}

template <typename T, int kAccess, bool kInterleaved, int kUnits>
__global__ void __launch_bounds__(kHeadGradThreads, kUnits == 1 ? 2 : 1)
    qk_norm_rope_bwd_head_kernel(const __grid_constant__ NormGradArgs args,
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
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes * kTokens);  // [kTokens, groups, width]
  float* weights = reinterpret_cast<float*>(table + kTokens * plan.table.groups * plan.table.width);
  share_weights<kVector, kInterleaved>(tensor.x.weight, args.norm.weight_dtype, 1, plan.units, angles.pairs,
                                       rope.head_dim,
                                       weights);  // [kVector / 2, units, 4]

  // thread = (head_slot * kTokens + token) * lanes + lane; threads without work only shuffle
  const int lane = threadIdx.x % plan.lanes, token = threadIdx.x / plan.lanes % kTokens;
  const int head_slot = threadIdx.x / plan.lanes / kTokens;
  Unit unit[kUnits];
  float dweight[kUnits][2][kVector];
#pragma unroll
  for (int n = 0; n < kUnits; ++n) {
    unit[n] = norm_unit<kVector, kInterleaved>(lane + n * plan.lanes, angles.pairs, rope.head_dim);
    const bool exists = lane + n * plan.lanes < plan.units && head_slot < plan.head_slots;
    if (!exists) unit[n].length[0] = unit[n].length[1] = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) dweight[n][0][i] = dweight[n][1][i] = 0.0f;
  }

  const int units = plan.units;
  auto weights_of = [&](int n) {
    const int slot = min(lane + n * plan.lanes, plan.units - 1);
    return [=](int v, float (&w)[kVector]) { load_weights(weights, slot, units, v, w); };
  };

  const uint32_t first_tile = blockIdx.x * plan.tiles_per_block;
  const uint32_t end_tile = min(static_cast<uint32_t>(rope.batch) * plan.tiles, first_tile + plan.tiles_per_block);
#pragma unroll 1
  for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
    const uint32_t batch = tile / plan.tiles;
    const int64_t first_token = static_cast<int64_t>(tile % plan.tiles) * kTokens;
    const int count = static_cast<int>(rope.tokens - first_token < kTokens ? rope.tokens - first_token : kTokens);
    const int64_t place = first_token + min(token, count - 1);
    const CosSin* token_rows = table + min(token, count - 1) * plan.table.groups * plan.table.width;
#pragma unroll 1
    for (int first_group = 0; first_group < angles.groups; first_group += plan.table.groups) {
      const int groups = min(plan.table.groups, angles.groups - first_group);
      build_table<kVector>(angles, plan.table, batch, first_token, count, first_group, groups, positions, table);
      const int items = groups * tensor.x.group_heads;
#pragma unroll 1
      for (int walked = 0; walked < items; walked += plan.head_slots) {
        const int item = walked + head_slot;
        const bool exists = item < items && token < count;
        const int64_t head = first_group * tensor.x.group_heads + item;
        const int64_t from = batch * heads.x_stride[0] + head * heads.x_stride[1] + place * heads.x_stride[2];
        const int64_t dy_from = batch * tensor.dy_stride[0] + head * tensor.dy_stride[1] + place * tensor.dy_stride[2];
        Vector x[kUnits][2], dy[kUnits][2];  // [kVector] each
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int length = exists ? unit[n].length[v] : 0;
            x[n][v] = load<T, kAccess>(static_cast<const Bits*>(heads.x) + from + unit[n].column[v], length);
            dy[n][v] = load<T, kAccess>(static_cast<const Bits*>(tensor.dy) + dy_from + unit[n].column[v], length);
          }
        }
        const int group = groups == 1 ? 0 : min(item / tensor.x.group_heads, groups - 1);
        float g[kUnits][2][kVector], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
          rotate_back<T, kInterleaved>(x[n], dy[n], token_rows + group * plan.table.width, unit[n].pair,
                                       plan.table.width, weights_of(n), g[n], sum);
        }
        const float reciprocal = reciprocal_rms(lane_sum(sum[0], plan.lanes), tensor.x.per_element, args.norm.eps);
        const float mean = lane_sum(sum[1], plan.lanes) * reciprocal * tensor.x.per_element;
        const int64_t to = batch * heads.y_stride[0] + head * heads.y_stride[1] + place * heads.y_stride[2];
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
          unit_gradient<T>(x[n], g[n], weights_of(n), reciprocal, mean);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int length = exists ? unit[n].length[v] : 0;
            store<T, kAccess>(static_cast<Bits*>(heads.y) + to + unit[n].column[v], x[n][v], length);
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              if (i < length) dweight[n][v][i] += g[n][v][i];
            }
          }
        }
      }
    }
  }
  if (tensor.partial == nullptr) return;

  // Lanes that hold the same unit add up inside their warp, then the warps do, in their order.
  constexpr int kOfLane = kUnits * 2 * kVector;
  float* sums = reinterpret_cast<float*>(shared);  // [warps, lanes, kUnits, 2, kVector]
  __syncthreads();                                 // table and weights are no longer read
#pragma unroll
  for (int n = 0; n < kUnits; ++n) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = dweight[n][v][i];
        for (int offset = plan.lanes; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (static_cast<int>(threadIdx.x % kWarp) < plan.lanes) {
          sums[(threadIdx.x / kWarp * plan.lanes + lane) * kOfLane + (n * 2 + v) * kVector + i] = sum;
        }
      }
    }
  }
  sum_barrier();
  for (int at = threadIdx.x; at < plan.lanes * kOfLane; at += blockDim.x) {
    const int i = at % kVector, v = at / kVector % 2, n = at / (2 * kVector) % kUnits, holder = at / kOfLane;
    const Unit held = norm_unit<kVector, kInterleaved>(holder + n * plan.lanes, angles.pairs, rope.head_dim);
    if (holder + n * plan.lanes >= plan.units || i >= (v == 0 ? held.length[0] : held.length[1])) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
      sum += sums[warp * plan.lanes * kOfLane + at];
    const int column = (v == 0 ? held.column[0] : held.column[1]) + i;
    tensor.partial[static_cast<int64_t>(blockIdx.x) * tensor.width + column] = sum;
  }
}

}  // namespace saccade
