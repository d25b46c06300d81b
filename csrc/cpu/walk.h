// The order in which the rows of a tile are visited: groups of a few heads of one token, tokens or heads outside, as
// memory lies.
//
// A row of cos and sin is twice as large as a bf16 row that it turns; used by one head at a time it came from L2 each
// time and doubled the time of a large [B, H, S, D] tensor. Few enough heads are taken together that the hardware
// follows their streams.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr int64_t kHeadsTogether = 4;
constexpr int64_t kRowsAhead = 4;

template <class T>
struct Walk {
  const T* x0;
  T* y0;
  int64_t x_head, x_token, y_head, y_token, begin, heads;
  int row_bytes;

  Walk(const Heads& h, int head_dim, int64_t batch, int64_t token, int64_t begin, int64_t end)
      : x_head(h.x_stride[1]),
        x_token(h.x_stride[2]),
        y_head(h.y_stride[1]),
        y_token(h.y_stride[2]),
        begin(begin),
        heads(end - begin),
        row_bytes(head_dim * static_cast<int>(sizeof(T))) {
    x0 = static_cast<const T*>(h.x) + batch * h.x_stride[0] + begin * x_head + token * x_token;
    y0 = static_cast<T*>(h.y) + batch * h.y_stride[0] + begin * y_head + token * y_token;
  }

  // h counts from `begin`, t from the first token.
  const T* x(int64_t h, int64_t t) const { return x0 + h * x_head + t * x_token; }
  T* y(int64_t h, int64_t t) const { return y0 + h * y_head + t * y_token; }

  // body(t, first, last): heads [first, last) of token t, at most kHeadsTogether
  template <class F>
  void each(int count, F&& body) const {
    if (x_head < x_token) {  // [B, S, H, D]: one stream, which the hardware prefetches
      for (int t = 0; t < count; ++t)
        for (int64_t h = 0; h < heads; h += kHeadsTogether) body(t, h, end_of(h));
      return;
    }
    for (int64_t h = 0; h < heads; h += kHeadsTogether)
      for (int t = 0; t < count; ++t) {
        if (t + kRowsAhead < count)
          for (int64_t g = h; g < end_of(h); ++g)
            for (int b = 0; b < row_bytes; b += 64)
              __builtin_prefetch(reinterpret_cast<const char*>(x(g, t + kRowsAhead)) + b);
        body(t, h, end_of(h));
      }
  }
  int64_t end_of(int64_t h) const { return h + kHeadsTogether < heads ? h + kHeadsTogether : heads; }
};

}  // namespace saccade::cpu::SACCADE_ISA
