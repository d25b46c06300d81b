"""torch.compile without graph breaks, opcheck of every raw op, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import alternate, normal, signs
from torch.utils._python_dispatch import TorchDispatchMode

import saccade
from saccade import merge as M
from saccade._load import BINARY
from saccade.merge._fakes import FAKES

CASES = {
    "plain": {},
    "protect first": dict(protect=2),
    "protect list": dict(protect=[1, 4, 5]),
    "threshold": dict(threshold=0.25),
    "whole": dict(whole_batch=True),
    "share": dict(share_batch=True),
    "window": dict(window=1),
    "similarity": dict(order="similarity"),
    "split": dict(order="split", score="l2"),
    "strided": dict(partition=M.Strided(3)),
    "grid": dict(partition=M.Grid((2, 4, 3), (1, 2, 1), seed=3, step=2), window=(1, 0, 1)),
    "frames": dict(partition=M.Frames(4, 2, phase="random", seed=1)),
    "random": dict(partition=M.Random(6, seed=2)),
    "index": dict(partition=M.Index([1, 5, 9, 17])),
}


def block(x, v, kw):
    """Plan, merge, positions and the way back, as a model does it."""
    plan = M.match(x, 5, **kw)
    y, size, log_size = M.merge(v, plan, log_size=True)
    z, _ = M.merge(v, plan, size[:, :1].expand(-1, v.shape[1], -1), mode="max")
    w, _ = M.merge(v, plan, mode="weighted", weight=v[..., 0].abs())
    place = M.merge_positions(plan, torch.arange(v.shape[1]), how="mean")
    out = M.unmerge(y + z * w, plan, residual=v, gate=v[:, :1].sigmoid())
    return out, size, log_size, place, plan.counts


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_plan_is_one_graph(name):
    torch._dynamo.reset()

    def function(x):
        plan = M.match(x, 5, **CASES[name])
        return plan.inverse, plan.ptr, plan.members, plan.head, plan.counts, plan.score

    x = signs((2, 24, 16), seed=1)
    for a, b in zip(torch.compile(function, fullgraph=True, backend="eager")(x), function(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "threshold", "share"])
def test_fullgraph_forward_and_backward(name):
    torch._dynamo.reset()
    kw = CASES[name]
    x, v = signs((2, 24, 16), seed=1), normal((2, 24, 8))

    def run(function):
        leaf = v.clone().requires_grad_()
        out, *rest = function(x, leaf, kw)
        return [out, *rest, torch.autograd.grad(out.square().sum(), leaf)[0]]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(block), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_fullgraph_with_inductor():
    torch._dynamo.reset()
    x, v = signs((2, 24, 16), seed=1), normal((2, 24, 8)).requires_grad_()
    compiled = torch.compile(block, fullgraph=True)
    out, want = compiled(x, v, {}), block(x, v, {})
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    a, b = (torch.autograd.grad(o[0].sum(), v)[0] for o in (out, want))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_graph_for_other_data():
    """Nothing depends on values: other numbers, and other counts of padding, run the graph that is there."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda x, v: block(x, v, dict(threshold=0.25))[0], backend=counter, fullgraph=True)
    for seed in range(4):
        x = signs((2, 24, 16), seed=seed, distinct=seed + 1)
        v = normal((2, 24, 8), seed=seed)
        assert torch.equal(function(x, v), block(x, v, dict(threshold=0.25))[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["protect first", "window"])
def test_other_lengths(name):
    """The number of rows is part of a graph: other lengths compile again, with symbols in their place or without."""
    torch._dynamo.reset()
    kw = {**CASES[name], "protect": CASES[name].get("protect", 1)}

    def function(x):
        plan = M.match(x, 3, **kw)
        return M.unmerge(M.merge(x, plan)[0], plan)

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (24, 41):
        x = signs((2, tokens, 16))
        assert torch.equal(compiled(x), function(x))


def test_a_plan_goes_through_compiled_code():
    """As an argument and as a result."""
    torch._dynamo.reset()
    x = signs((2, 24, 16))
    plan = torch.compile(lambda x: M.match(x, 6), fullgraph=True, backend="aot_eager")(x)
    want = M.match(x, 6)
    assert isinstance(plan, M.MergePlan) and torch.equal(plan.inverse, want.inverse)
    merge = torch.compile(lambda x, plan: M.merge(x, plan)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(merge(x, plan), M.merge(x, want)[0])


def test_too_large_r_is_refused_in_compiled_code():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="r: at most 11 of 24 tokens can be merged"):
        torch.compile(lambda x: M.match(x, 12, protect=2).inverse, backend="eager")(signs((1, 24, 16)))


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value goes to Python, or where a shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("index", "protect list")])
def test_no_value_is_read(name):
    """`Index` and lists are checked, on the host and of host values; the others read nothing at all."""
    x, v = signs((2, 24, 16), seed=1), normal((2, 24, 8)).requires_grad_()
    with NoReads():
        out, *_ = block(x, v, CASES[name])
        out.sum().backward()


X, V = signs((2, 9, 16)), normal((2, 9, 5))
SRC, DST = alternate(9)
PLAN = M.match(X, 3)
SHARED = M.match(X, 3, share_batch=True)
ROWS = normal((2, 6, 5))
WEIGHT, TOTAL = torch.rand(2, 9) + 0.5, torch.ones(2, 6)
MASK = torch.arange(9)[None] == 3
GRID = normal((12, 4 * 4, 5)).view(2, 6, 4, 4, 5)
FRAME_WEIGHTS = torch.rand(2, 6, 4, 4)
RANGES = M.Alternate().ranges(9, 1, torch.device("cpu"))
TARGET = torch.tensor([[1, -1, 3, -1, 1, -1, -1, -1, -2]] * 2, dtype=torch.int32)


def csr(plan):
    return plan.ptr, plan.members, plan.head


CALLS = {
    "match": [
        (X, SRC, DST, None, None, 0),
        (X.bfloat16(), SRC, DST, RANGES, MASK, 2),
        (X[:, :0], SRC[:, :0], DST[:, :0], None, None, 1),
    ],
    "merge_plan": [(torch.rand(2, 9), TARGET, 6, 3, float("-inf"), False), (torch.rand(2, 9), TARGET, 9, 3, 0.5, True)],
    "merge": [
        (V, None, *csr(PLAN), 0),
        (V.half(), WEIGHT, *csr(SHARED), 1),
        (V, WEIGHT[:1], *csr(PLAN), 2),
        (V[:0], None, *csr(SHARED), 3),
    ],
    "merge_bwd": [
        (ROWS, None, WEIGHT, TOTAL, PLAN.inverse, *csr(PLAN), 0),
        (ROWS, V, None, TOTAL, SHARED.inverse, *csr(SHARED), 2),
        (ROWS.bfloat16(), None, None, TOTAL, PLAN.inverse, *csr(PLAN), 3),
    ],
    "unmerge": [(ROWS, PLAN.inverse, None, None), (ROWS.half(), SHARED.inverse, V.half(), V[:1, :1].half())],
    "prompt_pool3d": [
        (GRID, FRAME_WEIGHTS, 2, 2, 2, 2, 2, 2, 0.01),
        (GRID.half(), FRAME_WEIGHTS, 3, 2, 1, 1, 2, 1, 0.5),
    ],
    "prompt_pool3d_bwd": [(torch.ones(2, 3, 2, 2, 5), GRID, FRAME_WEIGHTS, 2, 2, 2, 2, 2, 2, 0.01)],
    "row_similarity": [(X, X.flip(1)), (X, X[:1, :1].expand_as(X))],
    "keep_top": [(torch.rand(2, 9), 4), (torch.rand(2, 9), 0)],
    "knn_density": [(X, 3), (X[:, :1], 1)],
}


def test_every_op_is_checked():
    assert set(CALLS) == set(FAKES)


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op):
    assert BINARY.problem is None, BINARY.problem
    for arguments in CALLS[op]:
        torch.library.opcheck(getattr(torch.ops.saccade, op).default, arguments)


def test_explain_says_which_and_why():
    for name, arguments in {"match": (X, 2), "merge": (V, PLAN), "unmerge": (ROWS, PLAN)}.items():
        answer = saccade.explain(name, *arguments)
        assert answer.chosen == "cpu" and answer.verdicts["cuda"].startswith("needs tensors on a CUDA device")
        wide = saccade.explain(getattr(M, name), arguments[0].double(), *arguments[1:])
        assert wide.chosen == "reference" and "float64" in wide.verdicts["cpu"]
