"""Modules: what they apply, HoPE's own draws of gamma, and Mochi's learned frequencies."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from rope.angle_tables import turn

from saccade.rope import modules, positions, presets
from saccade.rope.modules import GAMMAS, HoPE, MochiRoPE, RotaryEmbedding

SEGMENTS = [2, (2, 3, 3), 1, (3, 2, 2), 2]

MODULES = {
    "MRoPE": (lambda: modules.MRoPE(128, 1e6, (16, 24, 24)), presets.mrope(128, 1e6, (16, 24, 24)), (SEGMENTS,), {}),
    "MRoPEInterleaved": (
        lambda: modules.MRoPEInterleaved(128, 5e6, (24, 20, 20)),
        presets.mrope_interleaved(128, 5e6, (24, 20, 20)),
        (SEGMENTS,),
        {},
    ),
    "VideoRoPE": (lambda: modules.VideoRoPE(128, 1e6), presets.videorope(128, 1e6), (SEGMENTS,), {}),
    "HoPE": (lambda: HoPE(128, 1e6), presets.hope(128, 1e6), (SEGMENTS,), {"gamma": 0.75}),
    "QwenVisionRoPE": (lambda: modules.QwenVisionRoPE(80), presets.qwen_vision(80), ([(1, 4, 4)],), {}),
    "WanRoPE": (lambda: modules.WanRoPE(), presets.wan(), ((2, 3, 4),), {}),
    "HunyuanVideoRoPE": (lambda: modules.HunyuanVideoRoPE(), presets.hunyuan_video(), ((2, 3, 4),), {"suffix": 3}),
    "CogVideoXRoPE": (lambda: modules.CogVideoXRoPE(), presets.cogvideox(), ((2, 3, 4),), {"prefix": 3}),
    "CosmosRoPE": (lambda: modules.CosmosRoPE(), presets.cosmos(), ((2, 3, 4),), {"fps": 30}),
    "LTXRoPE": (lambda: modules.LTXRoPE(64, 4), presets.ltx(64, 4), ((2, 3, 4),), {"scale": (0.32, 32, 32)}),
    "LTX2RoPE": (lambda: modules.LTX2RoPE(64, 4), presets.ltx2(64, 4), ((2, 3, 4),), {"fps": 25}),
    "FluxRoPE": (lambda: modules.FluxRoPE(), presets.flux(), (3, (4, 5)), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_applies_its_spec_at_its_positions(name):
    make, spec, arguments, options = MODULES[name]
    rope = make().eval()
    assert rope.spec == spec and not list(rope.parameters()) and not list(rope.buffers())
    place = rope.positions(*arguments, **options)
    place = place[0] if isinstance(place, tuple) else place
    assert place.shape[0] == spec.axes
    heads = max(2, spec.groups)
    q = torch.randn(1, heads, place.shape[1], spec.head_dim, dtype=torch.float64)
    turned, none = rope(q, None, place)
    assert none is None
    torch.testing.assert_close(turned, turn(q, place, spec), rtol=0, atol=1e-12)
    q, k = rope(q, q, place[:, None])
    assert torch.equal(q, turned) and torch.equal(k, turned)


@pytest.mark.parametrize("make", [lambda: modules.WanRoPE(32), lambda: MochiRoPE(32, 2)])
def test_module_compiles_without_graph_break(make):
    rope = make()
    place = rope.positions((2, 3, 4))
    q = torch.randn(1, 2, 24, 32)
    compiled = torch.compile(rope, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, None, place)[0], rope(q, None, place)[0])


def test_audio_module_has_one_axis():
    rope = modules.LTX2RoPE(64, 2, axes=1, layout="split")
    assert rope.positions(7).shape == (1, 7) and rope.spec.pairing == "half"


def test_every_module_is_listed_and_has_a_doctest():
    for name in modules.__all__:
        assert ">>>" in inspect.getdoc(getattr(modules, name)), name
    assert set(MODULES) | {"RotaryEmbedding", "MochiRoPE"} == set(modules.__all__)


def test_mrope_switches_to_absolute_time():
    rope = modules.MRoPE(128, 1e6, (16, 24, 24))
    plain, _ = rope.positions([(2, 1, 1)])
    timed, _ = rope.positions([(2, 1, 1)], tokens_per_second=2, second_per_grid=2.0)
    assert plain[0].tolist() == [0, 1] and timed[0].tolist() == [0, 4]


def test_hope_draws_its_gammas_from_its_own_generator():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    rope, twin = HoPE(128, 1e6, seed=5), HoPE(128, 1e6, seed=5)
    drawn = [rope.positions(SEGMENTS) for _ in range(20)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    for ours, theirs in zip(drawn, (twin.positions(SEGMENTS) for _ in range(20)), strict=True):
        assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    assert len({end for _, end in drawn}) > 5


def test_hope_draws_one_gamma_per_video_and_all_of_them():
    rope = HoPE(128, 1e6)
    seen = set()
    for _ in range(60):
        place, _ = rope.positions(SEGMENTS)
        first = float(place[0, 2 + 9] - place[0, 2])  # one frame of the first video
        second = float(place[0, 21 + 4] - place[0, 21])
        seen.add((first, second))
    assert {a for a, _ in seen} == set(GAMMAS) == {b for _, b in seen}
    assert any(a != b for a, b in seen)


def test_hope_explicit_gamma_wins_over_drawing():
    rope = HoPE(128, 1e6)
    state = rope.generator.get_state()
    place, _ = rope.positions(SEGMENTS, gamma=[0.5, 1.5])
    expected, _ = positions.multimodal_positions(SEGMENTS, rule="hope", gamma=[0.5, 1.5])
    assert torch.equal(place, expected) and torch.equal(rope.generator.get_state(), state)


def test_hope_refuses_to_guess_at_inference():
    rope = HoPE(128, 1e6).eval()
    with pytest.raises(ValueError, match="gamma"):
        rope.positions(SEGMENTS)
    place, following = rope.positions(SEGMENTS, gamma=0.75)
    after, end = rope.positions([1, 1], start=following)
    assert after[0].tolist() == [following, following + 1] and end == following + 2
    assert torch.equal(torch.cat((place, after), 1), rope.positions([*SEGMENTS, 2], gamma=0.75)[0])


def test_hope_generator_is_part_of_the_state():
    rope = HoPE(128, 1e6, seed=1)
    rope.sample(7)
    state = copy.deepcopy(rope.state_dict())
    ahead = rope.sample(9)
    other = HoPE(128, 1e6, seed=2)
    other.load_state_dict(state)
    assert other.sample(9) == ahead
    rope.load_state_dict(state)
    assert copy.deepcopy(rope).sample(9) == rope.sample(9) == ahead


def test_mochi_learns_its_frequencies():
    rope = MochiRoPE(16, 2).double()
    torch.nn.init.normal_(rope.frequencies)
    place = rope.positions((2, 2, 2))
    q = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    turned, _ = rope(q, None, place)
    weight = torch.randn_like(turned)
    (turned * weight).sum().backward()
    # Central differences on the parameter itself.
    expected = torch.zeros_like(rope.frequencies)
    step = 1e-4  # the angle is rounded at 2^-32 turn, so a smaller step would measure that
    with torch.no_grad():
        for index in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(8)).tolist():
            sides = []
            for sign in (1, -1):
                shifted = rope.frequencies.detach().clone()
                shifted[tuple(index)] += sign * step
                sides.append((turn(q, place, presets.mochi(shifted)) * weight).sum())
            expected[tuple(index)] = (sides[0] - sides[1]) / (2 * step)
    scale = float(expected.abs().max())
    assert float((rope.frequencies.grad - expected).abs().max()) <= 1e-4 * scale


def test_mochi_follows_its_parameter():
    rope = MochiRoPE(16, 2)
    assert rope.spec.learned and rope.spec is rope.spec and rope.spec.inv_freq is rope.frequencies
    clone = copy.deepcopy(rope)
    assert clone.spec.inv_freq is clone.frequencies and clone.frequencies is not rope.frequencies
    rope.frequencies = torch.nn.Parameter(torch.ones(3, 2, 8))
    assert rope.spec.inv_freq is rope.frequencies
    rope.requires_grad_(False)
    frozen = rope.spec
    assert not frozen.learned and frozen is rope.spec and frozen.inv_freq[0][0][0] == 1.0
    with torch.no_grad():
        rope.frequencies.fill_(2.0)
    assert rope.spec.inv_freq[0][0][0] == 2.0
    rope.requires_grad_(True)
    assert rope.spec.learned


BAD = [
    (lambda: RotaryEmbedding(None), TypeError, "spec"),
    (lambda: HoPE(128, 1e6, gammas=()), ValueError, "gammas"),
    (lambda: HoPE(128, 1e6, gammas=(0.0,)), ValueError, r"gammas\[0\]"),
    (lambda: HoPE(128, 1e6, seed=0.5), TypeError, "seed"),
    (lambda: HoPE(127, 1e6), ValueError, "head_dim"),
    (lambda: HoPE(128, 1e6).sample(-1), ValueError, "videos"),
    (lambda: HoPE(128, 1e6).positions(3), TypeError, "segments"),
    (lambda: MochiRoPE(15, 2), ValueError, "head_dim"),
    (lambda: MochiRoPE(16, 0), ValueError, "heads"),
    (lambda: modules.VideoRoPE(128, 1e6).positions([-1]), ValueError, "segments"),
    (lambda: modules.WanRoPE(5), ValueError, "head_dim"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
