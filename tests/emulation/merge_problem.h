// A small merging problem, for the programs that ThreadSanitizer watches. Values do not matter there.
#pragma once
#include <cstdio>
#include <vector>

#include "../../kernels/merge_args.h"

namespace saccade::emulation {

// Skew and width that lead to accesses of 16 bytes, of 8, and of single elements.
struct RowMemory {
  int skew, width;
};
constexpr RowMemory kRowMemory[] = {{0, 320}, {0, 36}, {1, 36}};

inline std::vector<uint16_t> values(int64_t count, int skew) { return std::vector<uint16_t>(count + skew, 0x3f80); }

// One plan for the whole batch: row 1 has more members than two rounds of chunks, token 0 is dropped, the last row is
// padding.
struct MergeProblem {
  static constexpr int kBatch = 2, kTokens = 700, kRows = 40;
  std::vector<int32_t> inverse, ptr, members, head;
  std::vector<float> weight;
  PlanView plan;

  MergeProblem() : weight(kBatch * kTokens, 1.5f) {
    std::vector<std::vector<int32_t>> rows(kRows);
    inverse.push_back(-1);
    for (int32_t token = 1; token < kTokens; ++token) {
      inverse.push_back(token < 90 ? token % (kRows - 1) : 1);
      rows[inverse.back()].push_back(token);
    }
    for (const auto& row : rows) {
      ptr.push_back(static_cast<int32_t>(members.size()));
      head.push_back(row.empty() ? -1 : row.front());
      members.insert(members.end(), row.begin(), row.end());
    }
    ptr.push_back(static_cast<int32_t>(members.size()));
    members.resize(kTokens, -1);
    plan = {inverse.data(), ptr.data(), members.data(), head.data(), /*shared=*/true};
  }

  template <typename Args>
  void describe(Args& args, int width) const {
    args.batch = kBatch;
    args.tokens = kTokens;
    args.rows = kRows;
    args.width = width;
    args.dtype = Dtype::kBFloat16;
  }
};

}  // namespace saccade::emulation
