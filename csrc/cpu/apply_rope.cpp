// apply_rope on the CPU: per tile of tokens, cos and sin once, then all heads of q and k.
#include "angles.h"
#include "walk.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

// Rotate pairs [0, n) of heads [0, heads) of one token; x1, x2 point at the first and second column of pair `begin` of
// the first head. cos and sin of a chunk stay in registers for all heads.
template <class T, bool kInterleaved, bool kStill>
inline void rotate_rows(const T* x1, const T* x2, T* y1, T* y2, int64_t x_head, int64_t y_head, int64_t heads,
                        const float* cos, const float* sin, int n) {
  using C = Chunk<T, kInterleaved>;
  constexpr int kStep = C::kPairs, kColumns = kInterleaved ? 2 * kStep : kStep;
  int64_t left = n;
  for (; left >= kStep; left -= kStep) {
    VecF c[C::kVecs], s[C::kVecs];
    for (int v = 0; v < C::kVecs; ++v) {
      c[v] = load_raw<VecF>(cos + v * kLanes);
      s[v] = load_raw<VecF>(sin + v * kLanes);
    }
    for (int64_t h = 0; h < heads; ++h) {
      VecF a[C::kVecs], b[C::kVecs];
      C::load(x1 + h * x_head, x2 + h * x_head, a, b);
      for (int v = 0; v < C::kVecs; ++v) rotate<kStill>(c[v], s[v], a[v], b[v]);
      C::store(y1 + h * y_head, y2 + h * y_head, a, b);
    }
    x1 += kColumns;
    x2 += kColumns;
    y1 += kColumns;
    y2 += kColumns;
    cos += kStep;
    sin += kStep;
  }
  if (left == 0) return;
  // The last chunk goes through a buffer: the same arithmetic, so the same bits, and no access beyond the row.
  const size_t bytes = sizeof(T) * (kInterleaved ? 2 : 1) * static_cast<size_t>(left);
  for (int64_t h = 0; h < heads; ++h) {
    T first[kColumns] = {}, second[kColumns] = {};
    std::memcpy(first, x1 + h * x_head, bytes);
    if (!kInterleaved) std::memcpy(second, x2 + h * x_head, bytes);
    VecF a[C::kVecs], b[C::kVecs];
    C::load(first, second, a, b);
    for (int v = 0; v < C::kVecs; ++v)
      rotate<kStill>(load_raw<VecF>(cos + v * kLanes), load_raw<VecF>(sin + v * kLanes), a[v], b[v]);
    C::store(first, second, a, b);
    std::memcpy(y1 + h * y_head, first, bytes);
    if (!kInterleaved) std::memcpy(y2 + h * y_head, second, bytes);
  }
}

template <class T>
inline void copy_columns(const T* x, T* y, int from, int to) {
  if (to > from) std::memcpy(y + from, x + from, sizeof(T) * static_cast<size_t>(to - from));
}

// Heads [first, last) of token t
template <class T, bool kInterleaved>
inline void rotate_token(const Angles& a, int head_dim, const Walk<T>& walk, const Table& table, int t, int64_t first,
                         int64_t last) {
  const int c1 = kInterleaved ? 2 * a.begin : a.begin, c2 = a.pairs + a.begin;
  const T* x = walk.x(first, t);
  T* y = walk.y(first, t);
  for (int64_t h = first; x != y && h < last; ++h) {
    const T* from = walk.x(h, t);
    T* to = walk.y(h, t);
    copy_columns(from, to, 0, c1);
    copy_columns(from, to, kInterleaved ? 2 * a.end : a.end, kInterleaved ? head_dim : c2);
    if (!kInterleaved) copy_columns(from, to, a.pairs + a.end, head_dim);
  }
  const float *cos = table.cos + t * table.slots, *sin = table.sin + t * table.slots;
  auto* rotate_heads = table.still[t] ? rotate_rows<T, kInterleaved, true> : rotate_rows<T, kInterleaved, false>;
  rotate_heads(x + c1, x + c2, y + c1, y + c2, walk.x_head, walk.y_head, last - first, cos, sin, a.end - a.begin);
}

template <class T, bool kInterleaved>
void tile(const RopeArgs& args, int64_t item) {
  const int64_t tiles_per_batch = (args.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t batch = item / tiles_per_batch, token = item % tiles_per_batch * kTileTokens;
  const int count = static_cast<int>(args.tokens - token < kTileTokens ? args.tokens - token : kTileTokens);
  const Angles& a = args.angles;
  const Order order = Order::of<Chunk<T, kInterleaved>>(a.end - a.begin);
  Table table;
  for (int64_t group = 0; group < a.groups; ++group) {
    table.fill(a, order, group, batch, token, count);
    for (const Heads* heads : {&args.q, &args.k}) {
      const int64_t per_group = heads->heads / a.groups;
      const Walk<T> walk(*heads, args.head_dim, batch, token, group * per_group, (group + 1) * per_group);
      walk.each(count, [&](int t, int64_t first, int64_t last) {
        rotate_token<T, kInterleaved>(a, args.head_dim, walk, table, t, first, last);
      });
    }
  }
}

template <bool kInterleaved>
void by_dtype(const RopeArgs& args, int64_t item) {
  switch (args.dtype) {
    case Dtype::kFloat16:
      return tile<Half, kInterleaved>(args, item);
    case Dtype::kBFloat16:
      return tile<BFloat16, kInterleaved>(args, item);
    default:
      return tile<float, kInterleaved>(args, item);
  }
}

}  // namespace

void apply_rope(const RopeArgs& args, int64_t item) {
  args.angles.interleaved ? by_dtype<true>(args, item) : by_dtype<false>(args, item);
}

}  // namespace saccade::cpu::SACCADE_ISA
