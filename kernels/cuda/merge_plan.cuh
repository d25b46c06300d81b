// merge_plan: which sources are merged, and the rows that remain; specification python/saccade/reference/merge_plan.py.
//
// One block a sample:
//   cut      the r best candidates, by a radix select; over the whole batch, a kernel of one block finds it beforehand
//   rows     kept tokens are counted in order: row = number of kept tokens before, less the dropped ones
//   members  tokens sorted by row: a radix sort, stable, so that the members of a row stay in ascending order. It moves
//            token numbers and looks rows up in `inverse`. No atomics, and a row with very many members costs no more.
//   ptr      where the row changes in the sorted list
#pragma once
#include "../merge_args.h"
#include "prim/select.cuh"

namespace saccade {

struct PlanLaunch {
  int32_t passes;    // of the sort, 8 bits each
  int32_t* list;     // [B, N], where there is more than one pass
  Cut* whole_batch;  // or null
};

struct PlanShared {
  SelectShared select;
  uint32_t place[kSelectWarps][kDigits];  // next place of a digit, of a warp
  uint32_t base[kDigits];                 // first place of a digit
};

__device__ inline void plan_barrier() {
#ifndef SACCADE_MUTANT_NO_PLAN_BARRIER
  __syncthreads();
#endif
}

// The key of a token by place in [B, N]; 0 where it is no candidate.
__device__ __forceinline__ uint32_t plan_key(const MergePlanArgs& args, int64_t at) {
  const float score = args.score[at];
  return args.target[at] >= 0 && score >= args.threshold ? select_key(score) : 0;
}

static __global__ void __launch_bounds__(kSelectThreads)
    merge_plan_cut_kernel(const __grid_constant__ MergePlanArgs args, Cut* out) {
  __shared__ SelectShared shared;
  const auto key_of = [&](int64_t at) { return plan_key(args, at); };
  const Cut cut = select_largest(shared, args.batch * args.tokens, args.r, key_of);
  if (threadIdx.x == 0) *out = cut;
}

// Writes the row of every kept token, -1 for the others, and the head of every row; returns the rows in use.
__device__ __forceinline__ uint32_t plan_rows(const MergePlanArgs& args, const Cut& cut, int64_t sample,
                                              PlanShared& shared) {
  const int64_t first_token = sample * args.tokens, whole = args.whole_batch ? first_token : 0;
  const uint32_t room = static_cast<uint32_t>(args.rows);
  int32_t* inverse = args.inverse + first_token;
  int32_t* head = args.head + sample * args.rows;
  const Run run(args.tokens);
  uint32_t kept = 0, unfit = 0, all_kept, all_unfit;  // of this warp's run, then before a token
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t token = first + lane_of_warp();
    const bool is_kept = token < run.end && !cut.takes(plan_key(args, first_token + token), whole + token);
    kept += __popc(__ballot_sync(kFullWarp, is_kept));
    unfit += __popc(__ballot_sync(kFullWarp, is_kept && args.target[first_token + token] == -2));
  }
  kept = sum_before(shared.select.warp_sum[0], kept, all_kept);
  unfit = sum_before(shared.select.warp_sum[1], unfit, all_unfit);
  const uint32_t excess = all_kept > room ? all_kept - room : 0;
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t token = first + lane_of_warp();
    const bool is_kept = token < run.end && !cut.takes(plan_key(args, first_token + token), whole + token);
    const bool is_unfit = is_kept && args.target[first_token + token] == -2;
    const unsigned kept_mask = __ballot_sync(kFullWarp, is_kept), unfit_mask = __ballot_sync(kFullWarp, is_unfit);
    if (token < run.end) {
      const uint32_t kept_before = kept + __popc(kept_mask & lanes_below());
      const uint32_t unfit_before = unfit + __popc(unfit_mask & lanes_below());
      const uint32_t row = kept_before - min(unfit_before, excess);
      const bool stays = is_kept && !(is_unfit && unfit_before < excess) && row < room;
      inverse[token] = stays ? static_cast<int32_t>(row) : -1;
      if (stays) head[row] = static_cast<int32_t>(token);
    }
    kept += __popc(kept_mask);
    unfit += __popc(unfit_mask);
  }
  const uint32_t rows = min(all_kept - min(all_unfit, excess), room);
  for (int64_t row = rows + threadIdx.x; row < args.rows; row += kSelectThreads) head[row] = -1;
  return rows;
}

// One pass of the sort: from `from` (null: the tokens in order) to `to`, by 8 bits of the row; dropped tokens come
// last.
__device__ __forceinline__ void plan_sort(const MergePlanArgs& args, const int32_t* inverse, const int32_t* from,
                                          int32_t* to, int shift, PlanShared& shared) {
  const Run run(args.tokens);
  const auto digit_of = [&](int64_t at) -> uint32_t {
    const int32_t row = at < run.end ? inverse[from == nullptr ? static_cast<int32_t>(at) : from[at]] : 0;
    const uint32_t key = row < 0 ? static_cast<uint32_t>(args.rows) : static_cast<uint32_t>(row);
    return at < run.end ? key >> shift & (kDigits - 1) : kDigits;
  };
  uint32_t* place = shared.place[warp_of_block()];
  for (int d = lane_of_warp(); d < kDigits; d += kWarp) place[d] = 0;
  __syncwarp();
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const uint32_t digit = digit_of(first + lane_of_warp());
    const unsigned same = __match_any_sync(kFullWarp, digit);
    if (digit < kDigits && (same & lanes_below()) == 0) place[digit] += __popc(same);
    __syncwarp();
  }
  plan_barrier();
  for (int d = threadIdx.x; d < kDigits; d += kSelectThreads) {  // sums over the warps before
    uint32_t sum = 0;
#pragma unroll 4
    for (int w = 0; w < kSelectWarps; ++w) {
      const uint32_t count = shared.place[w][d];
      shared.place[w][d] = sum;
      sum += count;
    }
    shared.base[d] = sum;
  }
  plan_barrier();
  if (warp_of_block() == 0) {  // sums over the digits before
    constexpr int kPerLane = kDigits / kWarp;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += shared.base[lane_of_warp() * kPerLane + i];
    uint32_t before = warp_scan(sum) - sum;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      uint32_t& base = shared.base[lane_of_warp() * kPerLane + i];
      const uint32_t count = base;
      base = before;
      before += count;
    }
  }
  plan_barrier();
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t at = first + lane_of_warp();
    const uint32_t digit = digit_of(at);
    const unsigned same = __match_any_sync(kFullWarp, digit);
    const uint32_t before = digit < kDigits ? place[digit] : 0;
    __syncwarp();
    if (digit < kDigits) {
      to[shared.base[digit] + before + __popc(same & lanes_below())] =
          from == nullptr ? static_cast<int32_t>(at) : from[at];
      if ((same & lanes_below()) == 0) place[digit] = before + __popc(same);
    }
    __syncwarp();
  }
  plan_barrier();
}

static __global__ void __launch_bounds__(kSelectThreads)
    merge_plan_kernel(const __grid_constant__ MergePlanArgs args, const __grid_constant__ PlanLaunch made) {
  __shared__ PlanShared shared;
  const int64_t sample = blockIdx.x, first_token = sample * args.tokens;
  int32_t* inverse = args.inverse + first_token;
  int32_t* members = args.members + first_token;
  int32_t* ptr = args.ptr + sample * (args.rows + 1);
  const auto key_of = [&](int64_t token) { return plan_key(args, first_token + token); };
  const Cut cut =
      made.whole_batch != nullptr ? *made.whole_batch : select_largest(shared.select, args.tokens, args.r, key_of);
  const uint32_t rows = plan_rows(args, cut, sample, shared);
  if (threadIdx.x == 0) args.counts[sample] = static_cast<int32_t>(rows);
  plan_barrier();

  // A merged token joins the row of its target, which is kept: nobody writes what is read here.
  const int64_t whole = args.whole_batch ? first_token : 0;
  for (int64_t token = threadIdx.x; token < args.tokens; token += kSelectThreads) {
    if (cut.takes(key_of(token), whole + token)) inverse[token] = inverse[args.target[first_token + token]];
  }
  plan_barrier();

  // The last pass writes `members`.
  int32_t* list = made.list == nullptr ? nullptr : made.list + first_token;
  const int32_t* from = nullptr;
#pragma unroll 1
  for (int pass = 0; pass < made.passes; ++pass) {
    int32_t* to = (made.passes - pass) % 2 == 1 ? members : list;
    plan_sort(args, inverse, from, to, pass * 8, shared);
    from = to;
  }

  // Every row in use has its head: at most one row begins at a place.
  for (int64_t at = threadIdx.x; at < args.tokens; at += kSelectThreads) {
    const int32_t row = inverse[members[at]], before = at > 0 ? inverse[members[at - 1]] : -1;
    if (row >= 0 && row != before) ptr[row] = static_cast<int32_t>(at);
    if (row < 0 && (at == 0 || before >= 0)) shared.base[0] = static_cast<uint32_t>(at);
    if (row >= 0 && at == args.tokens - 1) shared.base[0] = static_cast<uint32_t>(args.tokens);
  }
  plan_barrier();
  const int32_t joined = static_cast<int32_t>(shared.base[0]);
  for (int64_t row = rows + threadIdx.x; row <= args.rows; row += kSelectThreads) ptr[row] = joined;
  for (int64_t at = joined + threadIdx.x; at < args.tokens; at += kSelectThreads) members[at] = -1;
}

}  // namespace saccade
