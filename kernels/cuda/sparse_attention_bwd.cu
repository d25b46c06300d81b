// Launch of the gradients of sparse_attention: delta first, then dk and dv, then dq; 16 kernels for these (dtype x head
// dim x what the rows are).
#include "prim/attention_launch.cuh"
#include "sparse_attention_bwd.cuh"
#include "sparse_attention_bwd.h"
#include "sparse_attention_delta.cuh"

namespace saccade {
namespace {

#ifndef SACCADE_ATTENTION_SHARED  // of a multiprocessor; the emulation has one, and asks for both numbers of stages
#define SACCADE_ATTENTION_SHARED shared_of_multiprocessor()
#endif

// Two stages, where one does not let more blocks run on a multiprocessor; registers allow two.
template <class Shared>
int choose_stages() {
  const int64_t room = SACCADE_ATTENTION_SHARED;
  const auto blocks = [room](int stages) {
    return least(2, room / static_cast<int64_t>(Shared::bytes(stages) + kSystemShared));
  };
  return Shared::bytes(2) > kMostShared || blocks(1) > blocks(2) ? 1 : 2;
}

template <typename T, int kDepth, bool kOfKeys>
const char* launch_rows(const SparseAttentionGradArgs& args, bool aligned, void* stream) {
  using Shared = AttentionGradShared<T, kDepth, kOfKeys>;
  const AttentionInputs& in = args.in;
  const int64_t tiles = ceil_div(kOfKeys ? key_positions(in) : query_positions(in), Shared::kRows);
  const int64_t programs = tiles * (kOfKeys ? in.kv_heads : in.heads) * in.batch * Shared::kSplit;
  if (programs == 0) return nullptr;
  if (programs > kMostPrograms) return "sparse_attention_bwd: more blocks than one launch has programs";
  AttentionGradPlan plan;
  plan.row_tiles = static_cast<int32_t>(tiles);
  plan.row_shift = (kOfKeys ? in.layout.k_block : in.layout.q_block) > Shared::kRows;
  plan.stages = choose_stages<Shared>();
  plan.aligned = aligned;
  plan.scale_log2 = in.scale * kLog2E;
  return launch(sparse_attention_bwd_kernel<T, kDepth, kOfKeys>, dim3(static_cast<unsigned>(programs)),
                kAttentionThreads, Shared::bytes(plan.stages), stream, args, plan);
}

template <typename T>
const char* launch_delta(const SparseAttentionGradArgs& args, bool aligned, void* stream) {
  const AttentionInputs& in = args.in;
  const int64_t queries = ceil_div(in.batch * in.heads * in.q_len, kDeltaWarps);
  const int64_t keys = in.layout.k_order.data == nullptr ? 0 : ceil_div(in.batch * in.kv_heads * in.k_len, kDeltaWarps);
  if (queries > kMostPrograms || keys > kMostPrograms) return "sparse_attention_bwd: more rows than one launch takes";
  const int threads = kDeltaWarps * kWarp;
  if (queries > 0) {
    const dim3 grid(static_cast<unsigned>(queries));
    if (const char* error = launch(attention_delta_kernel<T>, grid, threads, 0, stream, args, aligned)) return error;
  }
  if (keys == 0) return nullptr;
  return launch(attention_clear_keys_kernel<T>, dim3(static_cast<unsigned>(keys)), threads, 0, stream, args, aligned);
}

}  // namespace

int64_t sparse_attention_bwd_workspace_cuda(const SparseAttentionGradArgs&) { return 0; }

const char* sparse_attention_bwd_cuda(const SparseAttentionGradArgs& args, void* stream) {
  if (const char* refusal = attention_refusal(args.in)) return refusal;
  if (args.in.batch == 0 || args.in.heads == 0) return nullptr;
  WideAccess access(args.in);
  access.queries(args.dout, args.dout_stride);
  access.queries(args.out, args.out_stride);
  access.queries(args.dq, args.dq_stride);
  access.keys(args.dk, args.dk_stride);
  access.keys(args.dv, args.dv_stride);
  const bool aligned = access.allowed();
  return with_tile(args.in, [&](auto type, auto depth) {
    using T = decltype(type);
    if (const char* error = launch_delta<T>(args, aligned, stream)) return error;
    if (const char* error = launch_rows<T, depth, true>(args, aligned, stream)) return error;
    return launch_rows<T, depth, false>(args, aligned, stream);
  });
}

}  // namespace saccade
