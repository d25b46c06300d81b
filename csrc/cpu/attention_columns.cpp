// attention_columns on the CPU: a panel of keys stays, queries stream past it; a lane of the sum belongs to a key.
#include "attention_map.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr int64_t kStretch = 16;  // tiles of which a sum is taken before it joins the others
constexpr float kMost = 88.0f;    // of an lse that is not of these scores, exp goes so far

template <bool kMask>
__attribute__((always_inline)) inline void reduce(const Products& s, float scale, const VecF* bias, const float* lse,
                                                  const int32_t* sees, const VecI* key, VecF* sum) {
  const VecF mul = broadcast(scale), most = broadcast(kMost);
  VecF more[kPanelVecs] = {};
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) {
    const VecF own = broadcast(lse[j]);
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVecs; ++v) {
      const VecF x = s[j][v] * mul + bias[v];
      const VecF power = x - own;
      VecF share = exp_of(power > most ? most : power);
      share = x == kLowest ? VecF{} : share;  // also where lse is not a number
      if (kMask) share = key[v] < VecI{} + sees[j] ? share : VecF{};
      more[v] += share;
    }
  }
  for (int v = 0; v < kPanelVecs; ++v) sum[v] += more[v];
}

template <class T>
void one_panel(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t index, float* panel) {
  const AttentionInputs& in = a.in;
  const int64_t first = index * kPanel, tiles = ceil_div(a.row_count, kTile), width = in.head_dim;
  const int64_t own = head - s.first, kv_head = head / (in.heads / in.kv_heads);
  const T* k = head_of<T>(in.k, in.k_stride, in.kv_heads, kv_head);
  interleave<T>([&](int i) { return key_at(a, k, first + i); }, kPanel, width, panel);
  const int64_t count = in.k_len - first < kPanel ? in.k_len - first : kPanel;
  const float* key_bias = in.key_bias;
  if (key_bias != nullptr) key_bias += head / in.heads * in.key_bias_stride + first;
  float add[kPanel] = {};
  for (int64_t i = 0; i < count && key_bias != nullptr; ++i) add[i] = key_bias[i];
  VecF bias[kPanelVecs], total[kPanelVecs], sum[kPanelVecs];
  VecI key[kPanelVecs];
  for (int v = 0; v < kPanelVecs; ++v) {
    bias[v] = load_raw<VecF>(add + v * kLanes);
    key[v] = lane_numbers() + static_cast<int32_t>(first + v * kLanes);
    total[v] = sum[v] = VecF{};
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = own * tiles + t;
    const int32_t* sees = s.sees + at * kTile;
    int32_t most = 0, least = std::numeric_limits<int32_t>::max();
    for (int j = 0; j < kTile; ++j) {
      most = sees[j] > most ? sees[j] : most;
      least = sees[j] < least ? sees[j] : least;
    }
    if (most > first) {
      Products p;
      multiply(panel, s.tiles + at * kTile * width, width, p);
      if (least >= first + count)
        reduce<false>(p, in.scale, bias, s.add + at * kTile, sees, key, sum);
      else
        reduce<true>(p, in.scale, bias, s.add + at * kTile, sees, key, sum);
    }
    if (t % kStretch == kStretch - 1 || t == tiles - 1)
      for (int v = 0; v < kPanelVecs; ++v) {
        total[v] += sum[v];
        sum[v] = VecF{};
      }
  }
  float* out = a.columns + head * in.k_len + first;
  for (int64_t i = 0; i < count; ++i) out[i] = total[i / kLanes][i % kLanes];
}

template <class T>
void pack(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t tile) {
  const AttentionInputs& in = a.in;
  const int64_t tiles = ceil_div(a.row_count, kTile), at = (head - s.first) * tiles + tile, first = tile * kTile;
  const T* q = head_of<T>(in.q, in.q_stride, in.heads, head);
  interleave<T>([&](int j) { return query_at(a, q, first + j); }, kTile, in.head_dim,
                s.tiles + at * kTile * in.head_dim);
  for (int j = 0; j < kTile; ++j) {
    const float lse = first + j < a.row_count ? a.lse[head * a.row_count + first + j] : kLowest;
    s.sees[at * kTile + j] = lse == kLowest ? 0 : static_cast<int32_t>(sees_of(a, first + j));
    s.add[at * kTile + j] = lse == kLowest ? 0.0f : lse;
  }
}

}  // namespace

void attention_columns_pack(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t tile) {
  SACCADE_BY_TYPE(a.in.dtype, pack<T>(a, s, head, tile));
}

void attention_columns(const AttentionMapArgs& a, const MapScratch& s, int64_t head, int64_t panel, float* space) {
  SACCADE_BY_TYPE(a.in.dtype, one_panel<T>(a, s, head, panel, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
