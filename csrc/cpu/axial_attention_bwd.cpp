// Gradients of attention inside the boxes of a grid behind a prefix: items and lanes as in axial_attention.cpp.
//
// Rows of the prefix take part in every box. Their gradients are summed over the boxes of a run here, and over the runs
// in axial_prefix_end_bwd. A prefix query that sees all tokens sees those of a box while they are at hand.
#include "axial_kernels.h"
#include "axial_rows.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

constexpr int64_t kQueryRowsBwd = 48;

template <class T>
struct Heads {
  Head<const T> q, k, v, out, dout;
  Head<T> dq, dk, dv;
};
template <class T>
Heads<T> heads_at(const AxialAttentionGradArgs& a, int64_t batch, int64_t head) {
  const AxialAttentionArgs& f = a.forward;
  return {head_of<T>(f.q, f.q_stride, batch, head),
          head_of<T>(f.k, f.k_stride, batch, head),
          head_of<T>(f.v, f.v_stride, batch, head),
          head_of<T>(static_cast<const void*>(f.out), f.out_stride, batch, head),
          head_of<T>(a.dout, a.dout_stride, batch, head),
          head_of<T>(a.dq, a.dq_stride, batch, head),
          head_of<T>(a.dk, a.dk_stride, batch, head),
          head_of<T>(a.dv, a.dv_stride, batch, head)};
}

inline float row_dot(const float* a, const float* b, int64_t width) {
  VecF sum{};
  for (int64_t c = 0; c < width; c += kLanes) sum += load_raw<VecF>(a + c) * load_raw<VecF>(b + c);
  return sum_lanes(sum);
}
inline void scale_row(float* row, int64_t width, float by) {
  for (int64_t c = 0; c < width; c += kLanes) store_raw(row + c, load_raw<VecF>(row + c) * broadcast(by));
}

// Scores s and products dp to weights and score gradients, one vector. A query that sees nothing has lse +inf here.
inline void gradients(float* s, float* dp, VecF lse, VecF delta, VecF scale) {
  const VecF p = exp_of(load_raw<VecF>(s) * scale - lse);
  store_raw(s, p);
  store_raw(dp, p * (load_raw<VecF>(dp) - delta) * scale);
}
inline float level_of(float lse) { return lse == -__builtin_inff() ? __builtin_inff() : lse; }

// ---- the prefix of a head -------------------------------------------------------------------------------------------
struct Prefix {
  int64_t count, width;
  bool mean;
  const float **q, **dout;  // rows; dout divided by the number of boxes with `mean`
  float **dq, **dk, **dv;   // sums of this run
  float *lse, *delta;       // of queries that see all tokens
  float *q_rows, *dout_rows, *sums, *spread, *s, *dp;
};
template <class S>
Prefix take_prefix(S& space, int64_t count, int64_t width) {
  Prefix p{};
  p.count = count;
  p.width = width;
  p.q = space.template take<const float*>(count);
  p.dout = space.template take<const float*>(count);
  p.dq = space.template take<float*>(count);
  p.dk = space.template take<float*>(count);
  p.dv = space.template take<float*>(count);
  p.lse = space.take(count);
  p.delta = space.take(count);
  p.q_rows = space.take(count * width);
  p.dout_rows = space.take(count * width);
  p.sums = space.take(3 * count * width);
  p.spread = space.take(2 * (count + kLanes) * kLanes);
  p.s = space.take((count + kLanes) * kLanes);
  p.dp = space.take((count + kLanes) * kLanes);
  return p;
}

template <class T>
void begin_prefix(const AxialAttentionGradArgs& a, const AxialPlan& plan, const Heads<T>& h, int64_t row, Prefix& p) {
  const int64_t columns = a.forward.head_dim;
  p.mean = a.forward.geometry.mean;
  fill(p.sums, 3 * p.count * p.width, 0.0f);
  for (int64_t i = 0; i < p.count; ++i) {
    load_row(h.q.base + i * h.q.stride, columns, p.q_rows + i * p.width);
    load_row(h.dout.base + i * h.dout.stride, columns, p.dout_rows + i * p.width);
    p.q[i] = p.q_rows + i * p.width;
    p.dout[i] = p.dout_rows + i * p.width;
    p.dq[i] = p.sums + i * p.width;
    p.dk[i] = p.sums + (p.count + i) * p.width;
    p.dv[i] = p.sums + (2 * p.count + i) * p.width;
    if (p.mean) {
      scale_row(p.dout_rows + i * p.width, p.width, 1.0f / static_cast<float>(most(plan.groups, 1)));
    } else {
      load_row(h.out.base + i * h.out.stride, columns, p.s);
      p.delta[i] = row_dot(p.s, p.dout[i], p.width);
      p.lse[i] = level_of(a.forward.lse[row * a.forward.tokens + i]);
    }
  }
}

// What prefix queries that see all tokens add to the gradients of `count` keys, and these to theirs.
void see_keys(const Prefix& p, const float* const* k, const float* const* v, int64_t count, float* const* dk,
              float* const* dv, float scale) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t keys = least(kLanes, count - j);
    const int wide = width_of(keys);
    const float *k_lanes[kLanes], *v_lanes[kLanes];
    for (int i = 0; i < wide; ++i) {
      k_lanes[i] = k[j + least(i, keys - 1)];
      v_lanes[i] = v[j + least(i, keys - 1)];
    }
    dot_rows(wide, k_lanes, p.q, p.count, p.width, p.s);
    dot_rows(wide, v_lanes, p.dout, p.count, p.width, p.dp);
    float *lse = p.spread, *delta = p.spread + (p.count + kLanes) * kLanes;
    for (int64_t i = 0; i < p.count; ++i) {
      fill(lse + i * wide, wide, p.lse[i]);
      fill(delta + i * wide, wide, p.delta[i]);
    }
    for (int64_t i = 0; i < p.count * wide; i += kLanes)
      gradients(p.s + i, p.dp + i, load_raw<VecF>(lse + i), load_raw<VecF>(delta + i), broadcast(scale));
    weighted_sums({p.s, 1, wide}, keys, p.count, p.dout, p.width, dv + j, true);
    weighted_sums({p.dp, 1, wide}, keys, p.count, p.q, p.width, dk + j, true);
    weighted_sums({p.dp, wide, 1}, p.count, keys, k + j, p.width, p.dq, true);
  }
}

float* part_of(const AxialAttentionGradArgs& a, const AxialPlan& plan, int64_t row, int64_t run) {
  const int64_t size = 3 * a.forward.geometry.prefix * a.forward.head_dim;
  return static_cast<float*>(a.workspace) + (row * most(plan.runs, 1) + run) * size;
}

// ---- boxes of few queries -------------------------------------------------------------------------------------------
struct Rows {
  int32_t* tokens;  // prefix, then the box
  const float **q, **k, **v, **out, **dout;
  float **dq, **dk, **dv;
  float* rows;  // of each of the eight
  float *s, *dp;
};
template <class S>
Rows take_rows(S& space, int64_t tokens, int64_t width) {
  Rows r;
  r.tokens = space.template take<int32_t>(tokens);
  for (const float*** x : {&r.q, &r.k, &r.v, &r.out, &r.dout}) *x = space.template take<const float*>(tokens + kLanes);
  for (float*** x : {&r.dq, &r.dk, &r.dv}) *x = space.template take<float*>(tokens);
  r.rows = space.take(8 * tokens * width);
  r.s = space.take((tokens + kLanes) * kLanes);
  r.dp = space.take((tokens + kLanes) * kLanes);
  return r;
}

template <class T>
void few_queries(const AxialAttentionGradArgs& a, const AxialPlan& plan, const Heads<T>& h, int64_t row, int64_t first,
                 int64_t last, const Prefix& p, Space space) {
  const AxialAttentionArgs& f = a.forward;
  const int64_t prefix = p.count, width = p.width, columns = f.head_dim, tokens = prefix + plan.volume;
  const int64_t skip = p.mean ? 0 : prefix;
  Rows r = take_rows(space, tokens, width);
  auto buffer = [&](int i) { return r.rows + (i * tokens + prefix) * width; };
  for (int32_t i = 0; i < prefix; ++i) {
    r.tokens[i] = i;
    r.q[i] = p.q[i];
    r.dout[i] = p.dout[i];
  }
  int32_t* box = r.tokens + prefix;
  read_rows(h.k, r.tokens, prefix, columns, r.rows + tokens * width, r.k);
  read_rows(h.v, r.tokens, prefix, columns, r.rows + 2 * tokens * width, r.v);
  if (first == 0 && !p.mean) see_keys(p, r.k, r.v, prefix, p.dk, p.dv, f.scale);
  const float* lse = f.lse + row * f.tokens;
  for (int64_t g = first; g < last; ++g) {
    const int64_t n = box_tokens(f.geometry, plan, g, box), keys = prefix + n, queries = keys - skip;
    read_rows(h.q, box, n, columns, buffer(0), r.q + prefix);
    read_rows(h.k, box, n, columns, buffer(1), r.k + prefix);
    read_rows(h.v, box, n, columns, buffer(2), r.v + prefix);
    read_rows(h.out, box, n, columns, buffer(3), r.out + prefix);
    read_rows(h.dout, box, n, columns, buffer(4), r.dout + prefix);
    aim_rows(h.dq, box, n, columns, buffer(5), r.dq + prefix);
    aim_rows(h.dk, box, n, columns, buffer(6), r.dk + prefix);
    aim_rows(h.dv, box, n, columns, buffer(7), r.dv + prefix);
    const float* group_lse = nullptr;
    if (p.mean && prefix > 0) {
      const int64_t at = (row * plan.groups + g) * prefix;
      group_lse = f.group_lse + at;
      for (int64_t i = 0; i < prefix; ++i) {
        r.out[i] = r.rows + (3 * tokens + i) * width;
        load_row(f.group_out + (at + i) * columns, columns, r.rows + (3 * tokens + i) * width);
      }
    }
    const int wide = width_of(queries);
    float level[kLanes], delta[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t x = skip + least(i % wide, queries - 1);
      if (i < wide) r.q[skip + i] = r.q[x], r.dout[skip + i] = r.dout[x];
      level[i] = level_of(x < prefix ? group_lse[x] : lse[r.tokens[x]]);
      delta[i] = i < wide ? row_dot(r.out[x], r.dout[x], width) : delta[i % wide];
    }
    dot_rows(wide, r.q + skip, r.k, keys, width, r.s);
    dot_rows(wide, r.dout + skip, r.v, keys, width, r.dp);
    const VecF levels = load_raw<VecF>(level), deltas = load_raw<VecF>(delta);
    for (int64_t i = 0; i < keys * wide; i += kLanes) gradients(r.s + i, r.dp + i, levels, deltas, broadcast(f.scale));
    const Weights by_query{r.dp, 1, wide}, weights{r.s, wide, 1}, by_key{r.dp, wide, 1};
    weighted_sums(by_query, prefix - skip, keys, r.k, width, p.dq, true);
    weighted_sums(by_query.from(prefix - skip, 0), n, keys, r.k, width, r.dq + prefix, false);
    weighted_sums(by_key, prefix, queries, r.q + skip, width, p.dk, true);
    weighted_sums(by_key.from(prefix, 0), n, queries, r.q + skip, width, r.dk + prefix, false);
    weighted_sums(weights, prefix, queries, r.dout + skip, width, p.dv, true);
    weighted_sums(weights.from(prefix, 0), n, queries, r.dout + skip, width, r.dv + prefix, false);
    if (!p.mean) see_keys(p, r.k + prefix, r.v + prefix, n, r.dk + prefix, r.dv + prefix, f.scale);
    flush_rows(h.dq, box, n, columns, r.dq + prefix);
    flush_rows(h.dk, box, n, columns, r.dk + prefix);
    flush_rows(h.dv, box, n, columns, r.dv + prefix);
  }
}

// ---- boxes of many queries ------------------------------------------------------------------------------------------
struct Many {
  int32_t* tokens;
  float *lse, *delta, *dq, *q, *dout, *k, *v, *k_columns, *v_columns, *dk, *dv, *s, *dp, *zeros;
  const float **k_row, **v_row;
  float **dk_row, **dv_row;
};
template <class S>
Many take_many(S& space, int64_t tokens, int64_t width) {
  Many x;
  const int64_t keys = padded(least(tokens, kKeyRowsBwd)), rows = kQueryRowsBwd;
  x.tokens = space.template take<int32_t>(tokens);
  x.lse = space.take(tokens);
  x.delta = space.take(tokens);
  x.dq = space.take(tokens * width);
  x.q = space.take(rows * width);
  x.dout = space.take(rows * width);
  for (float** each : {&x.k, &x.v, &x.k_columns, &x.v_columns, &x.dk, &x.dv}) *each = space.take(keys * width);
  x.s = space.take(rows * keys);
  x.dp = space.take(rows * keys);
  x.zeros = space.take(width);
  for (const float*** each : {&x.k_row, &x.v_row}) *each = space.template take<const float*>(keys);
  for (float*** each : {&x.dk_row, &x.dv_row}) *each = space.template take<float*>(keys);
  return x;
}

// The logarithm of the sum of weights, and delta, of every query of box g.
template <class T>
void begin_queries(const AxialAttentionGradArgs& a, const AxialPlan& plan, const Heads<T>& h, int64_t row, int64_t g,
                   const Prefix& p, int64_t tokens, const Many& x) {
  const AxialAttentionArgs& f = a.forward;
  const int64_t columns = f.head_dim;
  for (int64_t i = p.mean ? 0 : p.count; i < tokens; ++i) {
    const int32_t token = x.tokens[i];
    if (i < p.count) {
      const int64_t at = (row * plan.groups + g) * p.count + i;
      load_row(f.group_out + at * columns, columns, x.q);
      x.delta[i] = row_dot(x.q, p.dout[i], p.width);
      x.lse[i] = level_of(f.group_lse[at]);
    } else {
      load_row(h.out.base + token * h.out.stride, columns, x.q);
      load_row(h.dout.base + token * h.dout.stride, columns, x.dout);
      x.delta[i] = row_dot(x.q, x.dout, p.width);
      x.lse[i] = level_of(f.lse[row * f.tokens + token]);
    }
  }
}

template <class T>
void many_queries(const AxialAttentionGradArgs& a, const AxialPlan& plan, const Heads<T>& h, int64_t row, int64_t first,
                  int64_t last, const Prefix& p, Space space) {
  const AxialAttentionArgs& f = a.forward;
  const int64_t prefix = p.count, width = p.width, columns = f.head_dim, skip = p.mean ? 0 : prefix;
  const Many x = take_many(space, prefix + plan.volume, width);
  const int64_t pitch = padded(least(prefix + plan.volume, kKeyRowsBwd));
  fill(x.zeros, width, 0.0f);
  for (int64_t i = 0; i < pitch; ++i) {
    x.k_row[i] = x.k + i * width, x.v_row[i] = x.v + i * width;
    x.dk_row[i] = x.dk + i * width, x.dv_row[i] = x.dv + i * width;
  }
  for (int32_t i = 0; i < prefix; ++i) x.tokens[i] = i;
  if (first == 0 && !p.mean) {
    for (int64_t j = 0; j < prefix; j += kKeyRowsBwd) {
      const int64_t count = least(kKeyRowsBwd, prefix - j);
      copy_rows(h.k, x.tokens + j, count, columns, x.k);
      copy_rows(h.v, x.tokens + j, count, columns, x.v);
      see_keys(p, x.k_row, x.v_row, count, p.dk + j, p.dv + j, f.scale);
    }
  }
  for (int64_t g = first; g < last; ++g) {
    const int64_t keys = prefix + box_tokens(f.geometry, plan, g, x.tokens + prefix);
    begin_queries(a, plan, h, row, g, p, keys, x);
    for (int64_t j = 0; j < keys; j += kKeyRowsBwd) {
      const int64_t count = least(kKeyRowsBwd, keys - j);
      copy_rows(h.k, x.tokens + j, count, columns, x.k);
      copy_rows(h.v, x.tokens + j, count, columns, x.v);
      transpose(x.k, count, width, x.k_columns, pitch, x.zeros);
      transpose(x.v, count, width, x.v_columns, pitch, x.zeros);
      fill(x.dk, count * width, 0.0f);
      fill(x.dv, count * width, 0.0f);
      for (int64_t i = skip; i < keys; i += kQueryRowsBwd) {
        const int64_t rows = least(kQueryRowsBwd, keys - i);
        copy_rows(h.q, x.tokens + i, rows, columns, x.q);
        copy_rows(h.dout, x.tokens + i, rows, columns, x.dout);
        for (int64_t n = i; n < least(i + rows, prefix); ++n)
          scale_row(x.dout + (n - i) * width, width, 1.0f / static_cast<float>(plan.groups));
        product<false, Into::kStore>(rows, padded(count), width, x.q, width, x.k_columns, pitch, x.s, pitch);
        product<false, Into::kStore>(rows, padded(count), width, x.dout, width, x.v_columns, pitch, x.dp, pitch);
        for (int64_t n = 0; n < rows; ++n) {
          const VecF lse = broadcast(x.lse[i + n]), delta = broadcast(x.delta[i + n]), scale = broadcast(f.scale);
          for (int64_t c = n * pitch; c < n * pitch + count; c += kLanes)
            gradients(x.s + c, x.dp + c, lse, delta, scale);
        }
        float* dq = x.dq + i * width;
        if (j == 0)
          product<false, Into::kStore>(rows, width, count, x.dp, pitch, x.k, width, dq, width);
        else
          product<false, Into::kAdd>(rows, width, count, x.dp, pitch, x.k, width, dq, width);
        product<true, Into::kAdd>(count, width, rows, x.dp, pitch, x.q, width, x.dk, width);
        product<true, Into::kAdd>(count, width, rows, x.s, pitch, x.dout, width, x.dv, width);
      }
      const int64_t of_prefix = most(0, least(count, prefix - j));
      for (int64_t n = 0; n < of_prefix; ++n)
        for (int64_t c = 0; c < width; ++c) {
          p.dk[j + n][c] += x.dk_row[n][c];
          p.dv[j + n][c] += x.dv_row[n][c];
        }
      if (!p.mean)
        see_keys(p, x.k_row + of_prefix, x.v_row + of_prefix, count - of_prefix, x.dk_row + of_prefix,
                 x.dv_row + of_prefix, f.scale);
      for (int64_t n = of_prefix; n < count; ++n) {
        const int32_t token = x.tokens[j + n];
        store_row(x.dk_row[n], columns, h.dk.base + token * h.dk.stride);
        store_row(x.dv_row[n], columns, h.dv.base + token * h.dv.stride);
      }
    }
    for (int64_t i = skip; i < prefix; ++i)
      for (int64_t c = 0; c < width; ++c) p.dq[i][c] += x.dq[i * width + c];
    for (int64_t i = prefix; i < keys; ++i) store_row(x.dq + i * width, columns, h.dq.base + x.tokens[i] * h.dq.stride);
  }
}

bool few(const AxialAttentionArgs& a, const AxialPlan& plan) {
  return plan.volume + (a.geometry.mean ? a.geometry.prefix : 0) <= kLanes;
}

template <class T>
void one_run(const AxialAttentionGradArgs& a, int64_t index, Space space) {
  const AxialAttentionArgs& f = a.forward;
  const AxialPlan plan = axial_plan(f);
  const int64_t runs = most(plan.runs, 1), row = index / runs, run = index % runs, first = run * plan.per_run;
  const int64_t last = least(first + plan.per_run, plan.groups), columns = f.head_dim, prefix = f.geometry.prefix;
  const Heads<T> h = heads_at<T>(a, row / f.heads, row % f.heads);
  Prefix p = take_prefix(space, prefix, padded(columns));
  begin_prefix(a, plan, h, row, p);
  few(f, plan) ? few_queries<T>(a, plan, h, row, first, last, p, space)
               : many_queries<T>(a, plan, h, row, first, last, p, space);
  float* part = part_of(a, plan, row, run);
  for (int64_t i = 0; i < 3 * prefix; ++i)
    std::memcpy(part + i * columns, p.sums + i * p.width, sizeof(float) * static_cast<size_t>(columns));
}

template <class T>
void end_prefix(const AxialAttentionGradArgs& a, int64_t row, Space space) {
  const AxialAttentionArgs& f = a.forward;
  const AxialPlan plan = axial_plan(f);
  const int64_t columns = f.head_dim, prefix = f.geometry.prefix, width = padded(columns);
  const Heads<T> h = heads_at<T>(a, row / f.heads, row % f.heads);
  float* sum = space.take(width);
  const Head<T> to[3] = {h.dq, h.dk, h.dv};
  for (int64_t i = 0; i < 3 * prefix; ++i) {
    fill(sum, width, 0.0f);
    for (int64_t run = 0; run < most(plan.runs, 1); ++run) {
      const float* part = part_of(a, plan, row, run) + i * columns;
      for (int64_t c = 0; c < columns; ++c) sum[c] += part[c];
    }
    store_row(sum, columns, to[i / prefix].base + i % prefix * to[i / prefix].stride);
  }
}

}  // namespace

int64_t axial_attention_bwd_space(const AxialAttentionGradArgs& a) {
  const AxialPlan plan = axial_plan(a.forward);
  const int64_t prefix = a.forward.geometry.prefix, width = padded(a.forward.head_dim);
  Measure all;
  take_prefix(all, prefix, width);
  if (few(a.forward, plan))
    take_rows(all, prefix + plan.volume, width);
  else
    take_many(all, prefix + plan.volume, width);
  return all.floats();
}

void axial_attention_bwd(const AxialAttentionGradArgs& a, int64_t index, float* space) {
  SACCADE_BY_TYPE(a.forward.dtype, one_run<T>(a, index, Space(space)));
}

void axial_prefix_end_bwd(const AxialAttentionGradArgs& a, int64_t row, float* space) {
  SACCADE_BY_TYPE(a.forward.dtype, end_prefix<T>(a, row, Space(space)));
}

}  // namespace saccade::cpu::SACCADE_ISA
