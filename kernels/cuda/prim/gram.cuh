// Products of rows: tiles of a b^T, for rows of `metric` that lists of tokens pick.
//
//   panel      rows of a tile, 128 bytes of each: [rows, 8 parts of 16 bytes] in shared memory, part p of row r at
//   place
//              p ^ (r % 8), so that 8 neighbouring rows are read without bank conflicts
//   GramTile   what the threads of a block hold of a tile: value(i, j) for rows row(i) and columns column() + offset(j)
//   slot       which of the kSlots threads that share a row
//
// Every product is summed over the channels in one order, whatever the tile and wherever the pair lies in it.
#pragma once
#include "copy_async.cuh"
#include "mma.cuh"

namespace saccade {

constexpr int kGramThreads = 256;
constexpr int kPanelBytes = 128;  // of a row

template <typename T>
constexpr int kPanelDepth = kPanelBytes / static_cast<int>(sizeof(typename T::Bits));  // channels

__device__ __forceinline__ int panel_place(int row, int part) { return row * kPanelBytes + ((part ^ row) & 7) * 16; }

// Starts to bring `kRows` rows into a panel, from channel `first` on; 0 where there is no channel, and where the token
// is negative (its address is that of token 0, from which nothing is read). `aligned`: 16-byte accesses are allowed.
template <typename T, int kRows>
__device__ __forceinline__ void load_panel(unsigned char* panel, const int32_t* tokens, const typename T::Bits* metric,
                                           int64_t stride, int first, int channels, bool aligned) {
  static_assert(kRows * 8 % kGramThreads == 0, "whole rounds of the block");
  constexpr int kRounds = kRows * 8 / kGramThreads, kRowsPerRound = kGramThreads / 8;
  const int part = threadIdx.x % 8, channel = first + part * T::kVector;
  const int length = max(0, min(T::kVector, channels - channel));
  metric += length > 0 ? channel : 0;
  tokens += threadIdx.x / 8;
  panel += panel_place(threadIdx.x / 8, part);  // the next rows have the same remainder by 8
  if (aligned) {
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      const int token = tokens[n * kRowsPerRound];
      const int count = token < 0 ? 0 : length;
      copy_async_16(panel + n * kRowsPerRound * kPanelBytes, metric + max(token, 0) * stride,
                    count * static_cast<int>(sizeof(typename T::Bits)));
    }
  } else {
#pragma unroll 1
    for (int n = 0; n < kRounds; ++n) {
      const int token = tokens[n * kRowsPerRound];
      const int count = token < 0 ? 0 : length;
      *reinterpret_cast<Vector*>(panel + n * kRowsPerRound * kPanelBytes) =
          load<T, 1>(metric + max(token, 0) * stride, count);
    }
  }
}

// 16-bit types, on tensor cores: kWarpsM x kWarpsN warps, each with kFragsM x kFragsN products of 16 x 8.
template <typename Type, int kWarpsM, int kWarpsN, int kFragsM, int kFragsN>
struct MmaTile {
  using T = Type;
  static_assert(kWarpsM * kWarpsN * kWarp == kGramThreads && kFragsN % 2 == 0, "8 warps, columns by 16");
  static constexpr int kRows = kWarpsM * kFragsM * 16, kColumns = kWarpsN * kFragsN * 8;
  static constexpr int kMyRows = 2 * kFragsM, kMyColumns = 2 * kFragsN, kSlots = 4 * kWarpsN;
  float sum[kFragsM][kFragsN][4];

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / kWarp / kWarpsN * (kFragsM * 16);
  }
  static __device__ __forceinline__ int first_column() {
    return static_cast<int>(threadIdx.x) / kWarp % kWarpsN * (kFragsN * 8);
  }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  static __device__ __forceinline__ int row(int i) { return first_row() + i / 2 * 16 + i % 2 * 8 + lane() / 4; }
  static __device__ __forceinline__ int column() { return first_column() + lane() % 4 * 2; }
  static __device__ __forceinline__ constexpr int offset(int j) { return j / 2 * 8 + j % 2; }
  static __device__ __forceinline__ int slot() {
    return static_cast<int>(threadIdx.x) / kWarp % kWarpsN * 4 + lane() % 4;
  }
  __device__ __forceinline__ float value(int i, int j) const { return sum[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kFragsM; ++m) {
#pragma unroll
      for (int n = 0; n < kFragsN; ++n) sum[m][n][0] = sum[m][n][1] = sum[m][n][2] = sum[m][n][3] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* a_panel, const unsigned char* b_panel) {
    // Row r of the first product's 16 (a) or of two products' 16 columns (b): the others lie whole products apart, with
    // the same remainder by 8, and part ^ (r % 8) takes the two bits of a part that say which 16 channels as they are.
    const int a_row = first_row() + lane() % 16, b_row = first_column() + lane() / 16 * 8 + lane() % 8;
    const int a_place = panel_place(a_row, lane() / 16), b_place = panel_place(b_row, lane() / 8 % 2);
#pragma unroll 2
    for (int part = 0; part < 8; part += 2) {  // 16 channels
      const unsigned char* a_at = a_panel + (a_place ^ part * 16);
      const unsigned char* b_at = b_panel + (b_place ^ part * 16);
      uint32_t a[kFragsM][4];
#pragma unroll
      for (int m = 0; m < kFragsM; ++m) load_matrices(a[m], a_at + m * 16 * kPanelBytes);
#pragma unroll
      for (int n = 0; n < kFragsN; n += 2) {
        uint32_t b[4];  // columns 0-7 of channels 0-7 and 8-15, then columns 8-15
        load_matrices(b, b_at + n * 8 * kPanelBytes);
#pragma unroll
        for (int m = 0; m < kFragsM; ++m) {
          multiply_matrices<T>(sum[m][n], a[m], b[0], b[1]);
          multiply_matrices<T>(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// float32, with fused multiply-adds in the order of the channels: 16 x 16 threads, each with every 16th row and column.
struct SimtTile {
  using T = Float32;
  static constexpr int kRows = 64, kColumns = 64, kMyRows = 4, kMyColumns = 4, kSlots = 16;
  float sum[kMyRows][kMyColumns];

  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 + 16 * i; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 16; }
  static __device__ __forceinline__ constexpr int offset(int j) { return 16 * j; }
  static __device__ __forceinline__ int slot() { return column(); }
  __device__ __forceinline__ float value(int i, int j) const { return sum[i][j]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) sum[i][j] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* a_panel, const unsigned char* b_panel) {
#pragma unroll 2
    for (int part = 0; part < 8; ++part) {
      Vector a[kMyRows], b[kMyColumns];
#pragma unroll
      for (int i = 0; i < kMyRows; ++i) a[i] = *reinterpret_cast<const Vector*>(a_panel + panel_place(row(i), part));
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) {
        b[j] = *reinterpret_cast<const Vector*>(b_panel + panel_place(column() + offset(j), part));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
          for (int j = 0; j < kMyColumns; ++j) {
            sum[i][j] = fmaf(__uint_as_float(a[i].word[k]), __uint_as_float(b[j].word[k]), sum[i][j]);
          }
        }
      }
    }
  }
};

}  // namespace saccade
