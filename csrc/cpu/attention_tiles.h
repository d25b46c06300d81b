// Tiles of kTile queries and kTile keys: which tokens they hold, which pairs are visible, rows in and out.
#pragma once
#include "attention_kernels.h"
#include "convert.h"
#include "gemm.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr uint64_t kAll = ~uint64_t{0};
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kScoreSum = 32;  // terms of one running sum of a score: forward and backward take the same

// Tokens at the positions of a tile.
struct TileTokens {
  int32_t token[kTile];  // -1: none
  uint64_t exists = 0;   // bit i: there is a token at i
  int64_t span = 0;      // behind it there is none
  bool straight = true;  // token[i] = token[0] + i up to the span
};

inline void set_span(TileTokens& t) { t.span = t.exists == 0 ? 0 : 64 - __builtin_clzll(t.exists); }

inline TileTokens tokens_of(const PositionTable& order, int64_t batch, int64_t head, int64_t tile, int64_t length) {
  TileTokens t;
  const int64_t base = tile * kTile;
  if (order.data == nullptr) {
    for (int64_t i = 0; i < kTile; ++i) t.token[i] = base + i < length ? static_cast<int32_t>(base + i) : -1;
    t.span = length - base < 0 ? 0 : length - base < kTile ? length - base : kTile;
    t.exists = t.span == kTile ? kAll : (uint64_t{1} << t.span) - 1;
    return t;
  }
  const int32_t* at = order.data + batch * order.stride[0] + head * order.stride[1] + base;
  for (int64_t i = 0; i < kTile; ++i) {
    const bool there = at[i] >= 0 && at[i] < length;
    t.token[i] = there ? at[i] : -1;
    t.exists |= static_cast<uint64_t>(there) << i;
  }
  set_span(t);
  for (int64_t i = 0; i < t.span; ++i) t.straight = t.straight && t.token[i] == t.token[0] + i && t.token[0] >= 0;
  return t;
}

// One list of blocks.
struct List {
  const int32_t* entry = nullptr;
  const int32_t* id = nullptr;
  int64_t count = 0;
};

inline List list_of(const BlockLists& lists, int64_t batch, int64_t head, int64_t row, int64_t rows) {
  if (lists.starts == nullptr) return {};
  const int64_t at = (batch * lists.stride[0] + head * lists.stride[1]) * rows + row, start = lists.starts[at];
  return {lists.indices + start, lists.ids == nullptr ? nullptr : lists.ids + start, lists.counts[at]};
}

// A tile on the other side of a list entry.
struct TileRef {
  int64_t tile = 0;
  bool partial = false;
  int32_t id = 0;  // row of the bits
};

// body(TileRef) for every tile of the lists of `row`: whole blocks, then partial ones.
template <class F>
inline void each_tile(const BlockLists& full, const BlockLists& partial, int64_t batch, int64_t head, int64_t row,
                      int64_t rows, int64_t columns, int64_t tiles_per_block, F&& body) {
  for (const bool part : {false, true}) {
    const List list = list_of(part ? partial : full, batch, head, row, rows);
    for (int64_t n = 0; n < list.count; ++n) {
      const int64_t block = list.entry[n];
      if (block < 0 || block >= columns) continue;
      for (int64_t i = 0; i < tiles_per_block; ++i)
        body(TileRef{block * tiles_per_block + i, part, list.id == nullptr ? 0 : list.id[n]});
    }
  }
}

// Into the second cache.
inline void fetch(const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(from + i, 0, 2);
}

// The same, with ahead(TileRef) one tile before: what a tile needs comes from far away.
template <class Ahead, class F>
inline void each_tile(const BlockLists& full, const BlockLists& partial, int64_t batch, int64_t head, int64_t row,
                      int64_t rows, int64_t columns, int64_t tiles_per_block, Ahead&& ahead, F&& body) {
  TileRef current;
  bool any = false;
  each_tile(full, partial, batch, head, row, rows, columns, tiles_per_block, [&](const TileRef& next) {
    ahead(next);
    if (any) body(current);
    current = next;
    any = true;
  });
  if (any) body(current);
}

inline uint32_t lane_bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// Lanes of x whose bit is set, of `other` where it is not.
inline VecF where_bits(uint64_t bits, VecF x, VecF other) {
#if defined(__AVX512F__)
  return (VecF)_mm512_mask_blend_ps(static_cast<__mmask16>(bits), (__m512)other, (__m512)x);
#else
  VecI bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  const VecI chosen = (VecI{} + static_cast<int32_t>(bits & ((1u << kLanes) - 1))) & bit;
  return chosen != VecI{} ? x : other;
#endif
}

// Which pairs of a partial tile are visible: bit j of out[i], for the keys of `exists`.
inline void visible_pairs(const BlockLayoutArgs& l, int64_t batch, int64_t head, int64_t q_tile, int64_t k_tile,
                          int32_t id, uint64_t exists, int64_t rows, uint64_t* out) {
  if (l.bits != nullptr) {
    const int64_t words = l.k_block / 32, first = q_tile * kTile % l.q_block;
    const int32_t* at = l.bits + (id * int64_t{l.q_block} + first) * words + k_tile * kTile % l.k_block / 32;
    for (int64_t i = 0; i < rows; ++i, at += words)
      out[i] = exists & (static_cast<uint32_t>(at[0]) | static_cast<uint64_t>(static_cast<uint32_t>(at[1])) << 32);
    return;
  }
  const int64_t q_positions = int64_t{l.q_blocks} * l.q_block, k_positions = int64_t{l.k_blocks} * l.k_block;
  const int32_t* at = l.at.data + batch * l.at.stride[0] + head * l.at.stride[1] + k_tile * kTile;
  const int32_t* low = l.box.data + batch * l.box.stride[0] + head * l.box.stride[1] + q_tile * kTile;
  const int32_t* high = low + l.axes * q_positions;
  uint64_t by_all = 0;
  for (int64_t c = 0; c < kTile; c += kLanes)
    by_all |= static_cast<uint64_t>(lane_bits(load_raw<VecI>(at + c) == VecI{} + kSeenByAll)) << c;
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t seen = 0;
    for (int64_t c = 0; c < kTile; c += kLanes) {
      VecI inside = VecI{} - 1;
      for (int64_t a = 0; a < l.axes; ++a) {
        const VecI x = load_raw<VecI>(at + a * k_positions + c);
        inside &= (x >= VecI{} + low[a * q_positions + i]) & (x < VecI{} + high[a * q_positions + i]);
      }
      seen |= static_cast<uint64_t>(lane_bits(inside)) << c;
    }
    out[i] = (seen | by_all) & exists;
  }
}

// ---- rows --------------------------------------------------------------------------------------------------------

// Rows of x [.., tokens, D] at the tokens of a tile, up to its span, as float in rows of `step`; 0 where there is none.
// Bit i of the result: row i is not finite; with `clean` it is 0 here.
inline uint64_t load_rows(const void* x, const int64_t (&stride)[3], Dtype dtype, int64_t batch, int64_t head,
                          const TileTokens& t, int64_t head_dim, bool clean, float* out, int64_t step) {
  uint64_t broken = 0;
  by_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* base = static_cast<const T*>(x) + batch * stride[0] + head * stride[1];
    for (int64_t i = 0; i < t.span; ++i) {
      float* row = out + i * step;
      const bool there = t.token[i] >= 0;
      if (there) broken |= static_cast<uint64_t>(any_nan(widen_row(base + t.token[i] * stride[2], head_dim, row))) << i;
      if (!there || (clean && (broken >> i & 1) != 0))
        std::memset(row, 0, sizeof(float) * static_cast<size_t>(padded(head_dim)));
    }
  });
  return broken;
}

// Row [D] * factor to the token of y.
inline void store_row(void* y, const int64_t (&stride)[3], Dtype dtype, int64_t batch, int64_t head, int64_t token,
                      int64_t head_dim, const float* row, float factor) {
  SACCADE_BY_TYPE(dtype, narrow_row(row, factor, head_dim,
                                    static_cast<T*>(y) + batch * stride[0] + head * stride[1] + token * stride[2]));
}

// ---- biases ------------------------------------------------------------------------------------------------------

// bias of one query at the keys of a tile plus key_bias [kTile] or null, as float [kTile]
inline void bias_row(const AttentionInputs& a, int64_t batch, int64_t head, int64_t token, const TileTokens& keys,
                     const float* key_bias, float* out) {
  for (int64_t c = 0; c < kTile; c += kLanes)
    store_raw(out + c, key_bias == nullptr ? VecF{} : load_raw<VecF>(key_bias + c));
  if (a.bias == nullptr || token < 0) return;
  by_type(a.bias_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* row =
        static_cast<const T*>(a.bias) + batch * a.bias_stride[0] + head * a.bias_stride[1] + token * a.bias_stride[2];
    if (!keys.straight) {
      for (int64_t j = 0; j < keys.span; ++j)
        if (keys.token[j] >= 0) out[j] += to_float(row[keys.token[j]]);
      return;
    }
    if (keys.span == 0) return;
    row += keys.token[0];
    for (int64_t c = 0; c < keys.span; c += kLanes) {
      const int64_t left = keys.span - c;
      store_raw(out + c, load_raw<VecF>(out + c) + (left >= kLanes ? wide(row + c) : wide(row + c, left)));
    }
  });
}

inline void key_biases(const AttentionInputs& a, int64_t batch, const TileTokens& keys, float* out) {
  const float* row = a.key_bias + batch * a.key_bias_stride;
  for (int64_t j = 0; j < kTile; ++j) out[j] = keys.token[j] < 0 ? 0.0f : row[keys.token[j]];
}

}  // namespace saccade::cpu::SACCADE_ISA
