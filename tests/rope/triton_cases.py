"""Checks of the Triton kernels in Triton's interpreter: run as a program, with TRITON_INTERPRET=1, it takes the name of a check per
line and answers with a JSON line. Names come from `CHECKS`, which needs no Triton to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from interpreted import serve

from saccade.reference.apply_rope import apply_rope as reference_rope
from saccade.reference.qk_norm_rope import qk_norm_rope as reference_norm
from saccade.reference.rope_freq_grad import rope_freq_grad as reference_freq_grad
from saccade.rope.spec import RopeSpec
from saccade.testing import check_budget, heads, poison

CHECKS: dict[str, Callable[[], None]] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    name = "-".join([function.__name__, *(str(a).removeprefix("torch.") for a in (*args, *kwargs.values()))])
    CHECKS[name] = lambda: function(*args, **kwargs)


def spec(
    head_dim: int, pairs: int, interleaved: bool, groups: int = 1, axes: int = 3, zeros: tuple[int, int] = (0, 0)
) -> RopeSpec:
    """Dense frequencies over all axes; the first zeros[0] and the last zeros[1] pairs are the identity."""
    generator = torch.Generator().manual_seed(pairs)
    freq = torch.rand(axes, groups, pairs, generator=generator, dtype=torch.float64) * 4 - 2
    freq[..., : zeros[0]] = 0
    freq[..., pairs - zeros[1] :] = 0
    return RopeSpec(head_dim, freq.tolist(), None, "interleaved" if interleaved else "half")


def positions(
    axes: int, batch: int, tokens: int, dtype: torch.dtype = torch.float64, scale: float = 4096
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return ((torch.rand(axes, batch, tokens, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(dtype)


def same_bits(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    a, b = a.contiguous().view(integer), b.contiguous().view(integer)
    if not torch.equal(a, b):
        raise AssertionError(f"{name}: {int((a != b).sum())} of {a.numel()} elements have other bits")


# apply_rope ------------------------------------------------------------------------------------------------------------------


def rope_args(s: RopeSpec, place: torch.Tensor, inverse: bool = False) -> tuple[Any, ...]:
    return place, s.steps(), s.shift, *s.active, s.pairing == "interleaved", s.attention_factor, inverse


def rope(
    head_dim,
    pairs,
    interleaved,
    groups,
    q_heads,
    k_heads,
    tokens,
    dtype,
    layout="bhsd",
    zeros=(0, 0),
    place=torch.float64,
):
    """Functional and in place, forward and inverse, held against float64."""
    from saccade._triton.apply_rope import apply_rope, apply_rope_

    s = spec(head_dim, pairs, interleaved, groups, zeros=zeros)
    q = heads((2, q_heads, tokens, head_dim), dtype, layout=layout)
    k = heads((2, k_heads, tokens, head_dim), dtype, layout=layout, seed=1) if k_heads else None
    where = positions(3, 2, tokens, place)
    for inverse in (False, True):
        args = rope_args(s, where, inverse)
        outs = apply_rope(q, k, *args)
        kwargs = {"shift": s.shift, "interleaved": interleaved, "inverse": inverse}
        if k is None:
            assert outs[1].shape == (0,)
        copies = [None if x is None else x.clone() for x in (q, k)]
        apply_rope_(*copies, *args)
        for name, x, out, copy in zip("qk", (q, k), outs, copies, strict=True):
            if x is not None:
                exact = reference_rope(x.double(), where, s.steps(), **kwargs)
                check_budget(name, out, reference_rope(x, where, s.steps(), **kwargs), exact)
                same_bits(f"{name} in place", copy, out)


check(rope, 128, 64, False, 1, 3, 1, 17, BF16, "bshd", place=torch.int64)
check(rope, 128, 64, False, 1, 2, 2, 17, F32, "packed", zeros=(0, 16), place=torch.float32)
check(rope, 80, 40, True, 1, 2, 1, 5, F16, "bshd", place=torch.int32)
check(rope, 72, 36, False, 1, 2, 0, 21, F32, "packed")
check(rope, 96, 48, True, 1, 20, 4, 1, BF16, "bshd")
check(rope, 40, 12, False, 4, 8, 4, 9, BF16, zeros=(1, 2))
check(rope, 40, 12, True, 4, 8, 4, 9, BF16, zeros=(1, 2))
check(rope, 7, 3, True, 2, 4, 2, 33, F32)
check(rope, 2, 1, False, 1, 1, 1, 130, F16)
check(rope, 512, 256, False, 1, 1, 1, 6, BF16)


def turn_bits(
    place: np.ndarray, steps: np.ndarray, shift: int, inverse: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [B, G, S, R] in numpy, from the arithmetic every implementation shares. Overflow wraps."""
    f, u = np.float32, np.uint32
    total, valid = np.int64(0), np.bool_(True)
    for p, step in zip(place, steps, strict=True):  # [B, S], [G, R]
        p, step = p[:, None, :, None], step[None, :, None, :]
        fraction, ok = np.int64(0), np.bool_(True)
        if p.dtype.kind == "f":
            scaled = p.astype(np.float64) * 2.0**shift
            ok = np.abs(scaled) < 2.0**62
            scaled = np.where(ok, scaled, 0.0)
            whole = np.floor(scaled).astype(np.int64)
            fraction = np.floor((scaled - np.floor(scaled)) * 2.0**32).astype(np.int64)
        else:
            whole = p.astype(np.int64) << shift
        total = total + step * whole + fraction * (step >> 32) + ((fraction * ((step & 0xFFFFFFFF) >> 1)) >> 31)
        valid = valid & ok
    t = ((total + 2**31) >> 32).astype(np.int32).astype(u)
    quarter = (t + u(0x20000000)) >> u(30)
    r = (t - (quarter << u(30))).astype(np.int32)
    low = r & np.int32(63)
    x, d = (r - low).astype(f) * f(2.0**-32), low.astype(f) * f(2 * math.pi * 2.0**-32)
    hexadecimal = lambda *values: [f(float.fromhex(v)) for v in values]  # noqa: E731
    s0, s1, s2 = hexadecimal("-0x1.4abbbep+5", "0x1.466012p+6", "-0x1.2dcaf2p+6")
    c0, c1, c2, c3 = hexadecimal("-0x1.f7e93ap-22", "0x1.03c1dep+6", "-0x1.55c64ap+6", "0x1.d9f188p+5")
    turn, turn_low, half_square = hexadecimal("0x1.921fb6p+2", "-0x1.777a5cp-23", "0x1.3bd3ccp+4")
    z = x * x
    p = turn_low + z * (s0 + z * (s1 + z * s2))
    g = c0 + z * (c1 + z * (c2 + z * c3))
    h = half_square * z
    w = f(1) - h
    first = w + (((f(1) - w) - h) + z * g)
    s = x * turn + (x * p + d * first)
    c = w + (((f(1) - w) - h) + (z * g - d * s))
    odd = (quarter & 1) != 0
    sin, cos = np.where(odd, c, s), np.where(odd, s, c)
    sin = np.where(quarter & 2, -sin, sin)
    cos = np.where((quarter + u(1)) & 2, -cos, cos)
    sin = -sin if inverse else sin
    cos, sin = cos * f(scale), sin * f(scale)
    assert cos.dtype == f
    return np.where(valid, cos, f(np.nan)), np.where(valid, sin, f(np.nan))


def bits(interleaved, groups, place, inverse=False, scale=1.0, largest=4096.0):
    """Every bit of the fp32 result, against numpy. `largest` position 2^40 has a fraction only in float64."""
    from saccade._triton.apply_rope import apply_rope

    s = spec(24, 10, interleaved, groups, zeros=(0, 1))
    x = heads((2, 4, 40, 24), F32)
    where = positions(3, 2, 40, place, largest)
    out, _ = apply_rope(x, None, where, s.steps(), s.shift, 0, 10, interleaved, scale, inverse)
    cos, sin = turn_bits(where.numpy(), s.steps().numpy(), s.shift, inverse, scale)
    cos, sin = (np.repeat(t, 4 // groups, 1) for t in (cos, sin))
    a = x.numpy()
    x1, x2 = (a[..., 0:20:2], a[..., 1:20:2]) if interleaved else (a[..., :10], a[..., 10:20])
    y1 = np.where(sin == 0, cos * x1, cos * x1 - sin * x2)
    y2 = np.where(sin == 0, cos * x2, sin * x1 + cos * x2)
    turned = np.stack((y1, y2), -1).reshape(2, 4, 40, 20) if interleaved else np.concatenate((y1, y2), -1)
    same_bits("q", out, torch.from_numpy(np.concatenate((turned, a[..., 20:]), -1)))


for _place in (torch.int32, torch.int64, torch.float32, torch.float64):
    check(bits, False, 1, _place)
check(bits, True, 4, torch.float64, True, 1.25)
check(bits, False, 2, torch.float64, False, 1.0, 2.0**40)
check(bits, False, 1, torch.int64, True, 1.0, 2.0**50)


def far_positions():
    """2^31 and beyond, not a number, infinite, fractional: against float64, NaN only where the position is not valid."""
    from saccade._triton.apply_rope import apply_rope, apply_rope_

    s = spec(16, 6, False, zeros=(1, 2))
    where = positions(3, 1, 8)
    where[0, 0] = torch.tensor([2.0**31, -(2.0**31), 2.0**44 + 0.5, math.nan, math.inf, -math.inf, 2.0**62, 0.75])
    x = heads((2, 2, 8, 16), F32)
    args = rope_args(s, where)
    out, _ = apply_rope(x, None, *args)
    check_budget("q", out, reference_masked(x, where, s), reference_masked(x.double(), where, s))
    assert out[..., 3:7, 1:4].isnan().all()
    same_bits(
        "identity pair", out[..., [0, 4, 5, 6, 10, 11, 12, 13, 14, 15]], x[..., [0, 4, 5, 6, 10, 11, 12, 13, 14, 15]]
    )
    apply_rope_(x, None, *args)
    assert torch.equal(x.isnan(), out.isnan())


def reference_masked(x: torch.Tensor, where: torch.Tensor, s: RopeSpec) -> torch.Tensor:
    """The reference turns identity pairs too, to NaN at positions that are not valid; kernels leave them."""
    turned = reference_rope(x, where, s.steps(), shift=s.shift)
    begin, end = s.active
    still = torch.ones(x.shape[-1], dtype=torch.bool)
    still[begin:end] = False
    still[s.pairs + begin : s.pairs + end] = False
    return torch.where(still, x, turned)


def untouched(interleaved: bool, dtype: torch.dtype):
    """Pairs outside the range keep their bits, also of -0, infinity and NaNs with a payload, in place and copied."""
    from saccade._triton.apply_rope import apply_rope, apply_rope_

    s = spec(40, 16, interleaved, zeros=(3, 5))
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    odd = torch.tensor([-0.0, math.inf, -math.inf, 1e-40, math.nan]).to(dtype).view(integer)
    odd[4] += 3  # another NaN
    x = odd[torch.arange(2 * 3 * 9 * 40) % 5].view(dtype).view(2, 3, 9, 40).clone()
    begin, end = s.active
    pair = torch.arange(32) // 2 if interleaved else torch.arange(32) % 16
    turned = torch.cat(((pair >= begin) & (pair < end), torch.zeros(8, dtype=torch.bool)))
    x[..., turned] = heads((2, 3, 9, int(turned.sum())), dtype)
    args = rope_args(s, positions(3, 1, 9))
    out, _ = apply_rope(x, None, *args)
    copy = x.clone()
    apply_rope_(copy, None, *args)
    same_bits("copied", out[..., ~turned], x[..., ~turned])
    same_bits("in place", copy, out)
    assert not torch.equal(out[..., turned], x[..., turned])


check(far_positions)
check(untouched, False, F32)
check(untouched, True, BF16)


def expanded():
    """Inputs whose heads and tokens share memory, a batch stride beyond 2^31 elements, and axes of length zero."""
    from saccade._triton.apply_rope import apply_rope

    s = spec(8, 4, False)
    where = positions(3, 1, 5)
    x = heads((1, 1, 1, 8), F32).expand(2, 3, 5, 8)
    out, _ = apply_rope(x, None, *rope_args(s, where))
    same_bits("expanded", out, apply_rope(x.contiguous(), None, *rope_args(s, where))[0])
    far = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 1, 5, 8), (2**31 + 8, 8, 8, 1))
    far.copy_(heads((2, 1, 5, 8), BF16))
    same_bits(
        "far",
        apply_rope(far, None, *rope_args(s, where))[0],
        apply_rope(far.contiguous(), None, *rope_args(s, where))[0],
    )
    for shape in ((0, 1, 5, 8), (1, 0, 5, 8), (1, 1, 0, 8)):
        assert apply_rope(x.new_empty(shape), None, *rope_args(s, where[..., : shape[2]]))[0].shape == shape


check(expanded)

# qk_norm_rope ----------------------------------------------------------------------------------------------------------------


def norm(
    row,
    head_dim,
    pairs,
    interleaved,
    groups,
    q_heads,
    k_heads,
    tokens,
    dtype,
    layout="bhsd",
    zeros=(0, 0),
    weighted=(True, True),
    held_tiles=8,
):
    """Forward, in place and gradients, held against float64; rows of more than `held_tiles` tiles are read twice."""
    from saccade._triton import launch
    from saccade._triton.qk_norm_rope import qk_norm_rope, qk_norm_rope_, qk_norm_rope_bwd

    launch.HELD_TILES = held_tiles
    s = spec(head_dim, pairs, interleaved, groups, zeros=zeros)
    q = heads((2, q_heads, tokens, head_dim), dtype, layout=layout)
    k = heads((2, k_heads, tokens, head_dim), dtype, layout=layout, seed=1) if k_heads else None
    dq, dk = (None if x is None else heads(tuple(x.shape), dtype, seed=7, layout=layout) for x in (q, k))
    weights = [
        heads((1, 1, 1, (n if row else 1) * head_dim), dtype, seed=9).flatten() if w and n else None
        for w, n in zip(weighted, (q_heads, k_heads), strict=True)
    ]
    where = positions(3, 2, tokens)
    args = (*weights, where, s.steps(), s.shift, *s.active, interleaved, 1.0, 1e-5, row)
    outs = qk_norm_rope(q, k, *args)
    copies = [None if x is None else x.clone() for x in (q, k)]
    qk_norm_rope_(*copies, *args)
    grads = qk_norm_rope_bwd(dq, dk, q, k, *args)
    for i, (x, w, dy) in enumerate(zip((q, k), weights, (dq, dk), strict=True)):
        if x is None:
            assert outs[i].shape == (0,) and grads[i].shape == (0,)
            continue
        exact, peer = (
            torch_norm(x, w, dy, where, s, row, interleaved, d)
            for d in (torch.float64, dtype if dtype == F32 else None)
        )
        check_budget("qk"[i], outs[i], peer[0], exact[0])
        same_bits(f"{'qk'[i]} in place", copies[i], outs[i])
        check_budget(f"d{'qk'[i]}", grads[i], peer[1], exact[1], factor=3)
        if w is None:
            assert grads[2 + i].shape == (0,)
        else:
            assert grads[2 + i].dtype == F32
            check_budget(f"d{'qk'[i]}_weight", grads[2 + i], peer[2], exact[2], factor=3)


def torch_norm(x, weight, dy, where, s, row, interleaved, dtype):
    """Result and gradients by autograd through the reference, in `dtype`, or in x's own."""
    x = x.to(dtype or x.dtype).requires_grad_()
    w = None if weight is None else weight.to(dtype or F32).requires_grad_()  # gradients of weights are summed in fp32
    y = reference_norm(x, w, where, s.steps(), shift=s.shift, interleaved=interleaved, eps=1e-5, row=row)
    return y.detach(), *torch.autograd.grad(y, [x] if w is None else [x, w], dy.to(y.dtype))


check(norm, False, 128, 64, False, 1, 3, 1, 17, BF16, "bshd")
check(norm, False, 128, 64, True, 1, 2, 2, 17, F32, "packed", (0, 16))
check(norm, False, 72, 36, False, 1, 2, 0, 3, F16, "bhsd", (0, 0), (False, False))
check(norm, False, 40, 12, False, 2, 4, 2, 19, F32, "bshd", (1, 2))
check(norm, False, 7, 3, True, 1, 2, 2, 20, F32, "packed", (1, 0), (True, False))
check(norm, True, 128, 64, True, 1, 12, 12, 3, BF16, "bshd")
check(norm, True, 40, 12, False, 2, 6, 2, 11, F32, "packed", (1, 2))
check(norm, True, 16, 8, True, 8, 8, 8, 9, F16, "bshd")
check(norm, True, 8, 4, False, 1, 20, 3, 2, F32, "bhsd", (0, 0), (True, False), 1)
check(norm, True, 8, 4, True, 4, 20, 4, 2, F32, "bhsd", (0, 1), (True, True), 1)


def splits(row: bool):
    """The same bits for a token whatever comes with it: other tokens, other batches, another place in memory."""
    from saccade._triton import launch
    from saccade._triton.qk_norm_rope import qk_norm_rope

    s = spec(32, 16, False)
    x, weight = heads((2, 4, 21, 32), F32), heads((1, 1, 1, 128 if row else 32), F32, seed=3).flatten()
    where = positions(3, 2, 21)
    run = lambda x, where: qk_norm_rope(  # noqa: E731
        x, None, weight, None, where, s.steps(), s.shift, *s.active, False, 1.0, 1e-6, row
    )[0]
    whole = run(x, where)
    for tokens in (1, 4, 5):
        same_bits(f"{tokens} tokens", run(x[:, :, :tokens], where[..., :tokens]), whole[:, :, :tokens])
    launch.PROGRAMS, before = 528, launch.PROGRAMS
    same_bits("heads shared out", run(x, where), whole)
    launch.PROGRAMS = before
    same_bits("second batch", run(x[1:], where[:, 1:]), whole[1:])
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    same_bits("not aligned", run(shifted, where), whole)


check(splits, False)
check(splits, True)

# rope_freq_grad, sum_rows, registration ----------------------------------------------------------------------------------------


def freq_grad(head_dim, pairs, interleaved, groups, q_heads, k_heads, tokens, dtype, place=torch.float32):
    from saccade._triton.rope_freq_grad import rope_freq_grad

    q, dq = (heads((2, q_heads, tokens, head_dim), dtype, layout="packed", seed=i) for i in (0, 1))
    k, dk = (heads((2, k_heads, tokens, head_dim), dtype, seed=i) if k_heads else None for i in (2, 3))
    where = positions(3, 1, tokens, place)
    out = rope_freq_grad(q, k, dq, dk, where, groups, pairs, interleaved)
    exact, peer = (
        reference_freq_grad(
            [(x.to(d), y.to(d)) for x, y in ((q, dq), (k, dk)) if x is not None], where, groups=groups, pairs=pairs,
            interleaved=interleaved,
        )
        for d in (torch.float64, F32)
    )  # fmt: skip
    check_budget("gradient", out, peer, exact, factor=3)


check(freq_grad, 32, 16, True, 4, 8, 4, 70, BF16)
check(freq_grad, 72, 33, False, 1, 3, 1, 19, F32, torch.int64)
check(freq_grad, 16, 8, True, 2, 2, 0, 5, F16)


def row_sums():
    """More rows than two passes take at once, against float64."""
    from saccade._triton.sum_rows import sum_rows

    for rows in (1, 2, 128, 129, 300):
        x = heads((1, 1, rows, 37), F32)[0, 0].contiguous()
        check_budget(f"{rows} rows", sum_rows(x), x.sum(0), x.double().sum(0), factor=3)
    try:  # the check itself can fail
        check_budget("wrong", sum_rows(x[:-1]), x.sum(0), x.double().sum(0), factor=3)
    except AssertionError:
        return
    raise AssertionError("a sum without its last row passed")


def registered():
    """Ops, schemas and fakes under their _triton names."""
    from saccade._load import schemas
    from saccade._triton.register import OPS, register

    register()
    register()  # once is enough, twice does no harm
    s = spec(16, 6, True)
    q, k = heads((1, 2, 5, 16), BF16, layout="bshd"), heads((1, 1, 5, 16), BF16)
    weight = torch.ones(16)
    turn = rope_args(s, positions(3, 1, 5))
    whole = (weight, None, *turn[:-1], 1e-6, False)
    calls = {
        "apply_rope": (q, k, *turn),
        "apply_rope_": (q.clone(), None, *turn),
        "rope_freq_grad": (q, None, q, None, turn[0], 1, 6, True),
        "qk_norm_rope": (q, k, *whole),
        "qk_norm_rope_": (q.clone(), k.clone(), *whole),
        "qk_norm_rope_bwd": (q, k, q, k, *whole),
    }
    assert set(calls) < set(OPS) == set(schemas())
    for name, args in calls.items():
        op = getattr(torch.ops.saccade, f"{name}_triton").default
        assert (
            str(op._schema).split("(", 1)[1] == str(getattr(torch.ops.saccade, name).default._schema).split("(", 1)[1]
        )
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    out = torch.ops.saccade.apply_rope_triton(q, k, *turn)[0]
    same_bits("op", out, reference_bits := OPS["apply_rope"](q, k, *turn)[0])
    assert not torch.equal(poison(reference_bits), out)


check(row_sums)
check(registered)


if __name__ == "__main__":
    from saccade._triton import launch

    launch.PROGRAMS = 6  # a GPU is filled by sharing out heads; here every program takes its time
    serve(CHECKS)
