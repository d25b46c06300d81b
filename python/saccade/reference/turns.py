r"""Rotary angles as fixed-point turns: the arithmetic that every implementation shares.

An angle only matters modulo one turn, and integers wrap for free. With `step = round(2^64 * inv_freq / (2 pi 2^shift))`
and a position `p * 2^shift = whole + fraction`,

    phase = sum_a step[a] * whole[a] + (step[a] * fraction[a])        (mod 2^64),   angle = 2 pi * phase / 2^64

is exact to 2^-34 turn (4e-10 rad) at any position up to 2^31, where a float32 product is wrong by whole turns.
"""

from __future__ import annotations

import math

import torch


def fixed_point(positions: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`positions * 2^shift` as (whole int64, 32-bit fraction in int64, valid bool), all of the positions' shape.

    A position that is not finite, or beyond +-2^62 after scaling, is not valid: its angles are NaN.
    """
    if not positions.is_floating_point():
        whole = positions.to(torch.int64)
        return whole << shift, torch.zeros_like(whole), torch.ones_like(whole, dtype=torch.bool)
    scaled = positions.double() * 2.0**shift
    valid = scaled.abs() < 2.0**62  # False for NaN
    scaled = torch.where(valid, scaled, 0.0)
    whole = scaled.floor()
    fraction = ((scaled - whole) * 2.0**32).floor()
    return whole.to(torch.int64), fraction.to(torch.int64), valid


def phase(positions: torch.Tensor, steps: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Phase in units of 2^-64 turn, and whether it is valid.

    Args:
        positions: [A, B, S].
        steps: int64 [A, G, R].
        shift: positions are scaled by 2^shift.

    Returns:
        (int64 [B, G, S, R], bool [B, 1, S, 1]).
    """
    whole, fraction, valid = (x[:, :, None, :, None] for x in fixed_point(positions, shift))  # [A, B, 1, S, 1]
    step = steps[:, None, :, None, :]  # [A, 1, G, 1, R]
    high, low = step >> 32, step & 0xFFFFFFFF
    total = (step * whole + fraction * high + ((fraction * (low >> 1)) >> 31)).sum(0)  # wraps: whole turns vanish
    return total, valid.all(0)


def cos_sin(
    positions: torch.Tensor, steps: torch.Tensor, shift: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles, [B, G, S, R], computed in float64 and rounded once to `dtype`."""
    total, valid = phase(positions, steps, shift)
    angle = torch.where(valid, total.double() * (2.0 * math.pi / 2.0**64), math.nan)
    return angle.cos().to(dtype), angle.sin().to(dtype)
