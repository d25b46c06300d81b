"""The same bits from run to run, for any thread count, any split of the batch, and either storage of the lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention.attention_cases import DTYPES, LAYOUTS, compressed, inputs, normal, results

from saccade.attention import sparse_attention


def run(impl, layout, tensors, dout, dlse):
    def function(q, k, v, bias, key_bias):
        return sparse_attention(q, k, v, layout, bias=bias, key_bias=key_bias, return_lse=True, impl=impl)

    out, lse, grads = results(function, tensors, dout, dlse)
    return out, lse, *grads


def problem(kind, dtype, device, batch=3):
    layout = LAYOUTS[kind](1, 4, 130, 200, 64, 64, 3).to(device)
    tensors = inputs(batch, 4, 2, 130, 200, 64, dtype, device=device)
    tensors += [normal((1, 4, 130, 200), seed=2, device=device), normal((batch, 200), seed=3, device=device)]
    return (
        layout,
        tensors,
        normal((batch, 4, 130, 64), dtype, seed=4, device=device),
        normal((batch, 4, 130), seed=5, device=device),
    )


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_run_to_run(implementation, kind, dtype):
    impl, device = implementation
    given = problem(kind, dtype, device)
    first = run(impl, *given)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, b in zip(run(impl, *given), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_for_any_split_of_the_batch(implementation, dtype):
    impl, device = implementation
    layout, tensors, dout, dlse = problem("bits", dtype, device)
    together = run(impl, layout, tensors, dout, dlse)
    for b in range(3):
        part = [t if t.shape[0] == 1 else t[b : b + 1] for t in tensors]
        alone = run(impl, layout, part, dout[b : b + 1], dlse[b : b + 1])
        for i in (0, 1, 2, 3, 4, 6):  # all but the bias, which the samples share
            assert torch.equal(alone[i], together[i][b : b + 1])


def test_either_storage_of_the_lists(implementation):
    impl, device = implementation
    layout, tensors, dout, dlse = problem("whole", torch.float32, "cpu")
    packed = replace(layout, full=compressed(layout.full), _transposed=[]).to(device)
    tensors = [t.to(device) for t in tensors]
    given = (tensors, dout.to(device), dlse.to(device))
    for a, b in zip(run(impl, packed, *given), run(impl, layout.to(device), *given), strict=True):
        assert torch.equal(a, b)
