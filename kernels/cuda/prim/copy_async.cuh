// Copies from global to shared memory that go on while the thread computes (cp.async). A PTX body and a host body side
// by side: on the CPU a copy happens no earlier than the wait for it, so a missing wait shows.
#pragma once
#include "launch.cuh"

namespace saccade {

// 16 bytes to `to`, of which the first `count` come from `from` and the others are 0. Both are 16-byte aligned.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int count) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(count) : "memory");
#else
  emulation::copy_async(to, from, count);
#endif
}

// Closes a group: the copies since the last one.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_async_commit();
#endif
}

// Waits until at most the last kPending groups of this thread are on their way. Other threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulation::copy_async_wait(kPending);
#endif
}

}  // namespace saccade
