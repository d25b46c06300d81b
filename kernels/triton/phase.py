"""Rotary angles from positions, with the same bits as the CPU and CUDA implementations.

saccade/reference/turns.py is the specification of the phase. Turns become cosines and sines by polynomials in separate
multiplications and additions: kernels must be launched with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

# sin(2 pi x) = x T + x (L + z S(z)) and cos(2 pi x) = 1 - z H + z C(z), z = x^2, |x| <= 1/8 turn; T + L = 2 pi.
_T = tl.constexpr(float.fromhex("0x1.921fb6p+2"))
_L = tl.constexpr(float.fromhex("-0x1.777a5cp-23"))
_S0 = tl.constexpr(float.fromhex("-0x1.4abbbep+5"))
_S1 = tl.constexpr(float.fromhex("0x1.466012p+6"))
_S2 = tl.constexpr(float.fromhex("-0x1.2dcaf2p+6"))
_H = tl.constexpr(float.fromhex("0x1.3bd3ccp+4"))
_C0 = tl.constexpr(float.fromhex("-0x1.f7e93ap-22"))
_C1 = tl.constexpr(float.fromhex("0x1.03c1dep+6"))
_C2 = tl.constexpr(float.fromhex("-0x1.55c64ap+6"))
_C3 = tl.constexpr(float.fromhex("0x1.d9f188p+5"))
_UNIT = tl.constexpr(2.0**-32)
_RADIANS = tl.constexpr(float.fromhex("0x1.921fb6p-30"))  # T 2^-32


@triton.jit
def phase(
    p_position, position_stride, m_position, p_step, step_stride, m_step, AXES: tl.constexpr, SHIFT: tl.constexpr
):
    """Phase in 2^-64 turns, int64, and where it is valid, both of the common shape of p_position and p_step.

    p_position, p_step: pointers of axis 0, of shapes that broadcast together; the strides lead to the next axis.
    """
    FLOATING: tl.constexpr = p_position.dtype.scalar.element_ty.is_floating()
    for axis in tl.static_range(AXES):
        position = tl.load(p_position + axis * position_stride.to(tl.int64), mask=m_position, other=0)
        step = tl.load(p_step + axis * step_stride, mask=m_step, other=0)
        if FLOATING:
            scaled = position.to(tl.float64) * (2.0**SHIFT)
            ok = tl.abs(scaled) < 2.0**62  # False for NaN
            scaled = tl.where(ok, scaled, 0.0)
            floor = tl.floor(scaled)
            whole = floor.to(tl.int64)
            fraction = ((scaled - floor) * (2.0**32)).to(tl.int64)
            low = (step & 0xFFFFFFFF) >> 1
            term = step * whole + fraction * (step >> 32) + ((fraction * low) >> 31)
        else:
            ok = m_position
            term = step * (position.to(tl.int64) << SHIFT)
        if axis == 0:
            total = term
            valid = ok
        else:
            total += term
            valid = valid & ok
    return total, valid


@triton.jit
def cos_sin_turns(turns):
    """cos and sin of `turns` (int32, in 2^-32 turn), fp32, within 7.6e-8."""
    u = turns.to(tl.uint32, bitcast=True)
    quadrant = (u + 0x20000000) >> 30
    r = (u - (quadrant << 30)).to(tl.int32, bitcast=True)
    low = r & 63
    x = (r - low).to(tl.float32) * _UNIT
    d = low.to(tl.float32) * _RADIANS
    z = x * x
    p = _S1 + z * _S2
    p = _S0 + z * p
    p = _L + z * p
    g = _C2 + z * _C3
    g = _C1 + z * g
    g = _C0 + z * g
    h = z * _H
    w = 1.0 - h
    rest = (1.0 - w) - h
    zg = z * g
    s = x * _T + (x * p + d * (w + (rest + zg)))
    c = w + (rest + (zg - d * s))
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def cos_sin(
    p_position, position_stride, m_position, p_step, step_stride, m_step, scale,
    AXES: tl.constexpr, SHIFT: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """scale * cos and scale * sin (sin negated for INVERSE), fp32, NaN where a position is not valid."""
    total, valid = phase(p_position, position_stride, m_position, p_step, step_stride, m_step, AXES, SHIFT)
    turns = ((total + 0x80000000) >> 32).to(tl.int32)
    c, s = cos_sin_turns(turns)
    if INVERSE:
        s = s * -1.0
    c = c * scale
    s = s * scale
    if p_position.dtype.scalar.element_ty.is_floating():
        c = tl.where(valid, c, float("nan"))
        s = tl.where(valid, s, float("nan"))
    return c, s


@triton.jit
def rotate(x1, x2, c, s):
    """Turn the pairs (x1, x2), fp32; a zero sine leaves out the products with it, so that the identity keeps every bit."""
    still = s == 0.0
    y1 = tl.where(still, c * x1, c * x1 - s * x2)
    y2 = tl.where(still, c * x2, s * x1 + c * x2)
    return y1, y2


@triton.jit
def unit_outside(c, s, BLOCK_R: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr):
    """The identity, without `scale`, for pairs outside [BEGIN, END)."""
    pair = tl.arange(0, BLOCK_R)[None, :]
    active = (pair >= BEGIN) & (pair < END)
    return tl.where(active, c, 1.0), tl.where(active, s, 0.0)


@triton.jit
def group_cos_sin(
    p_position, position_stride_a, m_row, step_ptr, i_group, m_group, groups, scale,
    R: tl.constexpr, AXES: tl.constexpr, SHIFT: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """cos and sin [rows, BLOCK_R] of group i_group (a scalar, or [rows, 1])."""
    pair = tl.arange(0, BLOCK_R)[None, :]
    c, s = cos_sin(
        p_position, position_stride_a, m_row, step_ptr + i_group.to(tl.int64) * R + pair, groups.to(tl.int64) * R,
        m_group & (pair >= BEGIN) & (pair < END), scale, AXES, SHIFT, INVERSE,
    )  # fmt: skip
    return unit_outside(c, s, BLOCK_R, BEGIN, END)
