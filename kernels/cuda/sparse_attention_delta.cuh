// What the backward pass of sparse_attention needs first: delta = rowsum(dout * out) - dlse, a warp for each query; and
// zeros in the gradients of keys that no position holds, a warp for each key.
#pragma once
#include "../attention_args.h"
#include "prim/reduce.cuh"
#include "prim/vec.cuh"

namespace saccade {

constexpr int kDeltaWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    attention_delta_kernel(const __grid_constant__ SparseAttentionGradArgs args, bool aligned) {
  using Bits = typename T::Bits;
  const AttentionInputs& in = args.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / kWarp, heads = in.heads;
  if (row >= in.batch * heads * in.q_len) return;  // whole warps
  const int64_t program = row / in.q_len, token = row - program * in.q_len, batch = program / heads;
  const int64_t head = program - batch * heads;
  const int channel = static_cast<int>(threadIdx.x) % kWarp * 8, count = max(0, min(8, in.head_dim - channel));
  const auto read = [&](const void* x, const int64_t (&stride)[3], float (&values)[8]) {
    const Bits* from = static_cast<const Bits*>(x) + batch * stride[0] + head * stride[1] + token * stride[2];
    from += count > 0 ? channel : 0;
    unpack<T>(aligned ? load<T, 8>(from, count) : load<T, 1>(from, count), values);
  };
  float dout[8], out[8], sum = 0.0f;
  read(args.dout, args.dout_stride, dout);
  read(args.out, args.out_stride, out);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(dout[i], out[i], sum);
  sum = lane_sum(sum, kWarp);
  if (threadIdx.x % kWarp == 0) args.delta[row] = sum - (args.dlse == nullptr ? 0.0f : args.dlse[row]);
}

template <typename T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    attention_clear_keys_kernel(const __grid_constant__ SparseAttentionGradArgs args, bool aligned) {
  using Bits = typename T::Bits;
  const AttentionInputs& in = args.in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDeltaWarps + threadIdx.x / kWarp, heads = in.kv_heads;
  if (row >= in.batch * heads * in.k_len) return;
  const int64_t program = row / in.k_len, token = row - program * in.k_len, batch = program / heads;
  const int64_t head = program - batch * heads;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, count = max(0, min(8, in.head_dim - lane * 8));
  const auto clear = [&](void* x, const int64_t (&stride)[3]) {
    Bits* to = static_cast<Bits*>(x) + batch * stride[0] + head * stride[1] + token * stride[2] + lane * 8;
    if (aligned) {
      store<T, 8>(to, {{0u, 0u, 0u, 0u}}, count);
    } else {
      store<T, 1>(to, {{0u, 0u, 0u, 0u}}, count);
    }
  };
  clear(args.dk, args.dk_stride);
  clear(args.dv, args.dv_stride);
  if (args.dkey_bias == nullptr) return;
  const int64_t group = in.heads / heads;
  for (int64_t member = lane; member < group; member += kWarp) {
    args.dkey_bias[((batch * heads + head) * group + member) * in.k_len + token] = 0.0f;
  }
}

}  // namespace saccade
