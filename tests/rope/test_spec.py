"""RopeSpec: its checks, its fixed-point steps, and the angles they give, against rational arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope.angle_tables import turn

from saccade.reference.turns import phase
from saccade.rope import presets, scaling
from saccade.rope.spec import RopeSpec

# 2 pi to 75 digits: far beyond what positions of 2^40 need.
TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875021164194988918461563281257")

SPECS = {
    "vanilla": presets.vanilla(64, 10000.0),
    "mrope": presets.mrope(128, 1e6, (16, 24, 24)),
    "videorope": presets.videorope(128, 1e6),
    "hope": presets.hope(128, 1e6),
    "wan": presets.wan(128),
    "yarn": scaling.yarn(presets.vanilla(128, 1e6), 4.0, 32768),
    "riflex": scaling.riflex(presets.wan(128), 4, 81),
    "fast": RopeSpec(8, (3.0, 100.0, -7.5, 0.0), (0, 0, 0, 0)),
    "ltx": presets.ltx(64, 4),
    "ltx2": presets.ltx2(64, 2, layout="split"),
    "dense": presets.mochi(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))),
}


def _worst_angle_error(spec, positions):
    """Largest angle error in radians, modulo whole turns, of the fixed-point phase at positions [A, S]."""
    total, valid = phase(positions[:, None], spec.steps(), spec.shift)
    assert bool(valid.all())
    worst = Fraction(0)
    dense = spec.dense()
    exact_positions = [[Fraction(x) for x in row] for row in positions.tolist()]
    for g in range(spec.groups):
        for i in range(spec.pairs):
            frequencies = [Fraction(dense[a][g][i]) for a in range(spec.axes)]
            for n in range(positions.shape[1]):
                angle = sum(f * row[n] for f, row in zip(frequencies, exact_positions, strict=True))
                turns = angle / TWO_PI - Fraction(int(total[0, g, n, i]), 2**64)
                worst = max(worst, abs(turns - round(turns)))
    return float(worst * TWO_PI)


def _derived_bound(spec, largest):
    """Per axis: the step is rounded at 2^-65 turn of a scaled position, a fraction of 32 bits turns half at most."""
    turns = spec.axes * (largest * 2.0**spec.shift * 2.0**-65 + 2.0**-33 + 2.0**-60)
    return 2 * math.pi * turns


@pytest.mark.parametrize("name", SPECS)
def test_angles_at_whole_positions_up_to_two_to_the_31(name):
    spec = SPECS[name]
    some = torch.tensor([0, 1, -1, 4095, 10**6 + 1, 2**31, -(2**31), 2**31 - 1])
    positions = torch.stack([some.roll(a) for a in range(spec.axes)])
    worst = _worst_angle_error(spec, positions)
    print(f"{name}: {worst:.2e} rad, shift {spec.shift}")
    assert worst <= _derived_bound(spec, 2.0**31)
    if spec.shift <= 7:
        assert worst <= 1e-7


@pytest.mark.parametrize("name", SPECS)
def test_angles_at_fractional_positions(name):
    spec = SPECS[name]
    # Frequencies of thousands of radians per unit go with normalised coordinates: the same reach in angle.
    reach = 2.0 ** (31 - max(0, spec.shift - 7))
    some = torch.tensor([0.1, -0.3, 1 / 3, 0.75, 1.5, 1000.7, reach / 3, -reach + 0.25], dtype=torch.float64)
    positions = torch.stack([some.roll(a) for a in range(spec.axes)])
    worst = _worst_angle_error(spec, positions)
    print(f"{name}: {worst:.2e} rad up to position {reach:.0f}")
    assert worst <= _derived_bound(spec, reach) and worst <= 1e-7


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-(2.0**20), 2.0**20, allow_subnormal=False), min_size=1, max_size=3),
    st.lists(st.floats(-(2.0**18), 2.0**18), min_size=1, max_size=3),
)
def test_any_frequency_and_position(frequencies, places):
    spec = RopeSpec(2 * len(frequencies), tuple(frequencies), (0,) * len(frequencies))
    positions = torch.tensor([places], dtype=torch.float64)
    assert _worst_angle_error(spec, positions) <= _derived_bound(spec, 2.0**18)


@settings(deadline=None, max_examples=40)
@given(st.integers(-(2**40), 2**40), st.sampled_from(["half", "interleaved"]), st.booleans())
def test_zero_frequency_keeps_every_bit(position, pairing, fractional):
    spec = RopeSpec(10, (0.0, 0.5, 0.0, 0.0), (0,) * 4, pairing)
    positions = torch.tensor([[position + 0.5 if fractional else position]])
    x = torch.randn(1, 1, 1, 10, dtype=torch.float64)
    x[..., 0], x[..., 9] = -0.0, math.inf
    still = RopeSpec(10, (0.0,) * 4, (0,) * 4, pairing)
    assert torch.equal(turn(x, positions, still).view(torch.int64), x.view(torch.int64))
    turned = turn(x, positions, spec)
    moving = [1, 5] if pairing == "half" else [2, 3]
    kept = [c for c in range(10) if c not in moving]
    assert torch.equal(turned[..., kept].view(torch.int64), x[..., kept].view(torch.int64))


def test_positions_that_are_not_finite_give_nan():
    positions = torch.tensor([[math.nan, math.inf, 1e30, 1.0]], dtype=torch.float64)
    turned = turn(torch.ones(1, 1, 4, 2), positions, RopeSpec(2, (1.0,), (0,)))
    assert turned.isnan().all(-1)[0, 0].tolist() == [True, True, True, False]


def test_a_quarter_turn_by_hand():
    spec = RopeSpec(4, (math.pi / 2, math.pi), (0, 1), "half")
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    # Pair (1, 3) turns by 90 degrees, pair (2, 4) by 180.
    expected = torch.tensor([[[[-3.0, -2.0, 1.0, -4.0]]]], dtype=torch.float64)
    torch.testing.assert_close(turn(x, torch.tensor([[1], [1]]), spec), expected, rtol=0, atol=1e-9)
    paired = replace(spec, pairing="interleaved", attention_factor=2.0)
    expected = torch.tensor([[[[-4.0, 2.0, -6.0, -8.0]]]], dtype=torch.float64)
    torch.testing.assert_close(turn(x, torch.tensor([[1], [1]]), paired), expected, rtol=0, atol=1e-8)


def test_what_kernels_ask_for():
    spec = presets.hope(128, 1e6)
    assert (spec.active, spec.groups, spec.axes, spec.shift, spec.pairs) == ((0, 48), 1, 3, 0, 64)
    assert spec.steps().shape == (3, 1, 64) and spec.steps() is spec.steps()
    assert not spec.steps()[0].any() and not spec.steps()[:, :, 48:].any()
    assert replace(spec, attention_factor=1.1).active == (0, 64)
    assert presets.ltx(64, 32).groups == 32 and presets.ltx(64, 32).shift == 13
    assert RopeSpec(4, (0.0, 0.0), (0, 0)).active == (0, 0)


def test_equal_specs_are_one_key():
    assert presets.wan(128) == presets.wan(128) and hash(presets.wan(128)) == hash(presets.wan(128))
    assert presets.wan(128) != presets.wan(64)
    assert len({presets.wan(128), presets.wan(128), presets.hope(128, 1e4)}) == 2


def test_learned_frequencies_stay_the_same_tensor():
    frequencies = torch.randn(3, 2, 4, requires_grad=True)
    spec = RopeSpec(8, frequencies, None)
    assert spec.learned and spec.inv_freq is frequencies and spec.dense_tensor() is frequencies
    static = RopeSpec(8, frequencies.detach(), None)
    exact = static.steps().double() * 2.0 ** (static.shift - spec.shift)
    assert float((spec.steps().double() - exact).abs().max()) <= 1.0  # cut, not rounded
    chosen = RopeSpec(8, torch.ones(4, requires_grad=True), (0, 1, 1, 2))
    assert chosen.dense_tensor().tolist() == [[[1, 0, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]]
    with pytest.raises(ValueError, match="inv_freq"):
        spec.dense()


BAD = [
    (lambda: RopeSpec(0, (1.0,), (0,)), ValueError, "head_dim"),
    (lambda: RopeSpec(513, (1.0,), (0,)), ValueError, "head_dim"),
    (lambda: RopeSpec(4.0, (1.0,), (0,)), ValueError, "head_dim"),
    (lambda: RopeSpec(4, (1.0,) * 3, (0,) * 3), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, (), ()), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, 1.0, 0), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, ("1.0",), (0,)), TypeError, "inv_freq"),
    (lambda: RopeSpec(4, (float("nan"),), (0,)), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, (float("inf"),), (0,)), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, (2.0**21,), (0,)), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, ((1.0, 1.0), (1.0,)), ((0, 0), (0,))), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, torch.ones(2, requires_grad=True), None), ValueError, "inv_freq"),
    (lambda: RopeSpec(4, (1.0, 1.0), (0,)), ValueError, "axis"),
    (lambda: RopeSpec(4, (1.0,), (-1,)), ValueError, "axis"),
    (lambda: RopeSpec(4, (1.0,), (0.5,)), ValueError, "axis"),
    (lambda: RopeSpec(4, (1.0,), (8,)), ValueError, "axes"),
    (lambda: RopeSpec(4, (1.0,), (1,), axes=1), ValueError, "axes"),
    (lambda: RopeSpec(4, (((1.0,),),), None, axes=2), ValueError, "axes"),
    (lambda: RopeSpec(4, (1.0,), (0,), "neox"), ValueError, "pairing"),
    (lambda: RopeSpec(4, (1.0,), (0,), rotary_dim=3), ValueError, "rotary_dim"),
    (lambda: RopeSpec(4, (1.0,), (0,), rotary_dim=4), ValueError, "rotary_dim"),
    (lambda: RopeSpec(4, (1.0,), (0,), attention_factor=float("nan")), ValueError, "attention_factor"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
