// What qk_norm_rope and its gradient share: the columns of a unit, its weights, and the plan of a launch.
//
//   unit     two vectors of a head, kVector pairs: one vector in each half of the rotary columns ("half" pairing), or
//   two
//            neighbours ("interleaved", and all columns beyond 2R). Which columns a unit holds never depends on
//            kAccess, so sums come in the same order however the memory is aligned.
//   kUnits   units of a head that one lane holds, `lanes` apart
#pragma once
#include "reduce.cuh"
#include "rotate.cuh"
#include "vec.cuh"

namespace saccade {

struct NormPlan {
  TableShape table;
  uint32_t tiles;           // token tiles of a batch entry
  int32_t tiles_per_block;  // gradient: consecutive tiles, over all batch entries
  int32_t units;            // of a head
  int32_t lanes;            // that share a head
  int32_t head_slots;       // heads that a block walks side by side
  int32_t parts;            // blocks that share the heads of the groups
  int32_t group_heads[2];   // heads of a group, of q and of k
  int32_t access;           // elements per memory access, where it is chosen at run time
  float per_element[2];     // 1 / number of elements that are normalised together, of q and of k
};

// One of q and k, by value: a pointer to either would put the arguments in local memory.
struct NormTensor {
  Heads heads;
  const void* weight;
  int32_t group_heads;
  float per_element;
};

__device__ __forceinline__ NormTensor norm_tensor(const NormArgs& args, const NormPlan& plan, int index) {
  return index == 0 ? NormTensor{args.rope.q, args.q_weight, plan.group_heads[0], plan.per_element[0]}
                    : NormTensor{args.rope.k, args.k_weight, plan.group_heads[1], plan.per_element[1]};
}

constexpr int kNoPair = 1 << 20;

struct Unit {
  int column[2], length[2];  // of the two vectors; a vector beyond the head has length 0
  int pair;                  // first pair; beyond the table where the columns do not turn
};

template <int kVector, bool kInterleaved>
__device__ __forceinline__ Unit norm_unit(int unit, int pairs, int head_dim) {
  const int turn_units = kInterleaved ? 0 : (pairs + kVector - 1) / kVector;
  Unit result;
  if (!kInterleaved && unit < turn_units) {
    result.pair = unit * kVector;
    result.column[0] = result.pair;
    result.column[1] = pairs + result.pair;
    result.length[0] = result.length[1] = min(kVector, pairs - result.pair);
  } else {
    result.pair = kInterleaved ? unit * kVector : kNoPair;
    result.column[0] = (kInterleaved ? 0 : 2 * pairs) + (unit - turn_units) * 2 * kVector;
    result.column[1] = result.column[0] + kVector;
    result.length[0] = max(0, min(kVector, head_dim - result.column[0]));
    result.length[1] = max(0, min(kVector, head_dim - result.column[1]));
  }
  return result;
}

inline int64_t norm_units(const RopeArgs& rope) {
  const int vector = 16 / element_bytes(rope.dtype), pairs = rope.angles.interleaved ? 0 : rope.angles.pairs;
  return ceil_div(pairs, vector) + ceil_div(rope.head_dim - 2 * pairs, 2 * vector);
}

// Angles of a unit; the identity where it does not turn, for which there is no table.
template <int kVector>
__device__ __forceinline__ bool unit_angles(const CosSin* row, int pair, int width, CosSin (&angle)[kVector]) {
  if (pair < width) return load_angles(row, pair / kVector, width / kVector, angle);
#pragma unroll
  for (int i = 0; i < kVector; ++i) angle[i] = {1.0f, 0.0f};
  return true;
}

__device__ __forceinline__ float read_weight(const void* weight, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(weight)[at];
  const uint16_t bits = static_cast<const uint16_t*>(weight)[at];
  return dtype == Dtype::kFloat16 ? half_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Weights of the unit's vector v, 1 where there are none; `first` is the head's first column in the weight.
template <int kVector>
__device__ __forceinline__ void unit_weights(const void* weight, Dtype dtype, int64_t first, const Unit& unit, int v,
                                             float (&w)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    w[i] = 1.0f;
    if (weight != nullptr && i < unit.length[v]) w[i] = read_weight(weight, dtype, first + unit.column[v] + i);
  }
}

// The same for all units of `heads` heads, in shared memory [2 * kVector / 4, heads * units, 4]: neighbouring threads
// read neighbouring 16 bytes. All threads of the block call it; a barrier must follow.
template <int kVector, bool kInterleaved>
__device__ __forceinline__ void share_weights(const void* weight, Dtype dtype, int heads, int units, int pairs,
                                              int head_dim, float* shared) {
  for (int n = threadIdx.x; n < heads * units * 2 * kVector; n += blockDim.x) {
    const int i = n % kVector, v = n / kVector % 2, slot = n / (2 * kVector), head = slot / units;
    const Unit unit = norm_unit<kVector, kInterleaved>(slot - head * units, pairs, head_dim);
    const int length = v == 0 ? unit.length[0] : unit.length[1];
    const int column = (v == 0 ? unit.column[0] : unit.column[1]) + i;
    const bool exists = weight != nullptr && i < length;
    shared[((v * kVector + i) / 4 * heads * units + slot) * 4 + i % 4] =
        exists ? read_weight(weight, dtype, static_cast<int64_t>(head) * head_dim + column) : 1.0f;
  }
}

// Of the unit's vector v.
template <int kVector>
__device__ __forceinline__ void load_weights(const float* shared, int slot, int slots, int v, float (&w)[kVector]) {
  struct alignas(16) Four {
    float value[4];
  };
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const Four four = *reinterpret_cast<const Four*>(shared + ((v * kVector + i) / 4 * slots + slot) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[i + j] = four.value[j];
  }
}

__device__ __forceinline__ float reciprocal_rms(float sum_of_squares, float per_element, double eps) {
  return __frsqrt_rn(sum_of_squares * per_element + static_cast<float>(eps));
}

// Loads and stores of the fallback kernels, which choose the width of an access at run time.
template <typename T, int kAccess>
__device__ __forceinline__ Vector load_any(const typename T::Bits* p, int count, int access) {
  if constexpr (kAccess != 0) return load<T, kAccess>(p, count);
  return access == T::kVector ? load<T, T::kVector>(p, count) : load<T, 1>(p, count);
}

template <typename T, int kAccess>
__device__ __forceinline__ void store_any(typename T::Bits* p, const Vector& v, int count, int access) {
  if constexpr (kAccess != 0) {
    store<T, kAccess>(p, v, count);
  } else if (access == T::kVector) {
    store<T, T::kVector>(p, v, count);
  } else {
    store<T, 1>(p, v, count);
  }
}

}  // namespace saccade
