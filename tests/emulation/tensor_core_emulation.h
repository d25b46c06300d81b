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
inline thread_local std::vector<Copy> open_group;
inline thread_local std::deque<std::vector<Copy>> groups;

inline void copy_async(void* to, const void* from, int count) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
  if (count < 0 || count > 16) std::abort();
  open_group.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), count});
}

inline void copy_async_commit() {
  groups.push_back(std::move(open_group));
  open_group.clear();
}

inline void copy_async_wait(size_t pending) {
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      for (int i = 0; i < 16; ++i) copy.to[i] = i < copy.count ? copy.from[i] : 0;
    }
  }
}

// --- tensor cores: the lanes of a warp show one another what they hold ---

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  const unsigned lane = threadIdx.x % kWarpSize;
  auto& wide = warp().wide;
  std::memcpy(wide[lane], &row, sizeof(row));
  warp().barrier.arrive_and_wait();
  for (unsigned m = 0; m < 4; ++m) {
    const unsigned char* from;
    std::memcpy(&from, wide[m * 8 + lane / 4], sizeof(from));
    std::memcpy(&matrix[m], from + lane % 4 * 4, 4);
  }
  warp().barrier.arrive_and_wait();
}

template <bool kIsHalf>
float half_of(uint32_t word, unsigned index) {
  const auto bits = static_cast<uint16_t>(word >> index * 16);
  if constexpr (kIsHalf) return half_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

template <bool kIsHalf>
void multiply_matrices(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % kWarpSize;
  auto& wide = warp().wide;
  std::memcpy(wide[lane], a, sizeof(a));
  wide[lane][4] = b0;
  wide[lane][5] = b1;
  warp().barrier.arrive_and_wait();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, upper = i / 2, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned holder = k % 8 / 2, half = k / 8;
      sum[i] += half_of<kIsHalf>(wide[row * 4 + holder][upper + 2 * half], k % 2) *
                half_of<kIsHalf>(wide[column * 4 + holder][4 + half], k % 2);
    }
  }
  warp().barrier.arrive_and_wait();
}

}  // namespace saccade::emulation
