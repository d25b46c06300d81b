// What the planning kernels of block-sparse attention are launched with, on the CPU and on a GPU. Plain data.
#pragma once
#include "attention_args.h"

namespace saccade {

// Mean of the tokens of each block; specification reference/block_pool.py.
struct BlockPoolArgs {
  const void* x = nullptr;  // [B, H, S, D], last stride 1
  int64_t x_stride[3] = {};
  PositionTable order;  // [blocks * block] token at each position, -1 for none; null: position = token
  int64_t batch = 0, tokens = 0;
  int32_t heads = 0, head_dim = 0, block = 64, blocks = 0;
  Dtype dtype = Dtype::kFloat32;
  float* out = nullptr;  // [B, H, blocks, D]; 0 where a block has no token
};

enum class Choose : int32_t { kTop, kShare, kThreshold };

// Which key blocks a query block sees; specification reference/block_select.py.
struct BlockSelectArgs {
  const float* q = nullptr;          // [B, H, nQ, D] contiguous
  const float* k = nullptr;          // [B, Hk, nK, D] contiguous
  const uint8_t* classes = nullptr;  // [1|B, 1|H, nQ, nK] contiguous, or null: all 1
  int64_t class_stride[2] = {};      // batch, head
  int64_t batch = 0;
  int32_t heads = 0, kv_heads = 0, head_dim = 0, q_blocks = 0, k_blocks = 0;
  Choose mode = Choose::kTop;
  int32_t keep = 0;
  float p = 0.0f, scale = 1.0f;
  int32_t width = 0;            // of the rows of indices
  int32_t* counts = nullptr;    // [B, H, nQ]
  int32_t* indices = nullptr;   // [B, H, nQ, width]; 0 behind the count
  int32_t* p_counts = nullptr;  // null where there are no classes
  int32_t* p_indices = nullptr;
  void* workspace = nullptr;
};

// The same lists by column, rows ascending; specification reference/block_transpose.py.
struct BlockTransposeArgs {
  BlockLists lists;    // contiguous [lists, rows]
  int64_t groups = 0;  // Lb * Lh
  int32_t rows = 0, columns = 0;
  int64_t entries = 0;           // elements of lists.indices, and so of t_indices
  int32_t* t_starts = nullptr;   // [groups, columns]
  int32_t* t_counts = nullptr;   // [groups, columns]
  int32_t* t_indices = nullptr;  // [entries]; 0 behind the last
  int32_t* t_ids = nullptr;      // [entries], where lists.ids is given
  void* workspace = nullptr;
};

}  // namespace saccade
