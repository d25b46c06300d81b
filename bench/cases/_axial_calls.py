"""Axial attention: divided space-time and windows, against what models do: rearrange into groups, SDPA, rearrange back.

FLOPs: 4 for every visible pair and column forward, 10 backward; those of dense attention beside them. Bytes: q, k, v read once and out
written once; backward those, dout and lse read and three gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.cases import Case, Check, Counts, Expected, Problem, Provider, Request
from bench.cases._attention_calls import impls, values
from bench.cases._checks import faster
from bench.cases._runs import one_pass
from bench.gate import largest_error
from bench.rows import Row
from saccade.attention import axial_attention

Tensor = torch.Tensor
Grid = tuple[int, int, int]
BF16, FP32 = "bfloat16", "float32"
PEER = "rearrange + SDPA"


class Layer(NamedTuple):
    """A layer of a model: heads, their width, the grid, the window, tokens in front and what they see."""

    name: str
    heads: int
    head_dim: int
    grid: Grid
    window: Grid
    prefix: int = 0
    mean: bool = False

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def groups(self) -> int:
        return (self.tokens - self.prefix) // self.members

    @property
    def members(self) -> int:
        """Tokens of a window; every window here is whole."""
        t, h, w = self.window
        return t * h * w

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key."""
        keys = self.prefix + self.members
        of_prefix = self.prefix * (self.groups * keys if self.mean else self.tokens)
        return self.groups * self.members * keys + of_prefix


LAYERS = (
    Layer("TimeSformer time", 12, 64, (8, 14, 14), (8, 1, 1)),
    Layer("Frozen in Time time", 12, 64, (8, 14, 14), (8, 1, 1), 1),
    Layer("TimeSformer space", 12, 64, (8, 14, 14), (1, 14, 14), 1, True),
)
GPU_LAYERS = (
    *LAYERS,
    Layer("TimeSformer-L time", 12, 64, (96, 14, 14), (96, 1, 1)),
    Layer("TimeSformer-L space", 12, 64, (96, 14, 14), (1, 14, 14), 1, True),
    Layer("windows through time", 24, 128, (16, 32, 48), (16, 4, 4)),
    Layer("frames with text", 24, 128, (16, 32, 48), (1, 32, 48), 128),
)


def _grouped(x: Tensor, layer: Layer) -> Tensor:
    """[B, H, G, n, D]: the tokens of each window side by side, a copy."""
    (t, h, w), (bt, bh, bw) = layer.grid, layer.window
    b, heads, _, d = x.shape
    x = x[:, :, layer.prefix :].view(b, heads, t // bt, bt, h // bh, bh, w // bw, bw, d)
    return x.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).reshape(b, heads, layer.groups, layer.members, d)


def _back(x: Tensor, layer: Layer) -> Tensor:
    (t, h, w), (bt, bh, bw) = layer.grid, layer.window
    b, heads, _, _, d = x.shape
    x = x.view(b, heads, t // bt, h // bh, w // bw, bt, bh, bw, d).permute(0, 1, 2, 5, 3, 6, 4, 7, 8)
    return x.reshape(b, heads, t * h * w, d)


def rearranged(q: Tensor, k: Tensor, v: Tensor, layer: Layer) -> Tensor:
    """The layer as models write it: the prefix repeated for every group, and SDPA over a batch of groups."""
    b, heads, _, d = q.shape
    queries, keys, values_ = (_grouped(x, layer) for x in (q, k, v))
    if layer.prefix:
        shape = (b, heads, layer.groups, layer.prefix, d)
        first = [x[:, :, None, : layer.prefix].expand(shape) for x in (q, k, v)]
        keys, values_ = torch.cat((first[1], keys), 3), torch.cat((first[2], values_), 3)
        if layer.mean:
            queries = torch.cat((first[0], queries), 3)
    flat = [x.flatten(0, 2)[:, None] for x in (queries, keys, values_)]
    out = F.scaled_dot_product_attention(*flat).view(queries.shape)
    if not layer.prefix:
        return _back(out, layer)
    if layer.mean:
        return torch.cat((out[:, :, :, : layer.prefix].mean(2), _back(out[:, :, :, layer.prefix :], layer)), 2)
    first_out = F.scaled_dot_product_attention(q[:, :, : layer.prefix], k, v)
    return torch.cat((first_out, _back(out, layer)), 2)


def ours(q: Tensor, k: Tensor, v: Tensor, layer: Layer, impl: Any) -> Tensor:
    """The same by `axial_attention`."""
    query = "mean" if layer.mean else "global"
    return axial_attention(q, k, v, layer.grid, "window", window=layer.window, prefix=layer.prefix, prefix_query=query, impl=impl)  # type: ignore[arg-type, no-any-return]  # fmt: skip


def attention(layer: Layer, dtype: str, mode: str, request: Request) -> Problem:
    """A layer, or its backward pass; q, k and v are slices of one projection."""
    shape = (1, layer.tokens, 3, layer.heads, layer.head_dim)
    q, k, v = values(shape, dtype, request, 1).permute(2, 0, 3, 1, 4).unbind()
    dout = values((1, layer.tokens, layer.heads, layer.head_dim), dtype, request, 2).transpose(1, 2)
    backward = mode == "backward"

    def results(function: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [function(*(x[:, :1].to(kind) for x in (q, k, v)))]
        leaves = [x[:, :1].to(kind).detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return list(torch.autograd.grad(out, leaves, dout[:, :1].to(kind)))

    def expected() -> Expected:
        run = lambda q, k, v: rearranged(q, k, v, layer)  # noqa: E731
        truth = results(run, torch.float64)
        errors = tuple(largest_error(x, t) for x, t in zip(results(run, q.dtype), truth, strict=True))
        names = ("dq", "dk", "dv") if backward else ("out",)
        return Expected(names, tuple(truth), {"strict": errors, "plain": errors}, 3.0 if backward else 2.0)

    def provider(name: str, role: str, function: Callable[..., Tensor]) -> Provider:
        return one_pass(name, role, function, (q, k, v), dout if backward else None, lambda x: x[:, :1])

    peer = lambda q, k, v: rearranged(q, k, v, layer)  # noqa: E731
    found = [
        provider(f"saccade {i}", "ours", lambda q, k, v, i=i: ours(q, k, v, layer, i))  # type: ignore[misc]
        for i in impls(request)
    ]
    found.append(provider(PEER, "eager", peer))
    if request.device == "cuda":
        found.append(provider(f"torch.compile of {PEER}", "compile", peer))
    return Problem(found, expected)


def _case(layer: Layer, dtype: str, mode: str, request: Request) -> Case:
    per_pair, rows = (4, 4) if mode == "forward" else (10, 8)
    width = layer.heads * layer.head_dim
    moved = rows * layer.tokens * width * (4 if dtype == FP32 else 2) + 4 * layer.heads * layer.tokens
    counts = Counts(moved, per_pair * layer.pairs * width, per_pair * layer.tokens**2 * width, dtype)
    shape = f"1x{layer.heads}x{layer.tokens}x{layer.head_dim}, windows {'x'.join(map(str, layer.window))}"
    build = partial(attention, layer, dtype, mode, request)
    return Case("attention", layer.name, "axial_attention", mode, dtype, shape, counts, build)  # type: ignore[arg-type]


def cases(request: Request) -> list[Case]:
    """Divided space-time attention on a CPU; longer videos and windows too on a GPU."""
    modes = ("forward", "backward")
    if request.quick:
        return [_case(layer, FP32, mode, request) for layer in LAYERS for mode in modes]
    if request.device == "cuda":
        return [_case(layer, BF16, mode, request) for layer in GPU_LAYERS for mode in modes]
    return [*(_case(x, FP32, m, request) for x in LAYERS for m in modes), _case(LAYERS[0], BF16, "forward", request)]


def checks(rows: Sequence[Row]) -> list[Check]:
    """Along time at least twice as fast as rearranging, along space 1.1 times, forward and backward."""
    found = []
    for layer in LAYERS:
        wanted = 1.1 if layer.mean else 2.0
        for mode in ("forward", "backward"):
            name = f"{layer.name}, {mode}: against {PEER}"
            found.append(faster(name, rows, layer.name, "saccade cpu", PEER, wanted, FP32, mode=mode))
    return found
