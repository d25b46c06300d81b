// attention_rows on the CPU: a panel of queries stays, keys stream past it; a lane of the sums belongs to a query.
#include <cmath>

#include "attention_map.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

// Of each query: highest score, sum of exp(s - top), and of exp(s - top) (s - top).
struct Running {
  VecF top[kPanelVecs], sum[kPanelVecs], moment[kPanelVecs];
};

// Where the highest score has risen. What is not a number wins nothing here, and so gets into the sums.
inline void rescale(Running& r, int v, VecF top) {
  const VecF fall = top > r.top[v] ? r.top[v] - top : VecF{}, factor = exp_of(fall);
  const VecF moved = r.sum[v] > 0.0f ? r.moment[v] + r.sum[v] * fall : r.moment[v];
  r.moment[v] = factor > 0.0f ? factor * moved : factor * r.moment[v];
  r.sum[v] *= factor;
  r.top[v] = top;
}

template <bool kMask>
__attribute__((always_inline)) inline void reduce(Products& s, float scale, const float* add, int64_t first,
                                                  const VecI* sees, Running& r) {
  const VecF mul = broadcast(scale);
#pragma GCC unroll 2
  for (int v = 0; v < kPanelVecs; ++v) {
    VecF top = r.top[v];
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      VecF x = s[j][v] * mul + broadcast(add[j]);
      if (kMask) x = sees[v] > VecI{} + static_cast<int32_t>(first + j) ? x : broadcast(kLowest);
      s[j][v] = x;
      top = x > top ? x : top;
    }
    if (any(top > r.top[v])) rescale(r, v, top);
    // A query whose scores are all -inf so far has a sum of 0.
    const VecF base = r.top[v] > kLowest ? r.top[v] : VecF{};
    VecF sum{}, moment{};
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      const VecF x = s[j][v] - base, e = exp_of(x);
      sum += e;
      const VecF term = e * x;
      moment += e == 0.0f ? VecF{} : term;
    }
    r.sum[v] += sum;
    r.moment[v] += moment;
  }
}

template <class T>
void one_panel(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t index, float* panel) {
  const AttentionInputs& in = a.in;
  const int64_t first = index * kPanel, tiles = ceil_div(in.k_len, kTile), width = in.head_dim;
  const T* q = head_of<T>(in.q, in.q_stride, in.heads, head);
  interleave<T>([&](int i) { return query_at(a, q, first + i); }, kPanel, width, panel);
  int32_t sees[kPanel];
  int64_t most = 0, least = in.k_len;
  for (int i = 0; i < kPanel; ++i) {
    const int64_t own = sees_of(a, first + i);
    sees[i] = static_cast<int32_t>(own);
    most = own > most ? own : most;
    least = own < least ? own : least;
  }
  VecI limit[kPanelVecs];
  Running r;
  for (int v = 0; v < kPanelVecs; ++v) {
    limit[v] = load_raw<VecI>(sees + v * kLanes);
    r.top[v] = broadcast(kLowest);
    r.sum[v] = r.moment[v] = VecF{};
  }
  const int64_t own = head / (in.heads / in.kv_heads) - s.first;
  for (int64_t t = 0; t < ceil_div(most, kTile); ++t) {
    Products p;
    multiply(panel, s.tiles + (own * tiles + t) * kTile * width, width, p);
    const float* add = s.add + (own * tiles + t) * kTile;
    if ((t + 1) * kTile <= least)
      reduce<false>(p, in.scale, add, t * kTile, limit, r);
    else
      reduce<true>(p, in.scale, add, t * kTile, limit, r);
  }
  for (int i = 0; i < kPanel && first + i < a.row_count; ++i) {
    const float sum = r.sum[i / kLanes][i % kLanes], moment = r.moment[i / kLanes][i % kLanes];
    const float top = r.top[i / kLanes][i % kLanes];
    const int64_t at = head * a.row_count + first + i;
    const float log_sum = std::log(sum);
    a.lse[at] = sum == 0.0f ? kLowest : (top > kLowest ? top : 0.0f) + log_sum;
    a.entropy[at] = sum == 0.0f ? 0.0f : log_sum - moment / sum;
  }
}

template <class T>
void pack(const AttentionMapArgs& a, const MapScratch& s, int64_t kv_head, int64_t tile) {
  const AttentionInputs& in = a.in;
  const int64_t tiles = ceil_div(in.k_len, kTile), at = (kv_head - s.first) * tiles + tile, first = tile * kTile;
  const T* k = head_of<T>(in.k, in.k_stride, in.kv_heads, kv_head);
  interleave<T>([&](int j) { return key_at(a, k, first + j); }, kTile, in.head_dim, s.tiles + at * kTile * in.head_dim);
  const float* bias = in.key_bias;
  if (bias != nullptr) bias += kv_head / in.kv_heads * in.key_bias_stride;
  for (int j = 0; j < kTile; ++j)
    s.add[at * kTile + j] = bias != nullptr && first + j < in.k_len ? bias[first + j] : 0.0f;
}

}  // namespace

void attention_rows_pack(const AttentionMapArgs& a, const MapScratch& s, int64_t kv_head, int64_t tile) {
  SACCADE_BY_TYPE(a.in.dtype, pack<T>(a, s, kv_head, tile));
}

void attention_rows(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t panel, float* space) {
  SACCADE_BY_TYPE(a.in.dtype, one_panel<T>(a, s, head, panel, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
