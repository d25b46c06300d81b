// A small attention problem over two samples and four heads, for the programs that ThreadSanitizer watches. Values do
// not matter there.
#pragma once
#include <cstdio>
#include <vector>

#include "../../kernels/attention_args.h"

namespace saccade::emulation {

// Every query block has key block 0 whole and key block 1 in part, by box or by bits.
struct AttentionProblem {
  static constexpr int kBatch = 1, kHeads = 2, kLength = 70;
  int head_dim, blocks;
  std::vector<uint16_t> q, k, v, dout, out, dq, dk, dv, bias, dbias;
  std::vector<float> lse, delta, dlse, key_bias, dkey_bias, workspace;
  std::vector<int32_t> starts, parts, counts, whole, part, ids, bits, box, at, order;

  // `skew` leads to unaligned accesses.
  AttentionProblem(int head_dim, int block, bool by_box, bool ordered, int skew) : head_dim(head_dim) {
    blocks = (kLength + block - 1) / block;
    const int positions = blocks * block, rows = kBatch * kHeads * kLength;
    for (auto* x : {&q, &k, &v, &dout, &out, &dq, &dk, &dv}) x->assign(rows * head_dim + skew, 0x3c00);
    for (auto* x : {&bias, &dbias}) x->assign(kLength * kLength, 0x3c00);
    for (auto* x : {&lse, &delta, &dlse, &key_bias, &dkey_bias}) x->assign(rows, 1.0f);
    workspace.assign(kLength * kLength, 0.0f);
    for (int row = 0; row < blocks; ++row) {
      starts.push_back(row), parts.push_back(row);
      counts.push_back(1), whole.push_back(0), part.push_back(blocks - 1), ids.push_back(0);
    }
    bits.assign(block * (block / 32), 0x55555555);
    box.assign(2 * positions, 0);
    at.assign(positions, 0);
    for (int i = 0; i < positions; ++i) {
      box[positions + i] = i, at[i] = i;
      order.push_back(i % 3 == 0 && kLength - 1 - i / 3 >= 0 ? kLength - 1 - i / 3 : -1);
    }
    describe(in, block, by_box, ordered, skew);
  }

  AttentionInputs in;
  int64_t stride[3];

 private:
  void describe(AttentionInputs& args, int block, bool by_box, bool ordered, int skew) {
    stride[0] = kHeads * kLength * head_dim, stride[1] = kLength * head_dim, stride[2] = head_dim;
    args.q = q.data() + skew, args.k = k.data() + skew, args.v = v.data() + skew;
    for (auto* x : {&args.q_stride, &args.k_stride, &args.v_stride}) {
      for (int i = 0; i < 3; ++i) (*x)[i] = stride[i];
    }
    args.batch = kBatch, args.heads = args.kv_heads = kHeads, args.q_len = args.k_len = kLength;
    args.head_dim = head_dim;
    args.dtype = args.bias_dtype = Dtype::kFloat16;
    BlockLayoutArgs& layout = args.layout;
    layout.q_block = layout.k_block = block;
    layout.q_blocks = layout.k_blocks = blocks;
    layout.full = {starts.data(), counts.data(), whole.data(), nullptr, {0, 0}};
    layout.partial = {parts.data(), counts.data(), part.data(), ids.data(), {0, 0}};
    layout.t_full = {starts.data(), counts.data(), whole.data(), nullptr, {0, 0}};
    layout.t_partial = {parts.data(), counts.data(), part.data(), ids.data(), {0, 0}};
    if (by_box) {
      layout.box.data = box.data(), layout.at.data = at.data(), layout.axes = 1;
    } else {
      layout.bits = bits.data();
    }
    if (ordered) layout.q_order.data = layout.k_order.data = order.data();
  }
};

}  // namespace saccade::emulation
