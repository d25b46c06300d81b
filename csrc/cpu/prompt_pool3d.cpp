// prompt_pool3d and its gradient on the CPU.
#include <cmath>

#include "merge_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

struct Window {
  int32_t start[3];  // first place along t, h, w
};

Window window_of(const PromptPoolArgs& p, int64_t index) {
  const int64_t w = index % p.out_size[2], h = index / p.out_size[2] % p.out_size[1],
                t = index / p.out_size[2] / p.out_size[1];
  return {{static_cast<int32_t>(t) * p.stride[0], static_cast<int32_t>(h) * p.stride[1],
           static_cast<int32_t>(w) * p.stride[2]}};
}

int64_t volume(const PromptPoolArgs& p) { return static_cast<int64_t>(p.kernel[0]) * p.kernel[1] * p.kernel[2]; }

// body(i, t, h, w) for the places of a window, in order
template <class F>
inline void each_place(const PromptPoolArgs& p, const Window& o, F&& body) {
  int64_t i = 0;
  for (int32_t t = o.start[0]; t < o.start[0] + p.kernel[0]; ++t)
    for (int32_t h = o.start[1]; h < o.start[1] + p.kernel[1]; ++h)
      for (int32_t w = o.start[2]; w < o.start[2] + p.kernel[2]; ++w) body(i++, t, h, w);
}

template <class T>
const T* token_at(const PromptPoolArgs& p, int64_t batch, int64_t t, int64_t h, int64_t w) {
  return static_cast<const T*>(p.x) + batch * p.x_stride[0] + t * p.x_stride[1] + h * p.x_stride[2] + w * p.x_stride[3];
}

// Softmax of the window's weights, [volume]
void shares(const PromptPoolArgs& p, int64_t batch, const Window& o, float* a) {
  const float* weights = p.weights + batch * p.size[0] * p.size[1] * p.size[2];
  float top = -HUGE_VALF, sum = 0.0f;
  each_place(p, o, [&](int64_t i, int64_t t, int64_t h, int64_t w) {
    a[i] = weights[(t * p.size[1] + h) * p.size[2] + w] / p.temperature;
    top = a[i] > top ? a[i] : top;
  });
  const int64_t n = volume(p);
  for (int64_t i = 0; i < n; ++i) sum += a[i] = std::exp(a[i] - top);
  for (int64_t i = 0; i < n; ++i) a[i] /= sum;
}

template <class T>
void one_window(const PromptPoolArgs& p, int64_t batch, int64_t index, float* a) {
  using S = Span<T>;
  const Window o = window_of(p, index);
  shares(p, batch, o, a);
  const int64_t windows = static_cast<int64_t>(p.out_size[0]) * p.out_size[1] * p.out_size[2];
  T* y = static_cast<T*>(p.y) + (batch * windows + index) * p.width;
  S::each(p.width, [&](int64_t c, int64_t n) {
    VecF sum[S::kVecs] = {};
    each_place(p, o, [&](int64_t i, int64_t t, int64_t h, int64_t w) {
      VecF v[S::kVecs];
      S::at(token_at<T>(p, batch, t, h, w) + c, n, v);
      for (int k = 0; k < S::kVecs; ++k) sum[k] += v[k] * a[i];
    });
    S::put(y + c, n, sum);
  });
}

template <class T>
float dot(const T* x, const T* y, int64_t width) {
  using S = Span<T>;
  VecF sum = {};
  S::each(width, [&](int64_t c, int64_t n) {
    VecF a[S::kVecs], b[S::kVecs];
    S::at(x + c, n, a);
    S::at(y + c, n, b);
    for (int i = 0; i < S::kVecs; ++i) sum += a[i] * b[i];
  });
  return sum_lanes(sum);
}

// Workspace [B, windows, 2, volume]: the shares, and what each place adds to the gradient of its weight.
template <class T>
void one_window_bwd(const PromptPoolGradArgs& g, int64_t batch, int64_t index) {
  const PromptPoolArgs& p = g.pool;
  const Window o = window_of(p, index);
  const int64_t windows = static_cast<int64_t>(p.out_size[0]) * p.out_size[1] * p.out_size[2], n = volume(p);
  float *a = static_cast<float*>(g.workspace) + (batch * windows + index) * 2 * n, *c = a + n;
  shares(p, batch, o, a);
  const T* dy = static_cast<const T*>(g.dy) + (batch * windows + index) * p.width;
  double mean = 0.0;
  each_place(p, o, [&](int64_t i, int64_t t, int64_t h, int64_t w) {
    c[i] = dot(dy, token_at<T>(p, batch, t, h, w), p.width);
    mean += static_cast<double>(a[i]) * c[i];
  });
  for (int64_t i = 0; i < n; ++i) c[i] = static_cast<float>(a[i] * (c[i] - mean) / p.temperature);
}

template <class T>
void one_token_bwd(const PromptPoolGradArgs& g, int64_t batch, int64_t token) {
  using S = Span<T>;
  const PromptPoolArgs& p = g.pool;
  const int64_t at[3] = {token / p.size[2] / p.size[1], token / p.size[2] % p.size[1], token % p.size[2]};
  const int64_t windows = static_cast<int64_t>(p.out_size[0]) * p.out_size[1] * p.out_size[2], n = volume(p);
  int64_t first[3], last[3];  // windows that hold the token, along each axis
  for (int i = 0; i < 3; ++i) {
    first[i] = at[i] < p.kernel[i] ? 0 : (at[i] - p.kernel[i]) / p.stride[i] + 1;
    last[i] = at[i] / p.stride[i] < p.out_size[i] - 1 ? at[i] / p.stride[i] : p.out_size[i] - 1;
  }
  const float* space = static_cast<const float*>(g.workspace) + batch * windows * 2 * n;
  auto each_window = [&](auto&& body) {
    for (int64_t t = first[0]; t <= last[0]; ++t)
      for (int64_t h = first[1]; h <= last[1]; ++h)
        for (int64_t w = first[2]; w <= last[2]; ++w) {
          const int64_t i = ((at[0] - t * p.stride[0]) * p.kernel[1] + at[1] - h * p.stride[1]) * p.kernel[2] + at[2] -
                            w * p.stride[2];
          body((t * p.out_size[1] + h) * p.out_size[2] + w, i);
        }
  };
  float dweight = 0.0f;
  each_window([&](int64_t o, int64_t i) { dweight += space[(o * 2 + 1) * n + i]; });
  const int64_t tokens = static_cast<int64_t>(p.size[0]) * p.size[1] * p.size[2];
  g.dweights[batch * tokens + token] = dweight;
  T* dx = static_cast<T*>(g.dx) + (batch * tokens + token) * p.width;
  const T* dy = static_cast<const T*>(g.dy) + batch * windows * p.width;
  S::each(p.width, [&](int64_t c, int64_t count) {
    VecF sum[S::kVecs] = {};
    each_window([&](int64_t o, int64_t i) {
      VecF v[S::kVecs];
      S::at(dy + o * p.width + c, count, v);
      for (int k = 0; k < S::kVecs; ++k) sum[k] += v[k] * space[o * 2 * n + i];
    });
    S::put(dx + c, count, sum);
  });
}

}  // namespace

void prompt_pool3d(const PromptPoolArgs& p, int64_t batch, int64_t window, float* space) {
  SACCADE_BY_TYPE(p.dtype, one_window<T>(p, batch, window, space));
}

void prompt_pool3d_bwd_windows(const PromptPoolGradArgs& g, int64_t batch, int64_t window) {
  SACCADE_BY_TYPE(g.pool.dtype, one_window_bwd<T>(g, batch, window));
}

void prompt_pool3d_bwd(const PromptPoolGradArgs& g, int64_t batch, int64_t token) {
  SACCADE_BY_TYPE(g.pool.dtype, one_token_bwd<T>(g, batch, token));
}

}  // namespace saccade::cpu::SACCADE_ISA
