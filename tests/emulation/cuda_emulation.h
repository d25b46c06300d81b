// Enough of CUDA C++ for g++ to run the kernels of kernels/cuda on the CPU: one std::thread per CUDA thread, a barrier
// per block and per warp. Blocks run one after the other on the same threads. Under -fsanitize=thread a missing
// __syncthreads() is a reported data race; what it cannot show is written in README.md beside this file. With
// SACCADE_EMULATION_FIBERS the threads of a block take turns on one thread instead, which is many times faster.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#include "emulation_threads.h"

namespace saccade::emulation {

constexpr unsigned kWarpSize = 32;

struct Warp {
  Barrier barrier;
  uint32_t slot[kWarpSize] = {};
  // Of tensor_core_emulation.h: two in turn, so that what one exchange shows is read before the next but one begins.
  uint32_t wide[2][kWarpSize][6] = {};
  unsigned turn[kWarpSize] = {};
  unsigned lanes;
  explicit Warp(unsigned lanes) : barrier(lanes), lanes(lanes) {}
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<int> votes;
  std::vector<unsigned char> shared;

  Block(unsigned threads, size_t shared_bytes) : barrier(threads), votes(threads), shared(shared_bytes + 16) {
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<Warp>(threads - first < kWarpSize ? threads - first : kWarpSize));
    }
  }
};

inline Block* block = nullptr;
inline size_t largest_shared = 0;  // of all launches so far, in bytes

inline Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }

inline unsigned char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}

// Shared memory starts as NaN in every block: a value that is read before it is written shows in the results.
inline void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads < 1 || threads > 1024 || shared_bytes > 99 * 1024) std::abort();
  largest_shared = max(largest_shared, shared_bytes);
  Block current(threads, shared_bytes);
  block = &current;
  blockDim = dim3(threads);
  gridDim = grid;
  auto body = [&](unsigned thread) {
    threadIdx = dim3(thread);
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          if (thread == 0) std::memset(current.shared.data(), 0xff, current.shared.size());
          current.barrier.arrive_and_wait();
          kernel();
          current.barrier.arrive_and_wait();
        }
      }
    }
  };
  run_threads(threads, body);
  block = nullptr;
}

inline float half_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

inline uint16_t float_to_half(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

inline uint16_t float_to_bfloat16(float f) {
  if (f != f) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <bool kIsHalf>
uint32_t round_two(float low, float high) {
  const auto to_bits = kIsHalf ? float_to_half : float_to_bfloat16;
  return to_bits(low) | static_cast<uint32_t>(to_bits(high)) << 16;
}

}  // namespace saccade::emulation

inline float __uint_as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t __float_as_uint(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// Correctly rounded, as the intrinsic is.
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

inline void __syncthreads() { saccade::emulation::block->barrier.arrive_and_wait(); }

inline int __syncthreads_and(int vote) {
  auto& block = *saccade::emulation::block;
  block.votes[threadIdx.x] = vote;
  __syncthreads();
  int all = 1;
  for (int other : block.votes) all &= other != 0;
  __syncthreads();
  return all;
}

inline int __syncthreads_or(int vote) { return !__syncthreads_and(!vote); }

namespace saccade::emulation {

// What lane `source` holds; the lane's own value where there is no such lane. All lanes of the warp take part.
template <typename V>
V from_lane(V value, unsigned source) {
  static_assert(sizeof(V) == 4);
  auto& me = warp();
  std::memcpy(&me.slot[threadIdx.x % kWarpSize], &value, 4);
  me.barrier.arrive_and_wait();
  if (source < me.lanes) std::memcpy(&value, &me.slot[source], 4);
  me.barrier.arrive_and_wait();
  return value;
}

// Mask of the lanes whose value fulfils `condition`.
template <typename Condition>
unsigned lanes_where(uint32_t value, Condition condition) {
  auto& me = warp();
  me.slot[threadIdx.x % kWarpSize] = value;
  me.barrier.arrive_and_wait();
  unsigned mask = 0;
  for (unsigned lane = 0; lane < me.lanes; ++lane) mask |= static_cast<unsigned>(condition(me.slot[lane])) << lane;
  me.barrier.arrive_and_wait();
  return mask;
}

}  // namespace saccade::emulation

template <typename V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return saccade::emulation::from_lane(value, threadIdx.x % saccade::emulation::kWarpSize ^ mask);
}

template <typename V>
V __shfl_sync(unsigned, V value, int source) {
  return saccade::emulation::from_lane(value, source);
}

template <typename V>
V __shfl_up_sync(unsigned, V value, unsigned delta) {
  const unsigned lane = threadIdx.x % saccade::emulation::kWarpSize;
  return saccade::emulation::from_lane(value, lane < delta ? lane : lane - delta);
}

inline unsigned __ballot_sync(unsigned, int vote) {
  return saccade::emulation::lanes_where(vote != 0, [](uint32_t other) { return other != 0; });
}

inline unsigned __match_any_sync(unsigned, uint32_t value) {
  return saccade::emulation::lanes_where(value, [value](uint32_t other) { return other == value; });
}

inline void __syncwarp() { saccade::emulation::warp().barrier.arrive_and_wait(); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename V>
V atomicAdd(V* p, V value) {
  return std::atomic_ref<V>(*p).fetch_add(value, std::memory_order_relaxed);
}

template <typename V>
V atomicOr(V* p, V value) {
  return std::atomic_ref<V>(*p).fetch_or(value, std::memory_order_relaxed);
}

template <typename V>
V atomicMax(V* p, V value) {
  std::atomic_ref<V> shared(*p);
  V old = shared.load(std::memory_order_relaxed);
  while (old < value && !shared.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

template <typename V>
V atomicMin(V* p, V value) {
  std::atomic_ref<V> shared(*p);
  V old = shared.load(std::memory_order_relaxed);
  while (value < old && !shared.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

#include "tensor_core_emulation.h"
