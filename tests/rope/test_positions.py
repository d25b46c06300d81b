"""Positions on grids: by hand, properties, and bad input. Those of each generator are in test_presets_diffusion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope.angle_tables import table, turn

from saccade.rope import positions as place
from saccade.rope import presets

sizes = st.integers(0, 5)
quarters = st.integers(-40, 40).map(lambda n: n / 4)


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(sizes, sizes, sizes),
    st.tuples(quarters, quarters, quarters),
    st.tuples(quarters, quarters, quarters),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_grid_one_token_at_a_time(grid, stride, origin, centered, prefix, suffix):
    got = place.grid_positions(grid, stride=stride, origin=origin, centered=centered, prefix=prefix, suffix=suffix)
    tokens = [(0.0, 0.0, 0.0)] * prefix
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                index = [n - ((size - 1) / 2 if c else 0) for n, size, c in zip((t, h, w), grid, centered, strict=True)]
                tokens.append(tuple(o + s * n for o, s, n in zip(origin, stride, index, strict=True)))
    tokens += [(0.0, 0.0, 0.0)] * suffix
    assert got.shape == (3, len(tokens))
    assert got.double().T.tolist() == [list(token) for token in tokens]
    whole = all(float(x).is_integer() for token in tokens for x in token)
    assert got.dtype == (torch.int64 if whole else torch.float64)


@settings(deadline=None, max_examples=50)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), st.integers(-(2**30), 2**30))
def test_attention_scores_do_not_see_a_common_move(grid, move):
    spec = presets.wan(32)
    still = place.grid_positions(grid)
    moved = place.grid_positions(grid, origin=(move, -move, 3 * move))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, still.shape[1], 32, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = [turn(q, p, spec) @ turn(k, p, spec).mT for p in (still, moved)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)


def test_dtype_and_device():
    assert place.grid_positions((1, 2, 2), dtype=torch.float32).dtype == torch.float32
    assert place.grid_positions((1, 2, 2), stride=(1, 0.5, 2), dtype=torch.float32).dtype == torch.float32
    assert place.grid_positions((1, 1, 2), dtype=torch.int32).dtype == torch.int32
    assert place.grid_positions((2, 1, 1), device="meta").device.type == "meta"
    big = place.grid_positions((1, 1, 2), origin=(0, 0, 2**31), stride=(1, 1, 0.5))
    assert big[2].tolist() == [2.0**31, 2.0**31 + 0.5]


def test_text_tokens_of_a_grid_do_not_turn():
    cos, sin = table(presets.cogvideox(64), place.grid_positions((1, 2, 2), prefix=2, suffix=1))
    assert bool((cos[:, [0, 1, 6]] == 1).all()) and not sin[:, [0, 1, 6]].any()


def test_one_frame_and_one_pixel():
    assert place.cogvideox_positions((1, 1, 1), crop=((2, 3), (4, 5))).tolist() == [[0], [2], [3]]
    assert place.mochi_positions((1, 1, 1)).tolist() == [[0], [0], [0]]
    assert place.ltx_positions((1, 1, 1), scale=(0.32, 32, 32)).tolist() == [[-1], [-1], [-1]]
    assert place.flux_positions(0, (1, 1)).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize(
    "empty",
    [
        place.grid_positions((0, 3, 3)),
        place.cogvideox_positions((3, 0, 3), crop=((0, 0), (4, 4))),
        place.cosmos_positions((0, 1, 1), fps=24),
        place.mochi_positions((2, 0, 0)),
        place.ltx_positions((0, 4, 4), scale=(1, 32, 32)),
        place.ltx2_positions((2, 0, 3)),
        place.flux_positions(0, (0, 4)),
    ],
)
def test_a_grid_of_nothing_has_no_tokens(empty):
    assert empty.shape == (3, 0)


def test_lists_of_nothing():
    assert place.qwen_vision_positions([]).shape == (2, 0)
    assert place.qwen_vision_positions([(0, 4, 4)]).shape == (2, 0)
    assert place.ltx2_audio_positions(0).shape == (1, 0)
    assert place.seedance_positions([]).shape == (4, 0)


def test_ltx_in_seconds_reaches_one_at_its_base():
    positions = place.ltx_positions((3, 1, 1), scale=(8 / 25, 32, 32), base=(0.64, 2048, 2048))
    assert positions[0].tolist() == [-1, 0, 1]


BAD = [
    (lambda: place.grid_positions((2, 3)), ValueError, "grid"),
    (lambda: place.grid_positions(5), TypeError, "grid"),
    (lambda: place.grid_positions((2, -3, 4)), ValueError, r"grid\[1\]"),
    (lambda: place.grid_positions((2, 3.0, 4)), TypeError, r"grid\[1\]"),
    (lambda: place.grid_positions((2, 3, 4), stride=(1, 2)), ValueError, "stride"),
    (lambda: place.grid_positions((2, 3, 4), stride=(1, 2, float("nan"))), ValueError, r"stride\[2\]"),
    (lambda: place.grid_positions((2, 3, 4), origin="000"), TypeError, "origin"),
    (lambda: place.grid_positions((2, 3, 4), centered=(True, False)), ValueError, "centered"),
    (lambda: place.grid_positions((2, 3, 4), centered=(1, 0, 0)), TypeError, "centered"),
    (lambda: place.grid_positions((2, 3, 4), prefix=-1), ValueError, "prefix"),
    (lambda: place.grid_positions((2, 3, 4), suffix=1.5), TypeError, "suffix"),
    (lambda: place.grid_positions((2, 3, 4), dtype=torch.bfloat16), ValueError, "dtype"),
    (lambda: place.grid_positions((2, 3, 4), stride=(1, 1, 0.5), dtype=torch.int64), ValueError, "dtype"),
    (lambda: place.cogvideox_positions((2, 3, 4), crop=(0, 0, 3, 4)), ValueError, "crop"),
    (lambda: place.cogvideox_positions((2, 3, 4), crop=((0, 0), (3, "4"))), TypeError, r"crop\[1\]"),
    (lambda: place.cogvideox_crop((0, 4), (3, 4)), ValueError, r"size\[0\]"),
    (lambda: place.cogvideox_crop((4, 4), (3, -4)), ValueError, r"base_size\[1\]"),
    (lambda: place.cosmos_positions((2, 3, 4), fps=0), ValueError, "fps"),
    (lambda: place.cosmos_positions((2, 3, 4), fps=24, base_fps=-1), ValueError, "base_fps"),
    (lambda: place.mochi_positions((2, 3, 4), area=0), ValueError, "area"),
    (lambda: place.flux_positions(-1, (2, 2)), ValueError, "text"),
    (lambda: place.flux_positions(1, (2, 2, 2)), ValueError, "size"),
    (lambda: place.flux_positions(1, (2, 2), axes=2), ValueError, "axes"),
    (lambda: place.qwen_vision_positions([(1, 3, 4)]), ValueError, r"grids\[0\]"),
    (lambda: place.qwen_vision_positions((1, 4, 4)), TypeError, r"grids\[0\]"),
    (lambda: place.qwen_vision_positions([(1, 4, 4)], merge=0), ValueError, "merge"),
    (lambda: place.normalise_positions([[1.0]], (1,)), TypeError, "coordinates"),
    (lambda: place.normalise_positions(torch.ones(2, 3, dtype=torch.bfloat16), (1, 1)), ValueError, "coordinates"),
    (lambda: place.normalise_positions(torch.ones(2, 3), (1,)), ValueError, "size"),
    (lambda: place.ltx_positions((2, 3, 4), scale=(1, 32)), ValueError, "scale"),
    (lambda: place.ltx_positions((2, 3, 4), scale=(1, 32, 32), base=(0, 1, 1)), ValueError, r"base\[0\]"),
    (lambda: place.ltx_positions((2, 3, 4), scale=(1, 32, 32), patch=(1, 0, 1)), ValueError, r"patch\[1\]"),
    (lambda: place.ltx2_positions((2, 3, 4), fps=-24), ValueError, "fps"),
    (lambda: place.ltx2_positions((2, 3, 4), compression=(8, 32)), ValueError, "compression"),
    (lambda: place.ltx2_positions((2, 3, 4), causal_offset=-1), ValueError, "causal_offset"),
    (lambda: place.ltx2_audio_positions(-1), ValueError, "length"),
    (lambda: place.ltx2_audio_positions(4, shift=-1), ValueError, "shift"),
    (lambda: place.ltx2_audio_positions(4, sampling_rate=0), ValueError, "sampling_rate"),
    (lambda: place.seedance_positions([(0, 1, 1)]), ValueError, r"segments\[0\]"),
    (lambda: place.seedance_positions([-1]), ValueError, r"segments\[0\]"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
