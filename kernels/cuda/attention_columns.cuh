// attention_columns: column sums of the attention map; specification python/saccade/reference/attention_columns.py.
//
// A block keeps a tile of keys and goes over a part of the queries: sums of a tile of queries, then over tiles, then
// over the threads that share a key, then over parts, in order. grid: parts x tiles of keys x heads x samples.
#pragma once
#include "prim/pair_stream.cuh"

namespace saccade {

template <typename T, int kRows>
__global__ void __launch_bounds__(kGramThreads, 2)
    attention_columns_kernel(const __grid_constant__ AttentionMapArgs args, const __grid_constant__ PairPlan plan) {
  using Stream = typename PairKind<T, kRows>::Stream;
  using Tile = typename Stream::Tile;
  SACCADE_SHARED(base);
  const AttentionInputs& in = args.in;
  const Stream stream(base, plan);
  const auto [part, entry, first, batch, q, k] = pair_place<T, kRows>(in, plan);
  const float* lse = args.lse + entry * args.row_count;
  if (threadIdx.x < kRows) {
    const int64_t key = first + threadIdx.x;
    const bool exists = key < in.k_len;
    const bool biased = exists && in.key_bias != nullptr;
    stream.row_tokens[threadIdx.x] = exists ? static_cast<int32_t>(key) : -1;
    stream.rows[threadIdx.x] = {biased ? in.key_bias[batch * in.key_bias_stride + key] * kLog2E : 0.0f,
                                exists ? static_cast<int32_t>(key) : kNowhere};
  }
  int64_t begin = part * plan.part_length;
  const int64_t end = min(begin + plan.part_length, args.row_count);
  if (args.causal && args.rows == nullptr) {  // queries before see none of these keys
    begin = max(begin, (first + in.q_len - in.k_len) / Tile::kColumns * Tile::kColumns);
  }

  float mine[Tile::kMyRows];
#pragma unroll
  for (int i = 0; i < Tile::kMyRows; ++i) mine[i] = 0.0f;
  stream.run(
      plan, in.head_dim, k, q, begin, end,
      [&](int64_t place, int32_t& token) {
        const int32_t last = last_seen(args, place, token);
        const float value = lse[place];
        return PairColumn{value * kLog2E, value == negative_infinity() ? -1 : last};
      },
      [&](Tile& tile, const PairColumn* columns) {
#pragma unroll
        for (int i = 0; i < Tile::kMyRows; ++i) {
          const PairColumn row = stream.rows[Tile::row(i)];
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < Tile::kMyColumns; ++j) {
            const PairColumn column = columns[Tile::column() + Tile::offset(j)];
            const float e = power_of_two(fmaf(tile.value(i, j), plan.scale_log2, row.value - column.value));
            sum += row.at <= column.at ? e : 0.0f;
          }
          mine[i] += sum;
        }
      });

  float* all = reinterpret_cast<float*>(stream.stages);  // [kRows, kSlots]
#pragma unroll
  for (int i = 0; i < Tile::kMyRows; ++i) all[Tile::row(i) * Tile::kSlots + Tile::slot()] = mine[i];
  pair_barrier();
  if (threadIdx.x >= kRows || first + threadIdx.x >= in.k_len) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int s = 0; s < Tile::kSlots; ++s) sum += all[threadIdx.x * Tile::kSlots + s];
  const int64_t at = entry * in.k_len + first + threadIdx.x;
  if (plan.parts == 1) {
    args.columns[at] = sum;
  } else {
    static_cast<float*>(args.workspace)[at * plan.parts + part] = sum;
  }
}

static __global__ void __launch_bounds__(kGramThreads)
    join_columns_kernel(const float* parts, int32_t count, int64_t keys, float* columns) {
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  if (key >= keys) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int part = 0; part < count; ++part) sum += parts[key * count + part];
  columns[key] = sum;
}

}  // namespace saccade
