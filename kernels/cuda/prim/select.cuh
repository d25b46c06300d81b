// The r largest of N, by one block: a radix select on 32-bit keys, four digits of 8 bits. Of equals the first are
// taken.
//
// A warp owns a run of consecutive items, so that the order of items is the order of warps, and of lanes within: ranks
// come from ballots, and only sums of warps are exchanged through shared memory. Everything is counted in integers.
#pragma once
#include "launch.cuh"

namespace saccade {

#ifndef SACCADE_SELECT_THREADS  // the emulation takes few: every thread costs it dearly
#define SACCADE_SELECT_THREADS 1024
#endif
constexpr int kSelectThreads = SACCADE_SELECT_THREADS, kSelectWarps = kSelectThreads / kWarp;
constexpr int kDigits = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

// Order of floats as order of unsigned numbers; -0 is 0. NaN is 1, less than every number. 0 stands for "no item".
__device__ __forceinline__ uint32_t select_key(float x) {
  if (x != x) return 1u;
  const uint32_t bits = x == 0.0f ? 0u : __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// An item is taken when its key is above `key`, or equal to it and the item is not beyond `last`.
struct Cut {
  uint32_t key;
  int64_t last;
  __device__ __forceinline__ bool takes(uint32_t other, int64_t item) const {
    return other != 0 && (other > key || (other == key && item <= last));
  }
};

struct SelectShared {
  uint32_t count[kDigits];
  uint32_t warp_sum[2][kSelectWarps];
  uint32_t digit, left, all;
  int64_t last;
};

// Not for select_largest: without its barriers the lanes of a warp would part, and the mutant hang instead of failing.
__device__ inline void count_barrier() {
#ifndef SACCADE_MUTANT_NO_COUNT_BARRIER
  __syncthreads();
#endif
}

__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_of_warp()) - 1; }

// The run of items that a warp owns: [begin, end), begin a multiple of 32.
struct Run {
  int64_t begin, end;
  __device__ __forceinline__ explicit Run(int64_t items) {
    const int64_t length = (items + kSelectThreads - 1) / kSelectThreads * kWarp;
    begin = warp_of_block() * length;
    end = begin + length < items ? begin + length : items;
  }
};

// Sum over the lanes up to this one.
__device__ __forceinline__ uint32_t warp_scan(uint32_t value) {
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, value, delta);
    if (lane_of_warp() >= delta) value += other;
  }
  return value;
}

// Replaces a warp's sum by the sum over the warps before it, and `total` by that over all. Two barriers.
__device__ __forceinline__ uint32_t sum_before(uint32_t (&sums)[kSelectWarps], uint32_t mine, uint32_t& total) {
  if (lane_of_warp() == 0) sums[warp_of_block()] = mine;
  count_barrier();
  const uint32_t value = lane_of_warp() < kSelectWarps ? sums[lane_of_warp()] : 0;
  const uint32_t upto = warp_scan(value);
  total = __shfl_sync(kFullWarp, upto, kWarp - 1);
  const uint32_t before = __shfl_sync(kFullWarp, upto - value, warp_of_block());
  count_barrier();
  return before;
}

// Warp 0: the digit in which the `wanted`th largest item lies, and how many of that digit are wanted.
__device__ __forceinline__ void find_digit(SelectShared& shared, uint32_t wanted) {
  constexpr int kPerLane = kDigits / kWarp;
  const int highest = kDigits - 1 - lane_of_warp() * kPerLane;
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += shared.count[highest - i];
  const uint32_t upto = warp_scan(sum);
  if (lane_of_warp() == kWarp - 1) shared.all = upto;
  uint32_t before = upto - sum;
  if (before >= wanted || upto < wanted) return;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const uint32_t count = shared.count[highest - i];
    if (before < wanted && before + count >= wanted) {
      shared.digit = highest - i;
      shared.left = wanted - before;
    }
    before += count;
  }
}

// The cut that takes the `wanted` largest of `items`, or all where there are no more. key_of(item) is its key. The
// whole block calls it; ends with a barrier.
template <typename KeyOf>
__device__ __forceinline__ Cut select_largest(SelectShared& shared, int64_t items, int64_t wanted, KeyOf key_of) {
  if (wanted <= 0) return {0xffffffffu, -1};
  const uint32_t quota = static_cast<uint32_t>(wanted < 0xffffffffll ? wanted : 0xffffffffll);
  const Run run(items);
  uint32_t prefix = 0, left = quota;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int d = threadIdx.x; d < kDigits; d += kSelectThreads) shared.count[d] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t first = run.begin; first < run.end; first += kWarp) {
      const int64_t item = first + lane_of_warp();
      const uint32_t key = item < run.end ? key_of(item) : 0;
      const bool counts = key != 0 && (shift == 24 || key >> (shift + 8) == prefix);
      const uint32_t digit = counts ? key >> shift & (kDigits - 1) : kDigits;
      const unsigned same = __match_any_sync(kFullWarp, digit);
      if (counts && (same & lanes_below()) == 0) {
        atomicAdd(&shared.count[digit], static_cast<uint32_t>(__popc(same)));
      }
    }
    __syncthreads();
    if (warp_of_block() == 0) find_digit(shared, left);
    __syncthreads();
    if (shift == 24 && shared.all <= quota) return {0, -1};
    prefix = prefix << 8 | shared.digit;
    left = shared.left;
  }
  // `left` of the items whose key is `prefix` are taken, the first ones.
  uint32_t equal = 0, total;
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t item = first + lane_of_warp();
    equal += __popc(__ballot_sync(kFullWarp, item < run.end && key_of(item) == prefix));
  }
  uint32_t before = sum_before(shared.warp_sum[0], equal, total);
  if (before < left && before + equal >= left) {
#pragma unroll 1
    for (int64_t first = run.begin; first < run.end; first += kWarp) {
      const int64_t item = first + lane_of_warp();
      const bool is_equal = item < run.end && key_of(item) == prefix;
      const unsigned mask = __ballot_sync(kFullWarp, is_equal);
      if (is_equal && before + __popc(mask & lanes_below()) + 1 == left) shared.last = item;
      before += __popc(mask);
    }
  }
  __syncthreads();
  return {prefix, shared.last};
}

}  // namespace saccade
