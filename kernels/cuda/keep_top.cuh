// keep_top: indices of the k largest scores, ascending; specification python/saccade/reference/keep_top.py.
//
// One block a sample: the cut by a radix select, then the places by counting what each warp takes. grid: samples.
#pragma once
#include "../merge_args.h"
#include "prim/select.cuh"

namespace saccade {

static __global__ void __launch_bounds__(kSelectThreads) keep_top_kernel(const __grid_constant__ KeepTopArgs args) {
  __shared__ SelectShared shared;
  const int64_t batch = blockIdx.x;
  const float* scores = args.scores + batch * args.score_stride;
  const auto key_of = [&](int64_t token) { return select_key(scores[token]); };
  const Cut cut = select_largest(shared, args.tokens, args.k, key_of);

  const Run run(args.tokens);
  uint32_t taken = 0, total;
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t token = first + lane_of_warp();
    taken += __popc(__ballot_sync(kFullWarp, token < run.end && cut.takes(key_of(token), token)));
  }
  int64_t place = batch * args.k + sum_before(shared.warp_sum[1], taken, total);
#pragma unroll 1
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t token = first + lane_of_warp();
    const bool takes = token < run.end && cut.takes(key_of(token), token);
    const unsigned mask = __ballot_sync(kFullWarp, takes);
    if (takes) args.out[place + __popc(mask & lanes_below())] = token;
    place += __popc(mask);
  }
}

}  // namespace saccade
