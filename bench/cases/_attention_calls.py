"""Inputs of the attention cases and their competitors as calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench.cases import Expected, Problem, Provider, Request
from bench.cases import _attention_exact as exact
from bench.cases._runs import one_pass
from bench.gate import largest_error
from saccade import attention as a
from saccade.attention import BlockLayout

Tensor = torch.Tensor
Outputs = Callable[[], Sequence[Tensor]] | None


def values(shape: Sequence[int], dtype: str, request: Request, seed: int) -> Tensor:
    """Normal values on the device of the request."""
    generator = torch.Generator(request.device).manual_seed(seed)
    return torch.empty(list(shape), dtype=getattr(torch, dtype), device=request.device).normal_(generator=generator)


def impls(request: Request) -> tuple[str, ...]:
    """What is ours on the device of the request."""
    return ("cuda", "triton") if request.device == "cuda" else ("cpu",)


def kept_blocks(blocks: int, density: float) -> int:
    """Key blocks that a query block keeps."""
    return max(1, round(blocks * density))


def layout_of(heads: int, tokens: int, density: float, request: Request, block: int = 64) -> BlockLayout:
    """As many key blocks for every query block, at random, other ones for every head."""
    blocks = -(-tokens // block)
    keep = kept_blocks(blocks, density)
    if keep == blocks:
        return BlockLayout.dense(tokens, tokens, q_block=block, k_block=block, device=request.device)
    noise = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(9))
    kept = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, noise.topk(keep).indices, True)
    sizes = dict(q_len=tokens, k_len=tokens, q_block=block, k_block=block)
    return BlockLayout.from_block_map(kept.to(request.device), **sizes)


def attention(
    heads: int, tokens: int, head_dim: int, density: float, dtype: str, mode: str, request: Request
) -> Problem:
    """`sparse_attention` at a density, or its backward pass, against dense SDPA and compiled FlexAttention."""
    q, k, v, dout = (values((1, heads, tokens, head_dim), dtype, request, i) for i in range(4))
    layout = layout_of(heads, tokens, density, request)
    layout.transposed()
    backward = mode == "backward"

    def expected() -> Expected:
        head = [x[0, 0] for x in (q, k, v)]
        run = lambda kind: exact.attention(*head, layout, kind, dout[0, 0] if backward else None)  # noqa: E731
        truth = run(torch.float64)
        errors = tuple(largest_error(x, t) for x, t in zip(run(q.dtype), truth, strict=True))
        names = ("dq", "dk", "dv") if backward else ("out",)
        return Expected(names, tuple(truth), {"strict": errors, "plain": errors}, 3.0 if backward else 2.0)

    def provider(
        name: str, role: str, function: Callable[[Tensor, Tensor, Tensor], Tensor], *, checked: bool
    ) -> Provider:
        part = (lambda x: x[0, 0]) if checked else None
        return one_pass(name, role, function, (q, k, v), dout if backward else None, part)

    found = [
        provider(f"saccade {i}", "ours", lambda q, k, v, i=i: a.sparse_attention(q, k, v, layout, impl=i), checked=True)
        for i in impls(request)
    ]
    if not backward and density < 1:
        keep = kept_blocks(-(-tokens // 64), density)

        def planned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return a.sparse_attention(q, k, v, a.patterns.top_k(q, k, keep=keep), impl="auto")

        found.append(provider("saccade with its plan (top_k)", "peer", planned, checked=False))
    found.append(provider("torch SDPA, dense", "eager", F.scaled_dot_product_attention, checked=density == 1))
    if density in (1.0, 0.25):
        flex = _flex(layout, backward and request.device == "cpu")
        found.append(provider("torch FlexAttention, compiled", "compile", flex, checked=True))
    return Problem(found, expected)


def _flex(layout: BlockLayout, no_backward: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of the layout, which `one_pass` compiles."""

    from torch.nn.attention.flex_attention import flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if no_backward:
            raise ValueError("impl: FlexAttention has no backward pass on the CPU")
        return flex_attention(q, k, v, block_mask=mask)  # type: ignore[no-any-return]

    mask = layout.to_flex()
    return function
