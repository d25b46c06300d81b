// A small problem of attention_rows and attention_columns, for the programs that ThreadSanitizer watches. Values do not
// matter there.
#pragma once
#include <cstdio>
#include <vector>

#include "../../kernels/attention_args.h"

namespace saccade::emulation {

// 250 keys meet parts where there are few queries. `skew` leads to unaligned accesses.
inline const char* map_once(const char* (*run)(const AttentionMapArgs&, void*), Dtype dtype, int queries, int channels,
                            bool skew) {
  constexpr int kKeys = 250;
  const uint32_t one = dtype == Dtype::kFloat32 ? 0x3f800000 : 0x3c003c00;
  std::vector<uint32_t> q(queries * channels + 1, one), k(kKeys * channels + 1, one);
  std::vector<float> lse(queries, 3.0f), entropy(queries), columns(kKeys), key_bias(kKeys, 0.5f), workspace(8 * 1024);
  const int offset = skew ? dtype == Dtype::kFloat32 ? 4 : 2 : 0;
  AttentionMapArgs args;
  AttentionInputs& in = args.in;
  in.q = reinterpret_cast<unsigned char*>(q.data()) + offset;
  in.k = reinterpret_cast<unsigned char*>(k.data()) + offset;
  in.q_stride[2] = in.k_stride[2] = channels;
  in.key_bias = key_bias.data();
  in.batch = in.heads = in.kv_heads = 1;
  in.q_len = queries;
  in.k_len = kKeys;
  in.head_dim = channels;
  in.scale = 0.1f;
  in.dtype = dtype;
  args.row_count = queries;
  args.causal = true;
  args.lse = lse.data();
  args.entropy = entropy.data();
  args.columns = columns.data();
  args.workspace = workspace.data();
  return run(args, nullptr);
}

}  // namespace saccade::emulation
