// Weights and score gradients of one tile of queries and one tile of keys: what every backward kernel starts from.
#pragma once
#include <limits>

#include "attention_tiles.h"
#include "exp.h"

namespace saccade::cpu::SACCADE_ISA {

// Per query: +inf where it sees nothing (so that every weight is 0), and then no delta.
inline float shift_of(float lse) { return lse == -std::numeric_limits<float>::infinity() ? -lse : lse; }
inline float delta_of(float lse, float delta) { return lse == -std::numeric_limits<float>::infinity() ? 0.0f : delta; }

// dP and delta nearly cancel where a query sees few keys: shorter sums for both, in one order.
constexpr int64_t kGradSum = 16;

struct PairTile {
  const AttentionInputs* in;
  int64_t batch, head, rows;
  const TileTokens *queries, *keys;
  const uint64_t* visible;     // [rows], or null: all keys that exist
  const float* by_key;         // key_bias of the tile, or null
  const float *shift, *delta;  // [rows]
  const float* dlse;           // [rows], or null: part of delta
};

// scores: q k^T to P = exp(s - lse); grads: dout v^T to dS = P (dP - delta). Rows of kTile. Exactly 0 where nothing is
// visible.
inline void grads_of_scores(const PairTile& t, float* scores, float* grads) {
  const VecF scale = broadcast(t.in->scale), zero{};
  const bool biased = t.in->bias != nullptr || t.by_key != nullptr;
  const bool masked = t.visible != nullptr || t.keys->exists != kAll;
  const int64_t columns = padded(t.keys->span);
  float bias[kTile];
  for (int64_t i = 0; i < t.rows; ++i, scores += kTile, grads += kTile) {
    const VecF minus = broadcast(-t.shift[i]), delta = broadcast(t.delta[i]);
    const VecF dlse = t.dlse == nullptr ? zero : broadcast(t.dlse[i]);
    if (!biased && !masked) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const VecF p = exp_of(load_raw<VecF>(scores + c) * scale + minus);
        store_raw(scores + c, p);
        store_raw(grads + c, p * (load_raw<VecF>(grads + c) - delta + dlse));
      }
      continue;
    }
    if (biased) bias_row(*t.in, t.batch, t.head, t.queries->token[i], *t.keys, t.by_key, bias);
    const uint64_t seen = t.visible == nullptr ? t.keys->exists : t.visible[i];
    for (int64_t c = 0; c < columns; c += kLanes) {
      const VecF s = load_raw<VecF>(scores + c);
      const VecF p = exp_of(biased ? (s * scale + load_raw<VecF>(bias + c)) + minus : s * scale + minus);
      store_raw(scores + c, where_bits(seen >> c, p, zero));
      store_raw(grads + c, where_bits(seen >> c, p * (load_raw<VecF>(grads + c) - delta + dlse), zero));
    }
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
