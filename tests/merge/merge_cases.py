"""Inputs of the merging tests, calls of any implementation by one name, and what every plan must satisfy."""

from __future__ import annotations

import torch

from saccade._dispatch import raw
from saccade.merge import MergePlan
from saccade.reference import match as match_reference
from saccade.reference import merge as merge_reference
from saccade.reference import merge_plan as plan_reference
from saccade.reference import unmerge as unmerge_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCORES = {"cosine": 0, "dot": 1, "l2": 2}
MODES = {"mean": 0, "sum": 1, "max": 2, "replace": 3}
# Below, at and beyond vectors and tiles of every size in use.
TOKENS = (1, 2, 3, 17, 63, 64, 65, 129, 260)
CHANNELS = (1, 3, 8, 31, 64, 80, 129)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape, dtype=torch.float32, *, seed=0, device="cpu", layout="dense"):
    """Normal values [B, N, D]: "dense", "transposed" (tokens outermost), "packed" (a slice of wider rows), "strided" (last stride 2)."""
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(device)
    return laid_out(x, layout)


def laid_out(x, layout):
    b, n, d = x.shape
    nan = float("nan")
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "packed":
        wide = torch.full((b, n, 3, d), nan, dtype=x.dtype, device=x.device)
        wide[:, :, 1] = x
        return wide[:, :, 1]
    if layout == "strided":
        wide = torch.full((b, n, d, 2), nan, dtype=x.dtype, device=x.device)
        wide[..., 1] = x
        return wide[..., 1]
    if layout == "odd":  # rows that start at any element: no vector load is aligned
        wide = torch.full((b, n, d + 1), nan, dtype=x.dtype, device=x.device)
        wide[..., 1:] = x
        return wide[..., 1:]
    assert layout == "dense"
    return x


LAYOUTS = ("dense", "transposed", "packed", "strided", "odd")


def signs(shape, dtype=torch.float32, *, seed=0, device="cpu", distinct=None):
    """Entries +-1, of `distinct` different rows: with C = 4, 16 or 64 every cosine is exact, and ties abound."""
    b, n, c = shape
    rows = torch.randint(0, 2, (b, distinct or n, c), generator=generator(seed)) * 2.0 - 1.0
    pick = torch.randint(0, max(rows.shape[1], 1), (b, n), generator=generator(seed + 1))
    x = rows.gather(1, pick[..., None].expand(b, n, c)) if distinct else rows
    return x.to(dtype).to(device)


def whole_numbers(shape, dtype=torch.float32, *, seed=0, device="cpu", most=3):
    """Whole numbers from -most to most: dot products and squared distances are exact in every dtype."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).to(dtype).to(device)


def match(impl, metric, src, dst, ranges=None, protect=None, score=0):
    """Score and target [B, N] of the raw op."""
    op = match_reference.match if impl == "reference" else raw("match", impl)
    return op(metric, src, dst, ranges, protect, score)


def merge_plan(impl, score, target, rows, r, threshold=float("-inf"), whole_batch=False):
    op = plan_reference.merge_plan if impl == "reference" else raw("merge_plan", impl)
    return op(score, target, rows, r, threshold, whole_batch)


def merge(impl, x, weight, plan, mode):
    if impl == "reference":
        return merge_reference.merge(x, weight, plan.inverse, plan.head, mode)
    return raw("merge", impl)(x, weight, plan.ptr, plan.members, plan.head, mode)


def merge_bwd(impl, dy, x, weight, total, plan, mode):
    if impl == "reference":
        return merge_reference.merge_bwd(dy, x, weight, plan.inverse, plan.head, mode)
    return raw("merge_bwd", impl)(dy, x, weight, total, plan.inverse, plan.ptr, plan.members, plan.head, mode)


def unmerge(impl, y, inverse, residual=None, gate=None):
    op = unmerge_reference.unmerge if impl == "reference" else raw("unmerge", impl)
    return op(y, inverse, residual, gate)


def lists(sources, destinations, device="cpu"):
    """src and dst [1, ...] int32 from Python lists."""
    make = lambda v: torch.tensor(v, dtype=torch.int32, device=device).reshape(1, -1)  # noqa: E731
    return make(sources), make(destinations)


def alternate(tokens, device="cpu"):
    return lists(list(range(0, tokens, 2)), list(range(1, tokens, 2)), device)


def same_plan(a: MergePlan, b: MergePlan) -> bool:
    """All parts that decide what merge and unmerge do."""
    parts = ("inverse", "ptr", "members", "head", "counts")
    return all(torch.equal(getattr(a, p).cpu(), getattr(b, p).cpu()) for p in parts)


def check_plan(plan: MergePlan) -> None:
    """inverse, ptr, members, head and counts say the same, in the forms that kernels rely on."""
    n, m = plan.tokens, plan.rows
    for name in ("inverse", "ptr", "members", "head", "counts"):
        part = getattr(plan, name)
        assert part.dtype == torch.int32 and part.is_contiguous(), name
    assert plan.ptr.shape == (plan.batch, m + 1) and plan.members.shape == (plan.batch, n)
    assert plan.head.shape == (plan.batch, m) and plan.counts.shape == (plan.batch,)
    for b in range(plan.batch):
        inverse, ptr, members, head = (getattr(plan, p)[b].tolist() for p in ("inverse", "ptr", "members", "head"))
        assert ptr[0] == 0 and ptr == sorted(ptr) and ptr[-1] <= n
        assert all(-1 <= i < m for i in inverse)
        rows = [members[ptr[i] : ptr[i + 1]] for i in range(m)]
        expected = [[t for t in range(n) if inverse[t] == i] for i in range(m)] if n * m < 1e5 else rows
        assert rows == expected, "members are the tokens of a row, ascending"
        assert sorted(members[: ptr[-1]]) == [t for t in range(n) if inverse[t] >= 0]
        assert members[ptr[-1] :] == [-1] * (n - ptr[-1])
        for i, h in enumerate(head):
            assert (h == -1) == (not rows[i]), "padding has no members"
            assert h == -1 or h in rows[i], "the head is a member of its row"
        used = int(plan.counts[b])
        assert used == sum(h >= 0 for h in head)
        if plan.cu_rows is None:
            assert head[used:] == [-1] * (m - used), "padding comes last"
