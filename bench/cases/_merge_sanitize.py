"""Small awkward calls of the merging ops: odd sizes, ends of tiles, protected and broken rows, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from saccade import merge as m
from saccade.merge import Alternate, Grid, Random, Strided
from saccade.testing import check_budget

# batch, tokens, channels, width, partition, window, dtype
SHAPES: tuple[tuple[int, int, int, int, Any, Any, torch.dtype], ...] = (
    (2, 77, 64, 40, Alternate(), None, torch.bfloat16),
    (1, 130, 33, 7, Strided(3), None, torch.float32),
    (3, 64, 16, 128, Grid((4, 4, 4), (2, 2, 2), seed=3), (1, 1, 1), torch.float16),
    (2, 199, 80, 96, Random(50, seed=1), None, torch.float16),
)
FIELDS = ("inverse", "ptr", "members", "head", "counts")


def _whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Products of which are exact, so plans must agree to the bit."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _plan(metric: torch.Tensor, impl: str, partition: Any, window: Any, threshold: float | None) -> m.MergePlan:
    r = partition.sources(metric.shape[1]) // 2
    protect = torch.zeros(metric.shape[1], dtype=torch.bool, device=metric.device)
    protect[:2] = True
    return m.match(
        metric,
        r,
        threshold=threshold,
        partition=partition,
        window=window,
        protect=protect,
        score="dot",
        impl=impl,  # type: ignore[arg-type]
    )


def _match(impl: str, device: str, metric: torch.Tensor, partition: Any, window: Any, threshold: float | None) -> None:
    ours = _plan(metric.to(device), impl, partition, window, threshold)
    theirs = _plan(metric, "reference", partition, window, threshold)
    for field in FIELDS:
        if not torch.equal(getattr(ours, field).cpu(), getattr(theirs, field)):
            raise AssertionError(f"{field} differs")


def _merge(impl: str, device: str, x: torch.Tensor, plan: m.MergePlan, mode: str) -> None:
    size = torch.arange(1, x.shape[1] + 1).remainder(4).add(1).float().expand(x.shape[0], -1)[..., None]

    def run(name: str, x: torch.Tensor, plan: m.MergePlan) -> tuple[torch.Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y, total = m.merge(leaf, plan, size.to(x.device), mode=mode, impl=name)  # type: ignore[arg-type]
        back = m.unmerge(y, plan, residual=x, gate=x[:1, :1], impl=name)  # type: ignore[arg-type]
        (dx,) = torch.autograd.grad(back.float().square().sum() / 8, leaf)
        return y.detach(), total, back.detach(), dx

    outs = run(impl, x.to(device), plan.to(device))
    same, exact = run("reference", x, plan), run("reference", x.double(), plan)
    for name, out, peer, truth in zip(("y", "size", "x", "dx"), outs, same, exact, strict=True):
        check_budget(name, out.cpu(), peer, truth.double(), factor=3.0)


def _pool(impl: str, device: str, dtype: torch.dtype, kernel: Any, stride: Any) -> None:
    x = torch.randn(2, 5, 6, 7, 24, generator=torch.Generator().manual_seed(5)).to(dtype)
    weights = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(6)) * 0.05

    def run(name: str, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
        y = m.prompt_pool3d(*leaves, kernel, stride=stride, impl=name)  # type: ignore[arg-type]
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    outs = run(impl, x.to(device), weights.to(device))
    same, exact = run("reference", x, weights), run("reference", x.double(), weights.double())
    for name, out, peer, truth in zip(("y", "dx", "dweights"), outs, same, exact, strict=True):
        check_budget(name, out.cpu(), peer, truth.double(), factor=3.0)


def _rows(impl: str, device: str, dtype: torch.dtype) -> None:
    from saccade._dispatch import raw
    from saccade.reference.keep_top import keep_top
    from saccade.reference.knn_density import knn_density
    from saccade.reference.row_similarity import row_similarity

    x, y = (torch.randn(2, 37, 21, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (7, 8))
    out = raw("row_similarity", impl)(x.to(device), y.to(device)).cpu()
    check_budget("similarity", out, row_similarity(x, y), row_similarity(x.double(), y.double()))
    out = raw("knn_density", impl)(x.to(device), 5).cpu()
    check_budget("density", out, knn_density(x, 5), knn_density(x.double(), 5))
    scores = _whole_numbers((3, 301), torch.float32, 9)
    if not torch.equal(raw("keep_top", impl)(scores.to(device), 100).cpu(), keep_top(scores, 100)):
        raise AssertionError("keep_top differs")


def calls(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of everything; a call raises where its result is wrong."""
    for batch, tokens, channels, width, partition, window, dtype in SHAPES:
        label = f"{type(partition).__name__} {tokens} {str(dtype).removeprefix('torch.')}"
        metric = _whole_numbers((batch, tokens, channels), dtype, 1)
        broken = metric.clone()
        broken[0, 5, 0], broken[-1, 8, 1] = float("nan"), float("inf")
        for name, values in (("", metric), (" not finite", broken)):
            for threshold in (None, 0.0):
                run = partial(_match, impl, device, values, partition, window, threshold)
                yield f"match{name} {label} {threshold}", run
        x = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)
        plan = _plan(metric, "reference", partition, window, None)
        for mode in ("mean", "sum", "max", "replace"):
            yield f"merge {mode} {label}", partial(_merge, impl, device, x, plan, mode)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"prompt_pool3d {dtype}", partial(_pool, impl, device, dtype, (2, 3, 3), None)
        yield f"prompt_pool3d overlapping {dtype}", partial(_pool, impl, device, dtype, (2, 3, 3), (1, 2, 1))
        yield f"rows {dtype}", partial(_rows, impl, device, dtype)
