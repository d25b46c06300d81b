"""Presets for video and image generators: each returns the `RopeSpec` of a published rotary embedding.

Positions come from `grid_positions` or the function named in the docstring. Unless stated, columns (2i, 2i + 1) form
a pair, the pairs of t come first, then h, then w, and theta restarts on each axis: theta_i =
base^(-2i / width of the axis). A wrong argument is a ValueError or TypeError that names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from saccade._arguments import choice, items, number, whole
from saccade.rope.presets_language import check_base, check_width, geometric
from saccade.rope.spec import Pairing, RopeSpec

__all__ = ["cogvideox", "cosmos", "flux", "hunyuan_video", "ltx", "ltx2", "mochi", "seedance", "wan"]


def _restarting(
    widths: Sequence[int], bases: Sequence[float], head_dim: int | None = None, pairing: Pairing = "interleaved"
) -> RopeSpec:
    """Axis n takes widths[n] columns, its frequencies start again at 1."""
    frequencies = [f for width, base in zip(widths, bases, strict=True) for f in geometric(width // 2, width, base)]
    axis = [n for n, width in enumerate(widths) for _ in range(width // 2)]
    return RopeSpec(sum(widths) if head_dim is None else head_dim, frequencies, axis, pairing, axes=len(widths))


def _widths(sections: Sequence[int], name: str, count: int | None = None) -> tuple[int, ...]:
    """Columns per axis: even numbers, at least one of them above zero."""
    widths = tuple(whole(size, f"{name}[{i}]", 0) for i, size in enumerate(items(sections, name, count)))
    if any(width % 2 for width in widths) or not sum(widths):
        raise ValueError(f"{name}: expected even numbers of columns that are not all zero, got {list(widths)}")
    return widths


def wan(head_dim: int = 128, *, base: float = 10000.0) -> RopeSpec:
    """h and w take 2 * (head_dim // 6) columns each, t the rest: 44, 42, 42 (Wan, arXiv 2503.20314, sec. 4.2).

    Example:
        >>> spec = wan(128)
        >>> [spec.axis.count(n) for n in range(3)]
        [22, 21, 21]
    """
    spatial = 2 * (check_width(head_dim, 2) // 6)
    base = check_base(base)
    return _restarting((head_dim - 2 * spatial, spatial, spatial), (base,) * 3)


def hunyuan_video(head_dim: int = 128, *, base: float = 256.0, sections: Sequence[int] | None = None) -> RopeSpec:
    """`sections` columns for t, h, w, by default head_dim / 8 and twice 7 head_dim / 16: 16, 56, 56.

    HunyuanVideo, arXiv 2412.03603, sec. 4.2.

    Example:
        >>> spec = hunyuan_video()
        >>> [spec.axis.count(n) for n in range(3)]
        [8, 28, 28]
    """
    if sections is None:
        unit = check_width(head_dim, 32) // 16
        sections = (2 * unit, 7 * unit, 7 * unit)
    widths = _widths(sections, "sections", 3)
    if sum(widths) != whole(head_dim, "head_dim", 1):
        raise ValueError(
            f"sections: expected columns that add up to head_dim {head_dim}, got {list(widths)} (sum {sum(widths)})"
        )
    return _restarting(widths, (check_base(base),) * 3)


def cogvideox(head_dim: int = 64, *, base: float = 10000.0) -> RopeSpec:
    """head_dim / 4 columns for t, 3 head_dim / 8 for h and w; positions `cogvideox_positions`.

    CogVideoX, arXiv 2408.06072, sec. 2.2: 3D-RoPE.

    Example:
        >>> spec = cogvideox(64)
        >>> [spec.axis.count(n) for n in range(3)]
        [8, 12, 12]
    """
    unit = check_width(head_dim, 16) // 8
    return _restarting((2 * unit, 3 * unit, 3 * unit), (check_base(base),) * 3)


def cosmos(head_dim: int = 128, *, scale: Sequence[float] = (2.0, 1.0, 1.0), base: float = 10000.0) -> RopeSpec:
    """Wan's widths, pairs (i, i + R), base * scale^(d / (d - 2)) on an axis of d columns; positions `cosmos_positions`.

    Cosmos, arXiv 2501.03575.

    Example:
        >>> cosmos(128).pairing
        'half'
    """
    spatial = 2 * (check_width(head_dim, 2) // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    if min(widths) < 4:
        raise ValueError(f"head_dim: expected at least 12, two pairs per axis, got {head_dim}")
    base = check_base(base)
    factors = [float(number(s, f"scale[{i}]", above=0.0)) for i, s in enumerate(items(scale, "scale", 3))]
    return _restarting(
        widths, [base * s ** (d / (d - 2)) for s, d in zip(factors, widths, strict=True)], pairing="half"
    )


def _per_head(head_dim: int, heads: int, axes: int, base: float, pairing: Pairing) -> RopeSpec:
    """Frequencies over the joint width of all heads: f0 of every axis, f1 of every axis, ...; identity pairs lead."""
    width, count = check_width(head_dim, 2), whole(heads, "heads", 1)
    pairs = width * count // 2
    steps = pairs // axes
    if steps < 1:
        raise ValueError(f"head_dim: expected at least {axes} pairs in heads * head_dim / 2, got {pairs}")
    base = check_base(base)
    idle = pairs - steps * axes
    ladder = [base ** (n / max(steps - 1, 1)) * math.pi / 2 for n in range(steps)]
    frequencies = [0.0] * idle + [f for f in ladder for _ in range(axes)]
    axis = [0] * idle + [n for _ in range(steps) for n in range(axes)]
    half = width // 2
    rows = range(0, pairs, half)
    return RopeSpec(
        width, [frequencies[i : i + half] for i in rows], [axis[i : i + half] for i in rows], pairing, axes=axes
    )


def ltx(head_dim: int = 64, heads: int = 32, *, base: float = 10000.0) -> RopeSpec:
    """[heads, head_dim / 2] frequencies pi / 2 * base^(n / (N - 1)), axes t, h, w in turn over the joint width.

    LTX-Video, arXiv 2501.00103, as its reference code has it; positions `ltx_positions`.

    Example:
        >>> spec = ltx(64, 32)
        >>> spec.groups, spec.axis[0][:5], spec.inv_freq[0][0]
        (32, (0, 0, 1, 2, 0), 0.0)
    """
    return _per_head(head_dim, heads, 3, base, "interleaved")


def ltx2(
    head_dim: int = 128, heads: int = 32, *, axes: int = 3, layout: str = "interleaved", base: float = 10000.0
) -> RopeSpec:
    """`ltx` with axes=3 (video) or 1 (audio), and layout "interleaved" or "split", which pairs (i, i + R).

    LTX-2, arXiv 2601.03233, as its reference code has it; positions `ltx2_positions` and `ltx2_audio_positions`.

    Example:
        >>> ltx2(64, 32, axes=1, layout="split").pairing
        'half'
    """
    split = choice(layout, "layout", ("interleaved", "split")) == "split"
    return _per_head(head_dim, heads, whole(axes, "axes", 1), base, "half" if split else "interleaved")


def mochi(frequencies: Any) -> RopeSpec:
    """Dense frequencies [3, heads, head_dim / 2], all three axes turning every pair; positions `mochi_positions`.

    Mochi 1, reference code. A tensor that requires grad is kept and gets its gradient.

    Example:
        >>> import torch
        >>> mochi(torch.zeros(3, 24, 64, requires_grad=True)).learned
        True
    """
    shape = tuple(frequencies.shape) if hasattr(frequencies, "shape") else None
    if shape is None:
        raise TypeError(f"frequencies: expected a tensor [3, heads, R], got {type(frequencies).__name__}")
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(f"frequencies: expected a non-empty [3, heads, R], got {list(shape)}")
    return RopeSpec(2 * shape[2], frequencies, None, "interleaved")


def flux(axes_dim: Sequence[int] = (16, 56, 56), *, base: float = 10000.0) -> RopeSpec:
    """axes_dim[n] columns for axis n, head_dim their sum, any number of axes; positions `flux_positions`.

    FLUX.1 and FLUX.2, reference code.

    Example:
        >>> flux((32, 32, 32, 32), base=2000.0).axes
        4
    """
    widths = _widths(axes_dim, "axes_dim")
    return _restarting(widths, (check_base(base),) * len(widths))


def seedance(
    head_dim: int, *, sections: Sequence[int], text: int, base: float, pairing: Pairing = "interleaved"
) -> RopeSpec:
    """Four axes (t, h, w, text): `sections` columns for visual t, h, w and `text` columns for the text axis.

    MM-RoPE, Seedance 1.0, arXiv 2506.09113, sec. 3: 3-D for visual, 1-D for text tokens; its numbers are
    unpublished, so all sizes are required.

    Example:
        >>> seedance(128, sections=(32, 32, 32), text=32, base=10000.0).axes
        4
    """
    widths = _widths((*items(sections, "sections", 3), text), "sections + text")
    if sum(widths) > whole(head_dim, "head_dim", 1):
        raise ValueError(f"sections: {list(widths)} columns (sum {sum(widths)}) exceed head_dim {head_dim}")
    return _restarting(widths, (check_base(base),) * 4, head_dim, pairing)
