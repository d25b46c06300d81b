"""Seeded inputs for the rotary ops, in the layouts that models use."""

from __future__ import annotations

import torch

from saccade.rope.spec import RopeSpec


def heads(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    layout: str = "bhsd",
    seed: int = 0,
    device: str = "cpu",
) -> torch.Tensor:
    """Normal values [B, H, S, D], stored as `layout`: "bhsd", "bshd" (a transposed view) or "packed" (a slice of a wider row)."""
    b, h, s, d = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(b, h, s, d, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout == "bhsd":
        return values
    if layout == "bshd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        wide = torch.full((b, s, 3, h, d), float("nan"), dtype=dtype, device=device)
        wide[:, :, 1] = values.transpose(1, 2)
        return wide[:, :, 1].transpose(1, 2)
    raise ValueError(f'layout: expected "bhsd", "bshd" or "packed", got {layout!r}')


def layouts() -> tuple[str, ...]:
    """Memory layouts that `heads` can make."""
    return ("bhsd", "bshd", "packed")


def rope_inputs(
    spec: RopeSpec,
    *,
    batch: int = 2,
    q_heads: int = 4,
    k_heads: int = 2,
    tokens: int = 37,
    dtype: torch.dtype = torch.float32,
    layout: str = "bhsd",
    positions: torch.dtype = torch.int64,
    shared: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, S, D], k [B, Hk, S, D] and positions [A, B, S] (or [A, 1, S] where shared), up to +-4096."""
    q = heads((batch, q_heads, tokens, spec.head_dim), dtype, layout=layout, seed=seed, device=device)
    k = heads((batch, k_heads, tokens, spec.head_dim), dtype, layout=layout, seed=seed + 1, device=device)
    generator = torch.Generator().manual_seed(seed + 2)
    assert spec.axes is not None
    place = (
        torch.rand(spec.axes, 1 if shared else batch, tokens, generator=generator, dtype=torch.float64) * 8192 - 4096
    )
    return q, k, place.to(positions).to(device)
