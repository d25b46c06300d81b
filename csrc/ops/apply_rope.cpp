// saccade::apply_rope, apply_rope_
#include "../cpu/kernels.h"
#include "rope_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/apply_rope.h"
#endif

namespace saccade {
namespace {

void run_cpu(const RopeArgs& args) {
  const cpu::Kernels& kernels = cpu::kernels(args.dtype);
  torch::stable::parallel_for(0, cpu::tiles(args), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) kernels.apply_rope(args, item);
  });
}

using Run = void (*)(const Tensor&, const RopeArgs&);
void cpu_run(const Tensor&, const RopeArgs& args) { run_cpu(args); }
#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, const RopeArgs& args) { call_cuda(q, "apply_rope", apply_rope_cuda, args); }
#endif

template <Run kRun>
void into(const Tensor& q, const OptionalTensor& k, const Tensor& q_out, const OptionalTensor& k_out,
          const Tensor& positions, const Tensor& steps, const AngleOptions& options) {
  RopeArgs args = rope_args(q, k, q_out, k_out, positions);
  set_angles(args, q, steps, options);
  if (!is_empty(args)) kRun(q, args);
}

template <Run kRun>
std::tuple<Tensor, Tensor> functional(const Tensor& q, const OptionalTensor& k, const Tensor& positions,
                                      const Tensor& steps, int64_t shift, int64_t begin, int64_t end, bool interleaved,
                                      double scale, bool inverse) {
  Tensor q_out = torch::stable::empty_like(q), k_out = output_like(k, q);
  into<kRun>(q, k, q_out, k.has_value() ? OptionalTensor(k_out) : std::nullopt, positions, steps,
             {shift, begin, end, interleaved, scale, inverse});
  return {q_out, k_out};
}

template <Run kRun>
void inplace(const Tensor& q, const OptionalTensor& k, const Tensor& positions, const Tensor& steps, int64_t shift,
             int64_t begin, int64_t end, bool interleaved, double scale, bool inverse) {
  into<kRun>(q, k, q, k, positions, steps, {shift, begin, end, interleaved, scale, inverse});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("apply_rope", TORCH_BOX(&functional<cpu_run>));
  m.impl("apply_rope_", TORCH_BOX(&inplace<cpu_run>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("apply_rope", TORCH_BOX(&functional<cuda_run>));
  m.impl("apply_rope_", TORCH_BOX(&inplace<cuda_run>));
}
#endif

}  // namespace saccade
