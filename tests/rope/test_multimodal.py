"""Text and video in one sequence: brute force in Python numbers, transformers, and properties."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope.angle_tables import UNIT, turn

from saccade.reference.apply_rope import apply_rope
from saccade.rope import presets
from saccade.rope.positions import batch_positions, multimodal_positions

# Text, a video of odd sizes, text, a video of even sizes right after another, an image, text.
SEGMENTS = [3, (3, 5, 7), 4, (4, 6, 2), (2, 4, 4), 1, (1, 3, 4), 5]
GAMMAS = [0.75, 1.5, 0.5, 1.25]


def brute_force(rule, segments, gammas, start=0.0, decode=0, form="code", after_vision="max"):
    """One token at a time, in Python floats; returns the rows t, h, w and the next position."""
    rows, following, grids = [], float(start), 0
    for segment in [*segments, *[1] * decode]:
        if isinstance(segment, int):
            for _ in range(segment):
                rows.append((following,) * 3)
                following += 2.0 if rule == "tad" else 1.0
            continue
        frames, height, width = segment
        gamma, grids, here = gammas[grids], grids + 1, []
        token = 0
        for i in range(frames):
            for j in range(height):
                for k in range(width):
                    if rule == "mrope":
                        here.append((following + i, following + j, following + k))
                    elif rule == "mrope_time":
                        here.append((following + math.floor(i * gamma), following + j, following + k))
                    elif rule == "tad":
                        here.append((following + token + i,) * 3)
                    elif rule == "v2pe":
                        here.append((following - 1 + gamma * (token + 1),) * 3)
                    else:
                        t = following + gamma * i
                        middle_h = height / 2 if form == "paper" else (height - 1) // 2
                        middle_w = width / 2 if form == "paper" else (width - 1) // 2
                        here.append((t, t + j - middle_h, t + k - middle_w))
                    token += 1
        rows += here
        if rule in ("mrope", "mrope_time"):
            largest = max(max(row) for row in here)
            following = largest + 1 if after_vision == "max" else following + max(height, width)
        elif rule == "tad":
            following += token + frames  # both of its counters go on after their own last value
        elif rule == "v2pe":
            following = math.ceil(here[-1][0]) + 1
        else:
            following = following + gamma * frames if form == "paper" else max(row[0] for row in here) + 1
    return rows, following


CASES = [
    ("hope", {"gamma": GAMMAS}, GAMMAS),
    ("hope", {"gamma": 1.5}, [1.5] * 4),
    ("videorope", {}, [2.0] * 4),
    ("videorope", {"gamma": 1.25, "form": "paper"}, [1.25] * 4),
    ("mrope", {}, [1] * 4),
    ("mrope", {"after_vision": "hw"}, [1] * 4),
    ("mrope_time", {"tokens_per_second": 2, "second_per_grid": [0.7, 1.3, 2.0, 0.1]}, [1.4, 2.6, 4.0, 0.2]),
    ("tad", {}, [1] * 4),
    ("v2pe", {"gamma": 1 / 16}, [1 / 16] * 4),
]


@pytest.mark.parametrize(("rule", "options", "gammas"), CASES)
def test_one_token_at_a_time(rule, options, gammas):
    decode = 3
    positions, following = multimodal_positions([*SEGMENTS, *[1] * decode], rule=rule, **options)
    named = {k: v for k, v in options.items() if k in ("form", "after_vision")}
    rows, expected = brute_force(rule, SEGMENTS, gammas, decode=decode, **named)
    assert positions.double().T.tolist() == [list(row) for row in rows]
    assert following == expected
    whole = all(float(x).is_integer() for row in rows for x in row)
    assert positions.dtype == (torch.int64 if whole else torch.float64)
    assert type(following) is (int if float(expected).is_integer() else float)


@pytest.mark.parametrize(("rule", "options", "gammas"), CASES)
def test_rotation_is_the_formula(rule, options, gammas):
    """Rotated q equals cos and sin of position times frequency, formed in Python floats pair by pair."""
    maker = {"mrope": presets.mrope, "mrope_time": presets.mrope}.get(rule)
    spec = maker(128, 1e6, (16, 24, 24)) if maker else getattr(presets, rule)(128, 1e6)
    positions, _ = multimodal_positions(SEGMENTS, rule=rule, **options)
    named = {k: v for k, v in options.items() if k in ("form", "after_vision")}
    rows, _ = brute_force(rule, SEGMENTS, gammas, **named)
    x = torch.randn(1, 1, len(rows), 128, generator=torch.Generator().manual_seed(0))
    exact = x.double().clone()
    for n, row in enumerate(rows):
        for i in range(64):
            if rule in ("mrope", "mrope_time"):
                axis = 0 if i < 16 else 1 if i < 40 else 2
            elif rule in ("tad", "v2pe"):
                axis = 0
            else:
                axis = 0 if i >= 48 else 1 + i % 2
            angle = row[axis] * 1e6 ** (-i / 64) if rule != "hope" or i < 48 else 0.0
            a, b = float(x[0, 0, n, i]), float(x[0, 0, n, i + 64])
            exact[0, 0, n, i] = math.cos(angle) * a - math.sin(angle) * b
            exact[0, 0, n, i + 64] = math.sin(angle) * a + math.cos(angle) * b
    largest = float(x.abs().max())
    assert float((turn(x, positions, spec) - exact).abs().max()) <= 2e-9 * 2 * largest
    # In float32: cos and sin, two products and a sum, each rounded once.
    single = apply_rope(x, positions[:, None], spec.steps(), shift=spec.shift)
    worst = float((single - exact).abs().max())
    print(f"{rule}: largest float32 difference {worst:.2e}")
    assert worst <= 4 * UNIT * 2 * largest


def test_next_token_after_a_video_is_not_lost_in_decoding():
    """HoPE's published code puts every decoded token at position 0."""
    _, following = multimodal_positions([3, (3, 2, 2), 2], rule="hope", gamma=0.75)
    assert following == 3 + 0.75 * 2 + 1 + 2
    for step in range(3):
        positions, following = multimodal_positions([1], rule="hope", start=following)
        assert positions.tolist() == [[7.5 + step]] * 3
    assert following == 10.5


def _transformers(name, segments, sizes_of, merge=2, padding=0, **options):
    """transformers' own position ids and deltas for a batch of one, padded on the left."""
    pytest.importorskip("transformers")
    import importlib

    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model = {"qwen2_vl": "Qwen2VLModel", "qwen2_5_vl": "Qwen2_5_VLModel", "qwen3_vl": "Qwen3VLModel"}[name]
    model = getattr(models, model)
    vision = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=2)
    stand_in = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    stand_in.get_vision_position_ids = partial(model.get_vision_position_ids, stand_in)
    kinds = [0] * padding
    for segment in segments:
        kinds += [0] * segment if isinstance(segment, int) else [2] * math.prod(segment)
    grids = torch.tensor([sizes_of(s) for s in segments if not isinstance(s, int)])
    ids = torch.zeros(1, len(kinds), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return model.get_rope_index(
        stand_in, ids, torch.tensor([kinds]), video_grid_thw=grids, attention_mask=mask, **options
    )


# transformers joins neighbouring videos into one group of tokens, so these are set apart by text.
APART = [3, (3, 5, 7), 4, (4, 6, 2), 2, (2, 4, 4), 1, (1, 3, 4), 9]


def _merged(segment, merge=2):
    return segment[0], segment[1] * merge, segment[2] * merge


@pytest.mark.parametrize("padding", [0, 5])
def test_mrope_is_transformers(padding):
    theirs, delta = _transformers("qwen2_vl", APART, _merged, padding=padding)
    positions, mask, _ = batch_positions([APART, [theirs.shape[2]]], rule="mrope", after_vision="hw")
    assert torch.equal(positions[:, :1], theirs) and int(mask[0].sum()) == theirs.shape[2] - padding
    tokens = int(mask[0].sum())
    assert int(delta) == int(positions[:, 0].max()) + 1 - tokens


@pytest.mark.parametrize("seconds", [[0.7, 1.3, 2.0, 0.1], [1.0, 1.0, 1.0, 1.0], [1 / 3, 0.55, 0.15, 7.0]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_absolute_time_is_transformers(seconds, as_tensor):
    given_seconds = torch.tensor(seconds) if as_tensor else seconds
    theirs, _ = _transformers("qwen2_5_vl", APART, _merged, second_per_grid_ts=given_seconds)
    positions, _ = multimodal_positions(
        APART, rule="mrope_time", tokens_per_second=2, second_per_grid=given_seconds, after_vision="hw"
    )
    assert torch.equal(positions, theirs[:, 0])


def test_truncation_follows_transformers_into_float32():
    # 0.7 * 10 is 7 in float64 and 6.9999995 or 7 in float32, as the product rounds: the floor must not differ.
    seconds = [0.35, 0.05, 0.15]
    segments = [1, (60, 1, 1), 1, (60, 1, 1), 1, (60, 1, 1), 200]
    theirs, _ = _transformers("qwen2_5_vl", segments, _merged, second_per_grid_ts=torch.tensor(seconds))
    positions, _ = multimodal_positions(
        segments, rule="mrope_time", tokens_per_second=2, second_per_grid=torch.tensor(seconds), after_vision="hw"
    )
    assert torch.equal(positions, theirs[:, 0])


def test_frames_apart_are_transformers_qwen3():
    segments = [2, (1, 3, 5), 3, (1, 3, 5), 3, (1, 4, 2), 6]

    def sizes(segment):
        return _merged(segment)

    theirs, _ = _transformers("qwen3_vl", segments, sizes)
    positions, _ = multimodal_positions(segments, rule="mrope", after_vision="hw")
    assert torch.equal(positions, theirs[:, 0])


def test_the_papers_rule_after_a_long_video_differs_from_transformers():
    """Text after 40 frames of 2 x 2: behind the last frame by the paper, at 3 + 2 in transformers 5.3 to 5.23."""
    papers, following = multimodal_positions([3, (40, 2, 2), 1], rule="mrope")
    assert papers[:, -1].tolist() == [43] * 3 and following == 44
    theirs, _ = multimodal_positions([3, (40, 2, 2), 1], rule="mrope", after_vision="hw")
    assert theirs[:, -1].tolist() == [5] * 3


sizes = st.integers(1, 5)
texts = st.integers(0, 6)
segments_lists = st.lists(st.one_of(texts, st.tuples(sizes, sizes, sizes)), max_size=6)
rules = st.sampled_from(["hope", "videorope", "mrope", "mrope_time", "tad", "v2pe"])
eighths = st.integers(1, 16).map(lambda n: n / 8)


def _options(rule, gamma):
    if rule == "mrope_time":
        return {"tokens_per_second": 2, "second_per_grid": gamma}
    return {} if rule in ("mrope", "tad") else {"gamma": gamma}


@settings(deadline=None, max_examples=150)
@given(segments_lists, rules, eighths, st.integers(-(2**31), 2**31))
def test_moving_the_start_moves_everything(segments, rule, gamma, start):
    options = _options(rule, gamma)
    still, following = multimodal_positions(segments, rule=rule, **options)
    moved, moved_following = multimodal_positions(segments, rule=rule, start=start, **options)
    assert torch.equal(moved.double(), still.double() + start) and moved_following == following + start


@settings(deadline=None, max_examples=150)
@given(segments_lists, segments_lists, rules, eighths)
def test_prefill_and_continuation_are_one_pass(first, second, rule, gamma):
    options = _options(rule, gamma)
    together, end = multimodal_positions(first + second, rule=rule, **options)
    head, following = multimodal_positions(first, rule=rule, **options)
    tail, tail_end = multimodal_positions(second, rule=rule, start=following, **options)
    assert torch.equal(together.double(), torch.cat((head.double(), tail.double()), 1)) and end == tail_end


@settings(deadline=None, max_examples=150)
@given(segments_lists, st.sampled_from(["mrope", "mrope_time", "tad", "v2pe"]), eighths)
def test_the_next_position_lies_beyond_all_used_ones(segments, rule, gamma):
    positions, following = multimodal_positions(segments, rule=rule, **_options(rule, gamma))
    assert positions.shape[1] == 0 or following > float(positions.max())


@settings(deadline=None, max_examples=150)
@given(segments_lists, st.sampled_from(["hope", "videorope"]), eighths)
def test_the_next_position_lies_beyond_all_times(segments, rule, gamma):
    positions, following = multimodal_positions(segments, rule=rule, gamma=gamma)
    assert positions.shape[1] == 0 or following > float(positions[0].max())


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batch_is_each_sample_alone(padding):
    batch = [[2, (2, 3, 3), 1], [4], [], [(1, 2, 2), 3]]
    gammas = [0.75, None, None, [1.5]]
    positions, mask, following = batch_positions(batch, rule="hope", gamma=gammas, padding=padding, fill=7)
    assert positions.shape == (3, 4, 21) and positions.dtype == torch.float64
    for n, (segments, gamma) in enumerate(zip(batch, gammas, strict=True)):
        alone, end = multimodal_positions(segments, rule="hope", gamma=gamma)
        assert torch.equal(positions[:, n, mask[n]], alone.double()) and following[n] == end
        assert bool((positions[:, n, ~mask[n]] == 7).all())
        edge = mask[n].flip(0) if padding == "left" else mask[n]
        assert bool(edge[: alone.shape[1]].all())
    after, _, _ = batch_positions([[1]] * 4, rule="hope", start=following)
    assert torch.equal(after[0, :, 0].double(), following.double())


def test_empty_sequences():
    positions, following = multimodal_positions([], rule="hope", start=2.5)
    assert positions.shape == (3, 0) and following == 2.5
    positions, following = multimodal_positions([0, 0], rule="mrope_time")
    assert positions.shape == (3, 0) and following == 0
    positions, mask, following = batch_positions([], rule="mrope")
    assert positions.shape == (3, 0, 0) and mask.shape == (0, 0) and following.shape == (0,)


GRID = [(1, 2, 2)]
BAD = [
    (lambda: multimodal_positions(5, rule="mrope"), TypeError, "segments"),
    (lambda: multimodal_positions("5", rule="mrope"), TypeError, "segments"),
    (lambda: multimodal_positions([2, -1], rule="mrope"), ValueError, r"segments\[1\]"),
    (lambda: multimodal_positions([2.0], rule="mrope"), TypeError, r"segments\[0\]"),
    (lambda: multimodal_positions([True], rule="mrope"), TypeError, r"segments\[0\]"),
    (lambda: multimodal_positions([(0, 2, 2)], rule="mrope"), ValueError, r"segments\[0\]\[0\]"),
    (lambda: multimodal_positions([(1, 2)], rule="mrope"), ValueError, r"segments\[0\]"),
    (lambda: multimodal_positions([(1, 2.5, 2)], rule="mrope"), TypeError, r"segments\[0\]\[1\]"),
    (lambda: multimodal_positions(GRID, rule="rope"), ValueError, "rule"),
    (lambda: multimodal_positions(GRID, rule="hope"), ValueError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="v2pe"), ValueError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma=[1.0, 1.0]), ValueError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma=-1.0), ValueError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma=[float("nan")]), ValueError, r"gamma\[0\]"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma="1"), TypeError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="tad", gamma=[1.0]), TypeError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="mrope", gamma=1.0), ValueError, "gamma"),
    (lambda: multimodal_positions(GRID, rule="mrope", start=float("inf")), ValueError, "start"),
    (lambda: multimodal_positions(GRID, rule="mrope", start=None), TypeError, "start"),
    (lambda: multimodal_positions(GRID, rule="mrope", after_vision="min"), ValueError, "after_vision"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma=1.0, after_vision="hw"), ValueError, "after_vision"),
    (lambda: multimodal_positions(GRID, rule="hope", gamma=1.0, form="paper"), ValueError, "form"),
    (lambda: multimodal_positions(GRID, rule="videorope", form="eq7"), ValueError, "form"),
    (lambda: multimodal_positions(GRID, rule="mrope", tokens_per_second=2), ValueError, "tokens_per_second"),
    (lambda: multimodal_positions(GRID, rule="mrope_time"), ValueError, "tokens_per_second"),
    (lambda: multimodal_positions(GRID, rule="mrope_time", tokens_per_second=2), ValueError, "second_per_grid"),
    (
        lambda: multimodal_positions(GRID, rule="mrope_time", tokens_per_second=2, second_per_grid=[0.0]),
        ValueError,
        r"second_per_grid\[0\]",
    ),
    (
        lambda: multimodal_positions(GRID, rule="mrope_time", tokens_per_second=2, second_per_grid=torch.ones(2)),
        ValueError,
        "second_per_grid",
    ),
    (lambda: batch_positions([[1]], rule="mrope", padding="both"), ValueError, "padding"),
    (lambda: batch_positions([[1]], rule="mrope", fill=0.5), TypeError, "fill"),
    (lambda: batch_positions([[1]], rule="mrope", start=[0, 0]), ValueError, "start"),
    (lambda: batch_positions(3, rule="mrope"), TypeError, "batch"),
]


@pytest.mark.parametrize(("call", "error", "names"), BAD)
def test_bad_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
