"""The numpy twin of the angles that every implementation shares, bit for bit."""

from __future__ import annotations

import numpy as np
import torch

from saccade.reference.turns import phase

F = np.float32


def twin_cos_sin(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of int32 turns in units of 2^-32, in float32 operations that no compiler may contract."""
    u = t.astype(np.uint32)
    quarter = (u + np.uint32(0x20000000)) >> np.uint32(30)
    r = (u - (quarter << np.uint32(30))).astype(np.int32)
    low = r & np.int32(63)
    x = (r - low).astype(F) * F(2.0**-32)
    d = low.astype(F) * F(2 * np.pi * 2.0**-32)
    z = x * x
    h_of = float.fromhex
    s0, s1, s2 = (F(h_of(v)) for v in ("-0x1.4abbbep+5", "0x1.466012p+6", "-0x1.2dcaf2p+6"))
    tail, two_pi, half = F(h_of("-0x1.777a5cp-23")), F(h_of("0x1.921fb6p+2")), F(h_of("0x1.3bd3ccp+4"))
    c_ = [F(h_of(v)) for v in ("-0x1.f7e93ap-22", "0x1.03c1dep+6", "-0x1.55c64ap+6", "0x1.d9f188p+5")]
    p = tail + z * (s0 + z * (s1 + z * s2))
    g = c_[0] + z * (c_[1] + z * (c_[2] + z * c_[3]))
    h = half * z
    w = F(1) - h
    c0 = w + (((F(1) - w) - h) + z * g)
    s = x * two_pi + (x * p + d * c0)
    c = w + (((F(1) - w) - h) + (z * g - d * s))
    sine, cosine = np.where(quarter & 1, c, s), np.where(quarter & 1, s, c)
    sine, cosine = np.where(quarter & 2, -sine, sine), np.where((quarter + 1) & 2, -cosine, cosine)
    return cosine, sine


def twin_table(
    positions: torch.Tensor, steps: torch.Tensor, shift: int, begin: int, end: int, scale: float, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos, sin float32 [B, G, S, R], and which pairs [R] turn."""
    total, valid = phase(positions, steps, shift)
    t = ((total + 2**31) >> 32).numpy().astype(np.int64).astype(np.uint32).view(np.int32)
    cosine, sine = (torch.from_numpy(np.ascontiguousarray(x)) for x in twin_cos_sin(t))
    sine = (-sine if inverse else sine) * torch.tensor(scale)
    cosine = cosine * torch.tensor(scale)
    nan = torch.tensor(float("nan"))
    turning = (torch.arange(steps.shape[2]) >= begin) & (torch.arange(steps.shape[2]) < end)
    return torch.where(valid, cosine, nan), torch.where(valid, sine, nan), turning
