// apply_rope: rotate pairs of columns of q and k; specification python/saccade/reference/apply_rope.py.
//
//   T            storage type          kAccess  elements per memory access (prim/vec.cuh)
//   kVector      elements in 16 bytes  kPairs   pairs of a unit
//   unit         what a thread does for one head of one token: turns two vectors, one in each half ("half" pairing) or
//                one vector of neighbours ("interleaved"); or copies one vector of identity columns
//   item         head of a group: the group's q heads first, then its k heads
//   kUnroll      items whose loads are all issued before the first is used
//
// A block takes kTokens tokens of one batch entry and a range of head groups. First all its threads fill a table of
// cosines and sines in shared memory; then each thread keeps one unit's share of the table in registers and walks over
// heads. So an angle is computed once for all heads, and every byte of q and k moves once. In place, identity columns
// are neither read nor written.
#pragma once
#include "prim/rotate.cuh"
#include "prim/vec.cuh"

namespace saccade {

constexpr int kRopeThreads = 256;

// Half-open column range that is copied as it is.
struct Columns {
  int32_t begin, end;
};

struct RopePlan {
  TableShape table;          // tokens, groups and padded pairs of a block
  uint32_t tiles;            // token tiles of a batch entry
  int32_t q_heads, k_heads;  // of a group
  int32_t group_slots;       // groups that a block walks side by side
  int32_t head_slots;        // items that a block walks side by side
  int32_t items;             // items of a block: all of a group, or a part where tokens are few
  int32_t turn_units;        // units that turn
  int32_t units;             // all units, with those that copy
  Columns copied[3];
};

template <typename T, int kAccess, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads, kInterleaved ? 4 : 3)
    apply_rope_kernel(const __grid_constant__ RopeArgs args, const __grid_constant__ RopePlan plan) {
  using Bits = typename T::Bits;
  constexpr int kVector = T::kVector;
  constexpr int kPairs = kInterleaved ? kVector / 2 : kVector;
  constexpr int kUnroll = kInterleaved ? 4 : 2;
  const Angles& angles = args.angles;

  const int kTokens = plan.table.tokens;
  const int64_t batch = blockIdx.x / plan.tiles;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % plan.tiles) * kTokens;
  const int count = static_cast<int>(args.tokens - first_token < kTokens ? args.tokens - first_token : kTokens);
  const int first_group = blockIdx.y * plan.table.groups;
  const int groups = min(plan.table.groups, angles.groups - first_group);

  SACCADE_SHARED(shared);
  Position* positions = reinterpret_cast<Position*>(shared);                     // [A, kTokens]
  CosSin* table = reinterpret_cast<CosSin*>(positions + angles.axes * kTokens);  // [kTokens, groups, width]
  if (plan.turn_units > 0)
    build_table<kPairs>(angles, plan.table, batch, first_token, count, first_group, groups, positions, table);

  // thread = ((group_slot * head_slots + head_slot) * kTokens + token) * units + unit
  int rest = threadIdx.x;
  const int unit = rest % plan.units;
  rest /= plan.units;
  const int token = rest % kTokens;
  rest /= kTokens;
  const int head_slot = rest % plan.head_slots, group_slot = rest / plan.head_slots;
  if (token >= count || group_slot >= plan.group_slots) return;  // no barrier follows

  const bool turns = unit < plan.turn_units;
  int column_a, column_b, length;  // of the unit's vectors; `length` elements of each exist
  if (turns) {
    const int pair = angles.begin + unit * kPairs;
    column_a = kInterleaved ? 2 * pair : pair;
    column_b = pair + angles.pairs;
    length = min(kVector, (angles.end - pair) * (kInterleaved ? 2 : 1));
  } else {
    int piece = unit - plan.turn_units, range = 0;
    for (; range < 2; ++range) {
      const int vectors = (plan.copied[range].end - plan.copied[range].begin + kVector - 1) / kVector;
      if (piece < vectors) break;
      piece -= vectors;
    }
    column_a = column_b = plan.copied[range].begin + piece * kVector;
    length = min(kVector, plan.copied[range].end - column_a);
  }
  const int length_b = turns && !kInterleaved ? length : 0;

  const int64_t place = first_token + token;
  const int64_t q_from = batch * args.q.x_stride[0] + place * args.q.x_stride[2];
  const int64_t k_from = batch * args.k.x_stride[0] + place * args.k.x_stride[2];
  const int64_t q_to = batch * args.q.y_stride[0] + place * args.q.y_stride[2];
  const int64_t k_to = batch * args.k.y_stride[0] + place * args.k.y_stride[2];
  const int q_heads = plan.q_heads, k_heads = plan.k_heads;
  const int first_item = blockIdx.z * plan.items;
  const int end_item = min(q_heads + k_heads, first_item + plan.items);

  for (int group = group_slot; group < groups; group += plan.group_slots) {
    CosSin angle[kPairs];  // [kPairs]
    bool some_still = false;
    if (turns) {
      const CosSin* row = table + (token * plan.table.groups + group) * plan.table.width;
      some_still = load_angles(row, unit, plan.turn_units, angle);
    }
    for (int item = first_item + head_slot; item < end_item; item += plan.head_slots * kUnroll) {
      Vector a[kUnroll], b[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int head = item + u * plan.head_slots;
        if (head >= end_item) continue;
        const bool is_q = head < q_heads;
        const int64_t h =
            is_q ? (first_group + group) * q_heads + head : (first_group + group) * k_heads + head - q_heads;
        const Bits* x = static_cast<const Bits*>(is_q ? args.q.x : args.k.x) + (is_q ? q_from : k_from) +
                        h * (is_q ? args.q.x_stride[1] : args.k.x_stride[1]);
        a[u] = load<T, kAccess>(x + column_a, length);  // [kVector]
        b[u] = load<T, kAccess>(x + column_b, length_b);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int head = item + u * plan.head_slots;
        if (head >= end_item) continue;
        if (turns) {
          float first[kVector], second[kVector];
          unpack<T>(a[u], first);
          unpack<T>(b[u], second);
          rotate<kInterleaved>(angle, some_still, first, second);
          a[u] = pack<T>(first);
          b[u] = pack<T>(second);
        }
        const bool is_q = head < q_heads;
        const int64_t h =
            is_q ? (first_group + group) * q_heads + head : (first_group + group) * k_heads + head - q_heads;
        Bits* y = static_cast<Bits*>(is_q ? args.q.y : args.k.y) + (is_q ? q_to : k_to) +
                  h * (is_q ? args.q.y_stride[1] : args.k.y_stride[1]);
        store<T, kAccess>(y + column_a, a[u], length);
        store<T, kAccess>(y + column_b, b[u], length_b);
      }
    }
  }
}

}  // namespace saccade
