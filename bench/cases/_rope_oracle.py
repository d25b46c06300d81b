"""Rotary embedding, with and without RMSNorm, in plain torch at three precisions, for the gate of the rotary cases.

It shares no code with the package: angles are float64 products of positions and frequencies, not fixed-point turns.

    "exact"   everything in float64
    "strict"  fp32 arithmetic from a table rounded once, one rounding to the dtype at the end
    "plain"   what models do: fp32 angles, table and products in the dtype of q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.cases import Expected
from bench.gate import largest_error
from saccade.rope import RopeSpec

_TOKENS = 2048  # computed at once


@dataclass(frozen=True)
class Norm:
    """RMSNorm before the rotation: over the head or the row, weight of q and of k."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    row: bool
    eps: float = 1e-6


def _table(
    positions: torch.Tensor, spec: RopeSpec, level: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, G, S, R] for positions [A, B, S]."""
    angles = torch.float32 if level == "plain" else torch.float64
    frequencies = torch.tensor(spec.dense(), dtype=torch.float64, device=positions.device)  # [A, G, R]
    angle = torch.zeros(())
    for place, row in zip(positions, frequencies, strict=True):  # not einsum: TF32 would halve the digits
        angle = angle + place.to(angles)[:, None, :, None] * row.to(angles)[:, None, :]
    table = {"exact": torch.float64, "strict": torch.float32, "plain": dtype}[level]
    cos, sin = angle.cos() * spec.attention_factor, angle.sin() * spec.attention_factor
    return cos.to(table), sin.to(table)


def compute(
    x: torch.Tensor, weight: torch.Tensor | None, norm: Norm | None, positions: torch.Tensor, spec: RopeSpec, level: str
) -> torch.Tensor:
    """Rotate (normalise first where `norm` is given) x [B, H, S, D]; float64 for "exact", else x's dtype."""
    dtype = x.dtype
    work = {"exact": torch.float64, "strict": torch.float32, "plain": dtype}[level]
    y = x
    if norm is not None:
        y = y.to(torch.float64 if level == "exact" else torch.float32)
        y = y * torch.rsqrt(y.square().mean((1, 3) if norm.row else 3, keepdim=True) + norm.eps)
        y = y.to(work)
        if weight is not None:
            y = y * (weight.view(x.shape[1], 1, x.shape[3]) if norm.row else weight).to(work)
    y = y.to(work)
    cos, sin = _table(positions, spec, level, dtype)
    cos, sin = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) if t.shape[1] > 1 else t for t in (cos, sin))
    pairs = spec.pairs
    assert 2 * pairs == x.shape[3]  # the benchmarked models rotate whole heads
    if spec.pairing == "half":
        a, b = y[..., :pairs], y[..., pairs:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = y[..., 0::2], y[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return y if level == "exact" else y.to(dtype)


def _one(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    norm: Norm | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    level: str,
    gradient: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Output, or gradients of x and weight, in slices of tokens: the transients of float64 stay small."""
    kept = torch.empty_like(x, dtype=torch.float64 if level == "exact" else x.dtype)
    total = None
    for start in range(0, x.shape[2], _TOKENS):
        part = slice(start, start + _TOKENS)
        piece, place = x[:, :, part], positions[..., part]
        if gradient is None:
            kept[:, :, part] = compute(piece, weight, norm, place, spec, level)
            continue
        wide = torch.float64 if level == "exact" else x.dtype
        leaf = piece.detach().to(wide).requires_grad_()
        leaves = [leaf]
        if weight is not None:
            # Sums over tokens in the computing precision, as one fp32 reduction would have them.
            leaves.append(weight.detach().to(torch.float64 if level == "exact" else torch.float32).requires_grad_())
        out = compute(leaf, leaves[1] if weight is not None else None, norm, place, spec, level)
        got = torch.autograd.grad(out, leaves, gradient[:, :, part].to(out.dtype))
        kept[:, :, part] = got[0]
        if weight is not None:
            total = got[1] if total is None else total + got[1]
    if gradient is None or weight is None:
        return [kept]
    assert total is not None
    return [kept, total if level == "exact" else total.to(weight.dtype)]


def expected(
    tensors: Sequence[torch.Tensor],
    norm: Norm | None,
    positions: torch.Tensor,
    spec: RopeSpec,
    gradients: Sequence[torch.Tensor] | None = None,
) -> Expected:
    """Results for q and k, or where `gradients` are given those of q, k and the weights."""
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    results: dict[str, list[list[torch.Tensor]]] = {}
    errors: dict[str, tuple[float, ...]] = {}
    with torch.enable_grad():
        for level in ("exact", "strict", "plain"):
            parts = [
                _one(x, weights[i], norm, positions, spec, level, None if gradients is None else gradients[i])
                for i, x in enumerate(tensors)
            ]
            results[level] = parts
            if level == "exact":
                continue
            flat = [p[j] for j in range(len(parts[0])) for p in parts]
            truth = [p[j] for j in range(len(parts[0])) for p in results["exact"]]
            errors[level] = tuple(largest_error(a, b) for a, b in zip(flat, truth, strict=True))
            results[level] = []
    exact = tuple(p[j] for j in range(len(results["exact"][0])) for p in results["exact"])
    names = ("q", "k") if gradients is None else ("dq", "dk", "dq_weight", "dk_weight")[: len(exact)]
    return Expected(names, exact, errors, 2.0 if gradients is None else 3.0)
