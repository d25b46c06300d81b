// Work items over threads, each run of items with scratch memory of its own.
#pragma once
#include <vector>

#include "torch.h"

namespace saccade {

// body(item, space) for every item in [0, count); at least `grain` items a thread
template <class F>
void for_items(int64_t count, int64_t grain, int64_t space, F&& body) {
  torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, [&](int64_t begin, int64_t end) {
    std::vector<float> own(space);
    for (int64_t item = begin; item < end; ++item) body(item, own.data());
  });
}

// Items worth a thread of their own, where each moves `bytes`.
inline int64_t grain_of(int64_t bytes) { return 1 + (int64_t{1} << 15) / (bytes + 1); }

}  // namespace saccade
