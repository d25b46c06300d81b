// Visits the rows of a tile in the order of memory, and fetches ahead: rows of one head fill a few pages, after which the
// next head is megabytes away and the hardware prefetcher starts anew.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr int kFetchBytes = 4096;

// The rows of heads [begin, end) and tokens [token, token + count), the slower of the two outside.
template <class T>
struct Walk {
  bool heads_outside;  // [B, H, S, D], else [B, S, H, D]
  int64_t outer, inner, x_outer, x_inner, y_outer, y_inner, begin, ahead;
  int row_bytes;
  const T* x0;
  T* y0;

  Walk(const Heads& h, int head_dim, int64_t batch, int64_t token, int count, int64_t begin, int64_t end)
      : heads_outside(h.x_stride[1] >= h.x_stride[2]), begin(begin) {
    const int slow = heads_outside ? 1 : 2, fast = heads_outside ? 2 : 1;
    outer = heads_outside ? end - begin : count;
    inner = heads_outside ? count : end - begin;
    x_outer = h.x_stride[slow];
    x_inner = h.x_stride[fast];
    y_outer = h.y_stride[slow];
    y_inner = h.y_stride[fast];
    row_bytes = head_dim * static_cast<int>(sizeof(T));
    ahead = kFetchBytes / row_bytes + 1;
    if (ahead > inner) ahead = inner;
    x0 = static_cast<const T*>(h.x) + batch * h.x_stride[0] + begin * h.x_stride[1] + token * h.x_stride[2];
    y0 = static_cast<T*>(h.y) + batch * h.y_stride[0] + begin * h.y_stride[1] + token * h.y_stride[2];
  }
  const T* x(int64_t o, int64_t i) const { return x0 + o * x_outer + i * x_inner; }
  T* y(int64_t o, int64_t i) const { return y0 + o * y_outer + i * y_inner; }
  int64_t head(int64_t o, int64_t i) const { return begin + (heads_outside ? o : i); }
  int token(int64_t o, int64_t i) const { return static_cast<int>(heads_outside ? i : o); }
  void fetch(int64_t o, int64_t i) const {
    i += ahead;
    if (i >= inner) {
      i -= inner;
      if (++o >= outer) return;
    }
    const char* next = reinterpret_cast<const char*>(x(o, i));
    for (int b = 0; b < row_bytes; b += 64) __builtin_prefetch(next + b);
  }
};

}  // namespace saccade::cpu::SACCADE_ISA
