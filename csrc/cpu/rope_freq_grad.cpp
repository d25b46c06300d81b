// Gradient of learned frequencies: sum over tokens of position * sum over heads of cross(x, dx).
#include <cstring>
#include <vector>

#include "kernels.h"

namespace saccade::cpu {
namespace {

template <Dtype kDtype>
double value(const void* p, int64_t i) {
  if constexpr (kDtype == Dtype::kFloat64) return static_cast<const double*>(p)[i];
  if constexpr (kDtype == Dtype::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t bits = static_cast<const uint16_t*>(p)[i];
  if constexpr (kDtype == Dtype::kFloat16) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return static_cast<double>(static_cast<float>(h));
  }
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}

double position(const Angles& a, int64_t axis, int64_t batch, int64_t token) {
  const int64_t at = axis * a.position_stride[0] + batch * a.position_stride[1] + token * a.position_stride[2];
  switch (a.position_dtype) {
    case PositionDtype::kInt32:
      return static_cast<const int32_t*>(a.positions)[at];
    case PositionDtype::kInt64:
      return static_cast<double>(static_cast<const int64_t*>(a.positions)[at]);
    case PositionDtype::kFloat32:
      return static_cast<const float*>(a.positions)[at];
    default:
      return static_cast<const double*>(a.positions)[at];
  }
}

template <Dtype kDtype>
void sum(const FreqGradArgs& args, int64_t block, int64_t blocks, double* partial) {
  const RopeArgs& r = args.rope;
  const Angles& a = r.angles;
  const int64_t rows = r.batch * r.tokens, width = static_cast<int64_t>(a.groups) * a.pairs;
  std::vector<double> cross(width);
  std::memset(partial, 0, sizeof(double) * static_cast<size_t>(a.axes * width));
  for (int64_t at = rows * block / blocks; at < rows * (block + 1) / blocks; ++at) {
    const int64_t batch = at / r.tokens, token = at % r.tokens;
    std::fill(cross.begin(), cross.end(), 0.0);
    for (int which = 0; which < 2; ++which) {
      const Heads& h = which ? r.k : r.q;
      const int64_t* d_stride = which ? args.k_dx_stride : args.q_dx_stride;
      for (int64_t head = 0; head < h.heads; ++head) {
        const int64_t x0 = batch * h.x_stride[0] + head * h.x_stride[1] + token * h.x_stride[2];
        const int64_t d0 = batch * d_stride[0] + head * d_stride[1] + token * d_stride[2];
        const void* d = which ? args.k_dx : args.q_dx;
        double* out = cross.data() + head / (h.heads / a.groups) * a.pairs;
        for (int64_t i = 0; i < a.pairs; ++i) {
          const int64_t c1 = a.interleaved ? 2 * i : i, c2 = a.interleaved ? 2 * i + 1 : a.pairs + i;
          out[i] += value<kDtype>(h.x, x0 + c1) * value<kDtype>(d, d0 + c2) -
                    value<kDtype>(h.x, x0 + c2) * value<kDtype>(d, d0 + c1);
        }
      }
    }
    for (int64_t axis = 0; axis < a.axes; ++axis) {
      const double p = position(a, axis, batch, token);
      for (int64_t i = 0; i < width; ++i) partial[axis * width + i] += p * cross[i];
    }
  }
}

}  // namespace

void rope_freq_grad(const FreqGradArgs& args, int64_t block, int64_t blocks, double* partial) {
  switch (args.rope.dtype) {
    case Dtype::kFloat16:
      return sum<Dtype::kFloat16>(args, block, blocks, partial);
    case Dtype::kBFloat16:
      return sum<Dtype::kBFloat16>(args, block, blocks, partial);
    case Dtype::kFloat64:
      return sum<Dtype::kFloat64>(args, block, blocks, partial);
    default:
      return sum<Dtype::kFloat32>(args, block, blocks, partial);
  }
}

}  // namespace saccade::cpu
