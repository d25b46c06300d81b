// match on the CPU: the best destination of every source, reduced from the products as they are formed.
#include <cmath>
#include <limits>

#include "merge_kernels.h"
#include "panels.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

bool finite(float squares) { return squares - squares == 0.0f; }

bool usable(const MatchArgs& a, const float* squares, int64_t batch, int64_t token) {
  return finite(squares[token]) && (a.protect == nullptr || a.protect[batch * a.protect_stride + token] == 0);
}

float inverse_norm(float squares) { return squares > 0.0f ? 1.0f / std::sqrt(squares) : 0.0f; }

// Running best of a panel: score and place in the destination list of every row.
struct Best {
  VecF score[kPanelVecs];
  VecI place[kPanelVecs];
};

template <bool kRanges>
__attribute__((always_inline)) inline void reduce(Products& score, const float* mul, const float* add, int32_t first,
                                                  const VecI* from, const VecI* to, Best& best) {
  VecF top[kPanelVecs] = {best.score[0], best.score[1]};
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) {
    const VecF m = broadcast(mul[j]), a = broadcast(add[j]);
    for (int v = 0; v < kPanelVecs; ++v) {
      VecF s = score[j][v] * m + a;
      if (kRanges) {
        const VecI at = VecI{} + (first + j);
        s = (at >= from[v]) & (at < to[v]) ? s : broadcast(kNone);
      }
      score[j][v] = s;
      top[v] = s > top[v] ? s : top[v];  // false for NaN, which so never wins
    }
  }
  // Once the best is good, tiles seldom improve on it.
  for (int v = 0; v < kPanelVecs; ++v) {
    const VecI better = top[v] > best.score[v];
    bool any = false;
#if defined(__AVX512F__)
    any = _mm512_movepi32_mask((__m512i)better) != 0;
#elif defined(__AVX2__)
    any = _mm256_movemask_ps((__m256)better) != 0;
#else
    for (int l = 0; l < kLanes; ++l) any |= better[l] != 0;
#endif
    if (!any) continue;
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      const VecI wins = score[j][v] > best.score[v];
      best.score[v] = wins ? score[j][v] : best.score[v];
      best.place[v] = wins ? VecI{} + (first + j) : best.place[v];
    }
  }
}

template <class T>
void pack(const MatchArgs& a, const MatchScratch& s, int64_t batch, int64_t tile) {
  const int32_t* dst = a.dst + batch * a.dst_stride;
  const int64_t first = tile * kTile, tiles = ceil_div(a.destinations, kTile), at = batch * tiles + tile;
  const float* squares = s.squares + batch * a.tokens;
  auto row = [&](int j) {
    return first + j < a.destinations ? row_at<T>(a.metric, a.metric_stride, batch, dst[first + j]) : nullptr;
  };
  interleave<T>(row, kTile, a.channels, s.tiles + at * kTile * a.channels);
  for (int j = 0; j < kTile; ++j) {
    float mul = 0.0f, add = kNone;
    if (first + j < a.destinations && usable(a, squares, batch, dst[first + j])) {
      const float own = squares[dst[first + j]];
      mul = a.score == Score::kCosine ? inverse_norm(own) : a.score == Score::kL2 ? 2.0f : 1.0f;
      add = a.score == Score::kL2 ? -own : 0.0f;
    }
    s.mul[at * kTile + j] = mul;
    s.add[at * kTile + j] = add;
  }
}

struct Sources {
  const int32_t* position;
  int64_t first;
  int count;
};

template <bool kRanges>
void run_tiles(const MatchArgs& a, const MatchScratch& s, int64_t batch, const float* panel, int64_t begin, int64_t end,
               const VecI* from, const VecI* to, Best& best) {
  const int64_t tiles = ceil_div(a.destinations, kTile);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = batch * tiles + t;
    Products p;
    multiply(panel, s.tiles + at * kTile * a.channels, a.channels, p);
    reduce<kRanges>(p, s.mul + at * kTile, s.add + at * kTile, static_cast<int32_t>(t * kTile), from, to, best);
  }
}

void by_ranges(const MatchArgs& a, const MatchScratch& s, int64_t batch, const float* panel, const Sources& src,
               Best& best) {
  const int32_t* ranges = a.ranges + batch * a.ranges_stride + src.first * a.range_count * 2;
  for (int32_t r = 0; r < a.range_count; ++r) {
    int32_t from[kPanel] = {}, to[kPanel] = {}, low = std::numeric_limits<int32_t>::max(), high = 0;
    for (int i = 0; i < src.count; ++i) {
      from[i] = ranges[(static_cast<int64_t>(i) * a.range_count + r) * 2];
      to[i] = ranges[(static_cast<int64_t>(i) * a.range_count + r) * 2 + 1];
      if (from[i] >= to[i]) continue;
      low = from[i] < low ? from[i] : low;
      high = to[i] > high ? to[i] : high;
    }
    low = low < 0 ? 0 : low;
    high = high > a.destinations ? static_cast<int32_t>(a.destinations) : high;
    if (low >= high) continue;
    VecI f[kPanelVecs], t[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      f[v] = load_raw<VecI>(from + v * kLanes);
      t[v] = load_raw<VecI>(to + v * kLanes);
    }
    run_tiles<true>(a, s, batch, panel, low / kTile, ceil_div(high, kTile), f, t, best);
  }
}

template <class T>
void one_panel(const MatchArgs& a, const MatchScratch& s, int64_t batch, int64_t index, float* panel) {
  const float* squares = s.squares + batch * a.tokens;
  Sources src{a.src + batch * a.src_stride + index * kPanel, index * kPanel, kPanel};
  if (a.sources - src.first < kPanel) src.count = static_cast<int>(a.sources - src.first);
  // A source of norm 0 has the cosine 0 with everything, even where its products do not vanish as its norm does.
  auto row = [&](int i) -> const T* {
    if (i >= src.count || (a.score == Score::kCosine && squares[src.position[i]] == 0.0f)) return nullptr;
    return row_at<T>(a.metric, a.metric_stride, batch, src.position[i]);
  };
  interleave<T>(row, kPanel, a.channels, panel);
  Best best;
  for (int v = 0; v < kPanelVecs; ++v) {
    best.score[v] = broadcast(kNone);
    best.place[v] = VecI{} - 1;
  }
  if (a.ranges == nullptr)
    run_tiles<false>(a, s, batch, panel, 0, ceil_div(a.destinations, kTile), nullptr, nullptr, best);
  else
    by_ranges(a, s, batch, panel, src, best);
  const int32_t* dst = a.dst + batch * a.dst_stride;
  for (int i = 0; i < src.count; ++i) {
    const int64_t token = src.position[i];
    const int32_t place = best.place[i / kLanes][i % kLanes];
    if (place < 0 || !usable(a, squares, batch, token)) continue;
    float score = best.score[i / kLanes][i % kLanes];
    if (a.score == Score::kCosine) score *= inverse_norm(squares[token]);
    if (a.score == Score::kL2) score = score - squares[token] < 0.0f ? score - squares[token] : 0.0f;
    if (!(score > kNone)) continue;
    a.best[batch * a.tokens + token] = score;
    a.target[batch * a.tokens + token] = dst[place];
  }
}

}  // namespace

void squares(const void* x, const int64_t (&stride)[2], int32_t channels, Dtype dtype, int64_t tokens, int64_t row,
             int64_t end, float* out) {
  SACCADE_BY_TYPE(dtype, {
    for (; row < end; ++row) out[row] = squared_norm(row_at<T>(x, stride, row / tokens, row % tokens), channels);
  });
}

void match_pack(const MatchArgs& a, const MatchScratch& s, int64_t batch, int64_t tile) {
  SACCADE_BY_TYPE(a.dtype, pack<T>(a, s, batch, tile));
}

void match(const MatchArgs& a, const MatchScratch& s, int64_t batch, int64_t panel, float* space) {
  SACCADE_BY_TYPE(a.dtype, one_panel<T>(a, s, batch, panel, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
