// The native CPU kernels of attention. As in kernels.h: one source for every instruction set, a kernel handles one work
// item on the calling thread, and results do not depend on how items are spread over threads.
#pragma once
#include <cstdint>

#include "attention_args.h"
#include "axial_args.h"
#include "block_args.h"

namespace saccade::cpu {

constexpr int64_t kTile = 64;  // queries and keys that kernels handle at once: blocks are one or two tiles

// Keys and values of a run of (sample, key head) pairs, in the form that the forward kernel multiplies.
struct PackedKeys {
  int64_t first = 0;           // pair = sample * kv_heads + key head
  int64_t tiles = 0;           // key tiles of a pair
  int64_t tile_floats = 0;     // kTile rows of D in whole vectors
  float* keys = nullptr;       // [pairs, tiles, D, kTile]
  float* values = nullptr;     // [pairs, tiles, kTile, D]; rows that are not finite are 0 here
  uint64_t* broken = nullptr;  // [pairs, tiles]: bit j, the value row of key j is not finite
  uint8_t* used = nullptr;     // [pairs, tiles]: some list of this pair has the tile
};

struct SparseAttentionKernels {
  int64_t lanes;                                 // of a vector
  int64_t (*space)(const SparseAttentionArgs&);  // floats that `run` needs
  void (*mark)(const SparseAttentionArgs&, const PackedKeys&, int64_t pair);
  void (*pack)(const SparseAttentionArgs&, const PackedKeys&, int64_t tile);
  void (*run)(const SparseAttentionArgs&, const PackedKeys&, int64_t item, float* space);
};

// Queries of a run of heads in fp32, and what the chunks of their key blocks add to dq. Tiles as in [heads, tiles].
struct PackedQueries {
  int64_t first = 0, heads = 0;                               // sample * H + head; heads at hand
  int64_t tiles = 0, tile_floats = 0;                         // query tiles of a head; kTile rows of D in whole vectors
  int64_t chunks = 0;                                         // chunk c of a key head has the blocks c, c + chunks, ..
  float *q = nullptr, *dout = nullptr;                        // rows that are not finite are 0
  float *shift = nullptr, *delta = nullptr, *dlse = nullptr;  // [heads, tiles, kTile]; delta without dlse
  uint64_t* broken = nullptr;  // [heads, tiles]: bit i, q or dout of query i is not finite
  float* dq = nullptr;         // [chunks, heads, tiles, ..]
  uint8_t* touched = nullptr;  // [chunks, heads, tiles]: dq is defined
  uint64_t* spoilt = nullptr;  // [chunks, heads, tiles]: queries whose gradient is NaN
};

struct SparseAttentionGradKernels {
  int64_t (*space)(const SparseAttentionGradArgs&);
  void (*rows)(const SparseAttentionGradArgs&, const PackedQueries&, int64_t tile);
  void (*run)(const SparseAttentionGradArgs&, const PackedQueries&, int64_t item, float* space);  // [pairs, chunks]
  void (*sum)(const SparseAttentionGradArgs&, const PackedQueries&, int64_t tile);
};

struct AttentionBiasGradKernels {
  int64_t (*space)(const AttentionBiasGradArgs&);
  // item: a query tile of a bias; of the samples and heads that share it, numbers from .. to; sums [biases, Sq, Sk]
  void (*run)(const AttentionBiasGradArgs&, float* sums, int64_t item, int64_t from, int64_t to, float* space);
};

struct AttentionKernels {
  SparseAttentionKernels sparse_attention;
  SparseAttentionGradKernels sparse_attention_bwd;
  AttentionBiasGradKernels attention_bias_grad;
};

namespace baseline {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}

const AttentionKernels& attention_kernels();

}  // namespace saccade::cpu
