"""Small awkward calls of the attention ops: odd lengths, ends of blocks, holes, masks, tokens that nothing sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from saccade import attention as a
from saccade._dispatch import raw
from saccade.attention import patterns
from saccade.reference.attention_columns import attention_columns
from saccade.reference.attention_rows import attention_rows
from saccade.reference.block_pool import block_pool
from saccade.reference.block_select import block_select
from saccade.reference.block_transpose import block_transpose
from saccade.testing import check_budget

Tensor = torch.Tensor
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
GRID = (3, 5, 7)


def _normal(shape: tuple[int, ...], dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _mask(rows: int, columns: int) -> a.BlockLayout:
    mask = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[..., : rows // 2, : columns // 2] = True
    mask[..., ::9, :] = False
    return a.BlockLayout.from_mask(mask)


# layout, heads of q and k, head_dim, with bias
CORE: tuple[tuple[str, Callable[[], a.BlockLayout], int, int, int, bool], ...] = (
    ("bits", lambda: _mask(70, 130), 2, 1, 64, True),
    ("causal 128", lambda: patterns.causal(150, block=128), 2, 2, 40, False),
    ("sliding tile", lambda: patterns.sliding_tile(GRID, (2, 4, 4), (1, 3, 1), suffix=5), 2, 2, 128, True),
    ("neighbourhood", lambda: patterns.neighborhood(GRID, 3, prefix=3), 4, 2, 80, False),
)


def _core(impl: str, device: str, layout: a.BlockLayout, sizes: tuple[int, int, int], bias: bool, dtype: Any) -> None:
    heads, kv_heads, width = sizes
    shapes = ((heads, layout.q_len), (kv_heads, layout.k_len), (kv_heads, layout.k_len))
    tensors = [_normal((2, h, s, width), dtype, n) for n, (h, s) in enumerate(shapes)]
    key_bias = _normal((2, layout.k_len), FP32, 6) if bias else None
    if bias:
        tensors.append(_normal((1, heads, layout.q_len, layout.k_len), dtype, 5))
    dout = _normal((2, heads, layout.q_len, width), dtype, 7)

    def run(name: str, kind: torch.dtype | None, where: str) -> tuple[Tensor, ...]:
        leaves = [(t if kind is None else t.to(kind)).to(where).requires_grad_() for t in tensors]
        extra = {} if key_bias is None else {"bias": leaves[3], "key_bias": key_bias.to(where)}
        out = a.sparse_attention(*leaves[:3], layout.to(where), impl=name, **extra)  # type: ignore[call-overload]
        return out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, dout.to(out)))

    ours, same, exact = run(impl, None, device), run("reference", None, "cpu"), run("reference", torch.float64, "cpu")
    for n, (out, peer, truth) in enumerate(zip(ours, same, exact, strict=True)):
        check_budget(("out", "dq", "dk", "dv", "dbias")[n], out, peer, truth.double(), factor=3.0)


def _axial(impl: str, device: str, axis: str, prefix: int, query: str, dtype: torch.dtype) -> None:
    tokens = prefix + GRID[0] * GRID[1] * GRID[2]
    tensors = [_normal((2, 2, tokens, 64), dtype, n) for n in range(4)]

    def run(name: str, kind: torch.dtype | None, where: str) -> tuple[Tensor, ...]:
        q, k, v, dout = ((t if kind is None else t.to(kind)).to(where) for t in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        window = (2, 3, 3) if axis == "window" else None
        out = a.axial_attention(*leaves, GRID, axis, window=window, prefix=prefix, prefix_query=query, impl=name)  # type: ignore[arg-type]
        return out.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(out, leaves, dout))

    ours, same, exact = run(impl, None, device), run("reference", None, "cpu"), run("reference", torch.float64, "cpu")
    for name, out, peer, truth in zip(("out", "dq", "dk", "dv"), ours, same, exact, strict=True):
        check_budget(name, out, peer, truth.double(), factor=3.0)


def _maps(impl: str, device: str, dtype: torch.dtype, causal: bool) -> None:
    q, k = _normal((2, 4, 90, 64), dtype, 1), _normal((2, 2, 130, 64), dtype, 2)
    rows, key_bias = torch.tensor([89, 3, 3, 40], dtype=torch.int32), _normal((1, 130), FP32, 3)
    for chosen in (None, rows):
        given = (chosen, key_bias, causal, 0.125)
        same, exact = (
            attention_rows(q, k, *given),
            attention_rows(q.double(), k.double(), chosen, key_bias.double(), causal, 0.125),
        )
        there = [None if t is None else t.to(device) for t in (q, k, chosen, key_bias)]
        ours = raw("attention_rows", impl)(*there, causal, 0.125)
        for name, out, peer, truth in zip(("lse", "entropy"), ours, same, exact, strict=True):
            check_budget(name, out.cpu(), peer, truth, factor=3.0)
        lse = exact[0].float()
        out = raw("attention_columns", impl)(there[0], there[1], lse.to(device), there[2], there[3], causal, 0.125)
        peer = attention_columns(q, k, lse, *given)
        truth = attention_columns(q.double(), k.double(), lse.double(), chosen, key_bias.double(), causal, 0.125)
        check_budget("columns", out.cpu(), peer, truth, factor=3.0)


def _planner(impl: str, device: str, dtype: torch.dtype) -> None:
    whole = torch.randint(-2, 3, (2, 4, 200, 64), generator=torch.Generator().manual_seed(1)).to(dtype)
    out = raw("block_pool", impl)(whole.to(device), None, 64)
    check_budget("mean", out.cpu(), block_pool(whole, None, 64), block_pool(whole.double(), None, 64))
    q, k = (torch.randint(-2, 3, (2, h, 5, 16), generator=torch.Generator().manual_seed(h)).float() for h in (4, 2))
    classes = torch.randint(0, 5, (1, 4, 5, 5), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    for some in (None, classes):
        for mode, p in ((0, 0.0), (1, 0.7), (2, 0.1)):
            there = [None if t is None else t.to(device) for t in (q, k, some)]
            ours = raw("block_select", impl)(*there, mode, 2, p, 0.25)
            for x, y in zip(ours, block_select(q, k, some, mode, 2, p, 0.25), strict=True):
                if not torch.equal(x.cpu(), y):
                    raise AssertionError("block_select differs")
    full = _mask(200, 300).full
    expected = block_transpose(full.starts, full.counts, full.indices, full.indices, 5)
    there = [t.to(device) for t in (full.starts, full.counts, full.indices, full.indices)]
    for x, y in zip(raw("block_transpose", impl)(*there, 5), expected, strict=True):
        if not torch.equal(x.cpu(), y):
            raise AssertionError("block_transpose differs")


def calls(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of everything; a call raises where its result is wrong."""
    dtypes = (FP16, BF16) if impl == "cuda" else (FP32, BF16)
    for dtype in dtypes:
        short = str(dtype).removeprefix("torch.")
        for name, make, heads, kv_heads, width, bias in CORE:
            run = partial(_core, impl, device, make(), (heads, kv_heads, width), bias, dtype)
            yield f"sparse_attention {name} {short}", run
        for axis, prefix, query in (("time", 0, "global"), ("space", 1, "mean"), ("window", 2, "global")):
            yield f"axial_attention {axis} {query} {short}", partial(_axial, impl, device, axis, prefix, query, dtype)
        for causal in (False, True):
            yield f"attention maps causal={causal} {short}", partial(_maps, impl, device, dtype, causal)
        yield f"planner {short}", partial(_planner, impl, device, dtype)
