// Runs of consecutive columns in float vectors, for kernels that treat every column alike: their order inside a step is
// whatever is cheapest to load (even columns before odd ones for bf16).
#pragma once
#include <type_traits>

#include "rows.h"

namespace saccade::cpu::SACCADE_ISA {

// Past the cache: an output too large to stay in it need not be read first, which a plain store does.
template <class V>
inline void stream_raw(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  store_raw(p, v);
}
// Before another thread may read what was streamed.
inline void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline bool streams(const void* out, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes > kStreamBytes && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

inline void copy_row(void* to, const void* from, int64_t bytes, bool stream) {
  if (!stream) return (void)std::memcpy(to, from, static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes; i += static_cast<int64_t>(sizeof(VecF)))
    stream_raw(static_cast<char*>(to) + i, load_raw<VecF>(static_cast<const char*>(from) + i));
}

template <class T>
struct Span {
  using C = Chunk<T, false>;
  static constexpr int kVecs = C::kVecs, kStep = C::kPairs;

  static void load(const T* p, VecF* v) {
    VecF unused[kVecs];
    C::load(p, p, v, unused);
  }
  static void load(const T* p, int64_t columns, VecF* v) {
    T buffer[kStep] = {};
    std::memcpy(buffer, p, sizeof(T) * static_cast<size_t>(columns));
    load(buffer, v);
  }
  static void store(T* p, const VecF* v) {
    T buffer[kStep];
    C::store(p, buffer, v, v);
  }
  static void store(T* p, int64_t columns, const VecF* v) {
    T buffer[kStep], other[kStep];
    C::store(buffer, other, v, v);
    std::memcpy(p, buffer, sizeof(T) * static_cast<size_t>(columns));
  }

  // body(column, v) for every step of a row of `width` columns; load the step with `at`.
  template <class F>
  static void each(int64_t width, F&& body) {
    int64_t c = 0;
    for (; c + kStep <= width; c += kStep) body(c, int64_t{kStep});
    if (c < width) body(c, width - c);
  }
  static void at(const T* p, int64_t columns, VecF* v) { columns == kStep ? load(p, v) : load(p, columns, v); }
  static void put(T* p, int64_t columns, const VecF* v) { columns == kStep ? store(p, v) : store(p, columns, v); }
  // `stream` only where every row is whole vectors
  static void put(T* p, int64_t columns, const VecF* v, bool stream) {
    if (!stream) return put(p, columns, v);
    if constexpr (std::is_same_v<T, float>)
      stream_raw(p, v[0]);
    else if constexpr (std::is_same_v<T, BFloat16>)
      stream_raw(p, join_words(v[0], v[1]));
    else
      store(p, v);
  }
};

template <class T>
inline const T* row_at(const void* base, const int64_t* stride, int64_t batch, int64_t token) {
  return static_cast<const T*>(base) + batch * stride[0] + token * stride[1];
}

// Calls f with a null pointer of the storage type.
template <class F>
inline void by_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}
#define SACCADE_BY_TYPE(dtype, call)                 \
  by_type(dtype, [&](auto* type) {                   \
    using T = std::remove_pointer_t<decltype(type)>; \
    call;                                            \
  })

}  // namespace saccade::cpu::SACCADE_ISA
