// What the axial attention kernels are launched with, on the CPU and on a GPU. Plain data; strides as in
// attention_args.h.
#pragma once
#include "dtype.h"

namespace saccade {

// Tokens: `prefix`, then a grid (t, h, w) in t-major order, cut into boxes from the origin; those at the far edges are
// smaller. A token sees the prefix and its box. `mean`: a prefix token is a query in every box, out is the mean over
// boxes; otherwise it sees every token.
struct AxialGeometry {
  int32_t prefix = 0;
  int32_t grid[3] = {};
  int32_t box[3] = {};
  bool mean = false;
};

struct AxialAttentionArgs {
  const void* q = nullptr;  // [B, H, S, D], S = prefix + grid
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};  // batch, head, token
  int64_t batch = 0, tokens = 0;
  int32_t heads = 0, head_dim = 0;
  float scale = 1.0f;
  Dtype dtype = Dtype::kFloat32;
  AxialGeometry geometry;
  void* out = nullptr;  // [B, H, S, D]
  int64_t out_stride[3] = {};
  float* lse = nullptr;        // [B, H, S]; of a prefix row with `mean`: not defined, written as 0
  float* group_out = nullptr;  // [B, H, G, prefix, D] contiguous, with `mean` alone; boxes in t-major order
  float* group_lse = nullptr;  // [B, H, G, prefix]
  void* workspace = nullptr;
};

struct AxialAttentionGradArgs {
  AxialAttentionArgs forward;  // its outputs are inputs here
  const void* dout = nullptr;  // [B, H, S, D]
  int64_t dout_stride[3] = {};
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  int64_t dq_stride[3] = {}, dk_stride[3] = {}, dv_stride[3] = {};
  void* workspace = nullptr;
};

}  // namespace saccade
