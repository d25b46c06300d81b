// knn_density: mean squared distance to the k nearest rows; specification python/saccade/reference/knn_density.py.
//
//   tile    64 rows x 64 columns of one sample, |a|^2 + |b|^2 - 2 a . b in shared memory
//   reader  four threads a row, each with a quarter of every tile's columns and its own k smallest distances, ascending
//
// A block keeps 64 rows and goes over all columns. At the end the four lists of a row are merged: the k smallest, added
// up from the smallest on, so that the result does not depend on who met them. grid: (tiles of rows x samples).
#pragma once
#include "../merge_args.h"
#include "prim/gram.cuh"
#include "prim/squares.cuh"

namespace saccade {

constexpr int kMostNeighbours = 32, kKnnRows = 64, kKnnStages = 2, kReaders = kGramThreads / kKnnRows;
constexpr int kDistanceStride = kKnnRows + 1;  // no bank conflicts down a column

struct KnnPlan {
  int64_t row_tiles;  // of a sample
  int32_t chunks;     // of 128 bytes of channels
  bool aligned;       // 16-byte accesses are allowed
};

struct KnnShared {
  unsigned char* stages;              // [kKnnStages] panels of columns, then of rows
  float* distance;                    // [rows, kDistanceStride]
  float *row_square, *column_square;  // [64], not finite where there is no row
  int32_t *row_token, *column_token;  // [64]
  float* nearest;                     // [k, kGramThreads]
  static constexpr int kPanel = kKnnRows * kPanelBytes;

  __device__ __forceinline__ explicit KnnShared(unsigned char* base) {
    stages = base;
    distance = reinterpret_cast<float*>(base + kKnnStages * 2 * kPanel);
    row_square = distance + kKnnRows * kDistanceStride;
    column_square = row_square + kKnnRows;
    row_token = reinterpret_cast<int32_t*>(column_square + kKnnRows);
    column_token = row_token + kKnnRows;
    nearest = reinterpret_cast<float*>(column_token + kKnnRows);
  }

  static size_t bytes(int k) {
    return kKnnStages * 2 * kPanel + sizeof(float) * (kKnnRows * kDistanceStride + 4 * kKnnRows + k * kGramThreads);
  }
};

__device__ inline void knn_barrier() {
#ifndef SACCADE_MUTANT_NO_KNN_BARRIER
  __syncthreads();
#endif
}

// Products of 64 rows with 64 columns, chunk by chunk, the next on its way while one is used.
template <class Tile>
__device__ __forceinline__ void knn_products(const KnnDensityArgs& args, const KnnPlan& plan, const KnnShared& shared,
                                             const typename Tile::T::Bits* x, Tile& tile) {
  using T = typename Tile::T;
  const auto bring = [&](int chunk) {
    unsigned char* stage = shared.stages + chunk % kKnnStages * 2 * KnnShared::kPanel;
    const int channel = chunk * kPanelDepth<T>;
    load_panel<T, kKnnRows>(stage, shared.column_token, x, args.x_stride[1], channel, args.channels, plan.aligned);
    load_panel<T, kKnnRows>(stage + KnnShared::kPanel, shared.row_token, x, args.x_stride[1], channel, args.channels,
                            plan.aligned);
    copy_async_commit();
  };
  tile.clear();
  bring(0);
#pragma unroll 1
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    copy_async_wait<0>();
    knn_barrier();  // this chunk has come, and the last one has been read by all
    if (chunk + 1 < plan.chunks) bring(chunk + 1);
    const unsigned char* columns = shared.stages + chunk % kKnnStages * 2 * KnnShared::kPanel;
    tile.multiply(columns + KnnShared::kPanel, columns);
  }
}

// Puts a distance into this thread's ascending list; `worst` is its last entry.
__device__ __forceinline__ void keep_near(float* nearest, int k, float distance, float& worst) {
  if (!(distance < worst)) return;
  int at = k - 1;
#pragma unroll 1
  for (; at > 0 && nearest[(at - 1) * kGramThreads] > distance; --at) {
    nearest[at * kGramThreads] = nearest[(at - 1) * kGramThreads];
  }
  nearest[at * kGramThreads] = distance;
  worst = nearest[(k - 1) * kGramThreads];
}

template <class Tile>
__device__ __forceinline__ void knn_block(const KnnDensityArgs& args, const KnnPlan& plan, unsigned char* base) {
  const float infinity = __uint_as_float(0x7f800000u);
  const KnnShared shared(base);
  const int64_t batch = blockIdx.x / plan.row_tiles, first_row = (blockIdx.x - batch * plan.row_tiles) * kKnnRows;
  const auto* x = static_cast<const typename Tile::T::Bits*>(args.x) + batch * args.x_stride[0];
  const float* squares = static_cast<const float*>(args.workspace) + batch * args.tokens;
  const int reader_row = threadIdx.x % kKnnRows, reader = threadIdx.x / kKnnRows;
  float* nearest = shared.nearest + threadIdx.x;
  float worst = infinity;
  for (int i = 0; i < args.k; ++i) nearest[i * kGramThreads] = infinity;
  const auto token_at = [&](int64_t first) {
    const int64_t token = first + threadIdx.x;
    return static_cast<int32_t>(token < args.tokens ? token : -1);
  };
  if (threadIdx.x < kKnnRows) {
    const int32_t token = token_at(first_row);
    shared.row_token[threadIdx.x] = token;
    shared.row_square[threadIdx.x] = token < 0 ? infinity : squares[token];
  }
#pragma unroll 1
  for (int64_t first = 0; first < args.tokens; first += kKnnRows) {
    if (threadIdx.x < kKnnRows) {
      const int32_t token = token_at(first);
      shared.column_token[threadIdx.x] = token;
      shared.column_square[threadIdx.x] = token < 0 ? infinity : squares[token];
    }
    knn_barrier();
    Tile tile;
    knn_products(args, plan, shared, x, tile);
#pragma unroll
    for (int i = 0; i < Tile::kMyRows; ++i) {
      const int row = Tile::row(i);
      const float row_square = shared.row_square[row];
#pragma unroll
      for (int j = 0; j < Tile::kMyColumns; ++j) {
        const int column = Tile::column() + Tile::offset(j);
        const float column_square = shared.column_square[column];
        float distance = row_square + column_square - 2.0f * tile.value(i, j);
        if (distance < 0.0f || first_row + row == first + column) distance = 0.0f;
        if (!is_finite(column_square)) distance = infinity;
        shared.distance[row * kDistanceStride + column] = distance;
      }
    }
    knn_barrier();  // the tile is complete; squares and tokens of its columns are done with
#pragma unroll 1
    for (int i = reader; i < kKnnRows; i += kReaders) {
      keep_near(nearest, args.k, shared.distance[reader_row * kDistanceStride + i], worst);
    }
  }
  knn_barrier();  // of all readers
  const int64_t token = first_row + threadIdx.x;
  if (threadIdx.x >= kKnnRows || token >= args.tokens) return;
  double sum = 0.0;
  int used[kReaders] = {}, number = 0;
#pragma unroll 1
  for (int i = 0; i < args.k; ++i) {
    float least_distance = infinity;
    int who = -1;
#pragma unroll
    for (int r = 0; r < kReaders; ++r) {  // no list runs out: k are taken from lists of k
      const float head = shared.nearest[used[r] * kGramThreads + r * kKnnRows + threadIdx.x];
      if (head < least_distance) least_distance = head, who = r;
    }
    if (who < 0) break;
#pragma unroll
    for (int r = 0; r < kReaders; ++r) used[r] += r == who;
    sum += least_distance;
    ++number;
  }
  const float mean = static_cast<float>(sum) / static_cast<float>(max(number, 1)) / static_cast<float>(args.channels);
  args.out[batch * args.tokens + token] = is_finite(shared.row_square[threadIdx.x]) ? mean : infinity;
}

// The tile of a type: tensor cores for 16 bits, 4 x 2 warps of 16 x 32.
template <typename T>
struct KnnTile {
  using Tile = MmaTile<T, 4, 2, 1, 4>;
};
template <>
struct KnnTile<Float32> {
  using Tile = SimtTile;
};

template <typename T>
__global__ void __launch_bounds__(kGramThreads, 2)
    knn_density_kernel(const __grid_constant__ KnnDensityArgs args, const __grid_constant__ KnnPlan plan) {
  using Tile = typename KnnTile<T>::Tile;
  static_assert(Tile::kRows == kKnnRows && Tile::kColumns == kKnnRows, "64 x 64");
  SACCADE_SHARED(shared);
  knn_block<Tile>(args, plan, shared);
}

}  // namespace saccade
