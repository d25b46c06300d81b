// sparse_attention on the CPU. A work item is a tile of queries of one head: it walks its lists of key blocks a few
// tiles at a time, keeping a running maximum and sum (Milakov and Gimelshein 2018), and owns its rows of out and lse.
#include <cmath>
#include <limits>

#include "attention_tiles.h"
#include "exp.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr int64_t kTilesAtOnce = 2;  // key tiles between two updates of the maximum
constexpr int64_t kScoreStep = kTilesAtOnce * kTile;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one item works on.
struct Work {
  const AttentionInputs* in;
  int64_t batch, head, rows, width;  // rows of the tile up to its last token, columns of out in whole vectors
  TileTokens tokens;
  float *q, *scores, *out;     // [kTile, D], [kTile, kScoreStep], [kTile, width]
  float *top, *rescale, *sum;  // [kTile], [kTile], [kTile, kLanes]
  uint64_t spoilt;             // queries that see a value row that is not finite
};

// A key tile of the current step.
struct Keys {
  int64_t columns;  // whole vectors up to the last key
  int64_t span;
  float scale;  // of the scores; 1 where they are final
  const float* values;
};

// Scores of one tile, final where there is a mask or a bias: scaled, biased, -inf where nothing is to be seen.
void finish_scores(Work& w, const TileTokens& keys, const uint64_t* visible, Keys& k, float* scores) {
  const AttentionInputs& a = *w.in;
  const VecF scale = broadcast(a.scale), nothing = broadcast(-kInfinity);
  float by_key[kTile], bias[kTile];
  if (a.key_bias != nullptr) key_biases(a, w.batch, keys, by_key);
  const bool biased = a.bias != nullptr || a.key_bias != nullptr;
  for (int64_t i = 0; i < w.rows; ++i) {
    if (biased) bias_row(a, w.batch, w.head, w.tokens.token[i], keys, a.key_bias == nullptr ? nullptr : by_key, bias);
    const uint64_t seen = visible == nullptr ? keys.exists : visible[i];
    float* row = scores + i * kScoreStep;
    for (int64_t c = 0; c < k.columns; c += kLanes) {
      const VecF s = load_raw<VecF>(row + c);
      const VecF x = biased ? s * scale + load_raw<VecF>(bias + c) : s * scale;
      store_raw(row + c, where_bits(seen >> c, x, nothing));
    }
  }
  k.scale = 1.0f;
}

// The largest score of a row.
float largest(const float* row, const Keys* keys, int64_t count) {
  VecF most = broadcast(-kInfinity), also = most;
  for (int64_t n = 0; n < count; ++n, row += kTile) {
    const VecF scale = broadcast(keys[n].scale);
    const int64_t columns = keys[n].columns;
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
      most = max_of(load_raw<VecF>(row + c) * scale, most);
      also = max_of(load_raw<VecF>(row + c + kLanes) * scale, also);
    }
    if (c < columns) most = max_of(load_raw<VecF>(row + c) * scale, most);
  }
  return max_lanes(max_of(most, also));
}

// Scores to weights, in place; the running maximum and sum, and the factor that brings earlier results to the new
// maximum. One loop for each, over all rows: in a row, each waits for the one before.
void weigh(const Work& w, const Keys* keys, int64_t count) {
  alignas(64) float shift[kTile];
  for (int64_t i = 0; i < w.rows; ++i) shift[i] = largest(w.scores + i * kScoreStep, keys, count);
  for (int64_t i = 0; i < w.rows; i += kLanes) {  // rows behind the last are not used
    const VecF before = load_raw<VecF>(w.top + i), top = max_of(load_raw<VecF>(shift + i), before);
    const VecF by = top == broadcast(-kInfinity) ? VecF{} : top;
    store_raw(w.top + i, top);
    store_raw(shift + i, by);
    store_raw(w.rescale + i, exp_of(before - by));
  }
  for (int64_t i = 0; i < w.rows; ++i) {
    float* row = w.scores + i * kScoreStep;
    const VecF minus = splat(-shift[i]);
    VecF sum{};
    for (int64_t n = 0; n < count; ++n, row += kTile) {
      const VecF scale = splat(keys[n].scale);
      const int64_t columns = keys[n].columns;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const VecF p = exp_of(load_raw<VecF>(row + c) * scale + minus);
        store_raw(row + c, p);
        sum += p;
      }
    }
    store_raw(w.sum + i * kLanes, load_raw<VecF>(w.sum + i * kLanes) * splat(w.rescale[i]) + sum);
  }
}

void write(const SparseAttentionArgs& a, const Work& w) {
  for (int64_t i = 0; i < w.rows; ++i) {
    const int64_t token = w.tokens.token[i];
    if (token < 0) continue;
    const float sum = sum_lanes(load_raw<VecF>(w.sum + i * kLanes));
    const bool empty = sum == 0.0f;
    const bool spoilt = (w.spoilt >> i & 1) != 0;
    const float factor = spoilt ? std::numeric_limits<float>::quiet_NaN() : empty ? 0.0f : 1.0f / sum;
    store_row(a.out, a.out_stride, a.in.dtype, w.batch, w.head, token, a.in.head_dim, w.out + i * w.width, factor);
    const double lse = w.top[i] + std::log(static_cast<double>(sum));
    a.lse[(w.batch * a.in.heads + w.head) * a.in.q_len + token] = empty ? -kInfinity : static_cast<float>(lse);
  }
}

}  // namespace

int64_t sparse_attention_space(const SparseAttentionArgs& a) {
  return kTile * (padded(a.in.head_dim) * 2 + kScoreStep + 2 + kLanes);
}

void sparse_attention_mark(const SparseAttentionArgs& a, const PackedKeys& p, int64_t pair) {
  const BlockLayoutArgs& l = a.in.layout;
  const int64_t batch = (p.first + pair) / a.in.kv_heads, group = a.in.heads / a.in.kv_heads;
  const int64_t first = (p.first + pair) % a.in.kv_heads * group;
  uint8_t* used = p.used + pair * p.tiles;
  std::memset(used, 0, static_cast<size_t>(p.tiles));
  for (int64_t head = first; head < first + group; ++head)
    for (int64_t row = 0; row < l.q_blocks; ++row)
      each_tile(l.full, l.partial, batch, head, row, l.q_blocks, l.k_blocks, l.k_block / kTile,
                [&](const TileRef& t) { used[t.tile] = 1; });
}

void sparse_attention_pack(const SparseAttentionArgs& a, const PackedKeys& p, int64_t item) {
  if (p.used[item] == 0) return;
  const int64_t pair = p.first + item / p.tiles, batch = pair / a.in.kv_heads, head = pair % a.in.kv_heads;
  const int64_t width = padded(a.in.head_dim);
  const TileTokens t = tokens_of(a.in.layout.k_order, batch, head, item % p.tiles, a.in.k_len);
  alignas(64) float rows[kTile * kMaxHeadDim];
  load_rows(a.in.k, a.in.k_stride, a.in.dtype, batch, head, t, a.in.head_dim, false, rows, width);
  std::memset(rows + t.span * width, 0, sizeof(float) * static_cast<size_t>((kTile - t.span) * width));
  transpose_rows(rows, width, kTile, width, p.keys + item * p.tile_floats, kTile);
  p.broken[item] = load_rows(a.in.v, a.in.v_stride, a.in.dtype, batch, head, t, a.in.head_dim, true,
                             p.values + item * p.tile_floats, width);
}

void sparse_attention(const SparseAttentionArgs& a, const PackedKeys& p, int64_t item, float* space) {
  const AttentionInputs& in = a.in;
  const BlockLayoutArgs& l = in.layout;
  const int64_t group = in.heads / in.kv_heads, q_tiles = int64_t{l.q_blocks} * (l.q_block / kTile);
  const int64_t q_tile = item % q_tiles, pair = item / q_tiles / group;
  Work w;
  w.in = &in;
  w.batch = (p.first + pair) / in.kv_heads;
  const int64_t kv_head = (p.first + pair) % in.kv_heads;
  w.head = kv_head * group + item / q_tiles % group;
  w.tokens = tokens_of(l.q_order, w.batch, w.head, q_tile, in.q_len);
  w.rows = w.tokens.span;
  if (w.rows == 0) return;
  w.width = padded(in.head_dim);
  w.spoilt = 0;
  w.q = space;
  w.scores = w.q + kTile * w.width;
  w.out = w.scores + kTile * kScoreStep;
  w.sum = w.out + kTile * w.width;
  w.top = w.sum + kTile * kLanes;
  w.rescale = w.top + kTile;
  load_rows(in.q, in.q_stride, in.dtype, w.batch, w.head, w.tokens, in.head_dim, false, w.q, w.width);
  std::memset(w.out, 0, sizeof(float) * static_cast<size_t>(w.rows * w.width));
  std::memset(w.sum, 0, sizeof(float) * static_cast<size_t>(w.rows * kLanes));
  for (int64_t i = 0; i < w.rows; ++i) w.top[i] = -kInfinity;

  Keys keys[kTilesAtOnce];
  int64_t count = 0;
  auto finish_step = [&] {
    if (count == 0) return;
    weigh(w, keys, count);
    product<false, Into::kScaleAdd>(w.rows, w.width, keys[0].span, w.scores, kScoreStep, keys[0].values, w.width, w.out,
                                    w.width, w.rescale);
    for (int64_t n = 1; n < count; ++n)
      product<false, Into::kAdd>(w.rows, w.width, keys[n].span, w.scores + n * kTile, kScoreStep, keys[n].values,
                                 w.width, w.out, w.width);
    count = 0;
  };
  each_tile(
      l.full, l.partial, w.batch, w.head, q_tile * kTile / l.q_block, l.q_blocks, l.k_blocks, l.k_block / kTile,
      [&](const TileRef& t) {
        fetch(p.keys + (pair * p.tiles + t.tile) * p.tile_floats, p.tile_floats);
        fetch(p.values + (pair * p.tiles + t.tile) * p.tile_floats, p.tile_floats);
      },
      [&](const TileRef& t) {
        const TileTokens tokens = tokens_of(l.k_order, w.batch, kv_head, t.tile, in.k_len);
        if (tokens.span == 0) return;
        const int64_t at = pair * p.tiles + t.tile;
        Keys& k = keys[count];
        k = {padded(tokens.span), tokens.span, in.scale, p.values + at * p.tile_floats};
        float* scores = w.scores + count * kTile;
        product<false, Into::kStore>(w.rows, k.columns, in.head_dim, w.q, w.width, p.keys + at * p.tile_floats, kTile,
                                     scores, kScoreStep, nullptr, kScoreSum);
        uint64_t visible[kTile];
        if (t.partial) visible_pairs(l, w.batch, w.head, q_tile, t.tile, t.id, tokens.exists, w.rows, visible);
        if (t.partial || tokens.exists != kAll || in.bias != nullptr || in.key_bias != nullptr)
          finish_scores(w, tokens, t.partial ? visible : nullptr, k, scores);
        if (const uint64_t broken = p.broken[at]; broken != 0)
          for (int64_t i = 0; i < w.rows; ++i)
            w.spoilt |= static_cast<uint64_t>((broken & (t.partial ? visible[i] : kAll)) != 0) << i;
        if (++count == kTilesAtOnce) finish_step();
      });
  finish_step();
  write(a, w);
}

}  // namespace saccade::cpu::SACCADE_ISA
