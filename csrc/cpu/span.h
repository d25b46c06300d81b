// Runs of consecutive columns in float vectors, for kernels that treat every column alike: their order inside a step is
// whatever is cheapest to load (even columns before odd ones for bf16).
#pragma once
#include <type_traits>

#include "rows.h"

namespace saccade::cpu::SACCADE_ISA {

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
