// apply_rope on the CPU: per tile of tokens, cos and sin once, then all heads of q and k.
#include "angles.h"
#include "walk.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

// Rotate pairs [0, n) of one row in chunks; x1, x2 point at the first and second column of pair `begin`.
template <class T, bool kInterleaved, bool kStill>
inline void rotate_row(const T* x1, const T* x2, T* y1, T* y2, const float* cos, const float* sin, int n) {
  using C = Chunk<T, kInterleaved>;
  constexpr int kStep = C::kPairs, kColumns = kInterleaved ? 2 * kStep : kStep;
  VecF a[C::kVecs], b[C::kVecs];
  auto turn = [&](int i) {
    for (int v = 0; v < C::kVecs; ++v)
      rotate<kStill>(load_raw<VecF>(cos + i + v * kLanes), load_raw<VecF>(sin + i + v * kLanes), a[v], b[v]);
  };
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    const int at = kInterleaved ? 2 * i : i;
    C::load(x1 + at, x2 + at, a, b);
    turn(i);
    C::store(y1 + at, y2 + at, a, b);
  }
  if (i == n) return;
  // The last chunk goes through a buffer: the same arithmetic, so the same bits, and no access beyond the row.
  const int at = kInterleaved ? 2 * i : i;
  const size_t bytes = sizeof(T) * (kInterleaved ? 2 : 1) * static_cast<size_t>(n - i);
  T first[kColumns] = {}, second[kColumns] = {};
  std::memcpy(first, x1 + at, bytes);
  if (!kInterleaved) std::memcpy(second, x2 + at, bytes);
  C::load(first, second, a, b);
  turn(i);
  C::store(first, second, a, b);
  std::memcpy(y1 + at, first, bytes);
  if (!kInterleaved) std::memcpy(y2 + at, second, bytes);
}

template <class T>
inline void copy_columns(const T* x, T* y, int from, int to) {
  if (to > from) std::memcpy(y + from, x + from, sizeof(T) * static_cast<size_t>(to - from));
}

template <class T, bool kInterleaved>
inline void rotate_token(const Angles& a, int head_dim, const T* x, T* y, const float* cos, const float* sin, bool still) {
  const int first = kInterleaved ? 2 * a.begin : a.begin, second = a.pairs + a.begin, n = a.end - a.begin;
  if (x != y) {
    copy_columns(x, y, 0, first);
    copy_columns(x, y, kInterleaved ? 2 * a.end : a.end, kInterleaved ? head_dim : second);
    if (!kInterleaved) copy_columns(x, y, a.pairs + a.end, head_dim);
  }
  if (still)
    rotate_row<T, kInterleaved, true>(x + first, x + second, y + first, y + second, cos, sin, n);
  else
    rotate_row<T, kInterleaved, false>(x + first, x + second, y + first, y + second, cos, sin, n);
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
      const Walk<T> walk(*heads, args.head_dim, batch, token, count, group * per_group, (group + 1) * per_group);
      for (int64_t o = 0; o < walk.outer; ++o)
        for (int64_t i = 0; i < walk.inner; ++i) {
          const int t = walk.token(o, i);
          walk.fetch(o, i);
          rotate_token<T, kInterleaved>(a, args.head_dim, walk.x(o, i), walk.y(o, i), table.cos + t * table.slots,
                                        table.sin + t * table.slots, table.still[t]);
        }
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
