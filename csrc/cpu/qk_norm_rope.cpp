// qk_norm_rope on the CPU: RMS normalisation, weight and rotation of a row while it is in L1.
#include <cstdlib>

#include "rows.h"
#include "walk.h"

namespace saccade::cpu::SACCADE_ISA {

namespace {

struct Scratch {  // plain malloc: no container code in this translation unit (vec.h says why)
  float* data;
  explicit Scratch(int64_t floats) : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    std::memset(data, 0, static_cast<size_t>(floats) * 4);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

float element(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat16:
      return to_float(static_cast<const Half*>(p)[i]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

// Weights in lane order: one row, or one per head. No weight means 1.
template <class T, bool kInterleaved>
void load_weights(const NormArgs& args, const void* weight, int64_t heads, const RowLayout& layout, float* out) {
  float columns[512];
  const int64_t rows = args.row ? heads : 1, d = args.rope.head_dim;
  for (int64_t h = 0; h < rows; ++h) {
    for (int64_t i = 0; i < d; ++i) columns[i] = weight ? quiet(element(weight, args.weight_dtype, h * d + i)) : 1.0f;
    Rows<T, kInterleaved>::from_columns(layout, columns, out + h * layout.length());
  }
}

Angles all_pairs(Angles a) {  // identity pairs are normalised too, so the table spans every pair
  a.begin = 0;
  a.end = a.pairs;
  return a;
}

// In float64: an error here would be common to the whole row.
float inverse_rms(float sum_of_squares, int64_t count, double eps) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(sum_of_squares) / static_cast<double>(count) + eps));
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------
// The same in float32 for a group of heads, in place and with vectors: one row at a time it cost as much as the
// squares.
void inverse_rms(float (&sums)[kHeadsTogether], int64_t count, double eps) {
  const float n = static_cast<float>(count), e = static_cast<float>(eps);
  for (float& sum : sums) sum = 1.0f / __builtin_sqrtf(sum / n + e);
}

template <class T, bool kInterleaved>
struct Forward {
  using R = Rows<T, kInterleaved>;
  const NormArgs& args;
  const RopeArgs& rope;
  RowLayout l;
  int64_t batch, token;
  int count;

  void run(const Heads& heads, const void* weight, Table& table, const Order& order, const Angles& angles) const {
    if (heads.heads == 0) return;
    Scratch weights((args.row ? heads.heads : 1) * l.length());
    load_weights<T, kInterleaved>(args, weight, heads.heads, l, weights.data);
    float token_r[kTileTokens] = {};
    if (args.row) {
      const Walk<T> walk(heads, rope.head_dim, batch, token, 0, heads.heads);
      walk.each(count, [&](int t, int64_t first, int64_t last) {
        for (int64_t h = first; h < last; ++h) token_r[t] += R::squares(l, walk.x(h, t));
      });
      for (int t = 0; t < count; ++t) token_r[t] = inverse_rms(token_r[t], heads.heads * rope.head_dim, args.eps);
    }
    const int64_t per_group = heads.heads / angles.groups;
    for (int64_t group = 0; group < angles.groups; ++group) {
      if (angles.groups > 1) table.fill(angles, order, group, batch, token, count);
      const Walk<T> walk(heads, rope.head_dim, batch, token, group * per_group, (group + 1) * per_group);
      // One group behind: the square root and division of a group run while the one before is turned and stored.
      Pending pending;
      walk.each(count, [&](int t, int64_t first, int64_t last) {
        Pending next{t, first, last, {}};
        if (args.row) {
          for (float& r : next.r) r = token_r[t];
        } else {
          for (int64_t h = first; h < last; ++h) next.r[h - first] = R::squares(l, walk.x(h, t));
          inverse_rms(next.r, rope.head_dim, args.eps);
        }
        normalise(walk, pending, weights.data, table);
        pending = next;
      });
      normalise(walk, pending, weights.data, table);
    }
  }

  struct Pending {  // heads [first, last) of token t, and their 1 / rms
    int t = 0;
    int64_t first = 0, last = 0;
    float r[kHeadsTogether] = {};
  };

  void normalise(const Walk<T>& walk, const Pending& p, const float* weights, const Table& table) const {
    const float *cos = table.cos + p.t * table.slots, *sin = table.sin + p.t * table.slots;
    for (int64_t h = p.first; h < p.last; ++h) {
      const float* w = weights + (args.row ? (walk.begin + h) * l.length() : 0);
      const float r = p.r[h - p.first];
      if (table.still[p.t])
        R::template normalise<true>(l, walk.x(h, p.t), walk.y(h, p.t), r, w, cos, sin);
      else
        R::template normalise<false>(l, walk.x(h, p.t), walk.y(h, p.t), r, w, cos, sin);
    }
  }
};

template <class T, bool kInterleaved>
void forward(const NormArgs& args, int64_t item) {
  const RopeArgs& rope = args.rope;
  const int64_t tiles_per_batch = (rope.tokens + kTileTokens - 1) / kTileTokens;
  const int64_t token = item % tiles_per_batch * kTileTokens;
  const int64_t left = rope.tokens - token;
  const Forward<T, kInterleaved> f{args,
                                   rope,
                                   Rows<T, kInterleaved>::layout(rope.head_dim, rope.angles.pairs),
                                   item / tiles_per_batch,
                                   token,
                                   static_cast<int>(left < kTileTokens ? left : kTileTokens)};
  const Angles angles = all_pairs(rope.angles);
  const Order order = Order::of<Chunk<T, kInterleaved>>(angles.pairs);
  Table table;
  if (angles.groups == 1) table.fill(angles, order, 0, f.batch, f.token, f.count);
  f.run(rope.q, args.q_weight, table, order, angles);
  f.run(rope.k, args.k_weight, table, order, angles);
}

// ---- backward
// -------------------------------------------------------------------------------------------------------- With n = x r
// and z = n w rotated to y: dz = inverse rotation of dy, dw += dz n, g = dz w, dx = r (g - n mean(g n)).
template <class T, bool kInterleaved>
void backward_heads(const NormGradArgs& args, const Heads& heads, const void* weight, const void* dy,
                    const int64_t* dy_stride, int64_t block, int64_t blocks, double* partial) {
  using R = Rows<T, kInterleaved>;
  if (heads.heads == 0) return;
  const NormArgs& norm = args.norm;
  const RopeArgs& rope = norm.rope;
  const Angles angles = all_pairs(rope.angles);
  const Order order = Order::of<Chunk<T, kInterleaved>>(angles.pairs);
  const RowLayout l = R::layout(rope.head_dim, angles.pairs);
  const int length = l.length();
  const int64_t weight_rows = norm.row ? heads.heads : 1, h_count = heads.heads;
  Scratch weights(weight_rows * length), dweights(weight_rows * length), x_rows(h_count * length),
      g_rows(h_count * length);
  load_weights<T, kInterleaved>(norm, weight, h_count, l, weights.data);
  const int64_t rows = rope.batch * rope.tokens, from = rows * block / blocks, to = rows * (block + 1) / blocks;
  const int64_t per_group = h_count / angles.groups;
  Scratch steps_memory(static_cast<int64_t>(sizeof(Steps) / 4) * angles.groups + 16);
  Steps* steps = reinterpret_cast<Steps*>(steps_memory.data);
  for (int64_t g = 0; g < angles.groups; ++g) steps[g].load(angles, order, g);
  alignas(64) float cos[kMaxPairs + 2 * kLanes], sin[kMaxPairs + 2 * kLanes];
  // Float sums stay short, about 8 terms; then they move to float64.
  const int64_t flush_every = norm.row || h_count < 8 ? 8 : 1, width = weight_rows * rope.head_dim;
  for (int64_t i = 0; i < width; ++i) partial[i] = 0;
  auto flush = [&] {
    float columns[512];
    for (int64_t h = 0; h < weight_rows; ++h) {
      R::to_columns(l, dweights.data + h * length, columns);
      for (int64_t i = 0; i < rope.head_dim; ++i) partial[h * rope.head_dim + i] += columns[i];
    }
    std::memset(dweights.data, 0, sizeof(float) * static_cast<size_t>(weight_rows * length));
  };
  for (int64_t at = from; at < to; ++at) {
    if ((at - from) % flush_every == 0) flush();
    const int64_t batch = at / rope.tokens, token = at % rope.tokens;
    const T* x = static_cast<const T*>(heads.x) + batch * heads.x_stride[0] + token * heads.x_stride[2];
    const T* d = static_cast<const T*>(dy) + batch * dy_stride[0] + token * dy_stride[2];
    T* dx = static_cast<T*>(heads.y) + batch * heads.y_stride[0] + token * heads.y_stride[2];
    float squares = 0;
    for (int64_t h = 0; h < h_count; ++h) {
      float* row = x_rows.data + h * length;
      R::load(l, x + h * heads.x_stride[1], row);
      const float own = dot(row, row, length);
      if (norm.row) {
        squares += own;
        continue;
      }
      const float r = inverse_rms(own, rope.head_dim, norm.eps);
      for (int i = 0; i < length; i += kLanes) store_raw(row + i, load_raw<VecF>(row + i) * r);
      g_rows.data[h * length] = r;  // read back below, before g takes its place
    }
    const float row_r = norm.row ? inverse_rms(squares, h_count * rope.head_dim, norm.eps) : 0.0f;
    if (norm.row)
      for (int64_t i = 0; i < h_count * length; i += kLanes)
        store_raw(x_rows.data + i, load_raw<VecF>(x_rows.data + i) * row_r);
    float row_dot = 0;
    for (int64_t h = 0; h < h_count; ++h) {
      if (h % per_group == 0) fill_token(angles, steps[h / per_group], order.slots, batch, token, cos, sin);
      const float* n = x_rows.data + h * length;
      float* g = g_rows.data + h * length;
      const float r = norm.row ? row_r : g[0];
      R::load(l, d + h * dy_stride[1], g);
      rotate_slots<true>(g, order.slots, cos, sin);
      float* dw = dweights.data + (norm.row ? h * length : 0);
      const float* w = weights.data + (norm.row ? h * length : 0);
      for (int i = 0; i < length; i += kLanes) {
        const VecF dz = load_raw<VecF>(g + i);
        store_raw(dw + i, load_raw<VecF>(dw + i) + dz * load_raw<VecF>(n + i));
        store_raw(g + i, dz * load_raw<VecF>(w + i));
      }
      const float own = dot(g, n, length);
      if (norm.row) {
        row_dot += own;
        continue;
      }
      const float mean = own / static_cast<float>(rope.head_dim);
      for (int i = 0; i < length; i += kLanes)
        store_raw(g + i, (load_raw<VecF>(g + i) - load_raw<VecF>(n + i) * mean) * r);
      R::store(l, g, dx + h * heads.y_stride[1]);
    }
    if (!norm.row) continue;
    const float mean = row_dot / static_cast<float>(h_count * rope.head_dim);
    for (int64_t h = 0; h < h_count; ++h) {
      const float* n = x_rows.data + h * length;
      float* g = g_rows.data + h * length;
      for (int i = 0; i < length; i += kLanes)
        store_raw(g + i, (load_raw<VecF>(g + i) - load_raw<VecF>(n + i) * mean) * row_r);
      R::store(l, g, dx + h * heads.y_stride[1]);
    }
  }
  flush();
}

template <class T, bool kInterleaved>
void backward(const NormGradArgs& args, int64_t block, int64_t blocks) {
  const NormArgs& norm = args.norm;
  const int64_t d = norm.rope.head_dim;
  const int64_t q_width = norm.row ? norm.rope.q.heads * d : d, k_width = norm.row ? norm.rope.k.heads * d : d;
  double* partial = static_cast<double*>(args.workspace) + block * (q_width + k_width);
  NormGradArgs inverse = args;
  inverse.norm.rope.angles.inverse = true;
  backward_heads<T, kInterleaved>(inverse, norm.rope.q, norm.q_weight, args.q_dy, args.q_dy_stride, block, blocks,
                                  partial);
  backward_heads<T, kInterleaved>(inverse, norm.rope.k, norm.k_weight, args.k_dy, args.k_dy_stride, block, blocks,
                                  partial + q_width);
}

}  // namespace

void qk_norm_rope(const NormArgs& args, int64_t item) {
  const bool pairs = args.rope.angles.interleaved;
  switch (args.rope.dtype) {
    case Dtype::kFloat16:
      return pairs ? forward<Half, true>(args, item) : forward<Half, false>(args, item);
    case Dtype::kBFloat16:
      return pairs ? forward<BFloat16, true>(args, item) : forward<BFloat16, false>(args, item);
    default:
      return pairs ? forward<float, true>(args, item) : forward<float, false>(args, item);
  }
}

void qk_norm_rope_bwd(const NormGradArgs& args, int64_t block, int64_t blocks) {
  const bool pairs = args.norm.rope.angles.interleaved;
  switch (args.norm.rope.dtype) {
    case Dtype::kFloat16:
      return pairs ? backward<Half, true>(args, block, blocks) : backward<Half, false>(args, block, blocks);
    case Dtype::kBFloat16:
      return pairs ? backward<BFloat16, true>(args, block, blocks) : backward<BFloat16, false>(args, block, blocks);
    default:
      return pairs ? backward<float, true>(args, block, blocks) : backward<float, false>(args, block, blocks);
  }
}

}  // namespace saccade::cpu::SACCADE_ISA
