// What attention_rows and attention_columns share: their arguments, and how heads are spread over threads.
#pragma once
#include <algorithm>
#include <memory>

#include "../cpu/planning_kernels.h"
#include "../util/parallel.h"
#include "planning_args.h"

namespace saccade {

inline AttentionMapArgs map_args(const Tensor& q, const Tensor& k, const OptionalTensor& rows,
                                 const OptionalTensor& key_bias, bool causal, double scale) {
  AttentionMapArgs args;
  AttentionInputs& in = args.in;
  in.dtype = check_rows(q, "q", in.q_stride);
  STD_TORCH_CHECK(check_rows(k, "k", in.k_stride) == in.dtype && k.device() == q.device(),
                  "k: expected the dtype and device of q");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3), "k: expected the batch and head_dim of q");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k: expected heads that divide the ", q.size(1),
                  " of q, got ", k.size(1));
  in.q = q.data_ptr();
  in.k = k.data_ptr();
  in.batch = q.size(0);
  in.heads = small(q.size(1), "q");
  in.kv_heads = small(k.size(1), "k");
  in.q_len = small(q.size(2), "q");
  in.k_len = small(k.size(2), "k");
  in.head_dim = small(q.size(3), "q");
  in.scale = static_cast<float>(scale);
  if (key_bias.has_value()) {
    check_dense(*key_bias, ScalarType::Float, q, "key_bias");
    STD_TORCH_CHECK(key_bias->dim() == 2 && (key_bias->size(0) == 1 || key_bias->size(0) == in.batch) &&
                        key_bias->size(1) == in.k_len,
                    "key_bias: expected [1 or B, Sk]");
    in.key_bias = data_of<const float>(*key_bias);
    in.key_bias_stride = key_bias->size(0) == 1 ? 0 : in.k_len;
  }
  args.row_count = in.q_len;
  if (rows.has_value()) {
    check_dense(*rows, ScalarType::Int, q, "rows");
    STD_TORCH_CHECK(rows->dim() == 1, "rows: expected [R]");
    args.rows = data_of<const int32_t>(*rows);
    args.row_count = rows->size(0);
  }
  args.causal = causal;
  return args;
}

// A copy of the streaming side is made for a run of heads at a time, in so much memory, or for one head in more.
constexpr int64_t kMapScratchBytes = int64_t{64} << 20;

using MapPack = void (*)(const AttentionMapArgs&, const cpu::MapScratch&, int64_t, int64_t);
using MapKernel = void (*)(const AttentionMapArgs&, const cpu::MapScratch&, int64_t, int64_t, float*);

// `streamed` rows of each of `heads` stream; each has `repeat` heads with `held` rows that stay.
inline void run_map(const AttentionMapArgs& args, int64_t heads, int64_t streamed, int64_t repeat, int64_t held,
                    MapPack pack, MapKernel kernel) {
  const cpu::PanelShape shape = cpu::planning_kernels().map_shape;
  const int64_t width = args.in.head_dim;
  const int64_t tiles = cpu::ceil_div(streamed, shape.tile), panels = cpu::ceil_div(held, shape.panel);
  const int64_t slots = tiles * shape.tile, bytes = slots * (width + 2) * 4;
  const int64_t run = std::max(int64_t{1}, std::min(heads, kMapScratchBytes / (bytes + 1)));
  // Not value-initialised: what the kernels read, they have written.
  std::unique_ptr<float[]> memory(new float[run * slots * (width + 1)]);
  std::unique_ptr<int32_t[]> sees(new int32_t[run * slots]);
  cpu::MapScratch scratch;
  scratch.tiles = memory.get();
  scratch.add = memory.get() + run * slots * width;
  scratch.sees = sees.get();
  for (scratch.first = 0; scratch.first < heads; scratch.first += run) {
    const int64_t first = scratch.first, count = std::min(run, heads - first) * repeat;
    for_items(count / repeat * tiles, grain_of(shape.tile * width * 4), 0,
              [&](int64_t item, float*) { pack(args, scratch, first + item / tiles, item % tiles); });
    for_items(count * panels, 1, shape.panel * width, [&](int64_t item, float* space) {
      kernel(args, scratch, first * repeat + item / panels, item % panels, space);
    });
  }
}

}  // namespace saccade
