// saccade::sparse_attention, sparse_attention_bwd
#include <algorithm>
#include <memory>

#include "../cpu/attention_kernels.h"
#include "../util/queue.h"
#include "attention_args.h"
#ifdef SACCADE_WITH_CUDA
#include "../util/cuda_call.h"
#include "cuda/sparse_attention.h"
#include "cuda/sparse_attention_bwd.h"
#endif

namespace saccade {
namespace {

constexpr int64_t kPackedFloats = int64_t{4} << 20;  // packed at a time, where one head allows it: stays in the cache
constexpr int64_t kMostFloats = int64_t{64} << 20;   // the same, where many threads want more heads at a time

// ---- forward
// ---------------------------------------------------------------------------------------------------------
void cpu_run(const Tensor&, SparseAttentionArgs& args) {
  const cpu::SparseAttentionKernels& kernels = cpu::attention_kernels().sparse_attention;
  const AttentionInputs& in = args.in;
  const BlockLayoutArgs& l = in.layout;
  const int64_t width = (in.head_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  const int64_t pairs = in.batch * in.kv_heads, group = in.heads / in.kv_heads;
  cpu::PackedKeys packed;
  packed.tiles = int64_t{l.k_blocks} * (l.k_block / cpu::kTile);
  packed.tile_floats = width * cpu::kTile;
  const int64_t pair_floats = std::max<int64_t>(2 * packed.tiles * packed.tile_floats, 1);
  const int64_t at_once = std::clamp<int64_t>(kPackedFloats / pair_floats, 1, pairs);
  const Space values(at_once * pair_floats);
  std::unique_ptr<uint64_t[]> broken(new uint64_t[at_once * packed.tiles]);
  std::unique_ptr<uint8_t[]> used(new uint8_t[at_once * packed.tiles]);
  packed.keys = values.get();
  packed.values = packed.keys + at_once * packed.tiles * packed.tile_floats;
  packed.broken = broken.get();
  packed.used = used.get();
  const int64_t q_tiles = int64_t{l.q_blocks} * (l.q_block / cpu::kTile);
  for (packed.first = 0; packed.first < pairs; packed.first += at_once) {
    const int64_t here = std::min(at_once, pairs - packed.first);
    for_queue(here, 0, [&](int64_t pair, float*) { kernels.mark(args, packed, pair); });
    for_queue(here * packed.tiles, 0, [&](int64_t tile, float*) { kernels.pack(args, packed, tile); });
    for_queue(here * group * q_tiles, kernels.space(args),
              [&](int64_t item, float* space) { kernels.run(args, packed, item, space); });
  }
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, SparseAttentionArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {sparse_attention_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "sparse_attention", sparse_attention_cuda, args);
}
#endif

using Run = void (*)(const Tensor&, SparseAttentionArgs&);

template <Run kRun>
std::tuple<Tensor, Tensor> run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
                               const Tensor& counts, const Tensor& indices, const OptionalTensor& p_starts,
                               const OptionalTensor& p_counts, const OptionalTensor& p_indices,
                               const OptionalTensor& p_ids, const OptionalTensor& bits, const OptionalTensor& box,
                               const OptionalTensor& at, const OptionalTensor& q_order, const OptionalTensor& k_order,
                               const OptionalTensor& bias, const OptionalTensor& key_bias, int64_t q_block,
                               int64_t k_block, double scale) {
  SparseAttentionArgs args;
  args.in = attention_inputs(
      q, k, v, {starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order}, bias,
      key_bias, q_block, k_block, scale);
  Tensor out = output_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  args.out = out.data_ptr();
  copy_used_strides(out, args.out_stride);
  args.lse = data_of<float>(lse);
  if (!is_empty(args.in) && args.in.q_len > 0) kRun(q, args);
  return {out, lse};
}

// ---- backward
// --------------------------------------------------------------------------------------------------------
constexpr int64_t kMostChunks = 8, kEnoughItems = 64;

void cpu_run(const Tensor&, SparseAttentionGradArgs& args) {
  const cpu::SparseAttentionGradKernels& kernels = cpu::attention_kernels().sparse_attention_bwd;
  const AttentionInputs& in = args.in;
  const BlockLayoutArgs& l = in.layout;
  const int64_t lanes = cpu::attention_kernels().sparse_attention.lanes;
  const int64_t pairs = in.batch * in.kv_heads, group = in.heads / in.kv_heads;
  cpu::PackedQueries packed;
  packed.tiles = int64_t{l.q_blocks} * (l.q_block / cpu::kTile);
  packed.tile_floats = (in.head_dim + lanes - 1) / lanes * lanes * cpu::kTile;
  // The sums depend on it: by the shape of one sample alone, so that no split of the batch changes them.
  packed.chunks = std::clamp<int64_t>((kEnoughItems + in.kv_heads - 1) / in.kv_heads, 1, kMostChunks);
  packed.chunks = std::clamp<int64_t>(l.k_blocks, 1, packed.chunks);
  // Heads at hand: as many as the threads need and the memory allows.
  const int64_t pair_floats = std::max<int64_t>(group * packed.tiles * packed.tile_floats * (2 + packed.chunks), 1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = std::max(kPackedFloats / pair_floats, (4 * threads + packed.chunks - 1) / packed.chunks);
  const int64_t at_once = std::clamp<int64_t>(std::min(wanted, kMostFloats / pair_floats), 1, pairs);
  packed.heads = at_once * group;
  const int64_t all = packed.heads * packed.tiles;
  const Space values(all * packed.tile_floats * (2 + packed.chunks) + 3 * all * cpu::kTile);
  std::unique_ptr<uint64_t[]> flags(new uint64_t[all * (1 + packed.chunks)]);
  std::unique_ptr<uint8_t[]> touched(new uint8_t[all * packed.chunks]);
  packed.q = values.get();
  packed.dout = packed.q + all * packed.tile_floats;
  packed.dq = packed.dout + all * packed.tile_floats;
  packed.shift = packed.dq + all * packed.tile_floats * packed.chunks;
  packed.delta = packed.shift + all * cpu::kTile;
  packed.dlse = packed.delta + all * cpu::kTile;
  packed.broken = flags.get();
  packed.spoilt = packed.broken + all;
  packed.touched = touched.get();
  for (int64_t pair = 0; pair < pairs; pair += at_once) {
    const int64_t here = std::min(at_once, pairs - pair);
    packed.first = pair * group;
    for_queue(here * group * packed.tiles, 0, [&](int64_t tile, float*) { kernels.rows(args, packed, tile); });
    for_queue(here * packed.chunks, kernels.space(args),
              [&](int64_t item, float* space) { kernels.run(args, packed, item, space); });
    for_queue(here * group * packed.tiles, 0, [&](int64_t tile, float*) { kernels.sum(args, packed, tile); });
  }
}

#ifdef SACCADE_WITH_CUDA
void cuda_run(const Tensor& q, SparseAttentionGradArgs& args) {
  Tensor workspace = torch::stable::new_empty(q, {sparse_attention_bwd_workspace_cuda(args)}, ScalarType::Byte);
  args.workspace = workspace.data_ptr();
  call_cuda(q, "sparse_attention_bwd", sparse_attention_bwd_cuda, args);
}
#endif

using RunBackward = void (*)(const Tensor&, SparseAttentionGradArgs&);

void set_transposed(BlockLayoutArgs& l, const Tensor& q, const Tensor& starts, const Tensor& counts,
                    const Tensor& indices, const OptionalTensor& p_starts, const OptionalTensor& p_counts,
                    const OptionalTensor& p_indices, const OptionalTensor& p_ids) {
  l.t_full = lists_of(q, starts, counts, indices, l.k_blocks, "t_starts, t_counts, t_indices");
  if (l.partial.starts == nullptr) return;
  STD_TORCH_CHECK(p_starts.has_value() && p_counts.has_value() && p_indices.has_value(),
                  "tp_starts, tp_counts, tp_indices: expected them where p_starts is given");
  l.t_partial = lists_of(q, *p_starts, *p_counts, *p_indices, l.k_blocks, "tp_starts, tp_counts, tp_indices");
  set_ids(l.t_partial, q, *p_indices, p_ids, "tp_ids");
  STD_TORCH_CHECK(l.bits == nullptr || l.t_partial.ids != nullptr, "tp_ids: expected with bits");
}

template <RunBackward kRun>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& starts, const Tensor& counts, const Tensor& indices,
    const OptionalTensor& p_starts, const OptionalTensor& p_counts, const OptionalTensor& p_indices,
    const OptionalTensor& p_ids, const OptionalTensor& bits, const OptionalTensor& box, const OptionalTensor& at,
    const OptionalTensor& q_order, const OptionalTensor& k_order, const Tensor& t_starts, const Tensor& t_counts,
    const Tensor& t_indices, const OptionalTensor& tp_starts, const OptionalTensor& tp_counts,
    const OptionalTensor& tp_indices, const OptionalTensor& tp_ids, const OptionalTensor& bias,
    const OptionalTensor& key_bias, int64_t q_block, int64_t k_block, double scale) {
  SparseAttentionGradArgs args;
  args.in = attention_inputs(
      q, k, v, {starts, counts, indices, p_starts, p_counts, p_indices, p_ids, bits, box, at, q_order, k_order}, bias,
      key_bias, q_block, k_block, scale);
  const AttentionInputs& in = args.in;
  set_transposed(args.in.layout, q, t_starts, t_counts, t_indices, tp_starts, tp_counts, tp_indices, tp_ids);
  const Sizes rows = {in.batch, in.heads, in.q_len};
  for (const Tensor* t : {&dout, &out})
    check_sizes(*t, q, t == &out ? "out" : "dout", {in.batch, in.heads, in.q_len, in.head_dim});
  check_values(dout, "dout", in.dtype, args.dout_stride);
  check_values(out, "out", in.dtype, args.out_stride);
  args.dout = dout.data_ptr();
  args.out = out.data_ptr();
  args.lse = check_floats(lse, q, "lse", rows);
  if (dlse.has_value()) args.dlse = check_floats(*dlse, q, "dlse", rows);
  Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  Tensor delta = torch::stable::new_empty(q, {in.batch, in.heads, in.q_len}, ScalarType::Float);
  Tensor dkey_bias = key_bias.has_value()
                         ? torch::stable::new_empty(q, {in.batch, in.heads, in.k_len}, ScalarType::Float)
                         : torch::stable::new_empty(q, {0}, ScalarType::Float);
  copy_used_strides(dq, args.dq_stride);
  copy_used_strides(dk, args.dk_stride);
  copy_used_strides(dv, args.dv_stride);
  args.dq = dq.data_ptr();
  args.dk = dk.data_ptr();
  args.dv = dv.data_ptr();
  args.delta = data_of<float>(delta);
  if (key_bias.has_value()) args.dkey_bias = data_of<float>(dkey_bias);
  if (is_empty(in) || k_order.has_value()) {  // keys without a position are in no block
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    torch::stable::zero_(dkey_bias);
  }
  if (!is_empty(in)) kRun(q, args);
  return {dq, dk, dv, dkey_bias, delta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&run<cpu_run>));
  m.impl("sparse_attention_bwd", TORCH_BOX(&backward<cpu_run>));
}
#ifdef SACCADE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(saccade, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&run<cuda_run>));
  m.impl("sparse_attention_bwd", TORCH_BOX(&backward<cuda_run>));
}
#endif

}  // namespace saccade
