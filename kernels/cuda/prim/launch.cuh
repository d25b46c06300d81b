// What differs between nvcc and the emulation (tests/emulation), where g++ compiles the same kernels for the CPU.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Shared memory whose size the launch chooses.
#define SACCADE_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_emulation.h"
#define SACCADE_SHARED(name) unsigned char* const name = ::saccade::emulation::dynamic_shared()
#endif

namespace saccade {

constexpr int kWarp = 32;

template <typename T>
struct Same {
  using type = T;
};

// Starts `kernel`; returns null, or CUDA's text for what went wrong.
template <typename... Params>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream,
                   typename Same<Params>::type... args) {
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  emulation::run(grid, threads, shared_bytes, [&] { kernel(args...); });
  return nullptr;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace saccade
