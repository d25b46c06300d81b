// Work items of unequal size over threads: each takes the next one when it is done. Items must not depend on who runs
// them, or when.
#pragma once
#include <atomic>

#include "space.h"
#include "torch.h"

namespace saccade {

// body(item, space) for every item in [0, count); `space` floats for each thread, 64-byte aligned, not initialised
template <class F>
void for_queue(int64_t count, int64_t space, F&& body) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    if (next.load(std::memory_order_relaxed) >= count) return;
    const Space own(space);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item, own.get());
  });
}

}  // namespace saccade
