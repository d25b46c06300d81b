"""Context extension against transformers' own functions, and against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from saccade.rope import presets, scaling

UNIT = 2.0**-24


def _peer(kind, dim, base, *, length=None, max_positions=4096, partial=1.0, **parameters):
    """Frequencies and attention factor of transformers' function of this name."""
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    given = {"rope_type": kind, "rope_theta": base, "partial_rotary_factor": partial, **parameters}
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=max_positions,
        rope_parameters=given,
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def _assert_equal(spec, peer, base, extra=4):
    """Every frequency within float32 rounding of the peer's: the exponent (ln base) and `extra` operations."""
    theirs, factor = peer
    ours = torch.tensor(spec.inv_freq, dtype=torch.float64)
    assert ours.shape == theirs.shape
    relative = ((ours - theirs.double()).abs() / theirs.double().clamp(min=1e-300)).max()
    print(f"largest relative difference {float(relative):.2e}")
    assert torch.equal(ours == 0, theirs == 0)
    assert float(relative) <= UNIT * (math.log(base) + extra)
    assert spec.attention_factor == pytest.approx(float(factor), rel=1e-12)


BASES = [(64, 1e4), (128, 5e5), (80, 1e6)]


@pytest.mark.parametrize(("dim", "base"), BASES)
@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_linear(dim, base, factor):
    spec = scaling.linear(presets.vanilla(dim, base), factor)
    _assert_equal(spec, _peer("linear", dim, base, factor=factor), base)


@pytest.mark.parametrize(("dim", "base"), BASES)
@pytest.mark.parametrize(("factor", "length"), [(2.0, 100), (2.0, 4096), (4.0, 9000), (1.0, 5000)])
def test_dynamic_ntk(dim, base, factor, length):
    spec = scaling.dynamic_ntk(presets.vanilla(dim, base), factor, 4096, length)
    peer = _peer("dynamic", dim, base, length=length, factor=factor)
    _assert_equal(spec, peer, base * factor * 4)


@pytest.mark.parametrize(("dim", "base"), BASES)
def test_ntk_is_another_base(dim, base):
    spec = scaling.ntk(presets.vanilla(dim, base), 8.0)
    other = presets.vanilla(dim, base * 8.0 ** (dim / (dim - 2)))
    assert spec.inv_freq == pytest.approx(other.inv_freq, rel=1e-12)
    # dynamic NTK at L = L0 * (factor - 1 + s) / factor is static NTK with factor s.
    stretched = scaling.dynamic_ntk(presets.vanilla(dim, base), 2.0, 1000, 4500)
    assert spec.inv_freq == pytest.approx(stretched.inv_freq, rel=1e-12)


@pytest.mark.parametrize(("dim", "base"), BASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_fast": 24.0, "beta_slow": 2.0},
        {"truncate": False},
        {"attention_factor": 0.7},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
    ],
)
def test_yarn(dim, base, options):
    spec = scaling.yarn(presets.vanilla(dim, base), 4.0, 4096, **options)
    peer = _peer("yarn", dim, base, factor=4.0, original_max_position_embeddings=4096, **options)
    # The ramp is a difference of pairs of a few units; where both ends add up it costs a few roundings more.
    _assert_equal(spec, peer, base, extra=4 + 4 * 4)


@pytest.mark.parametrize("length", [None, 1024, 1025, 100_000])
def test_longrope(length):
    dim, base = 96, 1e4
    short = [1.0 + 0.01 * i for i in range(dim // 2)]
    long = [1.0 + 0.9 * i for i in range(dim // 2)]
    spec = scaling.longrope(presets.vanilla(dim, base), short, long, 1024, length=length, factor=16.0)
    peer = _peer(
        "longrope",
        dim,
        base,
        length=length,
        factor=16.0,
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=1024,
    )
    _assert_equal(spec, peer, base)
    assert scaling.longrope(presets.vanilla(dim, base), short, long, 1024, attention_factor=1.0).attention_factor == 1.0


@pytest.mark.parametrize(("dim", "base"), BASES)
@pytest.mark.parametrize("options", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 0.5, 16.0, 2048)])
def test_llama3(dim, base, options):
    factor, low, high, original = options
    spec = scaling.llama3(presets.vanilla(dim, base), factor, original, low_freq_factor=low, high_freq_factor=high)
    peer = _peer(
        "llama3",
        dim,
        base,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    # The blend is a difference of numbers up to high / (high - low) of itself, times factor where it is nearly zero.
    _assert_equal(spec, peer, base, extra=8 + 4 * factor)


@pytest.mark.parametrize(
    ("dim", "partial", "factor"), [(64, 0.25, 1.0), (128, 0.5, 8.0), (96, 1.0, 2.0), (80, 0.0, 1.0)]
)
def test_proportional(dim, partial, factor):
    spec = scaling.proportional(presets.vanilla(dim, 1e6), partial, factor=factor)
    _assert_equal(spec, _peer("proportional", dim, 1e6, factor=factor, partial=partial), 1e6)
    assert spec.rotary_dim == dim and spec.active == (0, int(partial * dim // 2))


def test_riflex_is_the_formula_of_the_paper():
    before = presets.wan(128)
    after = scaling.riflex(before, 6, 81)
    changed = [i for i, (x, y) in enumerate(zip(before.inv_freq, after.inv_freq, strict=True)) if x != y]
    assert changed == [5] and before.axis[5] == 0
    assert after.inv_freq[5] == 0.9 * 2 * math.pi / 81
    # The same pair counted within its axis, wherever that lies in the row.
    late = scaling.riflex(presets.videorope(128, 1e6), 4, 200)
    assert late.inv_freq[51] == 0.9 * 2 * math.pi / 200
    height = scaling.riflex(before, 1, 50, axis=1)
    assert height.inv_freq[22] == 0.9 * 2 * math.pi / 50


def test_each_axis_of_a_generator_is_its_own_progression():
    spec = scaling.ntk(presets.wan(128), 3.0)
    for axis, width in enumerate((44, 42, 42)):
        ours = [f for f, a in zip(spec.inv_freq, spec.axis, strict=True) if a == axis]
        base = 1e4 * 3.0 ** (width / (width - 2))
        assert ours == pytest.approx([base ** (-2 * i / width) for i in range(width // 2)], rel=1e-12)
    assert scaling.ntk(presets.wan(128), 3.0, axes=[0]).inv_freq[22:] == presets.wan(128).inv_freq[22:]
    cosmos = scaling.ntk(scaling.ntk(presets.cosmos(128, scale=(1.0, 1.0, 1.0)), 2.0, axes=[0]), 4.0, axes=[1, 2])
    assert cosmos.inv_freq == pytest.approx(presets.cosmos(128, scale=(2.0, 4.0, 4.0)).inv_freq, rel=1e-12)


def test_shared_progressions_are_scaled_whatever_their_axes():
    plain = scaling.yarn(presets.vanilla(128, 1e6), 4.0, 32768)
    mrope = scaling.yarn(presets.mrope(128, 1e6, (16, 24, 24)), 4.0, 32768)
    assert plain.inv_freq == mrope.inv_freq and plain.attention_factor == mrope.attention_factor
    hope = scaling.yarn(presets.hope(128, 1e6), 4.0, 32768)
    assert hope.inv_freq == (*plain.inv_freq[:48], *[0.0] * 16)
    heads = scaling.yarn(presets.mhrope(128, 1e6, 4, (1, 1, 1)), 4.0, 32768)
    assert heads.inv_freq == (plain.inv_freq,) * 3 + ((0.0,) * 64,)
    # VideoRoPE++ scales the temporal block alone.
    temporal = scaling.ntk(presets.videorope(128, 1e6), 4.0, axes=[0])
    assert temporal.inv_freq[:48] == presets.videorope(128, 1e6).inv_freq[:48]
    assert temporal.inv_freq[48:] == scaling.ntk(presets.vanilla(128, 1e6), 4.0).inv_freq[48:]


def test_everything_else_of_the_spec_stays():
    spec = presets.mrope_interleaved(256, 1e7, (11, 11, 10), rotary_dim=64)
    scaled = scaling.yarn(scaling.llama3(spec, 1.0, 8192), 2.0, 8192)
    assert (scaled.axis, scaled.pairing, scaled.rotary_dim, scaled.axes) == (spec.axis, spec.pairing, 64, 3)
    twice = scaling.yarn(
        scaling.yarn(presets.vanilla(64, 1e4), 1.0, 2048, attention_factor=2.0), 1.0, 2048, attention_factor=3.0
    )
    assert twice.attention_factor == 6.0


SPEC = presets.vanilla(8, 1e4)
DENSE = presets.mochi(torch.zeros(3, 1, 4))
BAD = [
    (lambda: scaling.linear(None, 2.0), TypeError, "spec"),
    (lambda: scaling.linear(DENSE, 2.0), ValueError, "spec"),
    (lambda: scaling.linear(SPEC, 0.0), ValueError, "factor"),
    (lambda: scaling.linear(SPEC, "2"), TypeError, "factor"),
    (lambda: scaling.linear(SPEC, 2.0, axes=[1]), ValueError, "axes"),
    (lambda: scaling.linear(SPEC, 2.0, axes=[]), ValueError, "axes"),
    (lambda: scaling.ntk(SPEC, -1.0), ValueError, "factor"),
    (lambda: scaling.ntk(presets.ltx(64, 2), 2.0), ValueError, "spec"),
    (lambda: scaling.ntk(presets.vanilla(2, 1e4), 2.0), ValueError, "spec"),
    (lambda: scaling.ntk(scaling.linear(SPEC, 3.0), 2.0), ValueError, "spec"),
    (lambda: scaling.dynamic_ntk(SPEC, 2.0, 0, 10), ValueError, "original_length"),
    (lambda: scaling.dynamic_ntk(SPEC, 2.0, 10, -1), ValueError, "length"),
    (lambda: scaling.dynamic_ntk(SPEC, float("nan"), 10, 10), ValueError, "factor"),
    (lambda: scaling.yarn(SPEC, 2.0, 1.5), TypeError, "original_length"),
    (lambda: scaling.yarn(SPEC, 2.0, 64, beta_fast=1.0), ValueError, "beta_fast"),
    (lambda: scaling.yarn(SPEC, 2.0, 64, beta_slow=0.0), ValueError, "beta_slow"),
    (lambda: scaling.yarn(SPEC, 2.0, 64, truncate=1), TypeError, "truncate"),
    (lambda: scaling.yarn(SPEC, 2.0, 64, attention_factor=-1.0), ValueError, "attention_factor"),
    (lambda: scaling.longrope(SPEC, [1.0] * 4, [1.0] * 3, 64, factor=2.0), ValueError, "long_factor"),
    (lambda: scaling.longrope(SPEC, [1.0, 1.0, 0.0, 1.0], [1.0] * 4, 64, factor=2.0), ValueError, r"short_factor\[2\]"),
    (lambda: scaling.longrope(SPEC, [1.0] * 4, [1.0] * 4, 64), ValueError, "factor"),
    (lambda: scaling.longrope(SPEC, [1.0] * 4, [1.0] * 4, 1, factor=2.0), ValueError, "original_length"),
    (lambda: scaling.llama3(SPEC, 8.0, 64, low_freq_factor=4.0), ValueError, "high_freq_factor"),
    (lambda: scaling.llama3(SPEC, 0.0, 64), ValueError, "factor"),
    (lambda: scaling.riflex(SPEC, 0, 64), ValueError, "k"),
    (lambda: scaling.riflex(SPEC, 5, 64), ValueError, "k"),
    (lambda: scaling.riflex(SPEC, 1, 64, axis=1), ValueError, "k"),
    (lambda: scaling.riflex(SPEC, 1, 0), ValueError, "length"),
    (lambda: scaling.proportional(SPEC, 1.5), ValueError, "proportion"),
    (lambda: scaling.proportional("spec", 0.5), TypeError, "spec"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
