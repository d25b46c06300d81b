// keep_top on the CPU: the same selection as merge_plan's.
#include "merge_kernels.h"
#include "select.h"

namespace saccade::cpu {

void keep_top(const KeepTopArgs& a, int64_t batch) {
  const float* score = a.scores + batch * a.score_stride;
  const Cut cut =
      select_largest(a.tokens, a.k, [&](int64_t i) { return order_key(score[i]); }, [](int64_t) { return false; });
  int64_t* out = a.out + batch * a.k;
  int64_t ties = cut.ties;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const uint32_t key = order_key(score[i]);
    if (key > cut.key || (key == cut.key && ties-- > 0)) *out++ = i;
  }
}

}  // namespace saccade::cpu
