"""merge_plan on the emulated GPU: the same plan as the reference, to the last entry."""

from __future__ import annotations

import pytest
import torch
from emulation.cuda_emulator import call, workspace
from emulation.merge_structs import MergePlanArgs

from saccade.reference.merge_plan import merge_plan

INF, NAN = float("inf"), float("nan")
NAMES = ("inverse", "ptr", "members", "head", "counts")


def run(
    score: torch.Tensor, target: torch.Tensor, rows: int, r: int, threshold: float = -INF, whole_batch: bool = False
) -> tuple[torch.Tensor, ...]:
    batch, tokens = score.shape
    shapes = [(batch, tokens), (batch, rows + 1), (batch, tokens), (batch, rows), (batch,)]
    out = [torch.full(shape, -99, dtype=torch.int32) for shape in shapes]
    args = MergePlanArgs(score.data_ptr(), target.data_ptr(), batch, tokens, rows, r, threshold, whole_batch)
    for name, x in zip(NAMES, out, strict=True):
        setattr(args, name, x.data_ptr())
    space = workspace("merge_plan", "merge_plan", args)
    args.workspace = space.data_ptr()
    call("merge_plan", "merge_plan", args)
    return tuple(out)


def check(score: torch.Tensor, target: torch.Tensor, rows: int, r: int, *rest: float) -> None:
    got = run(score, target, rows, r, *rest)
    for name, mine, wanted in zip(
        NAMES, got, merge_plan(score, target, rows, r, *(rest or (-INF, False))), strict=True
    ):
        assert torch.equal(mine, wanted), name


def problem(batch: int, tokens: int, kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of three tokens are sources, the others destinations."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(batch, tokens, generator=generator)
    place = torch.arange(tokens)
    hubs = max(1, tokens // 3 if kind == "random" else 2)
    target = torch.where(place % 3 != 0, torch.randint(hubs, (batch, tokens), generator=generator) * 3, -1)
    if kind == "ties":
        score = score.round()
    if kind == "special":
        special = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-42, 1.0])
        score = special[torch.randint(len(special), (batch, tokens), generator=generator)]
        target = target.where(torch.rand(batch, tokens, generator=generator) < 0.8, -2)
        target = target.where(place % 3 != 0, -1)
    return score, target.to(torch.int32)


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("kind", ["random", "ties", "special"])
@pytest.mark.parametrize("tokens", [4, 64, 250, 600])
def test_same_plan(kind: str, tokens: int, whole_batch: bool) -> None:
    score, target = problem(2, tokens, kind)
    r = tokens // 2
    check(score, target, tokens - r, 2 * r if whole_batch else r, -INF, whole_batch)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_rows_are_dropped_or_padded(whole_batch: bool) -> None:
    score, target = problem(3, 200, "special", seed=1)
    for rows, r in [(200, 20), (150, 20), (40, 60), (1, 10), (0, 10), (230, 0), (90, 1000)]:
        check(score, target, rows, r, -INF, whole_batch)


@pytest.mark.parametrize("threshold", [-INF, 0.0, -0.0, 1.0, INF, NAN])
def test_threshold(threshold: float) -> None:
    for kind in ("ties", "special"):
        score, target = problem(2, 100, kind, seed=2)
        check(score, target, 80, 30, threshold, False)
        check(score, target, 80, 60, threshold, True)


def test_all_into_one_row() -> None:
    score = torch.zeros(1, 500)
    target = torch.full((1, 500), 499, dtype=torch.int32)
    target[0, 499] = -1
    check(score, target, 1, 499)
    check(score, target, 300, 200)


@pytest.mark.parametrize(("batch", "tokens", "rows"), [(0, 5, 5), (2, 0, 0), (2, 0, 3)])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_empty(batch: int, tokens: int, rows: int, whole_batch: bool) -> None:
    out = run(torch.zeros(batch, tokens), torch.zeros(batch, tokens, dtype=torch.int32), rows, 3, -INF, whole_batch)
    assert all(torch.equal(x, torch.full_like(x, fill)) for x, fill in zip(out, (0, 0, 0, -1, 0), strict=True))


def test_a_sample_does_not_see_the_batch() -> None:
    score, target = problem(3, 130, "ties", seed=3)
    together = run(score, target, 90, 40)
    for b in range(3):
        alone = run(score[b : b + 1].contiguous(), target[b : b + 1].contiguous(), 90, 40)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, alone, strict=True))
