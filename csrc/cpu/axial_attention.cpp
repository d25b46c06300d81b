// Attention inside the boxes of a grid behind a prefix.
//
// A run of neighbouring boxes of one head is an item. Where the queries of a box fit a vector, scores lie with queries
// across the lanes, so that softmax is whole vectors; else keys lie across the lanes and are packed once for all
// queries. Prefix queries that see every token are items of their own, a chunk of keys each.
#include "axial_kernels.h"
#include "axial_rows.h"

namespace saccade::cpu::SACCADE_ISA {
namespace {

// ---- boxes of few queries -------------------------------------------------------------------------------------------
// s [keys][wide]: scores become weights; returns the logarithm of their sums in the lanes, `wide` of them repeated.
inline VecF softmax_lanes(float* s, int64_t keys, int wide, float scale) {
  const int64_t vecs = (keys * wide + kLanes - 1) / kLanes;
  fill(s + keys * wide, vecs * kLanes - keys * wide, -__builtin_inff());
  const VecF none = broadcast(-__builtin_inff()), factor = broadcast(scale);
  VecF top = none;
  for (int64_t i = 0; i < vecs; ++i) {
    VecF v = load_raw<VecF>(s + i * kLanes) * factor;
    if (i == vecs - 1 && keys * wide < vecs * kLanes)
      v = lane_numbers() + static_cast<int32_t>(i * kLanes) < VecI{} + static_cast<int32_t>(keys * wide) ? v : none;
    store_raw(s + i * kLanes, v);
    top = max_of(v, top);
  }
  for (int shift = wide; shift < kLanes; shift *= 2) top = max_of(turned(top, shift), top);
  top = top == none ? VecF{} : top;
  VecF sum{};
  for (int64_t i = 0; i < vecs; ++i) {
    const VecF e = exp_of(load_raw<VecF>(s + i * kLanes) - top);
    store_raw(s + i * kLanes, e);
    sum += e;
  }
  for (int shift = wide; shift < kLanes; shift *= 2) sum += turned(sum, shift);
  const VecF inverse = sum == VecF{} ? VecF{} : broadcast(1.0f) / sum;
  for (int64_t i = 0; i < vecs; ++i) store_raw(s + i * kLanes, load_raw<VecF>(s + i * kLanes) * inverse);
  return log_of(sum) + top;
}

struct Rows {
  int32_t* tokens;  // prefix, then the box
  const float **q, **k, **v;
  float** out;
  float *q_rows, *k_rows, *v_rows, *out_rows;
};
template <class S>
Rows take_rows(S& space, int64_t queries, int64_t keys, int64_t width) {
  Rows r;
  r.tokens = space.template take<int32_t>(keys);
  r.q = space.template take<const float*>(queries + kLanes);
  r.k = space.template take<const float*>(keys);
  r.v = space.template take<const float*>(keys);
  r.out = space.template take<float*>(queries);
  r.q_rows = space.take(queries * width);
  r.k_rows = space.take(keys * width);
  r.v_rows = space.take(keys * width);
  r.out_rows = space.take(queries * width);
  return r;
}

struct Item {
  int64_t batch, head, row, first, last;  // row: batch * heads + head; boxes [first, last)
};

template <class T>
void few_queries(const AxialAttentionArgs& a, const AxialPlan& plan, const Item& item, Space space) {
  const AxialGeometry& m = a.geometry;
  const int64_t prefix = m.prefix, columns = a.head_dim, width = padded(columns), first = m.mean ? 0 : prefix;
  const auto q = head_of<T>(a.q, a.q_stride, item.batch, item.head);
  const auto k = head_of<T>(a.k, a.k_stride, item.batch, item.head);
  const auto v = head_of<T>(a.v, a.v_stride, item.batch, item.head);
  const auto out = head_of<T>(a.out, a.out_stride, item.batch, item.head);
  Rows r = take_rows(space, prefix + plan.volume, prefix + plan.volume, width);
  float* s = space.take((prefix + plan.volume + kLanes) * kLanes);
  for (int32_t i = 0; i < prefix; ++i) r.tokens[i] = i;
  int32_t* box = r.tokens + prefix;
  if (m.mean) {
    read_rows(q, r.tokens, prefix, columns, r.q_rows, r.q);
    for (int64_t i = 0; i < prefix; ++i) r.out[i] = r.out_rows + i * width;
  }
  read_rows(k, r.tokens, prefix, columns, r.k_rows, r.k);
  read_rows(v, r.tokens, prefix, columns, r.v_rows, r.v);
  float* lse = a.lse + item.row * a.tokens;
  for (int64_t g = item.first; g < item.last; ++g) {
    const int64_t n = box_tokens(m, plan, g, box), at = prefix * width;
    read_rows(q, box, n, columns, r.q_rows + at, r.q + prefix);
    read_rows(k, box, n, columns, r.k_rows + at, r.k + prefix);
    read_rows(v, box, n, columns, r.v_rows + at, r.v + prefix);
    aim_rows(out, box, n, columns, r.out_rows + at, r.out + prefix);
    const int64_t queries = prefix + n - first;
    const int wide = width_of(queries);
    for (int i = 0; i < wide - queries; ++i) r.q[prefix + n + i] = r.q[prefix + n - 1];
    dot_rows(wide, r.q + first, r.k, prefix + n, width, s);
    const VecF sums = softmax_lanes(s, prefix + n, wide, a.scale);
    weighted_sums({s, 1, wide}, queries, prefix + n, r.v, width, r.out + first, false);
    flush_rows(out, box, n, columns, r.out + prefix);
    float each[kLanes];
    store_raw(each, sums);
    for (int64_t i = 0; i < n; ++i) lse[box[i]] = each[prefix - first + i];
    for (int64_t i = 0; i < prefix - first; ++i) {
      const int64_t row = (item.row * plan.groups + g) * prefix + i;
      std::memcpy(a.group_out + row * columns, r.out[i], sizeof(float) * static_cast<size_t>(columns));
      a.group_lse[row] = each[i];
    }
  }
}

// ---- boxes of many queries ------------------------------------------------------------------------------------------
// Scores s of a row to exp(s * scale - top) with the new largest `top`; returns the factor of what was summed before.
inline float softmax_row(float* s, int64_t keys, float scale, float& top, float& sum) {
  const VecF none = broadcast(-__builtin_inff()), factor = broadcast(scale);
  VecF most = none;
  for (int64_t i = 0; i < keys; i += kLanes) {
    VecF v = load_raw<VecF>(s + i) * factor;
    if (i + kLanes > keys) v = lane_numbers() < VecI{} + static_cast<int32_t>(keys - i) ? v : none;
    store_raw(s + i, v);
    most = max_of(v, most);
  }
  const float found = max_lanes(most), now = found > top ? found : top, level = now == -__builtin_inff() ? 0.0f : now;
  VecF total{};
  const VecF shift = broadcast(level);
  for (int64_t i = 0; i < keys; i += kLanes) {
    const VecF e = exp_of(load_raw<VecF>(s + i) - shift);
    store_raw(s + i, e);
    total += e;
  }
  const float before = top == -__builtin_inff() ? 0.0f : exp_of(broadcast(top - level))[0];
  sum = sum * before + sum_lanes(total);
  top = now;
  return before;
}

struct Many {
  int32_t* tokens;
  float *q, *k, *v, *keys, *s, *out, *top, *total, *factor, *zeros;
};
template <class S>
Many take_many(S& space, int64_t tokens, int64_t width) {
  Many x;
  const int64_t keys = padded(least(tokens, kKeyRows)), queries = least(tokens, kQueryChunk);
  x.tokens = space.template take<int32_t>(tokens);
  x.q = space.take(queries * width);
  x.k = space.take(keys * width);
  x.v = space.take(keys * width);
  x.keys = space.take(keys * width);
  x.s = space.take(kQueryRows * keys);
  x.out = space.take(queries * width);
  x.top = space.take(queries);
  x.total = space.take(queries);
  x.factor = space.take(kQueryRows);
  x.zeros = space.take(width);
  return x;
}

template <class T>
void many_queries(const AxialAttentionArgs& a, const AxialPlan& plan, const Item& item, Space space) {
  const AxialGeometry& m = a.geometry;
  const int64_t prefix = m.prefix, columns = a.head_dim, width = padded(columns), first = m.mean ? 0 : prefix;
  const auto q = head_of<T>(a.q, a.q_stride, item.batch, item.head);
  const auto k = head_of<T>(a.k, a.k_stride, item.batch, item.head);
  const auto v = head_of<T>(a.v, a.v_stride, item.batch, item.head);
  const auto out = head_of<T>(a.out, a.out_stride, item.batch, item.head);
  const Many x = take_many(space, prefix + plan.volume, width);
  const int64_t pitch = padded(least(prefix + plan.volume, kKeyRows));
  fill(x.zeros, width, 0.0f);
  for (int32_t i = 0; i < prefix; ++i) x.tokens[i] = i;
  for (int64_t g = item.first; g < item.last; ++g) {
    const int64_t keys = prefix + box_tokens(m, plan, g, x.tokens + prefix);
    for (int64_t from = first; from < keys; from += kQueryChunk) {
      const int64_t queries = least(kQueryChunk, keys - from);
      const int32_t* tokens = x.tokens + from;
      copy_rows(q, tokens, queries, columns, x.q);
      fill(x.top, queries, -__builtin_inff());
      fill(x.total, queries, 0.0f);
      for (int64_t j = 0; j < keys; j += kKeyRows) {
        const int64_t count = least(kKeyRows, keys - j);
        if (keys > kKeyRows || from == first) {
          copy_rows(k, x.tokens + j, count, columns, x.k);
          copy_rows(v, x.tokens + j, count, columns, x.v);
          transpose(x.k, count, width, x.keys, pitch, x.zeros);
        }
        for (int64_t i = 0; i < queries; i += kQueryRows) {
          const int64_t rows = least(kQueryRows, queries - i);
          product<false, Into::kStore>(rows, padded(count), width, x.q + i * width, width, x.keys, pitch, x.s, pitch);
          for (int64_t n = 0; n < rows; ++n)
            x.factor[n] = softmax_row(x.s + n * pitch, count, a.scale, x.top[i + n], x.total[i + n]);
          float* to = x.out + i * width;
          if (j == 0)
            product<false, Into::kStore>(rows, width, count, x.s, pitch, x.v, width, to, width);
          else
            product<false, Into::kScaleAdd>(rows, width, count, x.s, pitch, x.v, width, to, width, x.factor);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        const float total = x.total[i], inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const float lse = log_of(broadcast(total))[0] + (total == 0.0f ? 0.0f : x.top[i]);
        float* row = x.out + i * width;
        for (int64_t c = 0; c < width; c += kLanes) store_raw(row + c, load_raw<VecF>(row + c) * broadcast(inverse));
        if (from + i < prefix) {  // with `mean` alone
          const int64_t at = (item.row * plan.groups + g) * prefix + from + i;
          std::memcpy(a.group_out + at * columns, row, sizeof(float) * static_cast<size_t>(columns));
          a.group_lse[at] = lse;
        } else {
          store_row(row, columns, out.base + tokens[i] * out.stride);
          a.lse[item.row * a.tokens + tokens[i]] = lse;
        }
      }
    }
  }
}

bool few(const AxialAttentionArgs& a, const AxialPlan& plan) {
  return plan.volume + (a.geometry.mean ? a.geometry.prefix : 0) <= kLanes;
}

// ---- prefix queries that see all tokens -----------------------------------------------------------------------------
// Of each chunk of keys: sums of weighted values [prefix, columns], the largest score and the sum of weights [prefix].
struct Part {
  float *sums, *top, *total;
};
Part part_of(const AxialAttentionArgs& a, int64_t index) {
  const int64_t prefix = a.geometry.prefix;
  float* at = static_cast<float*>(a.workspace) + index * prefix * (a.head_dim + 2);
  return {at, at + prefix * a.head_dim, at + prefix * (a.head_dim + 1)};
}

struct Seen {
  int32_t* tokens;
  const float **q, **k, **v;
  float **out, *q_rows, *k_rows, *v_rows, *out_rows, *s;
};
template <class S>
Seen take_seen(S& space, int64_t prefix, int64_t width) {
  Seen x;
  x.tokens = space.template take<int32_t>(most(prefix, kPrefixChunk));
  x.q = space.template take<const float*>(prefix);
  x.k = space.template take<const float*>(kPrefixChunk + kLanes);
  x.v = space.template take<const float*>(kPrefixChunk);
  x.out = space.template take<float*>(prefix);
  x.q_rows = space.take(prefix * width);
  x.k_rows = space.take(kPrefixChunk * width);
  x.v_rows = space.take(kPrefixChunk * width);
  x.out_rows = space.take(prefix * width);
  x.s = space.take(prefix * kPrefixChunk);
  return x;
}

template <class T>
void see_chunk(const AxialAttentionArgs& a, const AxialPlan& plan, int64_t index, Space space) {
  const int64_t row = index / plan.chunks, begin = index % plan.chunks * kPrefixChunk, prefix = a.geometry.prefix;
  const int64_t count = least(kPrefixChunk, a.tokens - begin), columns = a.head_dim, width = padded(columns);
  const int64_t batch = row / a.heads, head = row % a.heads;
  const Seen x = take_seen(space, prefix, width);
  for (int64_t i = 0; i < prefix; ++i) x.tokens[i] = static_cast<int32_t>(i), x.out[i] = x.out_rows + i * width;
  read_rows(head_of<T>(a.q, a.q_stride, batch, head), x.tokens, prefix, columns, x.q_rows, x.q);
  for (int64_t i = 0; i < count; ++i) x.tokens[i] = static_cast<int32_t>(begin + i);
  read_rows(head_of<T>(a.k, a.k_stride, batch, head), x.tokens, count, columns, x.k_rows, x.k);
  read_rows(head_of<T>(a.v, a.v_stride, batch, head), x.tokens, count, columns, x.v_rows, x.v);
  for (int i = 0; i < kLanes; ++i) x.k[count + i] = x.k[count - 1];
  for (int64_t p = 0; p < prefix; ++p)
    for (int64_t j = 0; j < count; j += kLanes)
      store_raw(x.s + p * kPrefixChunk + j, dots<kLanes>(x.k + j, x.q + p, width));
  const Part part = part_of(a, index);
  for (int64_t p = 0; p < prefix; ++p) {
    part.top[p] = -__builtin_inff();
    part.total[p] = 0.0f;
    softmax_row(x.s + p * kPrefixChunk, count, a.scale, part.top[p], part.total[p]);
  }
  weighted_sums({x.s, kPrefixChunk, 1}, prefix, count, x.v, width, x.out, false);
  for (int64_t p = 0; p < prefix; ++p)
    std::memcpy(part.sums + p * columns, x.out[p], sizeof(float) * static_cast<size_t>(columns));
}

template <class T>
void end_prefix(const AxialAttentionArgs& a, const AxialPlan& plan, int64_t row, Space space) {
  const int64_t prefix = a.geometry.prefix, columns = a.head_dim;
  const auto out = head_of<T>(a.out, a.out_stride, row / a.heads, row % a.heads);
  float* sum = space.take(padded(columns));
  for (int64_t p = 0; p < prefix; ++p) {
    fill(sum, padded(columns), 0.0f);
    float lse = 0.0f;
    if (a.geometry.mean) {
      for (int64_t g = 0; g < plan.groups; ++g) {
        const float* one = a.group_out + ((row * plan.groups + g) * prefix + p) * columns;
        for (int64_t c = 0; c < columns; ++c) sum[c] += one[c];
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] /= static_cast<float>(most(plan.groups, 1));
    } else {
      float top = -__builtin_inff(), total = 0.0f;
      for (int64_t i = 0; i < plan.chunks; ++i) {
        const float found = part_of(a, row * plan.chunks + i).top[p];
        top = found > top ? found : top;
      }
      const float level = top == -__builtin_inff() ? 0.0f : top;
      for (int64_t i = 0; i < plan.chunks; ++i) {
        const Part part = part_of(a, row * plan.chunks + i);
        const float weight = exp_of(broadcast(part.top[p] - level))[0];
        total += part.total[p] * weight;
        for (int64_t c = 0; c < columns; ++c) sum[c] += part.sums[p * columns + c] * weight;
      }
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      for (int64_t c = 0; c < columns; ++c) sum[c] *= inverse;
      lse = log_of(broadcast(total))[0] + level;
    }
    store_row(sum, columns, out.base + p * out.stride);
    a.lse[row * a.tokens + p] = lse;
  }
}

}  // namespace

int64_t axial_attention_space(const AxialAttentionArgs& a) {
  const AxialPlan plan = axial_plan(a);
  const int64_t tokens = a.geometry.prefix + plan.volume, width = padded(a.head_dim);
  Measure boxes, prefix;
  if (few(a, plan)) {
    take_rows(boxes, tokens, tokens, width);
    boxes.take((tokens + kLanes) * kLanes);
  } else {
    take_many(boxes, tokens, width);
  }
  take_seen(prefix, a.geometry.prefix, width);
  return most(boxes.floats(), prefix.floats());
}

void axial_attention(const AxialAttentionArgs& a, int64_t index, float* space) {
  const AxialPlan plan = axial_plan(a);
  const int64_t row = index / plan.runs, first = index % plan.runs * plan.per_run;
  const Item item{row / a.heads, row % a.heads, row, first, least(first + plan.per_run, plan.groups)};
  SACCADE_BY_TYPE(a.dtype, few(a, plan) ? few_queries<T>(a, plan, item, Space(space))
                                        : many_queries<T>(a, plan, item, Space(space)));
}

void axial_prefix_chunk(const AxialAttentionArgs& a, int64_t index, float* space) {
  SACCADE_BY_TYPE(a.dtype, see_chunk<T>(a, axial_plan(a), index, Space(space)));
}

void axial_prefix_end(const AxialAttentionArgs& a, int64_t row, float* space) {
  SACCADE_BY_TYPE(a.dtype, end_prefix<T>(a, axial_plan(a), row, Space(space)));
}

}  // namespace saccade::cpu::SACCADE_ISA
