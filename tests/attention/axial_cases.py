"""Axial attention as torch makes it: SDPA with a mask of every pair, and one more call for each box where a prefix takes the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


class Problem(NamedTuple):
    """A prefix, a grid, a box, and whether the prefix takes the mean over boxes."""

    prefix: int
    grid: tuple[int, int, int]
    box: tuple[int, int, int]
    mean: bool = False

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1] * self.grid[2]

    def numbers(self, scale: float) -> tuple:
        return (self.prefix, *self.grid, *self.box, self.mean, scale)

    def boxes(self) -> Tensor:
        """The box of every grid token, as three numbers [T * H * W, 3]."""
        places = torch.cartesian_prod(*(torch.arange(n) for n in self.grid)).reshape(-1, 3)
        return places // torch.tensor(self.box)

    def mask(self) -> Tensor:
        """[S, S] bool."""
        boxes = self.boxes()
        seen = torch.ones(self.tokens, self.tokens, dtype=torch.bool)
        seen[self.prefix :, self.prefix :] = (boxes[:, None] == boxes[None]).all(-1)
        return seen


FIXED = {
    "time": Problem(0, (8, 3, 5), (8, 1, 1)),
    "time, class token": Problem(1, (8, 5, 7), (8, 1, 1)),
    "time, mean": Problem(1, (7, 3, 3), (7, 1, 1), True),
    "long time": Problem(2, (40, 2, 2), (40, 1, 1)),
    "space, mean": Problem(1, (3, 5, 9), (1, 5, 9), True),
    "space, text": Problem(21, (2, 9, 9), (1, 9, 9)),
    "ragged windows": Problem(0, (5, 6, 7), (2, 4, 3)),
    "ragged windows, mean": Problem(3, (5, 6, 7), (5, 4, 3), True),
    "ragged windows, text": Problem(70, (3, 3, 2), (2, 2, 2)),
    "one box": Problem(1, (2, 3, 4), (2, 3, 4), True),
    "time fastest": Problem(1, (3, 4, 8), (1, 1, 8)),
    "one token": Problem(0, (1, 1, 1), (1, 1, 1)),
    "boxes of one": Problem(1, (3, 2, 2), (1, 1, 1)),
}
EMPTY = {
    "no frames": Problem(3, (0, 4, 4), (1, 4, 4)),
    "no frames, mean": Problem(3, (0, 4, 4), (1, 4, 4), True),
    "no tokens": Problem(0, (2, 0, 4), (2, 1, 1)),
}
LARGE = {
    "several tiles": Problem(1, (2, 14, 20), (1, 14, 20)),
    "several tiles, mean": Problem(3, (2, 26, 24), (2, 26, 12), True),
    "many keys": Problem(5, (1, 26, 24), (1, 26, 24)),
}


def torch_axial(q: Tensor, k: Tensor, v: Tensor, problem: Problem, scale: float) -> Tensor:
    """Out in q's precision."""
    if q.shape[2] == 0:
        return q * 0 + k * 0 + v * 0
    prefix = problem.prefix
    out = F.scaled_dot_product_attention(q, k, v, problem.mask().to(q.device), scale=scale)
    if not (problem.mean and prefix):
        return out
    boxes, terms = problem.boxes(), []
    for box in boxes.unique(dim=0):
        keys = torch.cat((torch.arange(prefix), prefix + (boxes == box).all(-1).nonzero()[:, 0])).to(q.device)
        terms.append(F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, keys], v[:, :, keys], scale=scale))
    first = torch.stack(terms).mean(0) if terms else out[:, :, :prefix] * 0.0
    return torch.cat((first, out[:, :, prefix:]), 2)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    problem: Problem, head_dim: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 2, strides: str = "bhsd"
):
    """q, k, v, dout; strides "bhsd", "bshd" or "packed" (slices of one wider row, NaN between)."""
    found = [normal((batch, heads, problem.tokens, head_dim), dtype, seed=i) for i in range(4)]
    if strides == "bshd":
        found = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in found]
    if strides == "packed":
        wide = torch.full((batch, problem.tokens, 5, heads, head_dim), float("nan"), dtype=dtype)
        for i in range(4):
            wide[:, :, i] = found[i].transpose(1, 2)
        found = [wide[:, :, i].transpose(1, 2) for i in range(4)]
    return found


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def expected(problem: Problem, tensors, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """(float64 results, those of torch in the same precision), each out, dq, dk, dv."""
    run = lambda *x: torch_axial(*x, problem, scale)  # noqa: E731
    return with_gradients(run, *(x.double() for x in tensors)), with_gradients(run, *tensors)
