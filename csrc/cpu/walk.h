// Visits the rows of a tile in the order of memory, and fetches ahead: rows of one head fill a few pages, after which the
// next head is megabytes away and the hardware prefetcher starts anew.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

template <class T>
inline const T* row_of(const Heads& h, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(h.x) + batch * h.x_stride[0] + head * h.x_stride[1] + token * h.x_stride[2];
}
template <class T>
inline T* out_row_of(const Heads& h, int64_t batch, int64_t head, int64_t token) {
  return static_cast<T*>(h.y) + batch * h.y_stride[0] + head * h.y_stride[1] + token * h.y_stride[2];
}

constexpr int kFetchBytes = 4096;

// body(head, t, x, y) for heads [begin, end) and tokens [token, token + count)
template <class T, class F>
inline void each_row(const Heads& h, int head_dim, int64_t batch, int64_t token, int count, int64_t begin, int64_t end, F&& body) {
  const bool heads_outside = h.x_stride[1] >= h.x_stride[2];  // [B, H, S, D], else [B, S, H, D]
  const int64_t outer = heads_outside ? end - begin : count, inner = heads_outside ? count : end - begin;
  const int64_t x_outer = h.x_stride[heads_outside ? 1 : 2], x_inner = h.x_stride[heads_outside ? 2 : 1];
  const int64_t y_outer = h.y_stride[heads_outside ? 1 : 2], y_inner = h.y_stride[heads_outside ? 2 : 1];
  const T* x = row_of<T>(h, batch, begin, token);
  T* y = out_row_of<T>(h, batch, begin, token);
  const int row_bytes = head_dim * static_cast<int>(sizeof(T));
  const int64_t ahead = kFetchBytes / row_bytes < inner ? kFetchBytes / row_bytes + 1 : inner;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      const bool wraps = i + ahead >= inner;
      if (!wraps || o + 1 < outer) {
        const T* next = x + (wraps ? (o + 1) * x_outer + (i + ahead - inner) * x_inner : o * x_outer + (i + ahead) * x_inner);
        for (int b = 0; b < row_bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(next) + b);
      }
      const int64_t head = begin + (heads_outside ? o : i);
      body(head, static_cast<int>(heads_outside ? i : o), x + o * x_outer + i * x_inner, y + o * y_outer + i * y_inner);
    }
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
