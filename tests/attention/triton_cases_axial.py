"""Checks of the axial-attention Triton kernels in Triton's interpreter: run as a program, with TRITON_INTERPRET=1, it takes the name of a
check per line and answers with a JSON line. Names come from `CHECKS`, which needs no Triton to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attention.axial_cases import EMPTY, FIXED, LARGE, Problem, expected, inputs
from interpreted import serve

from saccade.reference import axial_attention as reference
from saccade.testing import check_budget

CHECKS: dict[str, Callable[[], None]] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("out", "dq", "dk", "dv")


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    words = (*args, *(f"{k}={v}" for k, v in kwargs.items()))
    name = "-".join([function.__name__, *(str(a).removeprefix("torch.") for a in words)])
    assert name not in CHECKS, name
    CHECKS[name] = lambda: function(*args, **kwargs)


def run(problem: Problem, q, k, v, dout, scale):
    """out, dq, dk, dv and what else the forward kernel returns."""
    from saccade._triton.axial_attention import axial_attention
    from saccade._triton.axial_attention_bwd import axial_attention_bwd

    numbers = problem.numbers(scale)
    outputs = axial_attention(q, k, v, *numbers)
    gradients = axial_attention_bwd(dout, q, k, v, *outputs, *numbers)
    return [outputs[0], *gradients], outputs[1:]


def attention_case(name, head_dim, dtype, strides="bhsd"):
    """Forward and every gradient within the budget; lse and the terms of the mean too."""
    problem = {**FIXED, **LARGE, **EMPTY}[name]
    # The largest error of two numbers is chance: with one token, more samples.
    tensors = inputs(problem, head_dim, dtype, batch=8 if problem.tokens == 1 else 1, strides=strides)
    scale = head_dim**-0.5
    found, rest = run(problem, *tensors, scale)
    exact, same = expected(problem, tensors, scale)
    for field, own, peer, truth in zip(NAMES, found, same, exact, strict=True):
        assert own.dtype == dtype
        check_budget(field, own, peer, truth, factor=2.0 if field == "out" else 3.0)
    given = [x.double() for x in tensors[:3]]
    numbers = problem.numbers(scale)
    peers = reference.axial_attention(*tensors[:3], *numbers)[1:]
    truths = reference.axial_attention(*given, *numbers)[1:]
    for field, own, peer, truth in zip(("lse", "group_out", "group_lse"), rest, peers, truths, strict=True):
        assert own.dtype == F32
        # Weights are rounded before the second product, as torch does: a term errs like an output.
        check_budget(field, own, peer.to(dtype).float() if field == "group_out" else peer, truth)


def invariant_case(name):
    """The same bits again, and for a sample alone that lies elsewhere."""
    problem = FIXED[name]
    q, k, v, dout = inputs(problem, 32, BF16, batch=2)
    first, _ = run(problem, q, k, v, dout, 0.2)
    packed = [x[1:] for x in inputs(problem, 32, BF16, batch=2, strides="packed")]
    alone, _ = run(problem, *packed, 0.2)
    for a, b in zip(first, alone, strict=True):
        assert torch.equal(a[1:], b)


def not_finite_case(name, where, value):
    """What is not finite stays in its box."""
    problem = FIXED[name]
    tensors = inputs(problem, 32, F32, batch=1)
    clean, _ = run(problem, *tensors, 0.2)
    token = problem.prefix + 1
    tensors[["q", "k", "v", "dout"].index(where)][0, 1, token, 5] = value
    found, _ = run(problem, *tensors, 0.2)
    mask = problem.mask()
    touched = mask[:, token] if where in ("k", "v") else torch.arange(problem.tokens) == token
    columns = mask[touched].any(0) | touched
    for field, a, b, spoilt in zip(NAMES, found, clean, (touched, touched, columns, columns), strict=True):
        assert torch.equal(a[0, 0], b[0, 0]), f"{field} of another head changed"
        assert torch.equal(a[0, 1, ~spoilt], b[0, 1, ~spoilt]), f"{field} of an untouched row changed"


for _name in FIXED:
    check(attention_case, _name, 32, BF16)
for _name in ("time, class token", "space, mean", "ragged windows, mean", "ragged windows, text", "one token"):
    check(attention_case, _name, 64, F32, strides="bshd")
    check(attention_case, _name, 40, F16, strides="packed")
for _name in EMPTY:
    check(attention_case, _name, 32, BF16)
check(attention_case, "several tiles", 64, F16)
check(attention_case, "space, text", 72, F32)
check(attention_case, "space, text", 128, BF16)
check(attention_case, "time, class token", 256, BF16)
check(attention_case, "time, class token", 80, F32)
for _name in ("time, class token", "space, mean", "ragged windows, text"):
    check(invariant_case, _name)
for _name in ("time", "time, class token", "time, mean", "ragged windows, text"):
    for _where in ("q", "k", "v", "dout"):
        check(not_finite_case, _name, _where, math.nan)
    check(not_finite_case, _name, "v", math.inf)


if __name__ == "__main__":
    serve(CHECKS)
