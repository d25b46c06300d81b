"""Presets for language and vision-language models: each returns the `RopeSpec` of a published rotary embedding.

The presets of video and image generators are in `presets_diffusion`. A wrong argument is a ValueError or TypeError that
names it. Where no head_dim is named below, R = head_dim / 2 pairs and theta_i = base^(-2i / head_dim).
"""

from __future__ import annotations

from collections.abc import Sequence

from saccade._arguments import items, number, whole
from saccade.rope.spec import Pairing, RopeSpec

__all__ = [
    "hope",
    "mhrope",
    "mmrope",
    "mrope",
    "mrope_interleaved",
    "qwen_vision",
    "tad",
    "v2pe",
    "vanilla",
    "videorope",
]


def geometric(pairs: int, dim: int, base: float) -> tuple[float, ...]:
    """base^(-2i / dim) for i below `pairs`."""
    return tuple(float(base) ** (-2.0 * i / dim) for i in range(pairs))


def check_base(base: float, name: str = "base") -> float:
    """A base of a geometric progression of frequencies."""
    return float(number(base, name, above=1.0))


def check_width(head_dim: int, multiple: int, name: str = "head_dim") -> int:
    """A width that is a positive multiple of `multiple`."""
    width = whole(head_dim, name, 1)
    if width % multiple:
        raise ValueError(f"{name}: expected a multiple of {multiple}, got {width}")
    return width


def _sections(sections: Sequence[int], pairs: int, name: str = "sections") -> tuple[int, ...]:
    """Pairs per axis, adding up to `pairs`."""
    sizes = tuple(whole(size, f"{name}[{i}]", 0) for i, size in enumerate(items(sections, name)))
    if sum(sizes) != pairs:
        raise ValueError(f"{name}: expected sizes that add up to {pairs} pairs, got {list(sizes)} (sum {sum(sizes)})")
    return sizes


def vanilla(head_dim: int, base: float, *, rotary_dim: int | None = None, pairing: Pairing = "half") -> RopeSpec:
    """One position axis, R = rotary_dim / 2 pairs, theta_i = base^(-2i / rotary_dim).

    RoFormer, arXiv 2104.09864, eq. 15.

    Example:
        >>> vanilla(8, 10000.0).inv_freq[1]
        0.1
    """
    width = check_width(
        head_dim if rotary_dim is None else rotary_dim, 2, "head_dim" if rotary_dim is None else "rotary_dim"
    )
    return RopeSpec(head_dim, geometric(width // 2, width, check_base(base)), (0,) * (width // 2), pairing)


def mrope(head_dim: int, base: float, sections: Sequence[int], *, rotary_dim: int | None = None) -> RopeSpec:
    """Sections of the R pairs for t, h, w in turn, theta over all pairs.

    Qwen2-VL, arXiv 2409.12191, sec. 2.1: 16, 24, 24.

    Example:
        >>> mrope(128, 1e6, (16, 24, 24)).axis[15:17]
        (0, 1)
    """
    width = check_width(
        head_dim if rotary_dim is None else rotary_dim, 2, "head_dim" if rotary_dim is None else "rotary_dim"
    )
    sizes = _sections(sections, width // 2)
    axis = tuple(n for n, size in enumerate(sizes) for _ in range(size))
    return RopeSpec(head_dim, geometric(width // 2, width, check_base(base)), axis, axes=len(sizes))


def mrope_interleaved(
    head_dim: int, base: float, sections: Sequence[int], *, rotary_dim: int | None = None
) -> RopeSpec:
    """Pairs t, h, w, t, h, w, ... until h and w are used up, the rest t.

    MRoPE-I, arXiv 2510.23095; Qwen3-VL: 24, 20, 20.

    Example:
        >>> mrope_interleaved(128, 5e6, (24, 20, 20)).axis[57:64]
        (0, 1, 2, 0, 0, 0, 0)
    """
    width = check_width(
        head_dim if rotary_dim is None else rotary_dim, 2, "head_dim" if rotary_dim is None else "rotary_dim"
    )
    pairs = width // 2
    sizes = _sections(items(sections, "sections", 3), pairs)
    axis = tuple(i % 3 if i < 3 * sizes[i % 3] else 0 for i in range(pairs))
    if any(axis.count(n) != sizes[n] for n in (1, 2)):
        raise ValueError(
            f"sections: {list(sizes)} cannot be interleaved in {pairs} pairs; h and w need a place in each three"
        )
    return RopeSpec(head_dim, geometric(pairs, width, check_base(base)), axis, axes=3)


def qwen_vision(head_dim: int, base: float = 10000.0) -> RopeSpec:
    """Two axes (h, w): the first head_dim / 4 pairs turn with h, the others with w, theta restarting.

    Qwen2-VL's vision tower, arXiv 2409.12191, sec. 2.1.

    Example:
        >>> qwen_vision(80).axis[19:21]
        (0, 1)
    """
    quarter = check_width(head_dim, 4) // 4
    frequencies = geometric(quarter, 2 * quarter, check_base(base))
    return RopeSpec(head_dim, frequencies * 2, (0,) * quarter + (1,) * quarter)


def tad(head_dim: int, base: float) -> RopeSpec:
    """`vanilla` that reads the first of three equal position rows; the time enters through rule="tad".

    TAD-RoPE, arXiv 2409.03206.

    Example:
        >>> tad(64, 10000.0).axes
        3
    """
    width = check_width(head_dim, 2)
    return RopeSpec(width, geometric(width // 2, width, check_base(base)), (0,) * (width // 2), axes=3)


def v2pe(head_dim: int, base: float) -> RopeSpec:
    """`vanilla` that reads the first of three equal position rows; small visual steps enter through rule="v2pe".

    V2PE, arXiv 2412.09616.

    Example:
        >>> v2pe(64, 10000.0) == tad(64, 10000.0)
        True
    """
    return tad(head_dim, base)


def _spatial_first(head_dim: int, temporal: int | None, name: str) -> tuple[int, tuple[int, ...]]:
    """R and the axes h, w, h, w, ..., t, t, ... with `temporal` pairs of t, by default a quarter (16 of 64)."""
    pairs = check_width(head_dim, 2) // 2
    size = pairs - 2 * (3 * pairs // 8) if temporal is None else whole(temporal, name, 0)
    if size > pairs:
        raise ValueError(f"{name}: expected at most the {pairs} pairs of head_dim {head_dim}, got {size}")
    return pairs, tuple(1 + i % 2 for i in range(pairs - size)) + (0,) * size


def videorope(head_dim: int, base: float, *, temporal: int | None = None) -> RopeSpec:
    """Pairs h, w, h, w, ... and then the `temporal` lowest frequencies t, 16 of 64.

    VideoRoPE, arXiv 2502.05173: low-frequency temporal allocation.

    Example:
        >>> videorope(128, 1e6).axis[46:50]
        (1, 2, 0, 0)
    """
    pairs, axis = _spatial_first(head_dim, temporal, "temporal")
    return RopeSpec(head_dim, geometric(pairs, 2 * pairs, check_base(base)), axis, axes=3)


def hope(head_dim: int, base: float, *, zeroed: int | None = None) -> RopeSpec:
    """VideoRoPE's layout with the `zeroed` lowest frequencies, 16 of 64, set to zero.

    HoPE, arXiv 2505.20444, sec. 4.1 and app. B.3.

    Example:
        >>> spec = hope(128, 1e6)
        >>> spec.inv_freq[47] > 0, spec.inv_freq[48], spec.active
        (True, 0.0, (0, 48))
    """
    pairs, axis = _spatial_first(head_dim, zeroed, "zeroed")
    frequencies = geometric(pairs, 2 * pairs, check_base(base))
    return RopeSpec(head_dim, tuple(f if a else 0.0 for f, a in zip(frequencies, axis, strict=True)), axis, axes=3)


def mhrope(head_dim: int, base: float, kv_heads: int, sections: Sequence[int]) -> RopeSpec:
    """One axis per key-value head: the first sections[0] heads turn with t, then h, then w, the rest stay.

    MHRoPE, arXiv 2510.23095; 2, 3, 3 of 8 heads.

    Example:
        >>> mhrope(128, 1e6, 8, (2, 3, 3)).groups
        8
    """
    pairs = check_width(head_dim, 2) // 2
    heads = whole(kv_heads, "kv_heads", 1)
    sizes = tuple(whole(size, f"sections[{i}]", 0) for i, size in enumerate(items(sections, "sections", 3)))
    if not 0 < sum(sizes) <= heads:
        raise ValueError(f"sections: expected 1 to {heads} heads in all, got {list(sizes)} (sum {sum(sizes)})")
    frequencies = geometric(pairs, 2 * pairs, check_base(base))
    axis_of_head = [n for n, size in enumerate(sizes) for _ in range(size)]
    idle = heads - len(axis_of_head)
    rows = [frequencies] * len(axis_of_head) + [(0.0,) * pairs] * idle
    return RopeSpec(head_dim, rows, [(n,) * pairs for n in axis_of_head + [0] * idle], axes=3)


def mmrope(head_dim: int, base: float) -> RopeSpec:
    """Pairs t, t, h, w, h, w, h, w, repeated, theta over all pairs (MM-RoPE of Lumos-1, arXiv 2507.08801).

    Example:
        >>> mmrope(32, 10000.0).axis[:8]
        (0, 0, 1, 2, 1, 2, 1, 2)
    """
    pairs = check_width(head_dim, 2) // 2
    axis = tuple((0, 0, 1, 2, 1, 2, 1, 2)[i % 8] for i in range(pairs))
    return RopeSpec(head_dim, geometric(pairs, 2 * pairs, check_base(base)), axis, axes=3)
