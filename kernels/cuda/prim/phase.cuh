// Angles as fixed-point turns, and a table of their cosines and sines in shared memory. The specification is
// python/saccade/reference/turns.py. CPU, Triton and CUDA give the same bits: integer phase, then float32 with separate
// multiplications and additions (-fmad=false).
//
//   A, G, R     axes, head groups, pairs of columns        steps   [A, G, R], 2^-64 turns per 2^-shift of a position
//   kTokens     tokens of the tile a block works on        count   how many of them exist
//   first_pair  pair of the first column of the table
//   width       columns of the table: whole units of kPairs pairs, which one thread reads 16 bytes (two pairs) at a
//   time.
//               A row of the table is [kPairs / 2, units, 2], so that neighbouring threads read neighbouring 16 bytes:
//               [units, kPairs] would be a fourfold bank conflict.
#pragma once
#include "../../rope_args.h"
#include "launch.cuh"

namespace saccade {

// position * 2^shift = whole + fraction * 2^-32
struct Position {
  int64_t whole;
  uint32_t fraction;
  uint32_t valid;  // 0 where the position is not finite or beyond +-2^62: its cosines and sines are NaN
};

struct alignas(8) CosSin {
  float cos, sin;
};

struct TableShape {
  int32_t tokens, groups, first_pair, width;
};

inline size_t table_bytes(const TableShape& shape, int32_t axes) {
  return sizeof(Position) * axes * shape.tokens + sizeof(CosSin) * shape.tokens * shape.groups * shape.width;
}

__device__ inline Position fixed_point(const Angles& angles, int64_t offset) {
  double scaled = 0.0;
  switch (angles.position_dtype) {
    case PositionDtype::kInt32:
    case PositionDtype::kInt64: {
      const int64_t whole = angles.position_dtype == PositionDtype::kInt32
                                ? static_cast<const int32_t*>(angles.positions)[offset]
                                : static_cast<const int64_t*>(angles.positions)[offset];
      return {static_cast<int64_t>(static_cast<uint64_t>(whole) << angles.shift), 0u, 1u};
    }
    case PositionDtype::kFloat32:
      scaled = static_cast<double>(static_cast<const float*>(angles.positions)[offset]);
      break;
    case PositionDtype::kFloat64:
      scaled = static_cast<const double*>(angles.positions)[offset];
      break;
  }
  scaled *= static_cast<double>(1ull << angles.shift);
  if (!(fabs(scaled) < 0x1p62)) return {0, 0u, 0u};  // also NaN
  const double whole = floor(scaled);
  return {static_cast<int64_t>(whole), static_cast<uint32_t>((scaled - whole) * 0x1p32), 1u};
}

// step * position modulo one turn, in 2^-64 turns. The last product drops one bit to stay within 64.
__device__ inline uint64_t turns(const Position& position, int64_t step) {
  uint64_t phase = static_cast<uint64_t>(step) * static_cast<uint64_t>(position.whole);
  if (position.fraction != 0) {
    const uint64_t fraction = position.fraction;
    phase += fraction * static_cast<uint64_t>(step >> 32);
    phase += (fraction * (static_cast<uint32_t>(step) >> 1)) >> 31;
  }
  return phase;
}

// Cosine and sine of t * 2^-32 turns, to 7.6e-8. r is the distance to the nearest quarter turn; its low 6 bits, which
// float32 cannot hold, enter to first order as d.
__device__ inline CosSin cos_sin(int32_t t) {
  const uint32_t quarter = (static_cast<uint32_t>(t) + 0x20000000u) >> 30;
  const int32_t r = static_cast<int32_t>(static_cast<uint32_t>(t) - (quarter << 30));
  const int32_t low = r & 63;
  const float x = static_cast<float>(r - low) * 0x1p-32f;
  const float d = static_cast<float>(low) * 0x1.921fb6p-30f;
  const float z = x * x;
  float p = 0x1.466012p+6f + z * -0x1.2dcaf2p+6f;
  p = -0x1.4abbbep+5f + z * p;
  p = -0x1.777a5cp-23f + z * p;
  float g = -0x1.55c64ap+6f + z * 0x1.d9f188p+5f;
  g = 0x1.03c1dep+6f + z * g;
  g = -0x1.f7e93ap-22f + z * g;
  const float h = 0x1.3bd3ccp+4f * z;
  const float w = 1.0f - h;
  const float rest = (1.0f - w) - h;
  const float zg = z * g;
  const float c0 = w + (rest + zg);
  const float s = x * 0x1.921fb6p+2f + (x * p + d * c0);
  const float c = w + (rest + (zg - d * s));
  float sine = quarter & 1 ? c : s;
  float cosine = quarter & 1 ? s : c;
  if (quarter & 2) sine = -sine;
  if ((quarter + 1) & 2) cosine = -cosine;
  return {cosine, sine};
}

// The barrier after which the table may be read. The tests take it away, to show that they would notice.
__device__ inline void table_barrier() {
#ifndef SACCADE_MUTANT_NO_TABLE_BARRIER
  __syncthreads();
#endif
}

// Fills table [kTokens, groups, width] for the tokens first_token + [0, count) of a batch entry and the head groups
// first_group + [0, groups), attention factor and direction included; pairs outside [begin, end) get the identity (1,
// 0). All threads of the block call it; `positions` [A, kTokens] is scratch space.
template <int kPairs>
__device__ __forceinline__ void build_table(const Angles& angles, const TableShape& shape, int64_t batch,
                                            int64_t first_token, int count, int first_group, int groups,
                                            Position* positions, CosSin* table) {
  int valid = 1;
  for (int i = threadIdx.x; i < angles.axes * count; i += blockDim.x) {
    const int axis = i / count, token = i - axis * count;
    const Position position = fixed_point(angles, axis * angles.position_stride[0] + batch * angles.position_stride[1] +
                                                      (first_token + token) * angles.position_stride[2]);
    positions[axis * shape.tokens + token] = position;
    valid &= position.valid;
  }
  const bool all_valid = __syncthreads_and(valid);

  // A thread keeps its pair, and with it the step, over as many tokens as it can.
  const int columns = groups * shape.width, threads = blockDim.x, thread = threadIdx.x;
  const int rows = columns < threads ? threads / columns : 1;
  const int row = columns < threads ? thread / columns : 0;
  const float nan = __uint_as_float(0x7fc00000u);
  if (row < rows) {
    for (int i = thread - row * columns; i < columns; i += threads) {
      const int group = i / shape.width, pair = shape.first_pair + i - group * shape.width;
      const int unit = (i - group * shape.width) / kPairs, in_unit = (i - group * shape.width) % kPairs;
      const int place = (in_unit / 2 * (shape.width / kPairs) + unit) * 2 + in_unit % 2;
      const bool turning = pair >= angles.begin && pair < angles.end;
      const int64_t plane = static_cast<int64_t>(angles.groups) * angles.pairs;
      const int64_t* steps = angles.steps + static_cast<int64_t>(first_group + group) * angles.pairs + pair;
      int64_t step = 0;
      int axis = 0, axes_that_turn = 0;
#pragma unroll 1
      for (int a = 0; a < angles.axes && turning; ++a) {
        if (const int64_t other = steps[a * plane]; other != 0) step = other, axis = a, ++axes_that_turn;
      }
#pragma unroll 1
      for (int token = row; token < count; token += rows) {
        uint64_t phase = 0;
        if (axes_that_turn <= 1) {
          phase = turns(positions[axis * shape.tokens + token], step);
        } else {
#pragma unroll 1
          for (int a = 0; a < angles.axes; ++a) phase += turns(positions[a * shape.tokens + token], steps[a * plane]);
        }
        CosSin turn = cos_sin(static_cast<int32_t>((phase + 0x80000000u) >> 32));
        if (angles.inverse) turn.sin = -turn.sin;
        turn = {turn.cos * angles.scale, turn.sin * angles.scale};
        if (!all_valid) {
#pragma unroll 1
          for (int a = 0; a < angles.axes; ++a) {
            if (!positions[a * shape.tokens + token].valid) turn = {nan, nan};
          }
        }
        if (!turning) turn = {1.0f, 0.0f};
        table[(token * shape.groups + group) * shape.width + place] = turn;
      }
    }
  }
  table_barrier();
}

}  // namespace saccade
