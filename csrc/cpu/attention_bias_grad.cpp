// attention_bias_grad on the CPU. A work item is a tile of queries of one bias: it owns these rows of the fp32 sums,
// and goes through the samples and heads that share them, in their order.
#include "attention_grads.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

// What one item works in.
struct Buffers {
  float *q, *dout, *rows, *k_columns, *v_columns;  // [kTile, width], the last two [width, kTile]
  float *scores, *grads;                           // [kTile, kTile]
  float *shift, *delta, *by_key;                   // [kTile]
};

void columns_of(const AttentionInputs& in, const void* x, const int64_t (&stride)[3], int64_t batch, int64_t head,
                const TileTokens& t, int64_t width, float* rows, float* columns) {
  load_rows(x, stride, in.dtype, batch, head, t, in.head_dim, false, rows, width);
  std::memset(rows + t.span * width, 0, sizeof(float) * static_cast<size_t>((kTile - t.span) * width));
  transpose_rows(rows, width, kTile, width, columns, kTile);
}

// sums [Sq, Sk] += grads, at the tokens of the tiles
void add_rows(const TileTokens& queries, const TileTokens& keys, const float* grads, float* sums, int64_t k_len) {
  for (int64_t i = 0; i < queries.span; ++i, grads += kTile) {
    if (queries.token[i] < 0) continue;
    float* row = sums + queries.token[i] * k_len;
    if (keys.straight) {
      row += keys.token[0];
      for (int64_t j = 0; j < keys.span; ++j) row[j] += grads[j];
    } else {
      for (int64_t j = 0; j < keys.span; ++j)
        if (keys.token[j] >= 0) row[keys.token[j]] += grads[j];
    }
  }
}

void one_head(const AttentionBiasGradArgs& a, int64_t batch, int64_t head, int64_t q_tile, const TileTokens& queries,
              int64_t width, const Buffers& b, float* sums) {
  const AttentionInputs& in = a.in;
  const BlockLayoutArgs& l = in.layout;
  load_rows(in.q, in.q_stride, in.dtype, batch, head, queries, in.head_dim, false, b.q, width);
  load_rows(a.dout, a.dout_stride, in.dtype, batch, head, queries, in.head_dim, false, b.dout, width);
  for (int64_t i = 0; i < queries.span; ++i) {
    const int64_t at = (batch * in.heads + head) * in.q_len + queries.token[i];
    const float lse = queries.token[i] < 0 ? -std::numeric_limits<float>::infinity() : a.lse[at];
    b.shift[i] = shift_of(lse);
    b.delta[i] = queries.token[i] < 0 ? 0.0f : delta_of(lse, a.delta[at]);
  }
  const int64_t kv_head = head / (in.heads / in.kv_heads);
  each_tile(l.full, l.partial, batch, head, q_tile * kTile / l.q_block, l.q_blocks, l.k_blocks, l.k_block / kTile,
            [&](const TileRef& ref) {
              const TileTokens keys = tokens_of(l.k_order, batch, kv_head, ref.tile, in.k_len);
              if (keys.span == 0) return;
              uint64_t visible[kTile];
              if (ref.partial)
                visible_pairs(l, batch, head, q_tile, ref.tile, ref.id, keys.exists, queries.span, visible);
              if (in.key_bias != nullptr) key_biases(in, batch, keys, b.by_key);
              columns_of(in, in.k, in.k_stride, batch, kv_head, keys, width, b.rows, b.k_columns);
              columns_of(in, in.v, in.v_stride, batch, kv_head, keys, width, b.rows, b.v_columns);
              const int64_t columns = padded(keys.span);
              product<false, Into::kStore>(queries.span, columns, in.head_dim, b.q, width, b.k_columns, kTile, b.scores,
                                           kTile, nullptr, kScoreSum);
              product<false, Into::kStore>(queries.span, columns, in.head_dim, b.dout, width, b.v_columns, kTile,
                                           b.grads, kTile, nullptr, kGradSum);
              grads_of_scores({&in, batch, head, queries.span, &queries, &keys, ref.partial ? visible : nullptr,
                               in.key_bias == nullptr ? nullptr : b.by_key, b.shift, b.delta, nullptr},
                              b.scores, b.grads);
              add_rows(queries, keys, b.grads, sums, in.k_len);
            });
}

}  // namespace

int64_t attention_bias_grad_space(const AttentionBiasGradArgs& a) {
  return kTile * (padded(a.in.head_dim) * 5 + 2 * kTile + 3);
}

void attention_bias_grad(const AttentionBiasGradArgs& a, float* sums, int64_t item, int64_t from, int64_t to,
                         float* space) {
  const AttentionInputs& in = a.in;
  const int64_t tiles = int64_t{in.layout.q_blocks} * (in.layout.q_block / kTile), width = padded(in.head_dim);
  const int64_t q_tile = item % tiles, bias = item / tiles;
  Buffers b;
  b.q = space;
  b.dout = b.q + kTile * width;
  b.rows = b.dout + kTile * width;
  b.k_columns = b.rows + kTile * width;
  b.v_columns = b.k_columns + kTile * width;
  b.scores = b.v_columns + kTile * width;
  b.grads = b.scores + kTile * kTile;
  b.shift = b.grads + kTile * kTile;
  b.delta = b.shift + kTile;
  b.by_key = b.delta + kTile;
  const int64_t heads = a.bias_heads == 1 ? in.heads : 1;  // that share a bias
  for (int64_t n = from; n < to; ++n) {
    const int64_t batch = bias / a.bias_heads + n / heads, head = bias % a.bias_heads + n % heads;
    const TileTokens queries = tokens_of(in.layout.q_order, batch, head, q_tile, in.q_len);
    if (queries.span > 0) one_head(a, batch, head, q_tile, queries, width, b, sums + bias * in.q_len * in.k_len);
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
