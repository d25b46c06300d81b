"""Every pattern of a video against a mask written from its definition, for ragged grids, text before and behind, and both blocks."""

from __future__ import annotations

import pytest
import torch
from attention import brute_masks as brute
from attention.exact import check_exact

from saccade.attention import patterns

SMALL, LARGE = (3, 5, 7), (5, 9, 11)
# grid, prefix, suffix, block
CASES = [
    (SMALL, 0, 0, 64),
    (SMALL, 5, 0, 64),
    (SMALL, 50, 3, 128),
    (LARGE, 0, 0, 128),
    (LARGE, 5, 50, 64),
    ((1, 1, 1), 0, 0, 64),
    ((2, 0, 3), 5, 0, 64),
    ((4, 4, 8), 0, 70, (64, 128)),
    ((4, 4, 8), 64, 0, (128, 64)),
]
cases = pytest.mark.parametrize(("grid", "prefix", "suffix", "block"), CASES)


def around(prefix, suffix, block):
    return {"prefix": prefix, "suffix": suffix, "block": block}


@cases
@pytest.mark.parametrize(
    ("tile", "window"),
    [
        ((2, 4, 4), (1, 1, 1)),
        ((2, 4, 4), (3, 1, 3)),
        ((1, 3, 4), (3, 3, 1)),
        ((4, 4, 8), (9, 9, 9)),
        ((2, 2, 2), (1, 3, 3)),
    ],
)
def test_sliding_tile(grid, prefix, suffix, block, tile, window):
    layout = patterns.sliding_tile(grid, tile, window, **around(prefix, suffix, block))
    check_exact(layout, brute.video_mask(grid, prefix, suffix, brute.sliding_tile(grid, tile, window)))


def test_sliding_tile_has_whole_blocks_where_tiles_fill_them():
    layout = patterns.sliding_tile((12, 16, 16), (6, 8, 8), (1, 1, 3), prefix=5, block=128)
    assert layout.partial is None
    ragged = patterns.sliding_tile((9, 12, 16), (6, 8, 8), (1, 1, 3), suffix=7, block=128)
    assert ragged.partial is None


def test_sliding_tile_with_a_window_for_each_head():
    grid, tile, windows = LARGE, (2, 4, 4), [(1, 1, 1), (3, 3, 1), (1, 3, 3)]
    layout = patterns.sliding_tile(grid, tile, windows, prefix=5)
    masks = [brute.video_mask(grid, 5, 0, brute.sliding_tile(grid, tile, w)) for w in windows]
    assert layout.heads == 3
    check_exact(layout, torch.stack(masks)[None])


@cases
@pytest.mark.parametrize(
    ("window", "stride", "dilation", "causal"),
    [
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False)),
        ((2, 4, 3), (2, 3, 1), (1, 1, 2), (False, False, False)),
        ((3, 2, 3), (1, 2, 3), (1, 3, 1), (True, False, False)),
        ((2, 3, 4), (2, 2, 2), (2, 1, 2), (True, True, True)),
        ((99, 3, 5), (1, 2, 4), (1, 2, 1), (False, False, True)),
    ],
)
def test_neighborhood(grid, prefix, suffix, block, window, stride, dilation, causal):
    options = {"stride": stride, "dilation": dilation, "causal": causal, **around(prefix, suffix, block)}
    mask = brute.video_mask(grid, prefix, suffix, brute.neighborhood(grid, window, stride, dilation, causal))
    check_exact(patterns.neighborhood(grid, window, **options), mask)
    check_exact(patterns.neighborhood(grid, window, tile=(2, 4, 4), **options), mask)


@cases
@pytest.mark.parametrize(
    ("window", "shift"),
    [((2, 3, 4), None), ((2, 3, 4), (1, 1, 2)), ((8, 7, 7), (4, 3, 3)), ((2, 4, 4), (0, 2, 3)), ((1, 2, 2), (0, 1, 1))],
)
def test_window(grid, prefix, suffix, block, window, shift):
    layout = patterns.window(grid, window, shift=shift, **around(prefix, suffix, block))
    mask = brute.video_mask(grid, prefix, suffix, brute.swin(grid, window, shift or (0, 0, 0)))
    check_exact(layout, mask)


@cases
@pytest.mark.parametrize(("width", "sink"), [(1.5, False), (0.5, True), (1.5, True), (0.11, False), (9, True)])
@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_bands(grid, prefix, suffix, block, width, sink, kind):
    layout = getattr(patterns, kind)(grid, width, sink=sink, **around(prefix, suffix, block))
    check_exact(layout, brute.video_mask(grid, prefix, suffix, brute.band(grid, width, sink, kind == "temporal")))


def test_bands_cut_to_a_multiple_as_published():
    layout = patterns.spatial((4, 8, 16), 1.6, round_to=128, block=128)  # 204.8 tokens -> 128
    check_exact(layout, brute.video_mask((4, 8, 16), 0, 0, brute.band((4, 8, 16), 1.0, False, False)))
    with pytest.raises(ValueError, match="round_to: 0.5 frames are 64 tokens"):
        patterns.spatial((4, 8, 16), 0.5, round_to=128)


@cases
@pytest.mark.parametrize(
    ("decay", "least", "near", "sink"),
    [
        (1.0, 4, "wan", True),
        (0.3, 3, "hunyuan", False),
        (1.0, 128, "wan", True),
        (2.5, 16, "hunyuan", True),
        (1, 1, "wan", False),
    ],
)
def test_radial(grid, prefix, suffix, block, decay, least, near, sink):
    options = {"decay": decay, "least": least, "near": near, "sink": sink}
    layout = patterns.radial(grid, **options, **around(prefix, suffix, block))
    check_exact(layout, brute.video_mask(grid, prefix, suffix, brute.radial(grid, **options)))


def test_radial_over_many_frames():
    layout = patterns.radial((17, 4, 4), least=4, prefix=5)
    check_exact(layout, brute.video_mask((17, 4, 4), 5, 0, brute.radial((17, 4, 4), 1.0, 4, "wan", True)))


@cases
@pytest.mark.parametrize(
    ("window", "sink", "sees"), [(None, False, "prefix"), (2, False, "all"), (1, True, "prefix"), (2, True, "all")]
)
def test_frame_causal(grid, prefix, suffix, block, window, sink, sees):
    layout = patterns.frame_causal(grid, window=window, sink=sink, prefix=prefix, prefix_sees=sees, block=block)
    check_exact(layout, brute.frame_causal(grid, prefix, window, sink, sees))
