"""Bad input: an error that names the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import signs

from saccade import merge as M

NAN = float("nan")
X = signs((2, 12, 16))
PLAN = M.match(X, 4)
V = torch.ones(2, 12, 6)
Y = torch.ones(2, 8, 6)
MASK = torch.zeros(12, dtype=torch.bool)

# changes of match(X, 4), error, what the message must hold
MATCH = {
    "metric list": (dict(metric=[1.0]), TypeError, "metric: expected a tensor [B, N, C], got list"),
    "metric 2-D": (dict(metric=X[0]), ValueError, "metric: expected 3 dimensions [B, N, C], got shape [12, 16]"),
    "metric 5-D": (dict(metric=X[None, None]), ValueError, "metric: expected 3 dimensions"),
    "metric int": (
        dict(metric=X.long()),
        TypeError,
        "metric: expected dtype float32, float16, bfloat16, float64, got int64",
    ),
    "metric heads int": (dict(metric=X.long()[None]), TypeError, "metric: expected dtype"),
    "metric empty": (
        dict(metric=X[:0]),
        ValueError,
        "metric: expected at least one sample, got an empty batch [0, 12, 16]",
    ),
    "nothing to merge": (dict(r=None), ValueError, "r: expected a number of tokens to merge, or a ratio or threshold"),
    "r float": (dict(r=4.0), TypeError, "r: expected a whole number, got 4.0 (float)"),
    "r bool": (dict(r=True), TypeError, "r: expected a whole number"),
    "r tensor": (dict(r=torch.tensor(3)), TypeError, "r: expected a whole number"),
    "r negative": (dict(r=-1), ValueError, "r: expected a whole number of at least 0, got -1"),
    "r too large": (
        dict(r=7),
        ValueError,
        "r: at most 6 of 12 tokens can be merged (Alternate leaves 6 sources a sample for 6",
    ),
    "r too large of all": (dict(r=13, whole_batch=True), ValueError, "r: at most 12 of 24 tokens can be merged"),
    "r and ratio": (dict(ratio=0.2), ValueError, "ratio: expected None where r is given"),
    "ratio one": (
        dict(r=None, ratio=1.0),
        ValueError,
        "ratio: expected the share of tokens to merge, 0 <= ratio < 1, got 1.0",
    ),
    "ratio nan": (dict(r=None, ratio=NAN), ValueError, "ratio: expected a finite number, got nan"),
    "ratio text": (dict(r=None, ratio="half"), TypeError, "ratio: expected a number, got 'half'"),
    "threshold nan": (dict(threshold=NAN), ValueError, "threshold: expected a number, got nan"),
    "threshold text": (dict(threshold="high"), TypeError, "threshold: expected a number, got 'high' (str)"),
    "threshold tensor": (dict(threshold=torch.tensor(0.5)), TypeError, "threshold: expected a number"),
    "threshold bool": (dict(threshold=True), TypeError, "threshold: expected a number, got True (bool)"),
    "partition": (
        dict(partition="alternate"),
        TypeError,
        "partition: expected Alternate(), Grid(...) or another Partition, got str",
    ),
    "partition class": (dict(partition=M.Alternate), TypeError, "partition: expected Alternate()"),
    "grid of others": (
        dict(partition=M.Grid((5, 5))),
        ValueError,
        "partition: the grid (1, 5, 5) has 25 tokens, got 12",
    ),
    "frames of others": (dict(partition=M.Frames(5)), ValueError, "partition: 5 frames do not divide 12 tokens"),
    "random too many": (dict(partition=M.Random(13)), ValueError, "partition: 13 destinations are more than 12 tokens"),
    "index too far": (
        dict(partition=M.Index([3, 12])),
        ValueError,
        "dst: expected positions from 0 to 11, got 3 to 12",
    ),
    "index negative": (
        dict(partition=M.Index(torch.tensor([-1, 3]))),
        ValueError,
        "dst: expected positions from 0 to 11, got -1",
    ),
    "index twice": (dict(partition=M.Index([3, 4, 3])), ValueError, "dst: expected each position once"),
    "index src twice": (dict(partition=M.Index([3], [5, 5])), ValueError, "src: expected each position once"),
    "index overlap": (dict(partition=M.Index([3, 4], [5, 4])), ValueError, "src: position 4 is a destination too"),
    "index batch": (
        dict(partition=M.Index(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64))),
        ValueError,
        "dst: expected positions for a batch of 1 or 2, got [3, 1]",
    ),
    "index of samples, shared": (
        dict(partition=M.Index(torch.tensor([[0], [1]]), torch.tensor([[1], [0]])), share_batch=True, r=1),
        ValueError,
        "dst: expected positions for a batch of 1, got [2, 1]",
    ),
    "window of frames": (dict(partition=M.Frames(4), window=1), ValueError, "window: Frames has no neighbourhood"),
    "window of random": (dict(partition=M.Random(4), window=1), ValueError, "window: Random has no neighbourhood"),
    "window float": (dict(window=0.5), TypeError, "window: expected a whole number"),
    "window negative": (dict(window=-1), ValueError, "window: expected a whole number of at least 0"),
    "window of a grid": (dict(partition=M.Grid((3, 4)), window=1, r=1), TypeError, "window: expected a list or tuple"),
    "window of four": (
        dict(partition=M.Grid((3, 4)), window=(0, 0, 0, 0), r=1),
        ValueError,
        "window: expected three sizes",
    ),
    "window below 0": (
        dict(partition=M.Grid((3, 4)), window=(0, -1), r=1),
        ValueError,
        "window[2]: expected a whole number",
    ),
    "protect float": (dict(protect=1.5), TypeError, "protect: expected a whole number, got 1.5"),
    "protect bool": (dict(protect=True), TypeError, "protect: expected a whole number, got True"),
    "protect negative": (dict(protect=-1), ValueError, "protect: expected a whole number of at least 0, got -1"),
    "protect many": (dict(protect=13), ValueError, "protect: 13 is more than the 12 tokens"),
    "protect far": (dict(protect=[0, 12]), ValueError, "protect: position 12 is outside of 12 tokens"),
    "protect floats": (dict(protect=[0.5]), TypeError, "protect[0]: expected a whole number"),
    "protect bools": (dict(protect=[True] * 12), TypeError, "protect[0]: expected a whole number, got True"),
    "protect text": (dict(protect="cls"), TypeError, "protect: expected a whole number"),
    "protect int mask": (dict(protect=MASK.int()), TypeError, "protect: expected a bool mask, got int32"),
    "protect mask length": (dict(protect=MASK[:11]), ValueError, "protect: expected a mask [12] or [2, 12], got [11]"),
    "protect mask batch": (
        dict(protect=MASK.expand(3, -1)),
        ValueError,
        "protect: expected a mask [12] or [2, 12], got [3, 12]",
    ),
    "protect mask 3-D": (dict(protect=MASK[None, None]), ValueError, "protect: expected a mask"),
    "protect device": (
        dict(protect=MASK.to("meta")),
        ValueError,
        "protect: expected the device of metric, cpu, got meta",
    ),
    "protect all": (dict(protect=12), ValueError, "r: at most 0 of 12 tokens can be merged"),
    "score": (dict(score="cos"), ValueError, "score: expected one of 'cosine', 'dot', 'l2', got 'cos'"),
    "heads": (dict(heads="max"), ValueError, "heads: expected one of 'mean', 'per_head', got 'max'"),
    "order": (dict(order="tome"), ValueError, "order: expected one of 'position', 'similarity', 'split', got 'tome'"),
    "impl": (dict(impl="gpu"), ValueError, "impl: expected one of"),
    "impl cuda": (
        dict(impl="cuda"),
        ValueError,
        "impl: 'cuda' cannot run match here: needs tensors on a CUDA device, got cpu",
    ),
    "impl triton": (
        dict(impl="triton"),
        ValueError,
        "impl: 'triton' cannot run match here: needs tensors on a CUDA device",
    ),
    "packed batch": (dict(cu_seqlens=[0, 12]), ValueError, "metric: packed sequences have a batch of 1, got 2"),
}
ONE = {
    "start": ([1, 12], ValueError, "cu_seqlens: expected to rise from 0 to the 12 tokens, got [1, 12]"),
    "end": ([0, 11], ValueError, "cu_seqlens: expected to rise from 0 to the 12 tokens, got [0, 11]"),
    "falling": ([0, 8, 6, 12], ValueError, "cu_seqlens: expected to rise"),
    "short": ([12], ValueError, "cu_seqlens: expected to rise"),
    "none": ([], ValueError, "cu_seqlens: expected to rise"),
    "negative": ([0, -1, 12], ValueError, "cu_seqlens[1]: expected a whole number of at least 0"),
    "floats": ([0, 6.0, 12], TypeError, "cu_seqlens[1]: expected a whole number, got 6.0"),
    "number": (12, TypeError, "cu_seqlens: expected a list or tuple, got int"),
    "float tensor": (torch.tensor([0.0, 12.0]), TypeError, "cu_seqlens[0]: expected a whole number"),
    "2-D tensor": (torch.tensor([[0, 12]]), ValueError, "cu_seqlens: expected [S + 1], got [1, 2]"),
    "elsewhere": (
        torch.zeros(2, device="meta", dtype=torch.int32),
        ValueError,
        "cu_seqlens: expected a list or a CPU tensor",
    ),
}
PACKED_WITH = [
    dict(threshold=0.5),
    dict(window=1),
    dict(order="split"),
    dict(whole_batch=True),
    dict(share_batch=True),
]


def raises(error, message, function, *args, **kw):
    with pytest.raises(error) as caught:
        function(*args, **kw)
    assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize("case", MATCH)
def test_match(case):
    changes, error, message = MATCH[case]
    raises(
        error, message, lambda **kw: M.match(kw.pop("metric"), kw.pop("r"), **kw), **{"metric": X, "r": 4, **changes}
    )


@pytest.mark.parametrize("case", ONE)
def test_packed(case):
    bounds, error, message = ONE[case]
    raises(error, message, M.match, X[:1], 2, cu_seqlens=bounds)


@pytest.mark.parametrize("changes", PACKED_WITH, ids=lambda c: next(iter(c)))
def test_packed_takes_no(changes):
    raises(
        ValueError,
        "cu_seqlens: packed sequences take r or ratio, and none of",
        M.match,
        X[:1],
        2,
        cu_seqlens=[0, 12],
        **changes,
    )


def test_packed_partition_must_fit():
    raises(ValueError, "partition: the grid", M.match, X[:1], 1, cu_seqlens=[0, 4, 12], partition=M.Grid((2, 2)))


PARTITIONS = {
    "k": (lambda: M.Strided(1), ValueError, "k: expected a whole number of at least 2, got 1"),
    "k float": (lambda: M.Strided(2.0), TypeError, "k: expected a whole number"),
    "grid sizes": (lambda: M.Grid((4,)), ValueError, "grid: expected three sizes"),
    "grid type": (lambda: M.Grid(16), TypeError, "grid: expected a list or tuple, got int"),
    "grid zero": (lambda: M.Grid((0, 4)), ValueError, "grid[1]: expected a whole number of at least 1, got 0"),
    "cell": (lambda: M.Grid((2, 4), (3, 2)), ValueError, "cell: 3 along H does not fit the grid's 2"),
    "cell zero": (lambda: M.Grid((2, 4), (0, 2)), ValueError, "cell[1]: expected a whole number of at least 1"),
    "seed": (lambda: M.Grid((4, 4), seed=-1), ValueError, "seed: expected a whole number of at least 0"),
    "step": (lambda: M.Grid((4, 4), seed=1, step=0.5), TypeError, "step: expected a whole number"),
    "frames": (lambda: M.Frames(0), ValueError, "frames: expected a whole number of at least 1"),
    "stride": (lambda: M.Frames(4, 0), ValueError, "stride: expected a whole number of at least 1"),
    "phase": (lambda: M.Frames(4, 2, phase=2), ValueError, 'phase: expected 0 to 1 or "random", got 2'),
    "phase text": (lambda: M.Frames(4, 2, phase="any"), TypeError, "phase: expected a whole number"),
    "frames seed": (lambda: M.Frames(4, 2, phase="random", seed="a"), TypeError, "seed: expected a whole number"),
    "count": (lambda: M.Random(0), ValueError, "count: expected a whole number of at least 1"),
    "dst": (lambda: M.Index(3), TypeError, "dst: expected a list or tuple, got int"),
    "dst float": (lambda: M.Index([1.0]), TypeError, "dst[0]: expected a whole number"),
    "dst mask": (lambda: M.Index(MASK), ValueError, "dst: expected whole numbers [K] or [B, K], got torch.bool [12]"),
    "dst 3-D": (
        lambda: M.Index(torch.zeros(1, 1, 1, dtype=torch.int64)),
        ValueError,
        "dst: expected whole numbers [K] or [B, K]",
    ),
    "src of samples": (
        lambda: M.Index(torch.tensor([[1], [2]])),
        ValueError,
        "src: expected positions [B, A] where dst is [B, K]",
    ),
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_partitions(case):
    make, error, message = PARTITIONS[case]
    raises(error, message, make)


S, T = torch.zeros(2, 4), torch.tensor([[1, -1, -1, -1], [-1, 0, -1, -1]])
BUILD = {
    "score list": (dict(score=[0.5]), TypeError, "score: expected a tensor [B, N], got list"),
    "score int": (dict(score=S.long()), TypeError, "score: expected a float dtype, got int64"),
    "score 1-D": (dict(score=S[0], target=T[0]), ValueError, "score: expected 2 dimensions [B, N], got shape [4]"),
    "target list": (dict(target=[1]), TypeError, "target: expected a tensor [B, N], got list"),
    "target float": (dict(target=T.float()), TypeError, "target: expected dtype int32 or int64, got float32"),
    "target shape": (
        dict(target=T[:, :3]),
        ValueError,
        "target: expected the shape [B, N] of score, [2, 4], got [2, 3]",
    ),
    "target device": (dict(target=T.to("meta")), ValueError, "target: expected the device of score, cpu, got meta"),
    "target far": (dict(target=T + 4), ValueError, "target: expected tokens below 4, got 5"),
    "target beyond int32": (dict(target=T + 2**32), ValueError, "target: expected tokens below 4, got 4294967297"),
    "chain": (
        dict(target=torch.tensor([[1, 2, -1, -1], [-1, -1, -1, -1]])),
        ValueError,
        "target: token 0 merges into 1, which merges into 2",
    ),
    "itself": (
        dict(target=torch.tensor([[-1] * 4, [-1, 1, -1, -1]])),
        ValueError,
        "target: token 1 merges into 1, which merges into 1",
    ),
    "r float": (dict(r=1.5), TypeError, "r: expected a whole number, got 1.5"),
    "r negative": (dict(r=-1), ValueError, "r: expected a whole number of at least 0"),
    "r too large": (dict(r=5), ValueError, "r: at most the 4 tokens can be merged, got 5"),
    "threshold": (dict(threshold="x"), TypeError, "threshold: expected a number, got 'x'"),
    "threshold nan": (dict(threshold=NAN), ValueError, "threshold: expected a number, got nan"),
    "impl": (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run merge_plan here"),
}


@pytest.mark.parametrize("case", BUILD)
def test_build_plan(case):
    changes, error, message = BUILD[case]
    raises(
        error,
        message,
        lambda **kw: M.build_plan(kw.pop("score"), kw.pop("target"), **kw),
        **{"score": S, "target": T, **changes},
    )


MERGE = {
    "x list": (dict(x=[1.0]), TypeError, "x: expected a tensor [B, N, D], got list"),
    "x 2-D": (dict(x=V[0]), ValueError, "x: expected 3 dimensions [B, N, D], got shape [12, 6]"),
    "x int": (dict(x=V.long()), TypeError, "x: expected dtype float32, float16, bfloat16, float64, got int64"),
    "x complex": (dict(x=V.to(torch.complex64)), TypeError, "x: expected dtype"),
    "x length": (dict(x=V[:, :11]), ValueError, "x: the plan is for 12 tokens, got 11 (shape [2, 11, 6])"),
    "x merged already": (dict(x=Y), ValueError, "x: the plan is for 12 tokens, got 8"),
    "x batch": (dict(x=V[:1]), ValueError, "x: the plan is for a batch of 2, got 1"),
    "x device": (dict(x=V.to("meta")), ValueError, "x: expected the device of the plan, cpu, got meta"),
    "plan": (dict(plan=(1, 2)), TypeError, "plan: expected a MergePlan, got tuple"),
    "size list": (dict(size=[1.0]), TypeError, "size: expected a tensor [B, N, 1] or None, got list"),
    "size length": (
        dict(size=torch.ones(2, 11, 1)),
        ValueError,
        "size: expected [2, 12, 1] or [2, 12], got [2, 11, 1]",
    ),
    "size batch": (dict(size=torch.ones(3, 12)), ValueError, "size: expected [2, 12, 1] or [2, 12], got [3, 12]"),
    "size columns": (
        dict(size=torch.ones(2, 12, 6)),
        ValueError,
        "size: expected [2, 12, 1] or [2, 12], got [2, 12, 6]",
    ),
    "size bool": (dict(size=MASK.expand(2, -1)), TypeError, "size: expected a float or whole-number dtype, got bool"),
    "size device": (
        dict(size=torch.ones(2, 12, device="meta")),
        ValueError,
        "size: expected the device of x, cpu, got meta",
    ),
    "mode": (
        dict(mode="avg"),
        ValueError,
        "mode: expected one of 'mean', 'sum', 'max', 'replace', 'weighted', got 'avg'",
    ),
    "weight alone": (
        dict(weight=torch.ones(2, 12)),
        ValueError,
        "weight: expected with mode=\"weighted\", and only there; got mode='mean'",
    ),
    "no weight": (dict(mode="weighted"), ValueError, "weight: expected with mode"),
    "weight length": (
        dict(mode="weighted", weight=torch.ones(2, 8)),
        ValueError,
        "weight: expected [2, 12, 1] or [2, 12], got [2, 8]",
    ),
    "impl": (dict(impl="triton"), ValueError, "impl: 'triton' cannot run merge here"),
    "float64": (dict(x=V.double(), impl="cpu"), ValueError, "impl: 'cpu' cannot run merge here: no float64 kernel"),
}


@pytest.mark.parametrize("case", MERGE)
def test_merge(case):
    changes, error, message = MERGE[case]
    raises(error, message, lambda **kw: M.merge(kw.pop("x"), kw.pop("plan"), **kw), **{"x": V, "plan": PLAN, **changes})


UNMERGE = {
    "y list": (dict(y=[1.0]), TypeError, "y: expected a tensor [B, M, D], got list"),
    "y 4-D": (dict(y=Y[None]), ValueError, "y: expected 4".replace("4", "3")),
    "y int": (dict(y=Y.int()), TypeError, "y: expected dtype"),
    "y unmerged": (dict(y=V), ValueError, "y: the plan is for 8 rows, got 12 (shape [2, 12, 6])"),
    "y batch": (dict(y=Y.repeat(2, 1, 1)), ValueError, "y: the plan is for a batch of 2, got 4"),
    "y device": (dict(y=Y.to("meta")), ValueError, "y: expected the device of the plan, cpu, got meta"),
    "plan": (dict(plan=None), TypeError, "plan: expected a MergePlan, got NoneType"),
    "residual list": (dict(residual=[0.0]), TypeError, "residual: expected a tensor [2, 12, 6], got list"),
    "residual rows": (dict(residual=Y), ValueError, "residual: expected [2, 12, 6], got [2, 8, 6]"),
    "residual dtype": (dict(residual=V.half()), TypeError, "residual: expected the dtype of y, float32, got float16"),
    "residual device": (dict(residual=V.to("meta")), ValueError, "residual: expected the device of y, cpu, got meta"),
    "gate list": (dict(gate=[1.0]), TypeError, "gate: expected a tensor [B, 1, D] or [B, N, D], got list"),
    "gate 2-D": (dict(gate=V[0]), ValueError, "gate: expected [2 or 1, 12 or 1, 6], got [12, 6]"),
    "gate rows": (dict(gate=Y), ValueError, "gate: expected [2 or 1, 12 or 1, 6], got [2, 8, 6]"),
    "gate width": (dict(gate=V[..., :1]), ValueError, "gate: expected [2 or 1, 12 or 1, 6], got [2, 12, 1]"),
    "gate dtype": (dict(gate=V.double()), TypeError, "gate: expected the dtype of y"),
    "gate device": (dict(gate=V.to("meta")), ValueError, "gate: expected the device of y, cpu, got meta"),
    "impl": (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run unmerge here"),
}


@pytest.mark.parametrize("case", UNMERGE)
def test_unmerge(case):
    changes, error, message = UNMERGE[case]
    raises(
        error, message, lambda **kw: M.unmerge(kw.pop("y"), kw.pop("plan"), **kw), **{"y": Y, "plan": PLAN, **changes}
    )


P = torch.zeros(3, 12)
POSITIONS = {
    "plan": (dict(plan=[0]), TypeError, "plan: expected a MergePlan, got list"),
    "positions list": (
        dict(positions=[0]),
        TypeError,
        "positions: expected a tensor [N], [A, N] or [A, B, N], got list",
    ),
    "length": (
        dict(positions=P[:, :8]),
        ValueError,
        "positions: the plan is for 12 tokens, expected [N], [A, N] or [A, B, N], got [3, 8]",
    ),
    "4-D": (dict(positions=P[None, None]), ValueError, "positions: the plan is for 12 tokens, expected [N]"),
    "scalar": (dict(positions=torch.tensor(1)), ValueError, "positions: the plan is for 12 tokens, expected [N]"),
    "batch": (dict(positions=P[:, None].expand(3, 3, 12)), ValueError, "positions: expected batch 1 or 2, got 3"),
    "device": (dict(positions=P.to("meta")), ValueError, "positions: expected the device of the plan, cpu, got meta"),
    "how": (dict(how="last"), ValueError, "how: expected one of 'destination', 'first', 'mean', got 'last'"),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_merge_positions(case):
    changes, error, message = POSITIONS[case]
    raises(
        error,
        message,
        lambda **kw: M.merge_positions(kw.pop("plan"), kw.pop("positions"), **kw),
        **{"plan": PLAN, "positions": P, **changes},
    )


def test_unhashable_and_odd_choices():
    """A value of any type is refused by name, not by an accident of comparing it."""
    for value in ([1], None, 3, torch.ones(2)):
        raises(ValueError, "mode: expected one of", M.merge, V, PLAN, mode=value)
        raises(ValueError, "order: expected one of", M.match, X, 2, order=value)
