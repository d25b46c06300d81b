// Rows of q and k in registers: 16-byte vectors, their loads and stores, and their conversion to float32.
//
//   T        storage type: Float32, Float16 or BFloat16
//   kVector  elements in 16 bytes: 4 or 8
//   kAccess  elements per memory access: kVector (16 bytes) where everything is aligned, fewer where it is not
#pragma once
#include "../../rope_args.h"
#include "launch.cuh"

namespace saccade {

struct alignas(16) Vector {
  uint32_t word[4];
};

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kVector = 4;
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr int kVector = 8;
  static constexpr bool kIsHalf = true;
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kVector = 8;
  static constexpr bool kIsHalf = false;
};

// --- memory: a PTX body and a host body side by side ---

// Every element is read once, so L1 need not keep it.
__device__ __forceinline__ Vector load_16_bytes(const void* p) {
#ifdef __CUDACC__
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
#else
  return *static_cast<const Vector*>(p);
#endif
}

__device__ __forceinline__ void store_16_bytes(void* p, const Vector& v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#else
  *static_cast<Vector*>(p) = v;
#endif
}

// Reads the first `count` elements of a vector, a multiple of kAccess; the others become 0.
template <typename T, int kAccess>
__device__ __forceinline__ Vector load(const typename T::Bits* p, int count) {
  using Bits = typename T::Bits;
  Vector v = {{0u, 0u, 0u, 0u}};
  if constexpr (kAccess == T::kVector) {
    if (count > 0) v = load_16_bytes(p);
  } else if constexpr (kAccess * sizeof(Bits) == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * kAccess < count) {
        const uint64_t bits = *reinterpret_cast<const uint64_t*>(p + i * kAccess);
        v.word[2 * i] = static_cast<uint32_t>(bits);
        v.word[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
      }
    }
  } else {
    static_assert(kAccess == 1, "16 bytes, 8 bytes or one element");
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      constexpr int kPerWord = 4 / sizeof(Bits);
      if (i < count) v.word[i / kPerWord] |= static_cast<uint32_t>(p[i]) << (i % kPerWord * 16);
    }
  }
  return v;
}

template <typename T, int kAccess>
__device__ __forceinline__ void store(typename T::Bits* p, const Vector& v, int count) {
  using Bits = typename T::Bits;
  if constexpr (kAccess == T::kVector) {
    if (count > 0) store_16_bytes(p, v);
  } else if constexpr (kAccess * sizeof(Bits) == 8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = v.word[2 * i] | static_cast<uint64_t>(v.word[2 * i + 1]) << 32;
      if (i * kAccess < count) *reinterpret_cast<uint64_t*>(p + i * kAccess) = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      constexpr int kPerWord = 4 / sizeof(Bits);
      if (i < count) p[i] = static_cast<Bits>(v.word[i / kPerWord] >> (i % kPerWord * 16));
    }
  }
}

// --- conversion ---

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef __CUDACC__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  return emulation::half_to_float(bits);
#endif
}

// Two floats rounded to nearest even, `low` in the lower half of the word.
template <typename T>
__device__ __forceinline__ uint32_t round_two(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  if constexpr (T::kIsHalf) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return emulation::round_two<T::kIsHalf>(low, high);
#endif
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector& v, float (&x)[T::kVector]) {
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) {
    if constexpr (T::kVector == 4) {
      x[i] = __uint_as_float(v.word[i]);
    } else if constexpr (T::kIsHalf) {
      x[i] = half_to_float(static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16)));
    } else {
      x[i] = __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
    }
  }
}

template <typename T>
__device__ __forceinline__ Vector pack(const float (&x)[T::kVector]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kVector == 4) {
      v.word[i] = __float_as_uint(x[i]);
    } else {
      v.word[i] = round_two<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return v;
}

// --- host: how wide accesses may be ---

inline int element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Largest of 16, 8 and 1 elements' bytes (8 for the 16-bit types only) that divides every address. `columns` gathers,
// by bitwise or, every column offset at which an access can start or end.
struct Alignment {
  uint64_t bits = 0;  // or of all byte addresses and byte strides
  int bytes_per_element;

  explicit Alignment(Dtype dtype) : bytes_per_element(element_bytes(dtype)) {}

  void columns(int64_t offset) { bits |= static_cast<uint64_t>(offset) * bytes_per_element; }

  // A stride along a length of 1 is never used, and may be anything.
  void tensor(const void* base, const int64_t (&stride)[3], int64_t batch, int64_t heads, int64_t tokens) {
    bits |= reinterpret_cast<uintptr_t>(base);
    if (batch > 1) columns(stride[0]);
    if (heads > 1) columns(stride[1]);
    if (tokens > 1) columns(stride[2]);
  }

  // In elements.
  int access() const {
    if (bits % 16 == 0) return 16 / bytes_per_element;
    if (bits % 8 == 0 && bytes_per_element == 2) return 4;
    return 1;
  }
};

}  // namespace saccade
