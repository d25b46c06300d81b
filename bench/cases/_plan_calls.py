"""Planning from pooled queries and keys, and token importance: beside the attention they serve, and the maps they do without.

FLOPs: a plan 2 for every pair of blocks and column, and 1 for every element pooled; importance 2 for every pair of tokens and column
where the LSE is given, twice that where it is not. Bytes: q and k read once, lists or sums written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import saccade
from bench.cases import Call, Case, Check, Counts, Expected, Problem, Provider, Request
from bench.cases._attention_calls import impls, kept_blocks, layout_of, values
from bench.cases._checks import measured
from bench.cases._runs import free, refusable
from bench.gate import largest_error
from bench.rows import Row
from saccade import attention as a

Tensor = torch.Tensor
BF16, FP32 = "bfloat16", "float32"
ATTENTION, SDPA, EAGER = "the attention it serves", "torch SDPA, dense", "the map in plain torch"
DENSITY = 0.25


def _ours(name: str, run: Callable[[], Any], outputs: Callable[[], Sequence[Tensor]] | None = None) -> Provider:
    def make() -> Call:
        refusable(free(run))
        return Call([free(run)], outputs, warm=free(run))

    return Provider(name, "ours", make, version=saccade.__version__)


def _peer(name: str, run: Callable[[], Any], role: str = "peer", outputs: Any = None) -> Provider:
    make = lambda: Call([free(run)], outputs)  # noqa: E731
    return Provider(name, role, make, "plain", torch.__version__)  # type: ignore[arg-type]


def plan(heads: int, tokens: int, head_dim: int, dtype: str, request: Request) -> Problem:
    """`top_k` of a quarter of the blocks, the attention that follows it, and the same choice with a map of scores in torch."""
    q, k, v = (values((1, heads, tokens, head_dim), dtype, request, i) for i in range(3))
    blocks = -(-tokens // 64)
    keep = kept_blocks(blocks, DENSITY)
    layout = layout_of(heads, tokens, DENSITY, request)

    def eager() -> Any:
        pooled = [F.avg_pool2d(x[0], (64, 1), ceil_mode=True, count_include_pad=False).float() for x in (q, k)]
        chosen = (pooled[0] @ pooled[1].mT).topk(keep).indices
        return torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=q.device).scatter_(-1, chosen, True)

    def expected() -> Expected:
        return Expected((), (), {"strict": (), "plain": ()})

    found = [_ours(f"saccade {i}", lambda i=i: a.patterns.top_k(q, k, keep=keep, impl=i)) for i in impls(request)]
    found.append(_peer(ATTENTION, lambda: a.sparse_attention(q, k, v, layout)))
    found.append(_peer("avg_pool2d, matmul, topk", eager, "eager"))
    return Problem(found, expected)


def importance(heads: int, tokens: int, head_dim: int, dtype: str, known: bool, request: Request) -> Problem:
    """`token_importance` with or without the LSE of the rows, against dense attention and against the map itself."""
    q, k, v = (values((1, heads, tokens, head_dim), dtype, request, i) for i in range(3))
    lse = a.attention_lse(q, k) if known else None

    def exact(kind: torch.dtype) -> Tensor:
        """In stretches of rows: the map would not fit."""
        total = torch.zeros(1, heads, tokens, dtype=kind, device=q.device)
        keys = k.to(kind).mT
        for rows in q.split(512, 2):
            total += (rows.to(kind) @ keys * head_dim**-0.5).softmax(-1).sum(2)
        return total.mean(1) / tokens

    def expected() -> Expected:
        truth, same = exact(torch.float64), exact(torch.float32)
        errors = (largest_error(same, truth),)
        return Expected(("importance",), (truth,), {"strict": errors, "plain": errors}, 2.0)

    found = []
    for impl in impls(request):
        run = lambda impl=impl: a.token_importance(q, k, lse=lse, impl=impl)  # noqa: E731
        found.append(_ours(f"saccade {impl}", run, lambda run=run: [run()]))
    found.append(_peer(SDPA, lambda: F.scaled_dot_product_attention(q, k, v)))
    found.append(_peer(EAGER, lambda: exact(torch.float32), "eager"))
    return Problem(found, expected)


def cases(request: Request) -> list[Case]:
    """A plan at 16,384 tokens and importance at 8,192 on a CPU, at Wan's lengths on a GPU."""
    gpu = request.device == "cuda"
    dtype, size = (BF16, 2) if gpu else (FP32, 4)
    heads, tokens, width = (12, 32760, 128) if gpu else (8, 16384, 64)
    blocks = -(-tokens // 64)
    read = 2 * heads * tokens * width * size
    counts = Counts(read, 2 * heads * blocks**2 * width + 2 * heads * tokens * width, unit=FP32)
    build: Callable[[], Problem] = partial(plan, heads, tokens, width, dtype, request)
    shape = f"1x{heads}x{tokens}x{width}, a quarter kept"
    found = [Case("attention", "top_k plan", "block_select", "forward", dtype, shape, counts, build)]
    tokens = tokens if gpu else 8192
    for known in (True, False):
        flops = (2 if known else 4) * heads * tokens**2 * width
        moved = 2 * heads * tokens * width * size + 4 * heads * tokens * 2
        name = "token importance" + (", LSE given" if known else "")
        build = partial(importance, heads, tokens, width, dtype, known, request)
        shape = f"1x{heads}x{tokens}x{width}"
        counts = Counts(moved, flops, unit=dtype)
        found.append(Case("attention", name, "attention_columns", "forward", dtype, shape, counts, build))
    return found


def _share(rows: Sequence[Row], case: str, dtype: str, ours: str, peer: str, limit: float) -> Check:
    name, wanted = f"{case}: share of {peer}", f"<= {limit:.0%}"
    found, why = measured(rows, case, "forward", dtype, ours, peer)
    if not found:
        return Check(name, why, wanted, None)
    share = found[0][1] / found[1][1]
    return Check(name, f"{share:.1%}", wanted, share <= limit)


def checks(rows: Sequence[Row], ours: str = "saccade cpu", dtype: str = FP32) -> list[Check]:
    """Planning at most a tenth of the attention, importance at most 0.6 of a dense forward pass."""
    return [
        _share(rows, "top_k plan", dtype, ours, ATTENTION, 0.1),
        _share(rows, "token importance, LSE given", dtype, ours, SDPA, 0.6),
    ]
