// Tiles of q, k, v and dout in shared memory, and their products on tensor cores.
//
//   tile      rows of kDepth 16-bit values, in parts of 16 bytes; channels beyond head_dim and rows of no token are 0
//   place     of part p of row r: p ^ (r % 8), or p ^ (r / 2 % 4) where a row is no multiple of 128 bytes, so that 8
//             neighbouring rows are read without bank conflicts
//   sum       of a warp: [16, 8] products side by side, as multiply_matrices has them: element i of product n is row
//             lane / 4 + i / 2 * 8 and column n * 8 + lane % 4 * 2 + i % 2
#pragma once
#include "copy_async.cuh"
#include "mma.cuh"

namespace saccade {

constexpr int kAttentionThreads = 128;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }

// Whether one of the two values in a word is infinite or NaN.
template <typename T>
__device__ __forceinline__ bool holds_non_finite(uint32_t word) {
  constexpr uint32_t kExponent = T::kIsHalf ? 0x7c007c00u : 0x7f807f80u;
  const uint32_t rest = (word & kExponent) ^ kExponent;  // a half of it is 0 where all exponent bits are set
  return ((rest - 0x00010001u) & 0x80008000u) != 0;
}

template <typename Type, int kDepth>
struct AttentionTile {
  using T = Type;
  using Bits = typename T::Bits;
  static constexpr int kParts = kDepth / 8, kRowBytes = kDepth * 2, kChunks = kDepth / 16;
  static constexpr int kGroup = kParts % 8 == 0 ? 8 : 4;  // parts that change places with one another
  static_assert(kParts % kGroup == 0, "whole groups of parts");

  static __device__ __forceinline__ int place(int row, int part) {
    const int turn = kGroup == 8 ? row & 7 : row / 2 & 3;
    return row * kRowBytes + (part ^ turn) * 16;
  }

  // Calls f(row, place) for the parts that this thread copies: always the same one of a row, of every kRound-th row.
  static constexpr int kRound = kGroup == 8 ? kAttentionThreads / kParts : 8;
  static __device__ __forceinline__ int my_part() { return static_cast<int>(threadIdx.x) % kParts; }
  template <int kRows, class F>
  static __device__ __forceinline__ void each_part(F f) {
    static_assert(kRows % kRound == 0 && kRound % 4 == 0 && kRound * kParts <= kAttentionThreads, "whole rounds");
    const int row = static_cast<int>(threadIdx.x) / kParts;
    if (row >= kRound) return;
    const int first = place(row, my_part());
#pragma unroll 2
    for (int n = 0; n < kRows / kRound; ++n) {
      f(row + n * kRound, (first ^ (n * kRound & 4) * 16) + n * (kRound * kRowBytes));
    }
  }

  // Starts to bring in the rows of `tokens` (in shared memory; -1 for none). `aligned`: 16-byte accesses are allowed.
  template <int kRows>
  static __device__ __forceinline__ void load(unsigned char* tile, const int32_t* tokens, const Bits* base,
                                              int64_t stride, int head_dim, bool aligned) {
    const bool inside = my_part() * 8 < head_dim;
    base += inside ? my_part() * 8 : 0;
    if (aligned) {
      each_part<kRows>([&](int row, int at) {
        const int token = tokens[row];
        copy_async_16(tile + at, base + max(token, 0) * stride, inside && token >= 0 ? 16 : 0);
      });
    } else {
      each_part<kRows>([&](int row, int at) {
        const int token = tokens[row];
        *reinterpret_cast<Vector*>(tile + at) =
            saccade::load<T, 1>(base + max(token, 0) * stride, inside && token >= 0 ? 8 : 0);
      });
    }
  }

  // After this thread's copies have come: what is not finite becomes 0, and `mark` of its row NaN.
  template <int kRows>
  static __device__ __forceinline__ void contain(unsigned char* tile, float* mark) {
    each_part<kRows>([&](int row, int at) {
      Vector* vector = reinterpret_cast<Vector*>(tile + at);
      bool bad = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) bad = bad || holds_non_finite<T>(vector->word[i]);
      if (bad) {
        *vector = {{0u, 0u, 0u, 0u}};
        atomicOr(reinterpret_cast<uint32_t*>(mark + row), 0x7fc00000u);
      }
    });
  }

  // Address of a 16 x 16 block whose first 16 channels lie at `chunk_0`.
  static __device__ __forceinline__ const unsigned char* chunk_at(const unsigned char* tile, int chunk_0, int chunk) {
    return tile + (chunk_0 ^ (chunk * 2 % kGroup) * 16) + chunk * 2 / kGroup * (kGroup * 16);
  }
  // Of this lane in load_matrices: rows first + 0..15 as the left factor, and as the right one, of products by channel.
  static __device__ __forceinline__ int left_place(int first) {
    return place(first + lane_of_warp() % 16, lane_of_warp() / 16);
  }
  static __device__ __forceinline__ int right_place(int first) {
    return place(first + lane_of_warp() / 16 * 8 + lane_of_warp() % 8, lane_of_warp() / 8 % 2);
  }

  // sum = left right^T: rows first + 0..15 of every 64 in `left`, all 8 * kColumns rows of `right`.
  template <int kFrags, int kColumns>
  static __device__ __forceinline__ void scores(float (&sum)[kFrags][kColumns][4], const unsigned char* left, int first,
                                                const unsigned char* right) {
    const int left_0 = left_place(first), right_0 = right_place(0);
#pragma unroll
    for (int m = 0; m < kFrags; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
#pragma unroll 1
    for (int group = 0; group < kParts / kGroup; ++group) {
#pragma unroll
      for (int part = 0; part < kGroup; part += 2) {
        const int chunk = group * (kGroup / 2) + part / 2;
        uint32_t a[kFrags][4];
#pragma unroll
        for (int m = 0; m < kFrags; ++m) load_matrices(a[m], chunk_at(left, left_0, chunk) + m * 64 * kRowBytes);
        multiply_chunk(sum, a, chunk_at(right, right_0, chunk));
      }
    }
  }

  // The same with the left factor in registers.
  template <int kFrags, int kColumns>
  static __device__ __forceinline__ void scores(float (&sum)[kFrags][kColumns][4],
                                                const uint32_t (&left)[kChunks][kFrags][4],
                                                const unsigned char* right) {
    const int right_0 = right_place(0);
#pragma unroll
    for (int m = 0; m < kFrags; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) multiply_chunk(sum, left[chunk], chunk_at(right, right_0, chunk));
  }

  template <int kFrags, int kColumns>
  static __device__ __forceinline__ void multiply_chunk(float (&sum)[kFrags][kColumns][4],
                                                        const uint32_t (&a)[kFrags][4], const unsigned char* right) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];  // columns 0-7 of channels 0-7 and 8-15, then columns 8-15
      load_matrices(b, right + n * 8 * kRowBytes);
#pragma unroll
      for (int m = 0; m < kFrags; ++m) {
        multiply_matrices<T>(sum[m][n], a[m], b[0], b[1]);
        multiply_matrices<T>(sum[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }

  // sum += weights tile, for weights [16, 16 * kSteps] and the channels of `tile` from chunk first_chunk on.
  template <int kFrags, int kSteps, int kChannels>
  static __device__ __forceinline__ void accumulate(float (&sum)[kFrags][kChannels][4],
                                                    const uint32_t (&weights)[kSteps][kFrags][4],
                                                    const unsigned char* tile, int first_chunk = 0) {
    const int first = left_place(0);
#pragma unroll
    for (int chunk = 0; chunk < kChannels / 2; ++chunk) {
      const unsigned char* at = chunk_at(tile, first, first_chunk + chunk);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t b[4];  // rows 0-7 and 8-15 of channels 0-7, then of channels 8-15
        load_transposed(b, at + k * 16 * kRowBytes);
#pragma unroll
        for (int m = 0; m < kFrags; ++m) {
          multiply_matrices<T>(sum[m][chunk * 2], weights[k][m], b[0], b[1]);
          multiply_matrices<T>(sum[m][chunk * 2 + 1], weights[k][m], b[2], b[3]);
        }
      }
    }
  }

  // Rounds sums to the left factor of `accumulate`.
  template <int kFrags, int kColumns>
  static __device__ __forceinline__ void round_weights(uint32_t (&weights)[kColumns / 2][kFrags][4],
                                                       const float (&sum)[kFrags][kColumns][4]) {
#pragma unroll
    for (int k = 0; k < kColumns / 2; ++k) {
#pragma unroll
      for (int m = 0; m < kFrags; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* two = sum[m][k * 2 + i / 2] + i % 2 * 2;
          weights[k][m][i] = round_two<T>(two[0], two[1]);
        }
      }
    }
  }

  // Stores sums [16, 8 * kChannels], row by row multiplied by factor[0] (rows 0-7) and factor[1], to the channels of
  // `out` from `channel` on: first to rows of `stage` that this warp alone uses, then 16 bytes at a time.
  template <int kChannels>
  static __device__ __forceinline__ void store(const float (&sum)[kChannels][4], const float (&factor)[2],
                                               unsigned char* stage, const int32_t* tokens, Bits* out, int64_t stride,
                                               int channel, int head_dim, bool aligned) {
    constexpr int kStageParts = kChannels;  // of a row that is being stored
    const int lane = lane_of_warp();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kChannels; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint32_t*>(stage + place(lane / 4 + i * 8, n) + lane % 4 * 4) =
            round_two<T>(sum[n][i * 2] * factor[i], sum[n][i * 2 + 1] * factor[i]);
      }
    }
    __syncwarp();
#pragma unroll 2
    for (int n = 0; n < 16 * kStageParts / kWarp; ++n) {
      const int row = (n * kWarp + lane) / kStageParts, part = (n * kWarp + lane) % kStageParts;
      const int token = tokens[row];
      if (token < 0 || channel + part * 8 >= head_dim) continue;
      const Vector vector = *reinterpret_cast<const Vector*>(stage + place(row, part));
      Bits* to = out + token * stride + channel + part * 8;
      if (aligned) {
        saccade::store<T, 8>(to, vector, 8);
      } else {
        saccade::store<T, 1>(to, vector, 8);
      }
    }
  }
};

}  // namespace saccade
