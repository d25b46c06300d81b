"""torch.compile without graph breaks, opcheck of the raw ops, and that nothing waits for the device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attention.attention_cases import LAYOUTS, inputs, normal

import saccade
from saccade._dispatch import raw
from saccade.attention import BlockLayout, sparse_attention
from saccade.attention._fakes import FAKES


def arguments(kind, seed=0):
    layout = LAYOUTS[kind](2, 2, 70, 100, 64, 64, seed)
    return layout, inputs(2, 2, 1, 70, 100, 32, seed=seed), normal((1, 2, 70, 100), seed=5), normal((2, 100), seed=6)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_fullgraph_forward_and_backward(kind):
    torch._dynamo.reset()
    layout, (q, k, v), bias, key_bias = arguments(kind)

    def function(q, k, v, bias, key_bias):
        out, lse = sparse_attention(q, k, v, layout, bias=bias, key_bias=key_bias, return_lse=True)
        return out * 2, lse.masked_fill(lse.isinf(), 0.0)

    leaves = [t.requires_grad_() for t in (q, k, v, bias, key_bias)]
    plain = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    for a, b in zip(compiled, plain, strict=True):
        assert torch.equal(a, b)
    ours, theirs = (torch.autograd.grad(sum(x.sum() for x in r), leaves) for r in (compiled, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_planning_and_attention_are_one_graph():
    torch._dynamo.reset()
    q, k, v = inputs(1, 2, 2, 200, 200, 64)

    def function(q, k, v):
        some = (q.mean(-1) > 0).unflatten(-1, (4, 50)).any(-1)
        layout = BlockLayout.from_block_map(some[..., :, None] & some[..., None, :], q_len=200, k_len=200)
        return sparse_attention(q, k, v, layout)

    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(q, k, v), function(q, k, v))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_opcheck(kind):
    layout, (q, k, v), bias, key_bias = arguments(kind)
    numbers = (64, 64, 0.2)
    forward = (q, k, v, *layout.tensors(), bias, key_bias, *numbers)
    torch.library.opcheck(torch.ops.saccade.sparse_attention.default, forward)
    out, lse = raw("sparse_attention", "cpu")(*forward)
    full, partial = layout.transposed()
    lists = (*layout.tensors(), *full[:3], *((None,) * 4 if partial is None else partial))
    backward = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *lists, bias, key_bias, *numbers)
    torch.library.opcheck(torch.ops.saccade.sparse_attention_bwd.default, backward)
    delta = raw("sparse_attention_bwd", "cpu")(*backward)[4]
    gradient = (torch.ones_like(out), q, k, v, lse, delta, *layout.tensors(), bias, key_bias, *numbers)
    torch.library.opcheck(torch.ops.saccade.attention_bias_grad.default, gradient)


def test_every_op_is_checked():
    """By this file, or by the one of its function."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r"opcheck\((?:torch\.)?ops(?:\.saccade)?\.(\w+)\.default", sources)) == set(FAKES)


def test_explain_says_what_runs():
    layout, (q, k, v), _, _ = arguments("whole")
    found = saccade.explain("sparse_attention", q, k, v, layout)
    assert found.chosen == "cpu" and "float32" in found.verdicts["cuda"]
    found = saccade.explain(sparse_attention, q.double(), k.double(), v.double(), layout)
    assert found.chosen == "reference" and "float64" in found.verdicts["cpu"]
