"""Specs and shapes that the op tests share; each is there for a reason."""

from __future__ import annotations

import torch

from saccade.rope import RopeSpec


def spec(
    head_dim: int,
    pairing: str = "half",
    *,
    pairs: int | None = None,
    groups: int | None = None,
    zeros: int = 0,
    axes: int = 3,
    factor: float = 1.0,
) -> RopeSpec:
    """Geometric frequencies over alternating axes; the last `zeros` pairs are the identity; per group if asked."""
    n = pairs or head_dim // 2
    freq = [0.0 if i >= n - zeros else 1e4 ** (-i / n) for i in range(n)]
    axis = [i % axes for i in range(n)]
    if groups:
        return RopeSpec(
            head_dim, [[f * (1 + 0.3 * g) for f in freq] for g in range(groups)], [axis] * groups, pairing, axes=axes
        )  # type: ignore[arg-type]
    return RopeSpec(head_dim, freq, axis, pairing, attention_factor=factor, axes=axes)  # type: ignore[arg-type]


SPECS = {
    "d128": spec(128),
    "d128-hope": spec(128, zeros=16),  # identity pairs at the end
    "d128-inter": spec(128, "interleaved"),
    "d72": spec(72),  # 36 pairs: not a whole vector in any width
    "d80-partial": spec(80, pairs=12),  # columns beyond the pairs
    "d80-inter-partial": spec(80, "interleaved", pairs=13, zeros=2),
    "d96-groups": spec(96, groups=2, zeros=3),  # frequencies per head group
    "d32-heads": spec(32, "interleaved", groups=4),  # per head, LTX
    "d256-yarn": spec(256, factor=1.25, zeros=5),  # attention factor reaches identity pairs
    "d40-one-axis": spec(40, axes=1),
    "d1-nothing": RopeSpec(2, (0.0,), (0,)),  # all identity
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (1, 31, 32, 100)  # one, below, at and beyond a tile


def on(x: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if x is None else x.to(device)
