// Launch of rope_freq_grad: how rows are cut into blocks, and the 16 kernels (dtype x access width x pairing).
#include "prim/norm_plan.cuh"
#include "prim/partials.cuh"
#include "rope_freq_grad.cuh"
#include "rope_freq_grad.h"

namespace saccade {
namespace {

constexpr int64_t kFreqBlocks =
    kEnoughBlocks;  // over all groups: rows of partial sums cost memory and time in the second pass

struct Launch {
  FreqPlan plan;
  int64_t blocks;  // of a group
};

Launch make_launch(const RopeArgs& rope) {
  const Angles& angles = rope.angles;
  Launch made = {};
  FreqPlan& plan = made.plan;
  plan.units = static_cast<int32_t>(ceil_div(angles.pairs, 16 / element_bytes(rope.dtype)));
  plan.row_slots = kFreqThreads / plan.units;
  plan.q_heads = static_cast<int32_t>(rope.q.heads / angles.groups);
  plan.k_heads = static_cast<int32_t>(rope.k.heads / angles.groups);
  const int64_t rows = rope.batch * rope.tokens;
  const int64_t wanted = most(least(kFreqBlocks / angles.groups, ceil_div(rows, 4 * plan.row_slots)), 1);
  plan.rows_per_block = most(ceil_div(rows, wanted), 1);
  made.blocks = ceil_div(rows, plan.rows_per_block);
  return made;
}

int access_elements(const FreqGradArgs& args) {
  const RopeArgs& rope = args.rope;
  Alignment alignment(rope.dtype);
  alignment.tensor(rope.q.x, rope.q.x_stride, rope.batch, rope.q.heads, rope.tokens);
  alignment.tensor(args.q_dx, args.q_dx_stride, rope.batch, rope.q.heads, rope.tokens);
  if (rope.k.heads != 0) {
    alignment.tensor(rope.k.x, rope.k.x_stride, rope.batch, rope.k.heads, rope.tokens);
    alignment.tensor(args.k_dx, args.k_dx_stride, rope.batch, rope.k.heads, rope.tokens);
  }
  alignment.columns(rope.angles.interleaved ? 2 * rope.angles.pairs : rope.angles.pairs);
  return alignment.access();
}

template <typename T, int kAccess>
const char* launch_pairing(const FreqGradArgs& args, const Launch& made, void* stream) {
  const Angles& angles = args.rope.angles;
  const dim3 grid(static_cast<unsigned>(made.blocks), static_cast<unsigned>(angles.groups),
                  static_cast<unsigned>(ceil_div(angles.axes, kAxes)));
  const auto kernel =
      angles.interleaved ? rope_freq_grad_kernel<T, kAccess, true> : rope_freq_grad_kernel<T, kAccess, false>;
  const size_t shared = sizeof(float) * kAxes * made.plan.row_slots * made.plan.units * T::kVector;
  return launch(kernel, grid, kFreqThreads, shared, stream, args, made.plan);
}

template <typename T>
const char* launch_dtype(const FreqGradArgs& args, const Launch& made, void* stream) {
  const int access = access_elements(args);
  if (access == T::kVector) return launch_pairing<T, T::kVector>(args, made, stream);
  if constexpr (T::kVector == 8) {
    if (access >= 4) return launch_pairing<T, 4>(args, made, stream);
  }
  return launch_pairing<T, 1>(args, made, stream);
}

int64_t outputs(const Angles& angles) { return static_cast<int64_t>(angles.axes) * angles.groups * angles.pairs; }

}  // namespace

int64_t rope_freq_grad_workspace_cuda(const FreqGradArgs& args) {
  return make_launch(args.rope).blocks * outputs(args.rope.angles) * static_cast<int64_t>(sizeof(float));
}

const char* rope_freq_grad_cuda(const FreqGradArgs& args, void* stream) {
  const Launch made = make_launch(args.rope);
  const char* error = nullptr;
  if (made.blocks > 0) {
    switch (args.rope.dtype) {
      case Dtype::kFloat32:
        error = launch_dtype<Float32>(args, made, stream);
        break;
      case Dtype::kFloat16:
        error = launch_dtype<Float16>(args, made, stream);
        break;
      case Dtype::kBFloat16:
        error = launch_dtype<BFloat16>(args, made, stream);
        break;
      default:
        return "rope_freq_grad: the GPU kernels take float32, float16 and bfloat16";
    }
  }
  if (error != nullptr) return error;
  return add_partials(static_cast<const float*>(args.workspace), made.blocks, outputs(args.rope.angles), args.out,
                      stream);
}

}  // namespace saccade
