// Host side of the attention kernels: what they refuse, and which of them a problem needs.
#pragma once
#include <type_traits>

#include "../../attention_args.h"
#include "vec.cuh"

namespace saccade {

constexpr int64_t kMostPrograms = 0x7fffffff;  // of a launch
constexpr size_t kMostShared = 99 * 1024;      // of a block, on the architecture that has least
constexpr size_t kSystemShared = 1024;         // what the system takes of a multiprocessor for every block

// Shared memory of a multiprocessor of the current device, in bytes.
inline int64_t shared_of_multiprocessor() {
  int bytes = 100 * 1024;
#ifdef __CUDACC__
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
#endif
  return bytes;
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls f(T{}, Constant<kDepth>{}) for the storage type and the least depth that head_dim fits into.
template <class T, class F>
const char* with_depth(int head_dim, F f) {
  if (head_dim <= 64) return f(T{}, Constant<64>{});
  if (head_dim <= 96) return f(T{}, Constant<96>{});
  if (head_dim <= 128) return f(T{}, Constant<128>{});
  return f(T{}, Constant<256>{});
}
template <class F>
const char* with_tile(const AttentionInputs& in, F f) {
  return in.dtype == Dtype::kFloat16 ? with_depth<Float16>(in.head_dim, f) : with_depth<BFloat16>(in.head_dim, f);
}

// Why the tensor-core kernels do not take a problem, or null.
inline const char* attention_refusal(const AttentionInputs& in) {
  if (in.dtype != Dtype::kFloat16 && in.dtype != Dtype::kBFloat16) {
    return "attention: the GPU kernels take float16 and bfloat16";
  }
  if (in.head_dim < 8 || in.head_dim > 256 || in.head_dim % 8 != 0) {
    return "attention: the GPU kernels take a head_dim that is a multiple of 8 up to 256";
  }
  const auto known = [](int32_t block) { return block == 64 || block == 128; };
  if (!known(in.layout.q_block) || !known(in.layout.k_block)) {
    return "attention: the GPU kernels take blocks of 64 and 128 positions";
  }
  if (in.bias != nullptr && in.bias_dtype != in.dtype && in.bias_dtype != Dtype::kFloat32) {
    return "attention: the GPU kernels take a bias of float32 or of the dtype of q";
  }
  return nullptr;
}

// Positions that a launch has to go over.
inline int64_t query_positions(const AttentionInputs& in) {
  return in.layout.q_order.data == nullptr ? in.q_len : static_cast<int64_t>(in.layout.q_blocks) * in.layout.q_block;
}
inline int64_t key_positions(const AttentionInputs& in) {
  return in.layout.k_order.data == nullptr ? in.k_len : static_cast<int64_t>(in.layout.k_blocks) * in.layout.k_block;
}

// Whether 16-byte accesses are allowed to everything that it was told of.
struct WideAccess {
  const AttentionInputs& in;
  Alignment all;

  explicit WideAccess(const AttentionInputs& in) : in(in), all(in.dtype) {
    queries(in.q, in.q_stride);
    keys(in.k, in.k_stride);
    keys(in.v, in.v_stride);
  }
  void queries(const void* x, const int64_t (&stride)[3]) { all.tensor(x, stride, in.batch, in.heads, in.q_len); }
  void keys(const void* x, const int64_t (&stride)[3]) { all.tensor(x, stride, in.batch, in.kv_heads, in.k_len); }
  bool allowed() const { return all.access() == 8; }
};

}  // namespace saccade
