// The r largest of many float32 scores, without a sort: radix selection on a key whose order is that of the numbers.
#pragma once
#include <cstdint>
#include <cstring>

namespace saccade::cpu {

// Larger numbers have larger keys, -0 that of 0, NaN 0: below every number.
inline uint32_t order_key(float score) {
  if (!(score == score)) return 0;
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Cut {
  uint32_t key = 0;  // all above it are taken
  int64_t ties = 0;  // and so many that equal it, the first ones
};

// key(i) for i in [0, n); skip(i): not among the candidates.
template <class Key, class Skip>
Cut select_largest(int64_t n, int64_t r, Key&& key, Skip&& skip) {
  Cut cut;
  int64_t candidates = 0;
  for (int64_t i = 0; i < n; ++i) candidates += !skip(i);
  if (r >= candidates) return {0, candidates};  // the key 0 itself: so that NaN are taken where they are candidates
  uint32_t prefix = 0, mask = 0;
  int64_t left = r;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t count[256] = {};
    for (int64_t i = 0; i < n; ++i)
      if (!skip(i) && (key(i) & mask) == prefix) ++count[key(i) >> shift & 255];
    int digit = 255;
    while (digit > 0 && count[digit] < left) left -= count[digit--];
    prefix |= static_cast<uint32_t>(digit) << shift;
    mask |= 255u << shift;
  }
  cut.key = prefix;
  cut.ties = left;
  return cut;
}

}  // namespace saccade::cpu
