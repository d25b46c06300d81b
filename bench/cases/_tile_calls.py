"""Tiles of a video: tokens read where they lie, through the layout's order, or permuted before attention and back after it.

The permutation is the cheapest there is: one `index_select` each for q, k and v and one for the output. FLOPs and bytes as in
`attention`; permuting moves another 8 times the tensor.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from bench.cases import Case, Counts, Expected, Problem, Request
from bench.cases._attention_calls import values
from bench.cases._runs import one_pass
from bench.gate import largest_error
from saccade import attention as a

Tensor = torch.Tensor
GRID, TILE, WINDOW = (
    (12, 24, 32),
    (4, 4, 4),
    (3, 3, 3),
)  # 9,216 tokens in tiles of 64: no holes, so both ways do the same work
IN_PLACE, PERMUTED = "saccade, in place", "saccade, permuted"


def tiles(heads: int, head_dim: int, dtype: str, request: Request) -> Problem:
    """Sliding tiles both ways; the reading in place is the one that `sliding_tile` gives."""
    layout = a.patterns.sliding_tile(GRID, TILE, WINDOW, device=request.device)
    assert layout.q_order is not None and layout.partial is None
    order = layout.q_order[0, 0].long()
    back = torch.argsort(order)
    plain = dataclasses.replace(layout, q_order=None, k_order=None)
    q, k, v = (values((1, heads, order.numel(), head_dim), dtype, request, i) for i in range(3))

    def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.index_select(2, order) for x in (q, k, v))
        return a.sparse_attention(q, k, v, plain).index_select(2, back)

    def expected() -> Expected:
        mask = layout.to_mask()[0, 0]

        def run(kind: torch.dtype) -> Tensor:
            one = (x[0, :1].to(kind) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=mask)

        truth = run(torch.float64)
        error = (largest_error(run(q.dtype), truth),)
        return Expected(("out",), (truth,), {"strict": error, "plain": error}, 2.0)

    part = lambda x: x[0, :1]  # noqa: E731
    found = [
        one_pass(IN_PLACE, "ours", lambda q, k, v: a.sparse_attention(q, k, v, layout), (q, k, v), None, part),
        one_pass(PERMUTED, "eager", permuted, (q, k, v), None, part),
    ]
    return Problem(found, expected)


def cases(request: Request) -> list[Case]:
    """One case: Wan's heads, fp32 on a CPU and bf16 on a GPU."""
    gpu = request.device == "cuda"
    dtype, heads, width = ("bfloat16", 12, 128) if gpu else ("float32", 4, 128)
    tokens = GRID[0] * GRID[1] * GRID[2]
    dense = 4 * heads * tokens * tokens * width
    density = 1.0
    for size, tile, window in zip(GRID, TILE, WINDOW, strict=True):
        density *= min(1.0, window * tile / size)
    moved = 4 * heads * tokens * width * (2 if gpu else 4)
    counts = Counts(moved, int(dense * density), dense, dtype)
    shape = f"1x{heads}x{tokens}x{width}, {WINDOW} of {TILE} tiles"
    build = partial(tiles, heads, width, dtype, request)
    return [Case("attention", "sliding tiles", "sparse_attention", "forward", dtype, shape, counts, build)]
