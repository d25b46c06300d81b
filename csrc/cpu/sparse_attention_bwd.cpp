// sparse_attention_bwd on the CPU, in three steps: rows of q and dout to clean fp32 rows, with delta; then, for every
// (sample, key head), chunks of key blocks that own their rows of dk and dv and add dq to a buffer of their own; then
// the sum of these buffers, in their order. No atomics, and the same sums whatever the number of threads.
#include "attention_grads.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Where the chunk's buffer of a query tile begins.
int64_t buffer_of(const PackedQueries& p, int64_t chunk, int64_t head, int64_t tile) {
  return (chunk * p.heads + head) * p.tiles + tile;
}

// out [kTile] = sums of a * b by row, both [kTile, width]. In the order of `product`: where a query sees one key, out
// is its v, and dP - delta is 0.
void dot_rows(const float* a, const float* b, int64_t head_dim, int64_t width, float* out) {
  alignas(64) float a_columns[kTile * kMaxHeadDim], b_columns[kTile * kMaxHeadDim];
  transpose_rows(a, width, kTile, width, a_columns, kTile);
  transpose_rows(b, width, kTile, width, b_columns, kTile);
  const int64_t stretch = stretch_of_sum(head_dim, kGradSum);
  for (int64_t r = 0; r < kTile; r += kLanes) {
    VecF total{};
    for (int64_t from = 0; from < head_dim; from += stretch) {
      VecF sum{};
      for (int64_t c = from; c < head_dim && c < from + stretch; ++c)
        sum += load_raw<VecF>(a_columns + c * kTile + r) * load_raw<VecF>(b_columns + c * kTile + r);
      total = from == 0 ? sum : sum + total;
    }
    store_raw(out + r, total);
  }
}

struct KeyTile {
  int64_t batch, kv_head, block, tile;
  TileTokens tokens;
  uint64_t broken;                   // keys whose k or v is not finite; 0 in the rows below
  uint64_t spoilt = 0;               // keys seen by a query whose q or dout is not finite
  float *k, *k_columns, *v_columns;  // [kTile, width], [width, kTile]
  float *dk, *dv;                    // [kTile, width]
  float *scores, *grads;             // [kTile, kTile]
  const float* by_key;
};

void load_keys(const SparseAttentionGradArgs& a, KeyTile& t, int64_t width) {
  const AttentionInputs& in = a.in;
  const size_t rest = sizeof(float) * static_cast<size_t>((kTile - t.tokens.span) * width);
  float* rows = t.dk;  // not in use yet
  t.broken = load_rows(in.v, in.v_stride, in.dtype, t.batch, t.kv_head, t.tokens, in.head_dim, true, rows, width);
  std::memset(rows + t.tokens.span * width, 0, rest);
  transpose_rows(rows, width, kTile, width, t.v_columns, kTile);
  t.broken |= load_rows(in.k, in.k_stride, in.dtype, t.batch, t.kv_head, t.tokens, in.head_dim, true, t.k, width);
  std::memset(t.k + t.tokens.span * width, 0, rest);
  transpose_rows(t.k, width, kTile, width, t.k_columns, kTile);
  std::memset(t.dk, 0, sizeof(float) * static_cast<size_t>(kTile * width));
  std::memset(t.dv, 0, sizeof(float) * static_cast<size_t>(kTile * width));
}

// Queries that see a broken key, keys that are seen by a broken query.
void spread(const uint64_t* visible, int64_t rows, const TileTokens& queries, uint64_t exists, uint64_t broken_queries,
            uint64_t broken_keys, uint64_t& spoilt_queries, uint64_t& spoilt_keys) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t seen = (queries.exists >> i & 1) == 0 ? 0 : visible == nullptr ? exists : visible[i];
    const bool broken = (broken_queries >> i & 1) != 0;
    if (broken) spoilt_keys |= seen;
    if ((broken && seen != 0) || (seen & broken_keys) != 0) spoilt_queries |= uint64_t{1} << i;
  }
}

// sums [kTile] += column sums of x [rows, kTile], eight rows at a time
void add_columns(const float* x, int64_t rows, int64_t columns, float* sums) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    VecF total{};
    for (int64_t i = 0; i < rows;) {
      VecF part{};
      for (const int64_t end = i + 8 < rows ? i + 8 : rows; i < end; ++i) part += load_raw<VecF>(x + i * kTile + c);
      total += part;
    }
    store_raw(sums + c, load_raw<VecF>(sums + c) + total);
  }
}

// One head's queries that see the key tile.
void one_head(const SparseAttentionGradArgs& a, const PackedQueries& p, KeyTile& t, int64_t head, int64_t local,
              int64_t chunk) {
  const AttentionInputs& in = a.in;
  const BlockLayoutArgs& l = in.layout;
  const int64_t width = p.tile_floats / kTile, columns = padded(t.tokens.span);
  float by_column[kTile] = {};
  uint64_t spoilt = 0;
  auto pair = [&](const TileRef& ref) {
    const TileTokens queries = tokens_of(l.q_order, t.batch, head, ref.tile, in.q_len);
    const int64_t rows = queries.span, at = local * p.tiles + ref.tile;
    if (rows == 0) return;
    uint64_t visible[kTile];
    if (ref.partial) visible_pairs(l, t.batch, head, ref.tile, t.tile, ref.id, t.tokens.exists, rows, visible);
    const uint64_t* shown = ref.partial ? visible : nullptr;
    const float *q = p.q + at * p.tile_floats, *dout = p.dout + at * p.tile_floats;
    product<false, Into::kStore>(rows, columns, in.head_dim, q, width, t.k_columns, kTile, t.scores, kTile, nullptr,
                                 kScoreSum);
    product<false, Into::kStore>(rows, columns, in.head_dim, dout, width, t.v_columns, kTile, t.grads, kTile, nullptr,
                                 kGradSum);
    grads_of_scores({&in, t.batch, head, rows, &queries, &t.tokens, shown, t.by_key, p.shift + at * kTile,
                     p.delta + at * kTile, p.dlse + at * kTile},
                    t.scores, t.grads);
    if (a.dkey_bias != nullptr) add_columns(t.grads, rows, columns, by_column);
    product<true, Into::kAdd>(t.tokens.span, width, rows, t.scores, kTile, dout, width, t.dv, width);
    product<true, Into::kAdd>(t.tokens.span, width, rows, t.grads, kTile, q, width, t.dk, width);
    const int64_t buffer = buffer_of(p, chunk, local, ref.tile);
    float* dq = p.dq + buffer * p.tile_floats;
    if (p.touched[buffer] == 0)
      product<false, Into::kStore>(rows, width, t.tokens.span, t.grads, kTile, t.k, width, dq, width);
    else
      product<false, Into::kAdd>(rows, width, t.tokens.span, t.grads, kTile, t.k, width, dq, width);
    if (p.touched[buffer] == 0) p.spoilt[buffer] = 0;
    p.touched[buffer] = 1;
    if ((p.broken[at] | t.broken) != 0)
      spread(shown, rows, queries, t.tokens.exists, p.broken[at], t.broken, p.spoilt[buffer], spoilt);
  };
  auto ahead = [&](const TileRef& ref) {
    const int64_t at = local * p.tiles + ref.tile;
    fetch(p.q + at * p.tile_floats, p.tile_floats);
    fetch(p.dout + at * p.tile_floats, p.tile_floats);
    fetch(p.dq + buffer_of(p, chunk, local, ref.tile) * p.tile_floats, p.tile_floats);
  };
  each_tile(l.t_full, l.t_partial, t.batch, head, t.block, l.k_blocks, l.q_blocks, l.q_block / kTile, ahead, pair);
  t.spoilt |= spoilt;
  if (a.dkey_bias == nullptr) return;
  float* out = a.dkey_bias + (t.batch * in.heads + head) * in.k_len;
  for (int64_t j = 0; j < t.tokens.span; ++j)
    if (t.tokens.token[j] >= 0) out[t.tokens.token[j]] = (spoilt >> j & 1) != 0 ? kNaN : by_column[j];
}

}  // namespace

int64_t sparse_attention_bwd_space(const SparseAttentionGradArgs& a) {
  return kTile * (padded(a.in.head_dim) * 5 + 2 * kTile + 1);
}

void sparse_attention_bwd_rows(const SparseAttentionGradArgs& a, const PackedQueries& p, int64_t item) {
  const AttentionInputs& in = a.in;
  const int64_t head = (p.first + item / p.tiles) % in.heads, batch = (p.first + item / p.tiles) / in.heads;
  const int64_t width = p.tile_floats / kTile;
  const TileTokens t = tokens_of(in.layout.q_order, batch, head, item % p.tiles, in.q_len);
  float *q = p.q + item * p.tile_floats, *dout = p.dout + item * p.tile_floats;
  float *shift = p.shift + item * kTile, *delta = p.delta + item * kTile, *dlse = p.dlse + item * kTile;
  alignas(64) float out[kTile * kMaxHeadDim];
  load_rows(a.out, a.out_stride, in.dtype, batch, head, t, in.head_dim, false, out, width);
  uint64_t broken = load_rows(a.dout, a.dout_stride, in.dtype, batch, head, t, in.head_dim, false, dout, width);
  const size_t rest = sizeof(float) * static_cast<size_t>((kTile - t.span) * width);
  std::memset(out + t.span * width, 0, rest);
  std::memset(dout + t.span * width, 0, rest);
  alignas(64) float dots[kTile];
  dot_rows(dout, out, in.head_dim, width, dots);
  for (int64_t i = 0; i < t.span; ++i) {
    shift[i] = std::numeric_limits<float>::infinity();
    delta[i] = dlse[i] = 0.0f;
    if (t.token[i] < 0) continue;
    const int64_t at = (batch * in.heads + head) * in.q_len + t.token[i];
    const float more = a.dlse == nullptr ? 0.0f : a.dlse[at];
    a.delta[at] = dots[i] - more;
    shift[i] = shift_of(a.lse[at]);
    delta[i] = delta_of(a.lse[at], dots[i]);
    dlse[i] = delta_of(a.lse[at], more);
    if ((broken >> i & 1) != 0) std::memset(dout + i * width, 0, sizeof(float) * static_cast<size_t>(width));
  }
  broken |= load_rows(in.q, in.q_stride, in.dtype, batch, head, t, in.head_dim, true, q, width);
  p.broken[item] = broken;
}

void sparse_attention_bwd(const SparseAttentionGradArgs& a, const PackedQueries& p, int64_t item, float* space) {
  const AttentionInputs& in = a.in;
  const BlockLayoutArgs& l = in.layout;
  const int64_t group = in.heads / in.kv_heads, width = p.tile_floats / kTile, tiles = l.k_block / kTile;
  const int64_t chunk = item % p.chunks, first = item / p.chunks * group;  // its first head, among those at hand
  KeyTile t;
  t.batch = (p.first + first) / in.heads;
  t.kv_head = (p.first + first) % in.heads / group;
  t.k = space;
  t.k_columns = t.k + kTile * width;
  t.v_columns = t.k_columns + kTile * width;
  t.dk = t.v_columns + kTile * width;
  t.dv = t.dk + kTile * width;
  t.scores = t.dv + kTile * width;
  t.grads = t.scores + kTile * kTile;
  float* by_key = t.grads + kTile * kTile;
  t.by_key = in.key_bias == nullptr ? nullptr : by_key;
  std::memset(p.touched + buffer_of(p, chunk, first, 0), 0, static_cast<size_t>(group * p.tiles));
  for (t.block = chunk; t.block < l.k_blocks; t.block += p.chunks)
    for (t.tile = t.block * tiles; t.tile < (t.block + 1) * tiles; ++t.tile) {
      t.tokens = tokens_of(l.k_order, t.batch, t.kv_head, t.tile, in.k_len);
      if (t.tokens.span == 0) continue;
      t.spoilt = 0;
      load_keys(a, t, width);
      if (t.by_key != nullptr) key_biases(in, t.batch, t.tokens, by_key);
      for (int64_t g = 0; g < group; ++g) one_head(a, p, t, t.kv_head * group + g, first + g, chunk);
      for (int64_t j = 0; j < t.tokens.span; ++j) {
        const int64_t token = t.tokens.token[j];
        if (token < 0) continue;
        const bool spoilt = (t.spoilt >> j & 1) != 0;
        store_row(a.dk, a.dk_stride, in.dtype, t.batch, t.kv_head, token, in.head_dim, t.dk + j * width,
                  spoilt ? kNaN : in.scale);
        store_row(a.dv, a.dv_stride, in.dtype, t.batch, t.kv_head, token, in.head_dim, t.dv + j * width,
                  spoilt ? kNaN : 1.0f);
      }
    }
}

void sparse_attention_bwd_sum(const SparseAttentionGradArgs& a, const PackedQueries& p, int64_t item) {
  const AttentionInputs& in = a.in;
  const int64_t local = item / p.tiles, tile = item % p.tiles, width = p.tile_floats / kTile;
  const int64_t head = (p.first + local) % in.heads, batch = (p.first + local) / in.heads;
  const TileTokens t = tokens_of(in.layout.q_order, batch, head, tile, in.q_len);
  alignas(64) float sum[kMaxHeadDim];
  for (int64_t i = 0; i < t.span; ++i) {
    if (t.token[i] < 0) continue;
    std::memset(sum, 0, sizeof sum);
    bool spoilt = false;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
      const int64_t buffer = buffer_of(p, chunk, local, tile);
      if (p.touched[buffer] == 0) continue;
      spoilt |= (p.spoilt[buffer] >> i & 1) != 0;
      const float* part = p.dq + buffer * p.tile_floats + i * width;
      for (int64_t c = 0; c < width; c += kLanes)
        store_raw(sum + c, load_raw<VecF>(sum + c) + load_raw<VecF>(part + c));
    }
    store_row(a.dq, a.dq_stride, in.dtype, batch, head, t.token[i], in.head_dim, sum, spoilt ? kNaN : in.scale);
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
