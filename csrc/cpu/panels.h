// Products of rows with rows, without a matrix of them: one side in panels of kPanel rows, the other in tiles of kTile.
//
//   panel [C, kPanel]   a column of kPanel rows side by side, as float vectors: they stay
//   tile  [C, kTile]    a column of kTile rows: read one value at a time, for all rows of the panel
//
// The product of a pair is summed over the columns in one order, whatever panel and tile it lies in: equal rows give
// equal bits. kTile x kPanel accumulators fill the registers of each instruction set.
#pragma once
#include "merge_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {

constexpr int kPanelVecs = 2, kPanel = kPanelVecs * kLanes;
#if defined(__AVX512F__)
constexpr int kTile = 12;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 6;
#endif

// dot[j][v]: products of tile row j with the panel rows of vector v.
using Products = VecF[kTile][kPanelVecs];

// Columns are summed in stretches: one running sum over all of them would be less accurate.
inline int64_t stretch_of(int64_t channels) {
  const int64_t stretches = channels <= 16 ? 1 : channels <= 64 ? 2 : ceil_div(channels, 32);
  return ceil_div(channels, stretches);
}

__attribute__((always_inline)) inline void multiply_stretch(const float* panel, const float* tile, int64_t channels,
                                                            Products& sum) {
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) sum[j][0] = sum[j][1] = VecF{};
  for (int64_t c = 0; c < channels; ++c, panel += kPanel, tile += kTile) {
    const VecF a0 = load_raw<VecF>(panel), a1 = load_raw<VecF>(panel + kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      const VecF b = broadcast(tile[j]);
      sum[j][0] += a0 * b;
      sum[j][1] += a1 * b;
    }
  }
}

__attribute__((always_inline)) inline void add(Products& sum, const Products& more) {
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j)
    for (int v = 0; v < kPanelVecs; ++v) sum[j][v] = more[j][v] + sum[j][v];
}

// Inlined, so that the last stretch, and what is made of the products, stays in registers.
__attribute__((always_inline)) inline void multiply(const float* panel, const float* tile, int64_t channels,
                                                    Products& sum) {
  const int64_t stretch = stretch_of(channels);
  multiply_stretch(panel, tile, stretch, sum);
  for (int64_t c = stretch; c < channels; c += stretch) {
    Products before;
    std::memcpy(&before, &sum, sizeof sum);
    multiply_stretch(panel + c * kPanel, tile + c * kTile, channels - c < stretch ? channels - c : stretch, sum);
    add(sum, before);
  }
}

// row(i) is row i of `width` side by side, null for none (zeros); out [C, width].
template <class T, class Row>
inline void interleave(Row&& row, int width, int64_t channels, float* out) {
  for (int i = 0; i < width; ++i) {
    const T* x = row(i);
    for (int64_t c = 0; c < channels; ++c) out[c * width + i] = x == nullptr ? 0.0f : to_float(x[c]);
  }
}

// Squared norm of a row, columns summed lane by lane.
template <class T>
inline float squared_norm(const T* x, int64_t channels) {
  VecF sum[Span<T>::kVecs] = {};
  Span<T>::each(channels, [&](int64_t c, int64_t n) {
    VecF v[Span<T>::kVecs];
    Span<T>::at(x + c, n, v);
    for (int i = 0; i < Span<T>::kVecs; ++i) sum[i] += v[i] * v[i];
  });
  for (int i = 1; i < Span<T>::kVecs; ++i) sum[0] += sum[i];
  return sum_lanes(sum[0]);
}

}  // namespace saccade::cpu::SACCADE_ISA
