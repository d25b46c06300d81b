"""What the tests of rotary presets share: our tables, and how far a float32 peer may be from them."""

from __future__ import annotations

import math

import torch

from saccade.reference.apply_rope import apply_rope, join_columns, pair_columns
from saccade.reference.turns import cos_sin
from saccade.rope.spec import RopeSpec

UNIT = 2.0**-24  # largest relative error of one float32 rounding


def table(spec: RopeSpec, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [G, S, R] in float64 for positions [A, S]."""
    cos, sin = cos_sin(positions[:, None], spec.steps(), spec.shift, torch.float64)
    return cos[0] * spec.attention_factor, sin[0] * spec.attention_factor


def columns(pairs: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """[..., R] of pairs to [..., 2R] of columns."""
    return pairs.repeat_interleave(2, -1) if spec.pairing == "interleaved" else torch.cat((pairs, pairs), -1)


def table_bound(
    spec: RopeSpec, positions: torch.Tensor, *, base: float | None, position_roundings: int = 0, reach: float = 0.0
) -> torch.Tensor:
    """Largest difference [G, S, R] between exact cos or sin and a peer's, computed in float32 like this:

    base^(2i/d) with the exponent rounded (ln(base) units in the result), pow (2), reciprocal (1), one factor more (1),
    and the product with the position (1); the position itself after `position_roundings` roundings of numbers up to
    `reach` (0: relative to itself). Then cos or sin of a float32 (1 and its own rounding, 1). A peer that computes in
    float64 up to the table (`base` None) rounds once.
    """
    frequencies = torch.tensor(spec.dense(), dtype=torch.float64).abs()  # [A, G, R]
    place = positions.double().abs()
    angle = torch.einsum("as,agr->gsr", place, frequencies)
    place_error = torch.clamp(place, min=reach) * position_roundings
    shifted = torch.einsum("as,agr->gsr", place_error, frequencies)
    if base is None:
        return torch.full_like(angle, UNIT)
    return UNIT * (angle * (math.log(base) + 5) + shifted + 2) * spec.attention_factor


def turn(x: torch.Tensor, positions: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Reference rotation of x [B, H, S, D] in float64 by positions [A, S] or [A, B, S]."""
    place = positions if positions.ndim == 3 else positions[:, None]
    kind = spec.pairing == "interleaved"
    return apply_rope(x.double(), place, spec.steps(), shift=spec.shift, interleaved=kind, scale=spec.attention_factor)


def turn_bound(x: torch.Tensor, bound: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Largest difference of x [B, H, S, D] turned by a float32 peer with table errors bound [G, S, R].

    Two products of numbers up to |x| * m, one sum, each rounded once, and one rounding of the result.
    """
    interleaved = spec.pairing == "interleaved"
    first, second = pair_columns(x.double().abs(), spec.pairs, interleaved)
    error = bound.repeat_interleave(x.shape[1] // bound.shape[0], 0) + 4 * UNIT * spec.attention_factor
    size = (first + second) * error
    rest = torch.zeros(*x.shape[:-1], x.shape[-1] - 2 * spec.pairs, dtype=torch.float64)
    return join_columns(size, size, rest, interleaved)


def assert_within(ours: torch.Tensor, theirs: torch.Tensor, bound: torch.Tensor, what: str = "") -> float:
    """No difference above its bound; NaN fails. Returns the largest difference."""
    assert ours.shape == theirs.shape == bound.shape, (ours.shape, theirs.shape, bound.shape)
    difference = (ours.double() - theirs.double()).abs()
    worst = float(difference.max())
    print(
        f"{what}: largest difference {worst:.2e}, bound there {float(bound[difference == difference.max()].max()):.2e}"
    )
    assert bool((difference <= bound).all()), f"{what}: {worst:.3e} is above the bound"
    return worst
