// block_pool on the CPU: one pass over the tokens, summed in a few rows that stay in the cache.
#include "planning_kernels.h"
#include "span.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr int kChains = kPoolChains;  // sums that run side by side: shorter ones are more accurate

template <class T>
void pool(const BlockPoolArgs& a, int64_t batch, int64_t head, int64_t block, float* sums) {
  using S = Span<T>;
  const T* x = static_cast<const T*>(a.x) + batch * a.x_stride[0] + head * a.x_stride[1];
  const int64_t first = block * a.block, pitch = pool_pitch(a.head_dim);
  const int32_t* order = a.order.data;
  if (order != nullptr) order += batch * a.order.stride[0] + head * a.order.stride[1];
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(kChains * pitch));
  int64_t count = 0;
  for (int64_t i = first; i < first + a.block; ++i) {
    const int64_t token = order == nullptr ? i : order[i];
    if (token < 0 || token >= a.tokens) continue;
    const T* row = x + token * a.x_stride[2];
    float* sum = sums + count++ % kChains * pitch;
    S::each(a.head_dim, [&](int64_t c, int64_t n) {
      VecF v[S::kVecs];
      S::at(row + c, n, v);
      for (int k = 0; k < S::kVecs; ++k) store_raw(sum + c + k * kLanes, load_raw<VecF>(sum + c + k * kLanes) + v[k]);
    });
  }
  const float divisor = static_cast<float>(count < 1 ? 1 : count);
  float* out = a.out + ((batch * a.heads + head) * a.blocks + block) * a.head_dim;
  for (int64_t c = 0; c < a.head_dim; ++c) {
    const int64_t in = c % S::kStep, at = c - in + in % S::kVecs * kLanes + in / S::kVecs;  // the order of Chunk
    out[c] = ((sums[at] + sums[pitch + at]) + (sums[2 * pitch + at] + sums[3 * pitch + at])) / divisor;
  }
}

}  // namespace

void block_pool(const BlockPoolArgs& a, int64_t batch, int64_t head, int64_t block, float* space) {
  SACCADE_BY_TYPE(a.dtype, pool<T>(a, batch, head, block, space));
}

}  // namespace saccade::cpu::SACCADE_ISA
