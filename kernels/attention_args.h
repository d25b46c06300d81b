// What the attention kernels are launched with, on the CPU and on a GPU. Plain data: no torch, no CUDA.
//
// Strides are in elements; the last dimension of every value tensor has stride 1. Index tensors are contiguous int32; a
// batch or head stride is 0 where one entry serves all. python/saccade/reference has the specification of each op under
// its name, python/saccade/_schemas.inc the shapes.
#pragma once
#include "dtype.h"

namespace saccade {

constexpr int32_t kSeenByAll = INT32_MIN;  // at[0][j]: a key that every query sees

// Lists of blocks: list `row` has entries indices[starts[row] + n], n < counts[row], ascending.
struct BlockLists {
  const int32_t* starts = nullptr;   // [Lb, Lh, rows]; null: no lists
  const int32_t* counts = nullptr;   // [Lb, Lh, rows]
  const int32_t* indices = nullptr;  // flat
  const int32_t* ids = nullptr;      // as indices: rows of `bits`
  int64_t stride[2] = {};            // batch, head: in lists
};

// A table of int32 for every position, of one or every sample and head.
struct PositionTable {
  const int32_t* data = nullptr;
  int64_t stride[2] = {};  // batch, head
};

struct BlockLayoutArgs {
  BlockLists full, partial;       // by query block: entries are key blocks
  BlockLists t_full, t_partial;   // by key block: entries are query blocks; backward alone
  const int32_t* bits = nullptr;  // [n, q_block, k_block / 32]
  PositionTable box;              // [2, axes, q_blocks * q_block]
  PositionTable at;               // [axes, k_blocks * k_block]
  PositionTable q_order;          // [q_blocks * q_block], null: position = token
  PositionTable k_order;          // [k_blocks * k_block]; its head is a key head
  int32_t axes = 0;
  int32_t q_block = 64, k_block = 64;  // 64 or 128
  int32_t q_blocks = 0, k_blocks = 0;
};

struct AttentionInputs {
  const void* q = nullptr;  // [B, H, Sq, D]
  const void* k = nullptr;  // [B, Hk, Sk, D]
  const void* v = nullptr;
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};  // batch, head, token
  const void* bias = nullptr;                                    // [1|B, 1|H, Sq, Sk]
  int64_t bias_stride[3] = {};                                   // batch, head, query
  const float* key_bias = nullptr;                               // [1|B, Sk]
  int64_t key_bias_stride = 0;
  int64_t batch = 0, q_len = 0, k_len = 0;
  int32_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  Dtype dtype = Dtype::kFloat32, bias_dtype = Dtype::kFloat32;
  BlockLayoutArgs layout;
};

// out = softmax(scale q k^T + bias + key_bias) v over what the layout shows; lse its logarithmic sum, -inf for a query
// that sees nothing, whose out is 0.
struct SparseAttentionArgs {
  AttentionInputs in;
  void* out = nullptr;  // [B, H, Sq, D]
  int64_t out_stride[3] = {};
  float* lse = nullptr;  // [B, H, Sq]
  void* workspace = nullptr;
};

struct SparseAttentionGradArgs {
  AttentionInputs in;
  const void* dout = nullptr;  // [B, H, Sq, D]
  const void* out = nullptr;   // [B, H, Sq, D]
  int64_t dout_stride[3] = {}, out_stride[3] = {};
  const float* lse = nullptr;   // [B, H, Sq]
  const float* dlse = nullptr;  // [B, H, Sq] contiguous, or null: 0
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  int64_t dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};
  float* dkey_bias = nullptr;  // [B, H, Sk], or null where there is no key_bias
  float* delta = nullptr;      // [B, H, Sq]: rowsum(dout * out) - dlse
  void* workspace = nullptr;
};

// The gradient of the bias, summed over the samples and heads that share it; 0 where the layout shows nothing.
struct AttentionBiasGradArgs {
  AttentionInputs in;
  const void* dout = nullptr;
  int64_t dout_stride[3] = {};
  const float* lse = nullptr;    // [B, H, Sq]
  const float* delta = nullptr;  // [B, H, Sq]
  void* dbias = nullptr;         // [bias_batch, bias_heads, Sq, Sk] contiguous, of bias_dtype
  int64_t bias_batch = 1;        // 1 or B
  int32_t bias_heads = 1;        // 1 or H
  void* workspace = nullptr;
};

// Statistics of rows of the attention map, and its column sums, without the map; specifications
// reference/attention_rows.py and attention_columns.py. in.v, in.bias and in.layout are not used.
struct AttentionMapArgs {
  AttentionInputs in;
  const int32_t* rows = nullptr;  // [R] queries, or null: all
  int64_t row_count = 0;
  bool causal = false;       // query i sees keys up to i + Sk - Sq
  float* lse = nullptr;      // [B, H, R]; written by attention_rows, read by attention_columns
  float* entropy = nullptr;  // [B, H, R], attention_rows alone
  float* columns = nullptr;  // [B, H, Sk], attention_columns alone
  void* workspace = nullptr;
};

}  // namespace saccade
