// A small problem of axial attention, for the programs that ThreadSanitizer watches. Values do not matter there.
#pragma once
#include <cstdio>
#include <vector>

#include "../../kernels/axial_args.h"

namespace saccade::emulation {

// A prefix of 2 tokens before a grid (t, 3, 5), cut into boxes (t, 1, 1). `skew` leads to unaligned accesses.
struct AxialProblem {
  AxialAttentionGradArgs args;
  std::vector<uint16_t> q, k, v, out, dout, dq, dk, dv;
  std::vector<float> lse, group_out, group_lse, workspace;

  AxialProblem(int t, int head_dim, bool mean, int skew) : workspace(1 << 18) {
    constexpr int kPrefix = 2, kBoxes = 15;
    const int tokens = kPrefix + t * kBoxes;
    for (auto* x : {&q, &k, &v, &out, &dout, &dq, &dk, &dv}) x->assign(tokens * head_dim + skew, 0x3c00);
    lse.assign(tokens, 1.0f);
    group_out.assign(kBoxes * kPrefix * head_dim, 1.0f);
    group_lse.assign(kBoxes * kPrefix, 1.0f);
    AxialAttentionArgs& forward = args.forward;
    forward.q = q.data() + skew, forward.k = k.data() + skew, forward.v = v.data() + skew;
    forward.out = out.data() + skew;
    args.dout = dout.data() + skew, args.dq = dq.data() + skew, args.dk = dk.data() + skew, args.dv = dv.data() + skew;
    for (auto* x : {&forward.q_stride, &forward.k_stride, &forward.v_stride, &forward.out_stride, &args.dout_stride,
                    &args.dq_stride, &args.dk_stride, &args.dv_stride}) {
      (*x)[2] = head_dim;
    }
    forward.batch = forward.heads = 1;
    forward.tokens = tokens;
    forward.head_dim = head_dim;
    forward.scale = 0.1f;
    forward.dtype = Dtype::kBFloat16;
    forward.geometry = {kPrefix, {t, 3, 5}, {t, 1, 1}, mean};
    forward.lse = lse.data();
    forward.group_out = group_out.data();
    forward.group_lse = group_lse.data();
    args.workspace = forward.workspace = workspace.data();
  }
};

}  // namespace saccade::emulation
