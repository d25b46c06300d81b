// The lists of a layout as a sequence of tiles, and which pairs of a tile are visible.
//
//   rows, columns   of the tile of scores that a warp holds: queries and keys, or keys and queries (kRowsAreKeys)
//   position        place in a table of the layout: block * block size + place in the block
//   seen            bit n * 4 + i for element i of product n (prim/attention_tile.cuh)
#pragma once
#include "../../attention_args.h"
#include "launch.cuh"

namespace saccade {

__device__ __forceinline__ const int32_t* of_sample(const PositionTable& table, int64_t batch, int64_t head) {
  return table.data == nullptr ? nullptr : table.data + batch * table.stride[0] + head * table.stride[1];
}

// One row of lists, full blocks before partial ones, each block in `2^shift` tiles of kColumns.
template <int kColumns>
struct TileList {
  const int32_t *full, *partial, *ids;
  int32_t full_tiles, tiles, shift;

  __device__ __forceinline__ TileList(const BlockLists& whole, const BlockLists& part, int64_t batch, int64_t head,
                                      int64_t row, int block)
      : full(nullptr), partial(nullptr), ids(nullptr), full_tiles(0), tiles(0), shift(0) {
    while (kColumns << shift < block) ++shift;
    if (whole.starts != nullptr) {
      const int64_t list = batch * whole.stride[0] + head * whole.stride[1] + row;
      full = whole.indices + whole.starts[list];
      full_tiles = whole.counts[list] << shift;
    }
    tiles = full_tiles;
    if (part.starts != nullptr) {
      const int64_t list = batch * part.stride[0] + head * part.stride[1] + row;
      const int32_t start = part.starts[list];
      partial = part.indices + start;
      ids = part.ids == nullptr ? nullptr : part.ids + start;
      tiles += part.counts[list] << shift;
    }
  }

  __device__ __forceinline__ bool is_partial(int32_t t) const { return t >= full_tiles; }

  // Position of the first column of tile t; 0 where there is no such tile.
  __device__ __forceinline__ int32_t first(int32_t t) const {
    if (t >= tiles) return 0;
    const int32_t in_list = is_partial(t) ? t - full_tiles : t;
    const int32_t block = (is_partial(t) ? partial : full)[in_list >> shift];
    return ((block << shift) + (in_list & ((1 << shift) - 1))) * kColumns;
  }

  // Row of bits of a partial tile.
  __device__ __forceinline__ int32_t id(int32_t t) const { return ids == nullptr ? 0 : ids[(t - full_tiles) >> shift]; }
};

// What says which pairs of a partial block are visible, for one sample and head.
struct PartMask {
  const int32_t *bits, *box, *at;
  int64_t box_axis, at_axis;  // positions
  int32_t axes, q_block, k_block;

  __device__ __forceinline__ PartMask(const BlockLayoutArgs& layout, int64_t batch, int64_t head)
      : bits(layout.bits),
        box(of_sample(layout.box, batch, head)),
        at(of_sample(layout.at, batch, head)),
        box_axis(static_cast<int64_t>(layout.q_blocks) * layout.q_block),
        at_axis(static_cast<int64_t>(layout.k_blocks) * layout.k_block),
        axes(layout.axes),
        q_block(layout.q_block),
        k_block(layout.k_block) {}

  // For the lane whose rows are at positions `row` and row + 8, and whose columns begin at position `column`.
  template <bool kRowsAreKeys, int kProducts>
  __device__ __forceinline__ uint32_t seen(int32_t row, int32_t column, int32_t id) const {
    if (bits != nullptr) return seen_by_bits<kRowsAreKeys, kProducts>(row, column, id);
    uint32_t inside = 0xffffffffu, by_all = 0;
#pragma unroll 1
    for (int axis = 0; axis < axes; ++axis) {
      const int32_t *low = box + axis * box_axis, *high = low + axes * box_axis, *place = at + axis * at_axis;
      uint32_t here = 0;
      const int32_t a0 = kRowsAreKeys ? place[row] : low[row], a1 = kRowsAreKeys ? place[row + 8] : low[row + 8];
      const int32_t b0 = kRowsAreKeys ? 0 : high[row], b1 = kRowsAreKeys ? 0 : high[row + 8];
#pragma unroll 2
      for (int j = 0; j < kProducts * 2; ++j) {
        const int at_bit = j / 2 * 4 + j % 2;
        const int32_t x = column + j / 2 * 8 + j % 2;
        bool in0, in1, all0, all1;
        if constexpr (kRowsAreKeys) {
          const int32_t from = low[x], to = high[x];
          in0 = from <= a0 && a0 < to, in1 = from <= a1 && a1 < to;
          all0 = a0 == kSeenByAll, all1 = a1 == kSeenByAll;
        } else {
          const int32_t key = place[x];
          in0 = a0 <= key && key < b0, in1 = a1 <= key && key < b1;
          all0 = all1 = key == kSeenByAll;
        }
        here |= static_cast<uint32_t>(in0) << at_bit | static_cast<uint32_t>(in1) << (at_bit + 2);
        if (axis == 0) by_all |= static_cast<uint32_t>(all0) << at_bit | static_cast<uint32_t>(all1) << (at_bit + 2);
      }
      inside &= here;
    }
    return inside | by_all;
  }

  template <bool kRowsAreKeys, int kProducts>
  __device__ __forceinline__ uint32_t seen_by_bits(int32_t row, int32_t column, int32_t id) const {
    const int words = k_block / 32;
    const int32_t* block = bits + static_cast<int64_t>(id) * q_block * words;
    uint32_t found = 0;
    if constexpr (kRowsAreKeys) {
      const int key = row & (k_block - 1), query = column & (q_block - 1);  // key and key + 8 are in one word
#pragma unroll 2
      for (int j = 0; j < kProducts * 2; ++j) {
        const uint32_t word = static_cast<uint32_t>(block[(query + j / 2 * 8 + j % 2) * words + key / 32]) >> key % 32;
        found |= ((word & 1) | (word >> 8 & 1) << 2) << (j / 2 * 4 + j % 2);
      }
    } else {
      const int query = row & (q_block - 1), key = column & (k_block - 1);
      const int32_t* line = block + query * words + key / 32;
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        const int shift = (key + n * 8) % 32, word = n / 4;  // a tile begins with a word
        const uint32_t row0 = static_cast<uint32_t>(line[word]) >> shift & 3;
        const uint32_t row8 = static_cast<uint32_t>(line[word + 8 * words]) >> shift & 3;
        found |= (row0 | row8 << 2) << n * 4;
      }
    }
    return found;
  }
};

// `seen` of a tile whose columns exist as `words` say, one bit for each.
template <int kProducts>
__device__ __forceinline__ uint32_t seen_columns(const uint32_t* words, int lane) {
  uint32_t found = 0;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    const uint32_t two = words[n / 4] >> (n % 4 * 8 + lane % 4 * 2) & 3;
    found |= (two | two << 2) << n * 4;
  }
  return found;
}

}  // namespace saccade
