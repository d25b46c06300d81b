"""Presets of language and vision-language models against transformers, and against the formulas written out."""

from __future__ import annotations

import pytest
import torch
from rope.angle_tables import assert_within, columns, table, table_bound, turn, turn_bound

from saccade.rope import positions as place
from saccade.rope import presets

HEADS, DIM, SEQUENCE = 2, 128, 60


def _qwen(name, sections, base, interleaved=False):
    """Rotary class and apply function of a Qwen model, with a small config."""
    pytest.importorskip("transformers")
    import importlib

    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    config = getattr(configs, prefix + "TextConfig")(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        rope_parameters={"rope_type": "default", "rope_theta": base, "mrope_section": list(sections)},
    )
    classes = {"qwen2_vl": "Qwen2VLRotaryEmbedding", "qwen2_5_vl": "Qwen2_5_VLRotaryEmbedding"}
    return getattr(models, classes.get(name, "Qwen3VLTextRotaryEmbedding"))(config), models


def _positions():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 4000, (3, 1, SEQUENCE), generator=generator)


@pytest.mark.parametrize(
    ("name", "preset", "sections", "base"),
    [
        ("qwen2_vl", presets.mrope, (16, 24, 24), 1e6),
        ("qwen2_5_vl", presets.mrope, (16, 24, 24), 1e6),
        ("qwen2_vl", presets.mrope, (20, 30, 14), 1e4),
        ("qwen3_vl", presets.mrope_interleaved, (24, 20, 20), 5e6),
        ("qwen3_vl", presets.mrope_interleaved, (22, 21, 21), 1e4),
    ],
)
def test_mrope_is_transformers(name, preset, sections, base):
    rope, models = _qwen(name, sections, base)
    positions = _positions()
    x = torch.randn(1, HEADS, SEQUENCE, DIM)
    cos, sin = rope(x, positions)
    rotated, _ = models.apply_rotary_pos_emb(x, x, cos, sin)
    spec = preset(DIM, base, sections)
    bound = table_bound(spec, positions[:, 0], base=base)
    for ours, theirs in zip(table(spec, positions[:, 0]), (cos, sin), strict=True):
        assert_within(columns(ours, spec)[0], theirs[0], columns(bound, spec)[0], name)
    assert_within(turn(x, positions, spec), rotated, turn_bound(x, bound, spec), f"{name} rotated")


@pytest.mark.parametrize(("head_dim", "merge"), [(80, 2), (72, 2), (64, 1)])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_vision_is_transformers(name, head_dim, merge):
    pytest.importorskip("transformers")
    import importlib

    from transformers.vision_utils import get_vision_position_ids

    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[name]
    sizes = {"num_heads": HEADS, "hidden_size": HEADS * head_dim, "embed_dim": HEADS * head_dim}
    config = getattr(configs, prefix + "VisionConfig")(**sizes)
    config.head_dim = head_dim
    rope = getattr(models, prefix + "VisionRotaryEmbedding")
    grids = [(2, 4, 6), (1, 8, 2)]
    theirs = get_vision_position_ids(torch.tensor(grids), merge)
    positions = place.qwen_vision_positions(grids, merge=merge)
    assert torch.equal(positions.T, theirs)
    x = torch.randn(len(theirs), HEADS, head_dim)
    cos, sin = rope(config)(x, theirs)
    rotated, _ = models.apply_rotary_pos_emb_vision(x, x, cos, sin)
    spec = presets.qwen_vision(head_dim)
    bound = table_bound(spec, positions, base=1e4)
    for ours, other in zip(table(spec, positions), (cos, sin), strict=True):
        assert_within(columns(ours, spec)[0], other, columns(bound, spec)[0], name)
    x = x.transpose(0, 1)[None]
    assert_within(turn(x, positions, spec), rotated.transpose(0, 1)[None], turn_bound(x, bound, spec), "rotated")


def test_vanilla_is_llama():
    pytest.importorskip("transformers")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_type": "default", "rope_theta": 5e5}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    x, positions = torch.randn(1, 2, SEQUENCE, DIM), torch.arange(SEQUENCE)[None] + 1000
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    spec = presets.vanilla(DIM, 5e5)
    rotated, _ = apply_rotary_pos_emb(x, x, cos, sin)
    bound = table_bound(spec, positions, base=5e5)
    assert_within(turn(x, positions, spec), rotated, turn_bound(x, bound, spec), "llama")


def test_interleaved_pairing_is_the_complex_product():
    x, positions = torch.randn(1, 1, 9, 16, dtype=torch.float64), torch.arange(9)[None]
    spec = presets.vanilla(16, 100.0, pairing="interleaved")
    angle = positions[0, :, None] * torch.tensor(spec.inv_freq, dtype=torch.float64)
    product = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turn(x, positions, spec), torch.view_as_real(product).flatten(-2), rtol=0, atol=1e-8)


def _brute_force_axes(name, pairs):
    """Axis and whether it turns, pair by pair, from the formulas in words."""
    found = []
    for i in range(pairs):
        if name in ("videorope", "hope"):
            # two spatial axes alternate over the highest 3/4 of the frequencies; the rest is time or nothing
            found.append((1 if i % 2 == 0 else 2, True) if i < 3 * pairs // 4 else (0, name == "videorope"))
        elif name == "mmrope":
            found.append(
                (["t", "t", "h", "w", "h", "w", "h", "w"][i % 8].translate({116: "0", 104: "1", 119: "2"}), True)
            )
        else:
            found.append((0, True))
    return [(int(axis), turns) for axis, turns in found]


@pytest.mark.parametrize("name", ["videorope", "hope", "mmrope", "tad", "v2pe"])
@pytest.mark.parametrize("head_dim", [128, 64, 256])
def test_axes_and_frequencies_pair_by_pair(name, head_dim):
    spec = getattr(presets, name)(head_dim, 1e6)
    for i, (axis, turns) in enumerate(_brute_force_axes(name, head_dim // 2)):
        assert spec.axis[i] == axis
        assert spec.inv_freq[i] == pytest.approx(1e6 ** (-2 * i / head_dim) if turns else 0.0, rel=1e-14)
    assert spec.axes == 3 and spec.pairing == "half"


@pytest.mark.parametrize("head_dim", [72, 80, 96, 32, 10])
def test_other_widths_keep_the_proportions(head_dim):
    spec = presets.hope(head_dim, 1e4)
    still = sum(f == 0.0 for f in spec.inv_freq)
    assert abs(still - head_dim / 8) < 2 and spec.axis.count(1) == spec.axis.count(2)
    assert presets.hope(head_dim, 1e4, zeroed=1).active == (0, head_dim // 2 - 1)
    assert presets.videorope(head_dim, 1e4, temporal=0).axis.count(0) == 0


def test_hope_leaves_its_zeroed_columns_alone():
    spec = presets.hope(128, 1e6)
    x, positions = torch.randn(1, 2, 5, 128), torch.randint(-(2**31), 2**31, (3, 5))
    turned = turn(x, positions, spec)
    assert torch.equal(turned[..., 48:64], x[..., 48:64].double()) and torch.equal(
        turned[..., 112:], x[..., 112:].double()
    )
    assert not torch.equal(turned[..., :48], x[..., :48].double())


def test_mhrope_turns_each_head_by_its_own_axis():
    spec = presets.mhrope(32, 1e4, 8, (2, 3, 2))
    x, positions = torch.randn(1, 16, 4, 32), torch.randint(0, 99, (3, 4))
    turned = turn(x, positions, spec)
    one_axis = presets.vanilla(32, 1e4)
    for head in range(16):
        kv = head // 2
        axis = 0 if kv < 2 else 1 if kv < 5 else 2
        alone = turn(x[:, head : head + 1], positions[axis : axis + 1], one_axis)
        expected = alone if kv < 7 else x[:, head : head + 1].double()
        assert torch.equal(turned[:, head : head + 1], expected)


def test_partial_rotary_width():
    spec = presets.mrope_interleaved(256, 1e7, (11, 11, 10), rotary_dim=64)
    assert (spec.rotary_dim, spec.head_dim) == (64, 256)
    assert [spec.axis.count(n) for n in range(3)] == [11, 11, 10]


BAD = [
    (lambda: presets.vanilla(0, 1e4), ValueError, "head_dim"),
    (lambda: presets.vanilla(63, 1e4), ValueError, "head_dim"),
    (lambda: presets.vanilla(True, 1e4), TypeError, "head_dim"),
    (lambda: presets.vanilla(64, "1e4"), TypeError, "base"),
    (lambda: presets.vanilla(64, 0.5), ValueError, "base"),
    (lambda: presets.vanilla(64, float("inf")), ValueError, "base"),
    (lambda: presets.vanilla(64, 1e4, rotary_dim=33), ValueError, "rotary_dim"),
    (lambda: presets.vanilla(64, 1e4, rotary_dim=128), ValueError, "head_dim"),
    (lambda: presets.vanilla(64, 1e4, pairing="neox"), ValueError, "pairing"),
    (lambda: presets.mrope(128, 1e6, (16, 24, 23)), ValueError, "sections"),
    (lambda: presets.mrope(128, 1e6, (16, 24, 25, -1)), ValueError, r"sections\[3\]"),
    (lambda: presets.mrope(128, 1e6, 64), TypeError, "sections"),
    (lambda: presets.mrope(128, 1e6, (16.5, 23.5, 24)), TypeError, r"sections\[0\]"),
    (lambda: presets.mrope_interleaved(128, 1e6, (32, 32)), ValueError, "sections"),
    (lambda: presets.mrope_interleaved(128, 1e6, (4, 30, 30)), ValueError, "sections"),
    (lambda: presets.qwen_vision(82), ValueError, "head_dim"),
    (lambda: presets.tad(-2, 1e4), ValueError, "head_dim"),
    (lambda: presets.v2pe(64, 1), ValueError, "base"),
    (lambda: presets.videorope(128, 1e6, temporal=65), ValueError, "temporal"),
    (lambda: presets.hope(128, 1e6, zeroed=-1), ValueError, "zeroed"),
    (lambda: presets.hope(128, 1e6, zeroed=16.0), TypeError, "zeroed"),
    (lambda: presets.mhrope(128, 1e6, 8, (4, 4, 4)), ValueError, "sections"),
    (lambda: presets.mhrope(128, 1e6, 0, (1, 1, 1)), ValueError, "kv_heads"),
    (lambda: presets.mhrope(128, 1e6, 8, (0, 0, 0)), ValueError, "sections"),
    (lambda: presets.mmrope(31, 1e4), ValueError, "head_dim"),
    (lambda: presets.mmrope(1024, 1e4), ValueError, "head_dim"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
