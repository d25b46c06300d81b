// What the token-merging kernels are launched with, on the CPU and on a GPU. Plain data: no torch, no CUDA.
//
// Strides are in elements; the last dimension of every value tensor has stride 1. Index tensors are contiguous int32,
// their batch stride is 0 where one plan serves the whole batch.
#pragma once
#include "dtype.h"

namespace saccade {

enum class Score : int32_t { kCosine, kDot, kL2 };
enum class Reduce : int32_t { kMean, kSum, kMax, kReplace };

// The best destination of every source; python/saccade/reference/match.py is the specification.
struct MatchArgs {
  const void* metric = nullptr;      // [B, N, C]
  int64_t metric_stride[2] = {};     // batch, token
  const int32_t* src = nullptr;      // [1|B, A] token positions
  const int32_t* dst = nullptr;      // [1|B, K] token positions
  const int32_t* ranges = nullptr;   // [1|B, A, R, 2], or null: every destination
  const uint8_t* protect = nullptr;  // [1|B, N], or null: no token
  int64_t src_stride = 0, dst_stride = 0, ranges_stride = 0, protect_stride = 0;
  int64_t batch = 0, tokens = 0, sources = 0, destinations = 0;
  int32_t channels = 0, range_count = 0;
  Score score = Score::kCosine;
  Dtype dtype = Dtype::kFloat32;
  float* best = nullptr;      // [B, N]
  int32_t* target = nullptr;  // [B, N]
  void* workspace = nullptr;
};

// Which sources are merged, and the rows that remain; specification reference/merge_plan.py.
struct MergePlanArgs {
  const float* score = nullptr;     // [B, N]
  const int32_t* target = nullptr;  // [B, N]
  int64_t batch = 0, tokens = 0, rows = 0;
  int64_t r = 0;           // merged at most, of each sample or of the whole batch
  float threshold = 0.0f;  // scores below it are not merged
  bool whole_batch = false;
  int32_t* inverse = nullptr;  // [B, N]
  int32_t* ptr = nullptr;      // [B, rows + 1]
  int32_t* members = nullptr;  // [B, N]
  int32_t* head = nullptr;     // [B, rows]
  int32_t* counts = nullptr;   // [B]
  void* workspace = nullptr;
};

// The part of a plan that kernels follow; its arrays have batch stride 0 where `shared`.
struct PlanView {
  const int32_t* inverse = nullptr;  // [1|B, N]
  const int32_t* ptr = nullptr;      // [1|B, rows + 1]
  const int32_t* members = nullptr;  // [1|B, N]
  const int32_t* head = nullptr;     // [1|B, rows]
  bool shared = false;
};

// y[row] from the members of the row; specification reference/merge.py.
struct MergeArgs {
  const void* x = nullptr;        // [B, N, D]
  int64_t x_stride[2] = {};       // batch, token
  const float* weight = nullptr;  // [1|B, N], or null: 1
  int64_t weight_stride = 0;
  PlanView plan;  // inverse is not read
  int64_t batch = 0, tokens = 0, rows = 0, width = 0;
  Reduce mode = Reduce::kMean;
  Dtype dtype = Dtype::kFloat32;
  void* y = nullptr;           // [B, rows, D] contiguous
  float* total = nullptr;      // [B, rows]
  float* log_total = nullptr;  // [B, rows]
};

// Its gradient: dx[token] from dy[inverse[token]].
struct MergeGradArgs {
  const void* dy = nullptr;  // [B, rows, D]
  int64_t dy_stride[2] = {};
  const void* x = nullptr;  // [B, N, D], for max alone
  int64_t x_stride[2] = {};
  const float* weight = nullptr;
  int64_t weight_stride = 0;
  const float* total = nullptr;  // [B, rows], as merge wrote it
  PlanView plan;
  int64_t batch = 0, tokens = 0, rows = 0, width = 0;
  Reduce mode = Reduce::kMean;
  Dtype dtype = Dtype::kFloat32;
  void* dx = nullptr;  // [B, N, D] contiguous
};

// out[token] = residual[token] + gate * y[inverse[token]]; specification reference/unmerge.py.
struct UnmergeArgs {
  const void* y = nullptr;  // [B, rows, D]
  int64_t y_stride[2] = {};
  const void* residual = nullptr;  // [B, N, D] or null
  int64_t residual_stride[2] = {};
  const void* gate = nullptr;        // [1|B, 1|N, D] or null
  int64_t gate_stride[2] = {};       // 0 where it has one entry
  const int32_t* inverse = nullptr;  // [1|B, N]
  bool shared = false;
  int64_t batch = 0, tokens = 0, rows = 0, width = 0;
  Dtype dtype = Dtype::kFloat32;
  void* out = nullptr;  // [B, N, D] contiguous
};

// Pooling of [B, T, H, W, D] by a softmax inside every window; specification reference/prompt_pool3d.py.
struct PromptPoolArgs {
  const void* x = nullptr;         // [B, T, H, W, D]
  int64_t x_stride[4] = {};        // batch, t, h, w
  const float* weights = nullptr;  // [B, T, H, W] contiguous
  int64_t batch = 0, width = 0;
  int32_t size[3] = {}, kernel[3] = {}, stride[3] = {}, out_size[3] = {};
  float temperature = 0.01f;
  Dtype dtype = Dtype::kFloat32;
  void* y = nullptr;  // [B, To, Ho, Wo, D] contiguous
};

struct PromptPoolGradArgs {
  PromptPoolArgs pool;        // pool.y is not written
  const void* dy = nullptr;   // [B, To, Ho, Wo, D] contiguous
  void* dx = nullptr;         // [B, T, H, W, D] contiguous
  float* dweights = nullptr;  // [B, T, H, W]
  void* workspace = nullptr;
};

// Cosine of matching rows; specification reference/row_similarity.py.
struct RowSimilarityArgs {
  const void* x = nullptr;  // [B, N, C]
  const void* y = nullptr;  // [B, N, C], strides of 0 for one row shared by many
  int64_t x_stride[2] = {}, y_stride[2] = {};
  int64_t batch = 0, tokens = 0;
  int32_t channels = 0;
  Dtype dtype = Dtype::kFloat32;
  float* out = nullptr;  // [B, N]
};

// Indices of the k largest, ascending; specification reference/keep_top.py.
struct KeepTopArgs {
  const float* scores = nullptr;  // [B, N]
  int64_t score_stride = 0, batch = 0, tokens = 0, k = 0;
  int64_t* out = nullptr;  // [B, k]
};

// Mean squared distance to the k nearest rows, itself among them; specification reference/knn_density.py.
struct KnnDensityArgs {
  const void* x = nullptr;  // [B, N, C]
  int64_t x_stride[2] = {};
  int64_t batch = 0, tokens = 0;
  int32_t channels = 0, k = 0;
  Dtype dtype = Dtype::kFloat32;
  float* out = nullptr;  // [B, N]
  void* workspace = nullptr;
};

}  // namespace saccade
