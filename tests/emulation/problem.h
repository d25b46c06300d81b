// A small rotary problem in [B, S, H, D] memory, for the programs that ThreadSanitizer watches. Values do not matter
// there.
#pragma once
#include <cstdio>
#include <utility>
#include <vector>

#include "../../kernels/rope_args.h"

// Since the last question: the variable is one for all libraries of a process.
extern "C" int emulated_largest_shared() {
  return static_cast<int>(std::exchange(saccade::emulation::largest_shared, 0));
}

namespace saccade::emulation {

// Skew and head_dim that lead to accesses of 16 bytes, of 8, and of single elements.
struct Memory {
  int skew, head_dim;
};
constexpr Memory kMemory[] = {{0, 32}, {0, 24}, {1, 24}};

struct Problem {
  std::vector<uint16_t> q, k, q_out, k_out;
  std::vector<float> positions;
  std::vector<int64_t> steps;
  RopeArgs args;

  Problem(Dtype dtype, int heads, int kv_heads, int tokens, int head_dim, int groups, int skew = 0)
      : q(heads * tokens * head_dim + skew, 0x3f80),
        k(kv_heads * tokens * head_dim + skew, 0x3f80),
        q_out(q.size()),
        k_out(k.size()),
        positions(2 * tokens, 1.5f),
        steps(2 * groups * (head_dim / 2), int64_t{1} << 59) {
    auto tensor = [&](std::vector<uint16_t>& x, std::vector<uint16_t>& y, int64_t count) {
      return Heads{
          x.data() + skew, y.data() + skew, count, {0, head_dim, count * head_dim}, {0, head_dim, count * head_dim}};
    };
    args.q = tensor(q, q_out, heads);
    args.k = tensor(k, k_out, kv_heads);
    args.angles.positions = positions.data();
    args.angles.position_dtype = PositionDtype::kFloat32;
    args.angles.position_stride[0] = tokens;
    args.angles.position_stride[2] = 1;
    args.angles.steps = steps.data();
    args.angles.axes = 2;
    args.angles.groups = groups;
    args.angles.pairs = args.angles.end = head_dim / 2;
    args.batch = 1;
    args.tokens = tokens;
    args.head_dim = head_dim;
    args.dtype = dtype;
  }
};

}  // namespace saccade::emulation
