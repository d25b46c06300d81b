// rope_freq_grad: gradient of learned frequencies; specification python/saccade/reference/rope_freq_grad.py.
//
//   out[a, g, i] = sum over tokens and heads of group g, of q and k, of position[a] * (x1 * dx2 - x2 * dx1)
//
//   rows   tokens of all batch entries, B * S       unit  kVector pairs of a head: two vectors of x and two of dx
//
// A thread keeps one unit of one group and adds up over rows and heads in registers, for kAxes axes at a time (more
// than kAxes read x and dx again). The block adds its row slots up in shared memory and leaves one row of partial sums;
// a second pass (prim/partials.cuh) adds the blocks. grid: (blocks of consecutive rows, groups, axes / kAxes).
#pragma once
#include "prim/norm_unit.cuh"

namespace saccade {

constexpr int kFreqThreads = 256;
constexpr int kAxes = 4;

struct FreqPlan {
  int64_t rows_per_block;
  int32_t units, row_slots;  // of a block
  int32_t q_heads, k_heads;  // of a group
};

__device__ inline float read_position(const Angles& angles, int64_t at) {
  switch (angles.position_dtype) {
    case PositionDtype::kInt32:
      return static_cast<float>(static_cast<const int32_t*>(angles.positions)[at]);
    case PositionDtype::kInt64:
      return static_cast<float>(static_cast<const int64_t*>(angles.positions)[at]);
    case PositionDtype::kFloat32:
      return static_cast<const float*>(angles.positions)[at];
    default:
      return static_cast<float>(static_cast<const double*>(angles.positions)[at]);
  }
}

template <typename T, int kAccess, bool kInterleaved>
__global__ void __launch_bounds__(kFreqThreads, 2)
    rope_freq_grad_kernel(const __grid_constant__ FreqGradArgs args, const __grid_constant__ FreqPlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  const RopeArgs& rope = args.rope;
  const Angles& angles = rope.angles;
  const int group = blockIdx.y, first_axis = blockIdx.z * kAxes, axes = min(kAxes, angles.axes - first_axis);

  const int slot = threadIdx.x / plan.units;
  // Columns beyond the rotary ones belong to no unit: head_dim is 2R here.
  const Unit unit = norm_unit<kVector, kInterleaved>(threadIdx.x % plan.units, angles.pairs, 2 * angles.pairs);
  float total[kAxes][kVector];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[a][i] = 0.0f;
  }

  const int64_t all_rows = rope.batch * rope.tokens, first = blockIdx.x * plan.rows_per_block;
  const int64_t end = first + plan.rows_per_block < all_rows ? first + plan.rows_per_block : all_rows;
  int64_t batch = (first + slot) / rope.tokens, token = (first + slot) - batch * rope.tokens;
  const int items = slot < plan.row_slots ? plan.q_heads + plan.k_heads : 0;
  for (int64_t row = first + slot; row < end; row += plan.row_slots) {
    float cross[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) cross[i] = 0.0f;
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
      const bool is_q = item < plan.q_heads;
      const Heads& q = rope.q;
      const Heads& k = rope.k;
      const int64_t head = is_q ? group * plan.q_heads + item : group * plan.k_heads + item - plan.q_heads;
      const Bits* x = static_cast<const Bits*>(is_q ? q.x : k.x) + batch * (is_q ? q.x_stride[0] : k.x_stride[0]) +
                      head * (is_q ? q.x_stride[1] : k.x_stride[1]) + token * (is_q ? q.x_stride[2] : k.x_stride[2]);
      const Bits* dx = static_cast<const Bits*>(is_q ? args.q_dx : args.k_dx) +
                       batch * (is_q ? args.q_dx_stride[0] : args.k_dx_stride[0]) +
                       head * (is_q ? args.q_dx_stride[1] : args.k_dx_stride[1]) +
                       token * (is_q ? args.q_dx_stride[2] : args.k_dx_stride[2]);
      Vector raw[4];  // [kVector] each: x, then dx
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        raw[v] = load<T, kAccess>(x + unit.column[v], unit.length[v]);
        raw[2 + v] = load<T, kAccess>(dx + unit.column[v], unit.length[v]);
      }
      float a[kVector], b[kVector], da[kVector], db[kVector];
      unpack<T>(raw[0], a);
      unpack<T>(raw[1], b);
      unpack<T>(raw[2], da);
      unpack<T>(raw[3], db);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        constexpr int kHalf = kVector / 2;
        const int first_of = i % kHalf * 2, second_of = first_of + 1;
        const float x1 = !kInterleaved ? a[i] : i < kHalf ? a[first_of] : b[first_of];
        const float x2 = !kInterleaved ? b[i] : i < kHalf ? a[second_of] : b[second_of];
        const float d1 = !kInterleaved ? da[i] : i < kHalf ? da[first_of] : db[first_of];
        const float d2 = !kInterleaved ? db[i] : i < kHalf ? da[second_of] : db[second_of];
        cross[i] += x1 * d2 - x2 * d1;
      }
    }
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      if (a >= axes) continue;
      const float position =
          read_position(angles, (first_axis + a) * angles.position_stride[0] + batch * angles.position_stride[1] +
                                    token * angles.position_stride[2]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) total[a][i] += position * cross[i];
    }
    token += plan.row_slots;
    while (token >= rope.tokens) token -= rope.tokens, ++batch;
  }

  SACCADE_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kAxes, row_slots, units * kVector]
  const int columns = plan.units * kVector;
#pragma unroll
  for (int a = 0; a < kAxes; ++a) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (slot >= plan.row_slots) continue;
      sums[(a * plan.row_slots + slot) * columns + threadIdx.x % plan.units * kVector + i] = total[a][i];
    }
  }
  sum_barrier();
  float* partial = static_cast<float*>(args.workspace) +
                   static_cast<int64_t>(blockIdx.x) * angles.axes * angles.groups * angles.pairs;  // [A, G, R]
  for (int at = threadIdx.x; at < axes * columns; at += blockDim.x) {
    const int axis = at / columns, pair = at - axis * columns;
    if (pair >= angles.pairs) continue;
    float sum = 0.0f;
    for (int s = 0; s < plan.row_slots; ++s) sum += sums[(axis * plan.row_slots + s) * columns + pair];
    partial[static_cast<int64_t>((first_axis + axis) * angles.groups + group) * angles.pairs + pair] = sum;
  }
}

}  // namespace saccade
