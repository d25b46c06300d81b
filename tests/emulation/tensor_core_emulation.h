// Host bodies of kernels/cuda/prim/copy_async.cuh and mma.cuh; included by cuda_emulation.h.
#pragma once
#include <deque>

namespace saccade::emulation {

// --- cp.async: a copy happens when the thread waits for it, as late as a GPU may do it ---

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int count;
};
struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// Of the calling CUDA thread.
inline Copies& copies() {
#ifdef SACCADE_EMULATION_FIBERS
  static std::vector<Copies> all(1024);
  return all[threadIdx.x];
#else
  static thread_local Copies mine;
  return mine;
#endif
}

inline void copy_async(void* to, const void* from, int count) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
  if (count < 0 || count > 16) std::abort();
  copies().open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), count});
}

inline void copy_async_commit() {
  Copies& mine = copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

inline void copy_async_wait(size_t pending) {
  auto& groups = copies().groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      for (int i = 0; i < 16; ++i) copy.to[i] = i < copy.count ? copy.from[i] : 0;
    }
  }
}

// --- tensor cores: the lanes of a warp show one another what they hold ---

using Shown = uint32_t[kWarpSize][6];

// What all lanes show, after all have.
inline const Shown& show(const void* mine, size_t bytes) {
  const unsigned lane = threadIdx.x % kWarpSize;
  Warp& me = warp();
  Shown& shown = me.wide[me.turn[lane]++ % 2];
  std::memcpy(shown[lane], mine, bytes);
  me.barrier.arrive_and_wait();
  return shown;
}

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  const unsigned lane = threadIdx.x % kWarpSize;
  const Shown& wide = show(&row, sizeof(row));
  for (unsigned m = 0; m < 4; ++m) {
    const unsigned char* from;
    std::memcpy(&from, wide[m * 8 + lane / 4], sizeof(from));
    std::memcpy(&matrix[m], from + lane % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  const unsigned lane = threadIdx.x % kWarpSize;
  const Shown& wide = show(&row, sizeof(row));
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t two[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned char* from;
      std::memcpy(&from, wide[m * 8 + lane % 4 * 2 + i], sizeof(from));
      std::memcpy(&two[i], from + lane / 4 * 2, 2);
    }
    std::memcpy(&matrix[m], two, 4);
  }
}

#pragma GCC push_options  // most of what the emulation does
#pragma GCC optimize("O2")

template <bool kIsHalf>
inline void unpack_two(uint32_t word, float* out) {
  for (unsigned i = 0; i < 2; ++i) {
    const auto bits = static_cast<uint16_t>(word >> i * 16);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if constexpr (kIsHalf) {
      _Float16 h;
      std::memcpy(&h, &bits, 2);
      out[i] = static_cast<float>(h);
    } else {
      std::memcpy(&out[i], &wide, 4);
    }
  }
}

template <bool kIsHalf>
void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % kWarpSize;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const Shown& wide = show(mine, sizeof(mine));
  float row[2][16],
      column[2][16];  // of a: rows lane / 4 and the eighth after it; of b: columns lane % 4 * 2 and the next
  for (unsigned holder = 0; holder < 4; ++holder) {
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned k = half * 8 + holder * 2;
      for (unsigned i = 0; i < 2; ++i) {
        unpack_two<kIsHalf>(wide[lane / 4 * 4 + holder][i + 2 * half], &row[i][k]);
        unpack_two<kIsHalf>(wide[(lane % 4 * 2 + i) * 4 + holder][4 + half], &column[i][k]);
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 16; ++k) sum[i] += row[i / 2][k] * column[i % 2][k];
  }
}

#pragma GCC pop_options

}  // namespace saccade::emulation
