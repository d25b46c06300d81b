// Which queries and keys meet in a program of axial attention.
//
//   pack      neighbouring boxes that one program takes, 1 where a box fills a tile
//   mates     queries of a box: its tokens, behind the prefix with `mean`
//   place     in a list of queries or keys: which token, and which queries or keys see it
//   virtual   queries (box, prefix token) with `mean`: their values have no row of their own
//
// kBox programs: queries of a pack against the prefix and the pack; keys of a pack against what sees them. kPrefix
// programs: prefix tokens against a part of all tokens. A pair is seen where the groups are equal, or one is
// kSeenAlways.
#pragma once
#include <type_traits>

#include "../../axial_args.h"
#include "attention_tile.cuh"
#include "block_mask.cuh"
#include "softmax.cuh"
#include "tiling.cuh"

namespace saccade {

constexpr int32_t kSeenAlways = -1, kSeenNever = -2;

struct AxialPlan {
  int32_t boxes[3],
      box[3];                   // how many, and their size, at most that of the grid
  int32_t box_count, box_size;  // G and N
  int32_t pack, packs, mates;
  int32_t row_tiles;          // of a pack: of its queries, or keys
  int32_t prefix_tiles;       // 0 where there are no kPrefix programs
  int32_t parts;              // of what a kPrefix program goes over
  int64_t part_length, list;  // of the list of all
  int64_t per_entry;          // programs of a sample and head
  bool aligned;
  float scale_log2, box_share;  // box_share: 1 / G
};

struct AxialPlace {
  int32_t token = -1, group = kSeenNever;
  int64_t virtual_row = -1;  // of a sample and head
};

// What a program is.
struct AxialProgram {
  int64_t entry, batch, head;
  bool of_prefix;
  int32_t first_box, first_row, part;

  __device__ __forceinline__ AxialProgram(const AxialPlan& plan, int64_t index, int heads) {
    entry = index / plan.per_entry;
    batch = entry / heads, head = entry - batch * heads;
    int64_t rest = index - entry * plan.per_entry;
    const int64_t of_boxes = static_cast<int64_t>(plan.packs) * plan.row_tiles;
    of_prefix = rest >= of_boxes;
    if (of_prefix) rest -= of_boxes;
    const int32_t inner = of_prefix ? plan.parts : plan.row_tiles;
    const int32_t outer = static_cast<int32_t>(rest / inner),
                  last = static_cast<int32_t>(rest - int64_t{outer} * inner);
    first_box = of_prefix ? 0 : outer * plan.pack;
    first_row = (of_prefix ? outer : last) * 64;
    part = of_prefix ? last : 0;
  }
};

// Token `at` of a box, counted in the largest box; -1 beyond the edges.
__device__ __forceinline__ int32_t box_token(const AxialGeometry& geometry, const AxialPlan& plan, int32_t box,
                                             int32_t at) {
  if (box >= plan.box_count) return -1;
  const int32_t box_row = box / plan.boxes[2], row = at / plan.box[2];
  const int32_t w = (box - box_row * plan.boxes[2]) * plan.box[2] + at - row * plan.box[2];
  const int32_t box_plane = box_row / plan.boxes[1], plane = row / plan.box[1];
  const int32_t h = (box_row - box_plane * plan.boxes[1]) * plan.box[1] + row - plane * plan.box[1];
  const int32_t t = box_plane * plan.box[0] + plane;
  if (t >= geometry.grid[0] || h >= geometry.grid[1] || w >= geometry.grid[2]) return -1;
  return geometry.prefix + (t * geometry.grid[1] + h) * geometry.grid[2] + w;
}

// A place among `size` of each box of the pack, of which the first `prefix` are virtual.
__device__ __forceinline__ AxialPlace pack_place(const AxialGeometry& geometry, const AxialPlan& plan,
                                                 const AxialProgram& program, int64_t at, int32_t size,
                                                 int32_t prefix) {
  AxialPlace place;
  if (at < 0 || at >= static_cast<int64_t>(plan.pack) * size) return place;
  const int32_t member = static_cast<int32_t>(at / size), rest = static_cast<int32_t>(at - int64_t{member} * size);
  const int32_t box = program.first_box + member;
  if (box >= plan.box_count) return place;
  if (rest < prefix) {
    place.token = rest;
    place.virtual_row = static_cast<int64_t>(box) * geometry.prefix + rest;
  } else {
    place.token = box_token(geometry, plan, box, rest - prefix);
  }
  if (place.token >= 0) place.group = member;
  return place;
}

__device__ __forceinline__ AxialPlace always_seen(int64_t token, int64_t virtual_row = -1) {
  AxialPlace place;
  place.token = static_cast<int32_t>(token), place.group = kSeenAlways, place.virtual_row = virtual_row;
  return place;
}

// Rows of a program: queries, or keys.
template <bool kOfKeys>
__device__ __forceinline__ AxialPlace axial_row(const AxialGeometry& geometry, const AxialPlan& plan,
                                                const AxialProgram& program, int32_t at) {
  const int64_t row = static_cast<int64_t>(program.first_row) + at;
  if (program.of_prefix) return row < geometry.prefix ? always_seen(row) : AxialPlace{};
  if constexpr (kOfKeys) return pack_place(geometry, plan, program, row, plan.box_size, 0);
  return pack_place(geometry, plan, program, row, plan.mates, plan.mates - plan.box_size);
}

// Columns of a program: what its rows meet; keys, or queries (kOfKeys).
template <bool kOfKeys>
__device__ __forceinline__ int64_t axial_columns(const AxialGeometry& geometry, const AxialPlan& plan,
                                                 const AxialProgram& program) {
  if (program.of_prefix) return max(int64_t{0}, min(plan.part_length, plan.list - program.part * plan.part_length));
  if (kOfKeys && geometry.mean) return static_cast<int64_t>(plan.pack) * plan.mates;
  return geometry.prefix + static_cast<int64_t>(plan.pack) * plan.box_size;
}

template <bool kOfKeys>
__device__ __forceinline__ AxialPlace axial_column(const AxialGeometry& geometry, const AxialPlan& plan,
                                                   const AxialProgram& program, int64_t at) {
  if (at >= axial_columns<kOfKeys>(geometry, plan, program)) return {};
  if (program.of_prefix) {
    at += program.part * plan.part_length;
    const int64_t virtuals = kOfKeys && geometry.mean ? static_cast<int64_t>(plan.box_count) * geometry.prefix : 0;
    if (at < virtuals) return always_seen(at % geometry.prefix, at);
    return always_seen(at - virtuals + (virtuals > 0 ? geometry.prefix : 0));
  }
  if (kOfKeys && geometry.mean) return pack_place(geometry, plan, program, at, plan.mates, geometry.prefix);
  if (at < geometry.prefix) return always_seen(at);
  return pack_place(geometry, plan, program, at - geometry.prefix, plan.box_size, 0);
}

// The columns of a tile.
template <int kColumns>
struct AxialColumns {
  int32_t token[kColumns], group[kColumns];
  float shift[kColumns];  // added to the exponents
  float delta[kColumns],
      weight[kColumns];  // of queries, in the backward pass alone
  uint32_t exists[kColumns / 32];
};

// Bits of prim/block_mask.cuh; `row_group` of rows lane / 4 and lane / 4 + 8.
template <int kProducts, int kColumns>
__device__ __forceinline__ uint32_t axial_seen(const AxialColumns<kColumns>& columns, const int32_t (&row_group)[2],
                                               bool packed, int lane) {
  uint32_t seen = seen_columns<kProducts>(columns.exists, lane);
  if (!packed) return seen;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t group = columns.group[n * 8 + lane % 4 * 2 + j];
      const uint32_t two = (group == kSeenAlways || group == row_group[0] ? 1u : 0u) |
                           (group == kSeenAlways || group == row_group[1] ? 4u : 0u);
      seen &= ~((5u & ~two) << (n * 4 + j));
    }
  }
  return seen;
}

// Sums of a warp, [16, 8 * kChannels], to rows of floats: row[0] for rows 0-7, row[1] for the others; null for none.
template <int kChannels>
__device__ __forceinline__ void store_floats(const float (&sum)[kChannels][4], const float (&factor)[2],
                                             float* const (&row)[2], int channel, int head_dim, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row[i] == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kChannels; ++n) {
      const int at = channel + n * 8 + lane % 4 * 2;
      if (at < head_dim) row[i][at] = sum[n][i * 2] * factor[i], row[i][at + 1] = sum[n][i * 2 + 1] * factor[i];
    }
  }
}

// Terms of prefix rows, [entries, terms, prefix, head_dim] fp32, joined in order: their sum times `factor`; with lse
// [entries, terms, prefix], in powers of two, the mean that softmax takes of parts of its keys. grid: prefix rows x
// entries.
constexpr int kJoinThreads = 256;

struct AxialJoin {
  const float* terms = nullptr;
  const float* lse = nullptr;
  int64_t count = 0;
  int32_t prefix = 0, heads = 0, head_dim = 0;
  float factor = 1.0f;
  void* out = nullptr;
  int64_t stride[3] = {};
  float* out_lse = nullptr;  // [entries, tokens], or null
  int64_t tokens = 0;
};

__device__ inline void join_barrier() {
#ifndef SACCADE_MUTANT_NO_JOIN_BARRIER
  __syncthreads();
#endif
}

template <typename T>
__global__ void __launch_bounds__(kJoinThreads) axial_join_kernel(const __grid_constant__ AxialJoin args) {
  __shared__ float sums[kJoinThreads * 4];
  __shared__ float shares[kJoinThreads];
  const int lanes = args.head_dim / 4, slots = kJoinThreads / lanes;
  const int slot = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) - slot * lanes;
  const int64_t entry = blockIdx.x / args.prefix, row = blockIdx.x - entry * args.prefix;
  const int64_t batch = entry / args.heads, head = entry - batch * args.heads;
  const int64_t first = entry * args.count * args.prefix + row;  // the others are `prefix` apart
  float top = negative_infinity();
  if (args.lse != nullptr) {
#pragma unroll 4
    for (int64_t term = 0; term < args.count; ++term) top = fmaxf(top, args.lse[first + term * args.prefix]);
    if (top == negative_infinity()) top = 0.0f;
  }
  float sum[4] = {}, share = 0.0f;
  if (slot < slots) {
#pragma unroll 4
    for (int64_t term = slot; term < args.count; term += slots) {
      const int64_t at = first + term * args.prefix;
      const Vector value = *reinterpret_cast<const Vector*>(args.terms + at * args.head_dim + lane * 4);
      const float weight = args.lse == nullptr ? args.factor : power_of_two(args.lse[at] - top);
      share += weight;
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(__uint_as_float(value.word[i]), weight, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[threadIdx.x * 4 + i] = sum[i];
  shares[threadIdx.x] = share;
  join_barrier();
  if (slot != 0) return;
  for (int s = 1; s < slots; ++s) {
    share += shares[s * lanes + lane];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += sums[(s * lanes + lane) * 4 + i];
  }
  const float inverse = args.lse == nullptr ? 1.0f : share == 0.0f ? 0.0f : 1.0f / share;
  typename T::Bits* out = static_cast<typename T::Bits*>(args.out) + batch * args.stride[0] + head * args.stride[1] +
                          row * args.stride[2] + lane * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t two = round_two<T>(sum[i * 2] * inverse, sum[i * 2 + 1] * inverse);
    out[i * 2] = static_cast<uint16_t>(two), out[i * 2 + 1] = static_cast<uint16_t>(two >> 16);
  }
  if (args.out_lse == nullptr || lane != 0) return;
  float lse = 0.0f;  // with `mean` nobody uses it
  if (args.lse != nullptr) lse = share == 0.0f ? negative_infinity() : kLn2 * (top + log2f(share));
  args.out_lse[entry * args.tokens + row] = lse;
}

// --- host ---

#ifndef SACCADE_AXIAL_PART  // the emulation takes few
#define SACCADE_AXIAL_PART 1024
#endif
constexpr int64_t kPrefixPrograms = 32;  // of a sample and head

inline AxialJoin axial_join(const AxialAttentionArgs& args, const float* terms, int64_t count, void* out,
                            const int64_t (&stride)[3]) {
  AxialJoin join;
  join.terms = terms;
  join.count = count;
  join.prefix = args.geometry.prefix;
  join.heads = args.heads;
  join.head_dim = args.head_dim;
  join.out = out;
  for (int i = 0; i < 3; ++i) join.stride[i] = stride[i];
  join.tokens = args.tokens;
  return join;
}

template <typename T>
const char* launch_join(const AxialJoin& join, int64_t entries, void* stream) {
  return launch(axial_join_kernel<T>, dim3(static_cast<unsigned>(entries * join.prefix)), kJoinThreads, 0, stream,
                join);
}

// Shapes alone decide, and nothing of other samples and heads.
inline AxialPlan axial_plan(const AxialAttentionArgs& args, bool of_keys) {
  const AxialGeometry& geometry = args.geometry;
  const int64_t prefix = geometry.prefix;
  AxialPlan plan = {};
  int64_t count = 1, size = 1;
  for (int i = 0; i < 3; ++i) {
    plan.box[i] = static_cast<int32_t>(most(least(geometry.box[i], geometry.grid[i]), 1));
    plan.boxes[i] = static_cast<int32_t>(ceil_div(geometry.grid[i], plan.box[i]));
    count *= plan.boxes[i], size *= plan.box[i];
  }
  plan.box_count = static_cast<int32_t>(count);
  plan.box_size = static_cast<int32_t>(size);
  plan.mates = static_cast<int32_t>(size + (geometry.mean ? prefix : 0));
  const int64_t fits = prefix + size <= 64 ? (64 - prefix) / size : 64;  // prefix and pack in one tile
  plan.pack = static_cast<int32_t>(most(least(least(64 / plan.mates, fits), count), 1));
  plan.packs = static_cast<int32_t>(ceil_div(count, plan.pack));
  plan.row_tiles = static_cast<int32_t>(ceil_div(int64_t{plan.pack} * (of_keys ? plan.box_size : plan.mates), 64));
  plan.list = args.tokens;
  if (of_keys && geometry.mean) plan.list += (count - 1) * prefix;  // of the prefix the virtual queries alone
  plan.parts = 1;
  if (prefix > 0 && (of_keys || !geometry.mean)) {
    plan.prefix_tiles = static_cast<int32_t>(ceil_div(prefix, 64));
    const int64_t wanted = ceil_div(kPrefixPrograms, plan.prefix_tiles);
    plan.parts = static_cast<int32_t>(most(least(ceil_div(plan.list, SACCADE_AXIAL_PART), wanted), 1));
  }
  plan.part_length = ceil_div(ceil_div(plan.list, plan.parts), 64) * 64;
  plan.per_entry = int64_t{plan.packs} * plan.row_tiles + int64_t{plan.prefix_tiles} * plan.parts;
  plan.scale_log2 = args.scale * kLog2E;
  plan.box_share = 1.0f / static_cast<float>(most(count, 1));
  return plan;
}

inline Alignment axial_alignment(const AxialAttentionArgs& args) {
  Alignment all(args.dtype);
  all.tensor(args.q, args.q_stride, args.batch, args.heads, args.tokens);
  all.tensor(args.k, args.k_stride, args.batch, args.heads, args.tokens);
  all.tensor(args.v, args.v_stride, args.batch, args.heads, args.tokens);
  all.tensor(args.out, args.out_stride, args.batch, args.heads, args.tokens);
  return all;
}

inline const char* axial_refusal(const AxialAttentionArgs& args) {
  if (args.dtype != Dtype::kFloat16 && args.dtype != Dtype::kBFloat16) {
    return "axial_attention: the GPU kernels take float16 and bfloat16";
  }
  if (args.head_dim < 8 || args.head_dim > 256 || args.head_dim % 8 != 0) {
    return "axial_attention: the GPU kernels take a head_dim that is a "
           "multiple of 8 up to 256";
  }
  const int64_t entries = args.batch * args.heads;
  for (bool of_keys : {false, true}) {
    const AxialPlan plan = axial_plan(args, of_keys);
    if (entries * most(plan.per_entry * 2, args.geometry.prefix) > 0x7fffffff || plan.list > 0x7fffffff) {
      return "axial_attention: more blocks than one launch has programs";
    }
  }
  return nullptr;
}

// f(Same<T>, kDepth) for the storage type and the least depth that head_dim fits into.
template <class T, class F>
const char* with_axial_depth_of(int head_dim, F f) {
  if (head_dim <= 64) return f(Same<T>{}, std::integral_constant<int, 64>{});
  if (head_dim <= 128) return f(Same<T>{}, std::integral_constant<int, 128>{});
  return f(Same<T>{}, std::integral_constant<int, 256>{});
}
template <class F>
const char* with_axial_depth(const AxialAttentionArgs& args, F f) {
  if (args.dtype == Dtype::kFloat16) return with_axial_depth_of<Float16>(args.head_dim, f);
  return with_axial_depth_of<BFloat16>(args.head_dim, f);
}

}  // namespace saccade
