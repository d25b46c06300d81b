// The rotary ops in float64: plain loops over columns, for gradient checks and for users who want them. Angles keep all
// 64 bits of the phase.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace saccade::cpu {
namespace {

constexpr double kRadiansPerPhase = 3.14159265358979323846 * 0x1p-63;

struct Turn {
  double cos, sin;
};

double position(const Angles& a, int64_t axis, int64_t batch, int64_t token) {
  const int64_t at = axis * a.position_stride[0] + batch * a.position_stride[1] + token * a.position_stride[2];
  return a.position_dtype == PositionDtype::kFloat32 ? static_cast<const float*>(a.positions)[at]
                                                     : static_cast<const double*>(a.positions)[at];
}

int64_t whole_position(const Angles& a, int64_t axis, int64_t batch, int64_t token) {
  const int64_t at = axis * a.position_stride[0] + batch * a.position_stride[1] + token * a.position_stride[2];
  return a.position_dtype == PositionDtype::kInt32 ? static_cast<const int32_t*>(a.positions)[at]
                                                   : static_cast<const int64_t*>(a.positions)[at];
}

// cos and sin of every pair of a group at one token, [R]
void fill(const Angles& a, int64_t group, int64_t batch, int64_t token, std::vector<Turn>& out) {
  const bool integral = a.position_dtype == PositionDtype::kInt32 || a.position_dtype == PositionDtype::kInt64;
  std::vector<uint64_t> phase(a.pairs, 0);
  bool valid = true;
  for (int64_t axis = 0; axis < a.axes; ++axis) {
    uint64_t whole, fraction = 0;  // fraction in 2^-32
    if (integral) {
      whole = static_cast<uint64_t>(whole_position(a, axis, batch, token)) << a.shift;
    } else {
      const double p = std::ldexp(position(a, axis, batch, token), a.shift);
      if (!(std::fabs(p) < 0x1p62)) {
        valid = false;
        continue;
      }
      whole = static_cast<uint64_t>(static_cast<int64_t>(std::floor(p)));
      fraction = static_cast<uint64_t>((p - std::floor(p)) * 0x1p32);
    }
    const int64_t* step = a.steps + (axis * a.groups + group) * a.pairs;
    for (int i = 0; i < a.pairs; ++i) {
      const int64_t high = static_cast<int64_t>(fraction) * (step[i] >> 32);
      const uint64_t low = (fraction * ((step[i] & 0xffffffff) >> 1)) >> 31;
      phase[i] += static_cast<uint64_t>(step[i]) * whole + static_cast<uint64_t>(high) + low;
    }
  }
  for (int i = 0; i < a.pairs; ++i) {
    const double angle = valid ? static_cast<double>(static_cast<int64_t>(phase[i])) * kRadiansPerPhase : NAN;
    out[i] = {std::cos(angle) * a.scale, std::sin(angle) * (a.inverse ? -a.scale : a.scale)};
  }
}

void rotate(const Angles& a, const std::vector<Turn>& turns, double* row) {
  for (int i = a.begin; i < a.end; ++i) {
    double& first = row[a.interleaved ? 2 * i : i];
    double& second = row[a.interleaved ? 2 * i + 1 : a.pairs + i];
    const auto [c, s] = turns[i];
    const double x1 = first, x2 = second;
    first = s == 0 ? c * x1 : c * x1 - s * x2;
    second = s == 0 ? c * x2 : s * x1 + c * x2;
  }
}

const double* row_of(const void* p, const int64_t* stride, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const double*>(p) + batch * stride[0] + head * stride[1] + token * stride[2];
}
double* row_of(void* p, const int64_t* stride, int64_t batch, int64_t head, int64_t token) {
  return static_cast<double*>(p) + batch * stride[0] + head * stride[1] + token * stride[2];
}

template <class F>
void each_token(const RopeArgs& r, int64_t item, F&& body) {
  const int64_t per_batch = (r.tokens + kTileTokens - 1) / kTileTokens, first = item % per_batch * kTileTokens;
  for (int64_t t = first; t < std::min(first + kTileTokens, r.tokens); ++t) body(item / per_batch, t);
}

void apply_rope(const RopeArgs& r, int64_t item) {
  std::vector<Turn> turns(r.angles.pairs);
  each_token(r, item, [&](int64_t batch, int64_t token) {
    for (int64_t group = 0; group < r.angles.groups; ++group) {
      fill(r.angles, group, batch, token, turns);
      for (const Heads* h : {&r.q, &r.k}) {
        const int64_t per_group = h->heads / r.angles.groups;
        for (int64_t head = group * per_group; head < (group + 1) * per_group; ++head) {
          const double* x = row_of(h->x, h->x_stride, batch, head, token);
          double* y = row_of(h->y, h->y_stride, batch, head, token);
          if (x != y) std::copy(x, x + r.head_dim, y);
          rotate(r.angles, turns, y);
        }
      }
    }
  });
}

double weight_at(const NormArgs& n, const void* weight, int64_t i) {
  if (weight == nullptr) return 1.0;
  return n.weight_dtype == Dtype::kFloat64 ? static_cast<const double*>(weight)[i]
                                           : static_cast<const float*>(weight)[i];
}

// 1 / rms of the head, or of all heads, at one token
double inverse_rms(const NormArgs& n, const Heads& h, int64_t batch, int64_t head, int64_t token) {
  const int64_t d = n.rope.head_dim, from = n.row ? 0 : head, to = n.row ? h.heads : head + 1;
  double sum = 0;
  for (int64_t g = from; g < to; ++g) {
    const double* x = row_of(h.x, h.x_stride, batch, g, token);
    for (int64_t i = 0; i < d; ++i) sum += x[i] * x[i];
  }
  return 1.0 / std::sqrt(sum / static_cast<double>((to - from) * d) + n.eps);
}

void qk_norm_rope(const NormArgs& n, int64_t item) {
  const RopeArgs& r = n.rope;
  const int64_t d = r.head_dim;
  std::vector<Turn> turns(r.angles.pairs);
  each_token(r, item, [&](int64_t batch, int64_t token) {
    for (const Heads* h : {&r.q, &r.k}) {
      const void* weight = h == &r.q ? n.q_weight : n.k_weight;
      std::vector<double> inverse(h->heads);  // before anything is written: in place overwrites x
      for (int64_t head = 0; head < h->heads; ++head)
        inverse[head] = n.row && head > 0 ? inverse[0] : inverse_rms(n, *h, batch, head, token);
      const int64_t per_group = h->heads / r.angles.groups;
      for (int64_t head = 0; head < h->heads; ++head) {
        if (head % per_group == 0) fill(r.angles, head / per_group, batch, token, turns);
        const double* x = row_of(h->x, h->x_stride, batch, head, token);
        double* y = row_of(h->y, h->y_stride, batch, head, token);
        for (int64_t i = 0; i < d; ++i) y[i] = x[i] * inverse[head] * weight_at(n, weight, (n.row ? head * d : 0) + i);
        rotate(r.angles, turns, y);
      }
    }
  });
}

void backward_heads(const NormGradArgs& args, const Heads& h, const void* weight, const void* dy,
                    const int64_t* dy_stride, int64_t block, int64_t blocks, double* partial) {
  const NormArgs& n = args.norm;
  const RopeArgs& r = n.rope;
  Angles angles = r.angles;
  angles.inverse = true;
  const int64_t d = r.head_dim, rows = r.batch * r.tokens, width = n.row ? h.heads * d : d;
  std::fill(partial, partial + (h.heads ? width : 0), 0.0);
  std::vector<Turn> turns(angles.pairs);
  std::vector<double> normal(h.heads * d), g(h.heads * d), inverse(h.heads), mean(h.heads);
  for (int64_t at = rows * block / blocks; h.heads && at < rows * (block + 1) / blocks; ++at) {
    const int64_t batch = at / r.tokens, token = at % r.tokens, per_group = h.heads / angles.groups;
    double row_dot = 0;
    for (int64_t head = 0; head < h.heads; ++head) {
      if (head % per_group == 0) fill(angles, head / per_group, batch, token, turns);
      inverse[head] = n.row && head > 0 ? inverse[0] : inverse_rms(n, h, batch, head, token);
      const double* x = row_of(h.x, h.x_stride, batch, head, token);
      const double* d_row = row_of(dy, dy_stride, batch, head, token);
      double *n_row = normal.data() + head * d, *g_row = g.data() + head * d, own = 0;
      std::copy(d_row, d_row + d, g_row);
      rotate(angles, turns, g_row);
      for (int64_t i = 0; i < d; ++i) {
        const int64_t w = (n.row ? head * d : 0) + i;
        n_row[i] = x[i] * inverse[head];
        partial[w] += g_row[i] * n_row[i];
        g_row[i] *= weight_at(n, weight, w);
        own += g_row[i] * n_row[i];
      }
      row_dot += own;
      mean[head] = own / static_cast<double>(d);
    }
    for (int64_t head = 0; head < h.heads; ++head) {
      double* dx = row_of(h.y, h.y_stride, batch, head, token);
      const double m = n.row ? row_dot / static_cast<double>(h.heads * d) : mean[head];
      for (int64_t i = 0; i < d; ++i) dx[i] = inverse[head] * (g[head * d + i] - normal[head * d + i] * m);
    }
  }
}

void qk_norm_rope_bwd(const NormGradArgs& args, int64_t block, int64_t blocks) {
  const NormArgs& n = args.norm;
  const int64_t d = n.rope.head_dim;
  const int64_t q_width = n.row ? n.rope.q.heads * d : d, k_width = n.row ? n.rope.k.heads * d : d;
  double* partial = static_cast<double*>(args.workspace) + block * (q_width + k_width);
  backward_heads(args, n.rope.q, n.q_weight, args.q_dy, args.q_dy_stride, block, blocks, partial);
  backward_heads(args, n.rope.k, n.k_weight, args.k_dy, args.k_dy_stride, block, blocks, partial + q_width);
}

}  // namespace

const Kernels kFloat64Kernels{"float64", apply_rope, qk_norm_rope, qk_norm_rope_bwd};

}  // namespace saccade::cpu
