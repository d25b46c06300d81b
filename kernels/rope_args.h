// What the rotary kernels are launched with, on the CPU and on a GPU. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace saccade {

enum class PositionDtype : int32_t { kInt32, kInt64, kFloat32, kFloat64 };

// One of q and k: [B, heads, S, D], last stride 1; the others are any, in elements.
struct Heads {
  const void* x = nullptr;
  void* y = nullptr;         // y == x in place
  int64_t heads = 0;         // 0: there is no such tensor
  int64_t x_stride[3] = {};  // batch, head, token
  int64_t y_stride[3] = {};
};

// How far each pair of columns turns; python/saccade/reference/turns.py is the specification.
struct Angles {
  const void* positions = nullptr;  // [A, B, S]
  PositionDtype position_dtype = PositionDtype::kInt64;
  int64_t position_stride[3] = {};  // axis, batch (0 when shared), token
  const int64_t* steps = nullptr;   // [A, G, R] contiguous, 2^-64 turns
  int32_t axes = 1, groups = 1, pairs = 0, shift = 0;
  int32_t begin = 0, end = 0;  // pairs outside are the identity in every group
  bool interleaved = false, inverse = false;
  float scale = 1.0f;
};

struct RopeArgs {
  Heads q, k;
  Angles angles;
  int64_t batch = 0, tokens = 0;
  int32_t head_dim = 0;
  Dtype dtype = Dtype::kFloat32;
};

// qk_norm_rope: RMS normalisation over D (head) or over heads * D (row), weight [D] or [heads * D], null for none.
struct NormArgs {
  RopeArgs rope;
  const void* q_weight = nullptr;
  const void* k_weight = nullptr;
  Dtype weight_dtype = Dtype::kFloat32;
  double eps = 1e-6;
  bool row = false;
};

// Its gradient: rope.q.x holds x, rope.q.y receives dx; dy comes beside. Weight gradients are summed in float32
// (float64 for float64) in a fixed order: every block writes its partial sum to `workspace`, a second pass adds them
// up.
struct NormGradArgs {
  NormArgs norm;
  const void* q_dy = nullptr;
  const void* k_dy = nullptr;
  int64_t q_dy_stride[3] = {}, k_dy_stride[3] = {};
  void* q_dweight = nullptr;  // [D] or [heads * D], float32 (float64)
  void* k_dweight = nullptr;
  void* workspace = nullptr;
};

// rope_freq_grad: q.x, k.x hold x; q_dx, k_dx the gradients that apply_rope(inverse) returned.
struct FreqGradArgs {
  RopeArgs rope;  // angles.steps is not read; groups and pairs are
  const void* q_dx = nullptr;
  const void* k_dx = nullptr;
  int64_t q_dx_stride[3] = {}, k_dx_stride[3] = {};
  void* out = nullptr;  // [A, G, R] float32 (float64 for float64)
  void* workspace = nullptr;
};

}  // namespace saccade
