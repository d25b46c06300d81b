// saccade::merge_plan
#include <algorithm>

#include "../cpu/merge_kernels.h"
#include "../util/parallel.h"
#include "merge_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/merge_plan.h"
#endif

namespace saccade {
namespace {

// Ties at the cut of a whole batch go to the first samples: how many each of them gets.
std::vector<int64_t> ties_of_samples(const MergePlanArgs& args, uint32_t cut, int64_t ties) {
  std::vector<int64_t> own(args.batch);
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t here = cpu::merge_plan_ties(args, b, cut);
    own[b] = std::min(here, ties);
    ties -= own[b];
  }
  return own;
}

void cpu_run(const Tensor&, MergePlanArgs& args) {
  if (args.whole_batch) {
    uint32_t cut = 0;
    int64_t ties = 0;
    cpu::merge_plan_cut(args, 0, &cut, &ties);
    const std::vector<int64_t> own = ties_of_samples(args, cut, ties);
    return for_items(args.batch, 1, 0, [&](int64_t b, float*) { cpu::merge_plan(args, b, cut, own[b]); });
  }
  for_items(args.batch, grain_of(args.tokens * 16), 0, [&](int64_t b, float*) {
    uint32_t cut = 0;
    int64_t ties = 0;
    cpu::merge_plan_cut(args, b, &cut, &ties);
    cpu::merge_plan(args, b, cut, ties);
  });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& score, MergePlanArgs& args) {
  Tensor workspace = torch::stable::new_empty(score, {merge_plan_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(score, "merge_plan", merge_plan_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, MergePlanArgs&);
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <Run kRun>
Plan run(const Tensor& score, const Tensor& target, int64_t rows, int64_t r, double threshold, bool whole_batch) {
  check_table(score, ScalarType::Float, score, "score", {-1, -1});
  check_table(target, ScalarType::Int, score, "target", {score.size(0), score.size(1)});
  STD_TORCH_CHECK(target.size(0) == score.size(0), "target: expected the shape of score");
  STD_TORCH_CHECK(rows >= 0 && r >= 0, "rows, r: expected at least 0, got ", rows, " and ", r);
  MergePlanArgs args;
  args.batch = score.size(0);
  args.tokens = score.size(1);
  args.rows = rows;
  args.r = r;
  args.threshold = static_cast<float>(threshold);
  args.whole_batch = whole_batch;
  args.score = data_of<const float>(score);
  args.target = data_of<const int32_t>(target);
  auto ints = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(score, std::vector<int64_t>(sizes), ScalarType::Int);
  };
  Tensor inverse = ints({args.batch, args.tokens}), ptr = ints({args.batch, rows + 1});
  Tensor members = ints({args.batch, args.tokens}), head = ints({args.batch, rows}), counts = ints({args.batch});
  args.inverse = data_of<int32_t>(inverse);
  args.ptr = data_of<int32_t>(ptr);
  args.members = data_of<int32_t>(members);
  args.head = data_of<int32_t>(head);
  args.counts = data_of<int32_t>(counts);
  if (args.batch > 0) kRun(score, args);
  return {inverse, ptr, members, head, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("merge_plan", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("merge_plan", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
