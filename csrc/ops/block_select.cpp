// saccade::block_select
#include <vector>

#include "../cpu/planning_kernels.h"
#include "../util/parallel.h"
#include "planning_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/block_select.h"
#endif

namespace saccade {
namespace {

void cpu_run(const Tensor&, BlockSelectArgs& args) {
  const cpu::PlanningKernels& kernels = cpu::planning_kernels();
  const int64_t per_head = args.q_blocks, per_sample = per_head * args.heads;
  torch::stable::parallel_for(0, args.batch * per_sample, grain_of(int64_t{args.k_blocks} * args.head_dim * 4),
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> scores(args.k_blocks);
                                std::vector<int32_t> places(args.k_blocks);
                                for (int64_t item = begin; item < end; ++item) {
                                  const int64_t batch = item / per_sample, head = item % per_sample / per_head,
                                                row = item % per_head;
                                  kernels.block_scores(args, batch, head, row, scores.data());
                                  cpu::block_select(args, batch, head, row, scores.data(), places.data());
                                }
                              });
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, BlockSelectArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {block_select_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "block_select", block_select_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, BlockSelectArgs&);
using Lists = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <Run kRun>
Lists run(const Tensor& q, const Tensor& k, const OptionalTensor& classes, int64_t mode, int64_t keep, double p,
          double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                  "q, k: expected [B, H, nQ, D] and [B, Hk, nK, D]");
  check_dense(q, ScalarType::Float, q, "q");
  check_dense(k, ScalarType::Float, q, "k");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "k: expected heads that divide the ", q.size(1),
                  " of q, got ", k.size(1));
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode: expected 0 to 2, got ", mode);
  STD_TORCH_CHECK(keep >= 0, "keep: expected at least 0, got ", keep);
  BlockSelectArgs args;
  args.q = data_of<const float>(q);
  args.k = data_of<const float>(k);
  args.batch = q.size(0);
  args.heads = small(q.size(1), "q");
  args.q_blocks = small(q.size(2), "q");
  args.head_dim = small(q.size(3), "q");
  args.kv_heads = small(k.size(1), "k");
  args.k_blocks = small(k.size(2), "k");
  args.mode = static_cast<Choose>(mode);
  args.keep = static_cast<int32_t>(keep < args.k_blocks ? keep : args.k_blocks);
  args.p = static_cast<float>(p);
  args.scale = static_cast<float>(scale);
  args.width = args.mode == Choose::kTop && !classes.has_value() ? args.keep : args.k_blocks;
  if (classes.has_value()) {
    check_dense(*classes, ScalarType::Byte, q, "classes");
    STD_TORCH_CHECK(classes->dim() == 4 && classes->size(2) == args.q_blocks && classes->size(3) == args.k_blocks,
                    "classes: expected [1 or B, 1 or H, ", args.q_blocks, ", ", args.k_blocks, "]");
    shared_strides(*classes, args.batch, args.heads, "classes", args.class_stride);
    args.classes = data_of<const uint8_t>(*classes);
  }
  const auto table = [&](bool exists, bool lists) {
    if (!exists) return torch::stable::new_empty(q, {0}, ScalarType::Int);
    if (!lists) return torch::stable::new_empty(q, {args.batch, args.heads, args.q_blocks}, ScalarType::Int);
    return torch::stable::new_empty(q, {args.batch, args.heads, args.q_blocks, args.width}, ScalarType::Int);
  };
  Tensor counts = table(true, false), indices = table(true, true);
  Tensor p_counts = table(classes.has_value(), false), p_indices = table(classes.has_value(), true);
  args.counts = data_of<int32_t>(counts);
  args.indices = data_of<int32_t>(indices);
  if (classes.has_value()) {
    args.p_counts = data_of<int32_t>(p_counts);
    args.p_indices = data_of<int32_t>(p_indices);
  }
  if (counts.numel() > 0) kRun(q, args);
  return {counts, indices, p_counts, p_indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("block_select", TORCH_BOX(&run<cpu_run>)); }
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) { m.impl("block_select", TORCH_BOX(&run<cuda_run>)); }
#endif

}  // namespace saccade
