"""NaN and infinity stay in the rows that see them, forward and backward."""

from __future__ import annotations

import pytest
import torch
from attention.attention_cases import DTYPES, LAYOUTS, inputs, normal, results

from saccade.attention import sparse_attention

KINDS = ("bits", "causal", "window")
NAN, INF = float("nan"), float("inf")


def run(impl, device, layout, tensors, dout):
    layout = layout.to(device)

    def function(q, k, v, bias):
        return sparse_attention(q, k, v, layout, bias=bias, return_lse=True, impl=impl)

    out, lse, grads = results(function, [t.to(device) for t in tensors], dout.to(device))
    return [t.cpu() for t in (out, lse, *grads)]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "dout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_rows_that_see_it(implementation, dtype, where, value):
    impl, device = implementation
    for kind in KINDS:
        layout = LAYOUTS[kind](1, 2, 150, 200, 64, 64, 4)
        mask = layout.to_mask().expand(1, 2, -1, -1)
        tensors = [*inputs(1, 2, 2, 150, 200, 64, dtype), normal((1, 2, 150, 200), seed=8)]
        dout = normal((1, 2, 150, 64), dtype, seed=9)
        clean = run(impl, device, layout, tensors, dout)
        broken_q, broken_k = torch.zeros(1, 2, 150, dtype=torch.bool), torch.zeros(1, 2, 200, dtype=torch.bool)
        given = [t.clone() for t in tensors]
        if where in ("q", "dout"):
            target = given[0] if where == "q" else (dout := dout.clone())
            target[0, 1, 70, 5] = value
            broken_q[0, 1, 70] = True
        elif where == "bias":
            given[3][0, 1, 70, :130] = value
            broken_q[0, 1, 70] = True
        else:
            given[1 if where == "k" else 2][0, 1, 66, 5] = value
            broken_k[0, 1, 66] = True
        found = run(impl, device, layout, given, dout)
        rows = broken_q | (mask & broken_k[:, :, None]).any(-1)  # queries that are touched
        columns = broken_k | (mask & rows[..., None]).any(-2)  # keys whose gradient they touch
        for name, a, b, touched in zip(
            ("out", "lse", "dq", "dk", "dv"), found, clean, (rows,) * 3 + (columns,) * 2, strict=False
        ):
            assert torch.equal(a[~touched], b[~touched]), f"{kind}: {name} of an untouched row changed"
        untouched = ~(rows[..., None] & mask)
        assert torch.equal(found[5][untouched], clean[5][untouched]), f"{kind}: dbias of an untouched pair changed"
        assert not torch.equal(found[0], clean[0]) or where == "dout" or not rows.any()
