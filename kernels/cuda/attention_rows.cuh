// attention_rows: normaliser and entropy of rows of the attention map; specification
// python/saccade/reference/attention_rows.py.
//
// A block keeps a tile of queries and goes over a part of the keys. Every thread keeps, for each of its rows, the
// largest exponent `top` so far, the sum of e = 2^(x - top) and that of e * (x - top): then lse = ln 2 * (top + log2
// sum) and entropy = ln 2 * (log2 sum - product / sum), in which no large numbers cancel. Threads that share a row, and
// then parts, are joined in order. grid: parts x tiles of rows x heads x samples.
#pragma once
#include "prim/pair_stream.cuh"

namespace saccade {

struct RowStatistics {
  float top, sum, product;

  __device__ __forceinline__ void clear() { top = negative_infinity(), sum = 0.0f, product = 0.0f; }

  // Refers to a larger exponent.
  __device__ __forceinline__ void raise(float largest) {
    if (!(largest > top)) return;
    const float shift = top == negative_infinity() ? 0.0f : top - largest;
    const float factor = power_of_two(top - largest);
    product = (product + sum * shift) * factor;
    sum *= factor;
    top = largest;
  }
  __device__ __forceinline__ void join(RowStatistics other) {
    raise(other.top);
    other.raise(top);
    sum += other.sum;
    product += other.product;
  }
  __device__ __forceinline__ void write(float& lse, float& entropy) const {
    const bool empty = sum == 0.0f;
    const float log_sum = log2f(sum);
    lse = empty ? negative_infinity() : kLn2 * (top + log_sum);
    entropy = empty ? 0.0f : kLn2 * (log_sum - product / sum);
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kGramThreads, 2)
    attention_rows_kernel(const __grid_constant__ AttentionMapArgs args, const __grid_constant__ PairPlan plan) {
  using Stream = typename PairKind<T, kRows>::Stream;
  using Tile = typename Stream::Tile;
  SACCADE_SHARED(base);
  const AttentionInputs& in = args.in;
  const Stream stream(base, plan);
  const auto [part, entry, first, batch, q, k] = pair_place<T, kRows>(in, plan);
  const float* key_bias = in.key_bias == nullptr ? nullptr : in.key_bias + batch * in.key_bias_stride;
  if (threadIdx.x < kRows) {
    int32_t token;
    stream.rows[threadIdx.x].at = last_seen(args, first + threadIdx.x, token);
    stream.row_tokens[threadIdx.x] = token;
  }
  __syncthreads();  // not pair_barrier(): without it warps would part, and the mutant hang instead of failing
  int32_t last = -1;
  for (int i = 0; i < kRows; ++i) last = max(last, stream.rows[i].at);
  const int64_t begin = part * plan.part_length;
  const int64_t end = min(begin + plan.part_length, static_cast<int64_t>(last) + 1);

  RowStatistics mine[Tile::kMyRows];
#pragma unroll
  for (int i = 0; i < Tile::kMyRows; ++i) mine[i].clear();
  stream.run(
      plan, in.head_dim, q, k, begin, end,
      [&](int64_t key, int32_t& token) {
        token = static_cast<int32_t>(key);
        return PairColumn{key_bias == nullptr ? 0.0f : key_bias[key] * kLog2E, token};
      },
      [&](Tile& tile, const PairColumn* columns) {
#pragma unroll
        for (int i = 0; i < Tile::kMyRows; ++i) {
          const int32_t limit = stream.rows[Tile::row(i)].at;
          float x[Tile::kMyColumns], largest = negative_infinity();
#pragma unroll
          for (int j = 0; j < Tile::kMyColumns; ++j) {
            const PairColumn column = columns[Tile::column() + Tile::offset(j)];
            const bool visible = column.at >= 0 && column.at <= limit;
            x[j] = visible ? fmaf(tile.value(i, j), plan.scale_log2, column.value) : negative_infinity();
            largest = fmaxf(largest, x[j]);
          }
          mine[i].raise(largest);
          const float top = mine[i].top == negative_infinity() ? 0.0f : mine[i].top;
          float sum = 0.0f, product = 0.0f;
#pragma unroll
          for (int j = 0; j < Tile::kMyColumns; ++j) {
            const float e = power_of_two(x[j] - top);
            sum += e;
            product += e > 0.0f ? e * (x[j] - top) : 0.0f;
          }
          mine[i].sum += sum;
          mine[i].product += product;
        }
      });

  RowStatistics* all = reinterpret_cast<RowStatistics*>(stream.stages);  // [kRows, kSlots]
#pragma unroll
  for (int i = 0; i < Tile::kMyRows; ++i) all[Tile::row(i) * Tile::kSlots + Tile::slot()] = mine[i];
  pair_barrier();
  if (threadIdx.x >= kRows || first + threadIdx.x >= args.row_count) return;
  RowStatistics row = all[threadIdx.x * Tile::kSlots];
#pragma unroll 1
  for (int s = 1; s < Tile::kSlots; ++s) row.join(all[threadIdx.x * Tile::kSlots + s]);
  const int64_t at = entry * args.row_count + first + threadIdx.x;
  if (plan.parts == 1) {
    row.write(args.lse[at], args.entropy[at]);
  } else {
    static_cast<RowStatistics*>(args.workspace)[at * plan.parts + part] = row;
  }
}

static __global__ void __launch_bounds__(kGramThreads)
    join_rows_kernel(const RowStatistics* parts, int32_t count, int64_t rows, float* lse, float* entropy) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kGramThreads + threadIdx.x;
  if (row >= rows) return;
  RowStatistics all = parts[row * count];
#pragma unroll 1
  for (int part = 1; part < count; ++part) all.join(parts[row * count + part]);
  all.write(lse[row], entropy[row]);
}

}  // namespace saccade
