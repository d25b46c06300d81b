// How axial attention is cut into items of work: by shape alone, so that sums have one order whatever the threads.
#pragma once
#include <cstdint>

#include "axial_args.h"

namespace saccade::cpu {

constexpr int64_t kAxialRuns = 64;     // runs of neighbouring boxes of a head, at most
constexpr int64_t kAxialTokens = 128;  // tokens of a run, at least
constexpr int64_t kPrefixChunk = 512;  // keys of an item of prefix queries that see all tokens

// Internal linkage: each instruction set has its own.
static inline int64_t least(int64_t a, int64_t b) { return b < a ? b : a; }
static inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

struct AxialPlan {
  int64_t boxes[3] = {}, groups = 1, volume = 1;
  int64_t per_run = 1, runs = 0;  // boxes of a run, runs of a head
  int64_t chunks = 0;
};

static inline AxialPlan axial_plan(const AxialAttentionArgs& a) {
  AxialPlan p;
  for (int i = 0; i < 3; ++i) {
    p.boxes[i] = (int64_t{a.geometry.grid[i]} + a.geometry.box[i] - 1) / a.geometry.box[i];
    p.groups *= p.boxes[i];
    p.volume *= least(a.geometry.box[i], most(a.geometry.grid[i], 1));
  }
  auto cut = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  p.per_run = most(cut(p.groups, kAxialRuns), cut(kAxialTokens, p.volume));
  p.runs = cut(p.groups, p.per_run);
  p.chunks = cut(a.tokens, kPrefixChunk);
  return p;
}

// Floats of workspace: what prefix queries make of each chunk of keys; sums of prefix gradients of each run.
static inline int64_t axial_workspace(const AxialAttentionArgs& a) {
  if (a.geometry.mean || a.geometry.prefix == 0) return 0;
  return a.batch * a.heads * axial_plan(a).chunks * a.geometry.prefix * (a.head_dim + 2);
}
static inline int64_t axial_bwd_workspace(const AxialAttentionArgs& a) {
  return a.batch * a.heads * most(axial_plan(a).runs, 1) * a.geometry.prefix * a.head_dim * 3;
}

}  // namespace saccade::cpu
