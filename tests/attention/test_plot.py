"""Pictures show what the layout says: classes of blocks, densities in the titles, and what one query sees of each frame."""

from __future__ import annotations

import pytest
import torch

from saccade.attention import BlockLayout, patterns
from saccade.attention.plot import FULL, NONE, PARTIAL, plot, query_row

GRID = (5, 6, 7)


def rgb(colour):
    return [int(colour[n : n + 2], 16) for n in (1, 3, 5)]


def images(figure):
    return [ax.get_images()[0].get_array() for ax in figure.axes if ax.get_images()]


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_images()]


LAYOUTS = {
    "box": patterns.neighborhood(GRID, 3, prefix=5),
    "order": patterns.temporal(GRID, 0.3, sink=True, prefix=5, block=128),
    "tiles": patterns.sliding_tile(GRID, (2, 2, 4), [(1, 1, 1), (3, 3, 1)], prefix=5),
    "bits": BlockLayout.from_mask(torch.rand(2, 2, 215, 215, generator=torch.Generator().manual_seed(0)) < 0.05),
    "other lengths": patterns.causal(64, 215),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_is_that_of_the_mask(name):
    layout = LAYOUTS[name]
    mask = layout.to_mask()
    for sample in range(layout.batch):
        for head in range(layout.heads):
            for token in (0, 4, 5, 63, layout.q_len - 1):
                row = query_row(layout, token, sample=sample, head=head)
                assert torch.equal(row, mask[min(sample, mask.shape[0] - 1), min(head, mask.shape[1] - 1), token])


def test_keys_of_heads_that_share_an_order():
    layout = patterns.svg(torch.randn(1, 4, 215, 16), *torch.randn(2, 1, 2, 215, 16), GRID, 0.5, prefix=5)
    spatial, temporal = (
        getattr(patterns, kind)(GRID, 0.5, prefix=5).to_mask()[0, 0] for kind in ("spatial", "temporal")
    )
    for head in range(4):
        row = query_row(layout, 100, head=head)
        assert torch.equal(row, spatial[100]) or torch.equal(row, temporal[100])


@pytest.mark.parametrize("name", LAYOUTS)
def test_maps_have_the_colours_of_their_blocks(name):
    layout = LAYOUTS[name]
    figure = plot(layout)
    classes = layout.block_map()[0]
    assert len(images(figure)) == layout.heads
    for own, image, title in zip(classes, images(figure), titles(figure), strict=True):
        colours = torch.tensor([rgb(NONE), rgb(PARTIAL), rgb(FULL)], dtype=torch.uint8)
        assert torch.equal(torch.as_tensor(image), colours[own.long()])
        assert f"{100 * float((own > 0).float().mean()):.1f} % computed" in title


def test_frames_show_what_the_query_sees(tmp_path):
    layout = LAYOUTS["box"]
    figure = layout.plot(grid=GRID, prefix=5, query=(2, 3, 0), path=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    _, *frames = images(figure)
    row = layout.to_mask()[0, 0, 5 + (2 * 6 + 3) * 7][5:].reshape(GRID)
    assert len(frames) == 5
    for seen, frame in zip(row, frames, strict=True):
        assert torch.equal((torch.as_tensor(frame) == torch.tensor(rgb(FULL), dtype=torch.uint8)).all(-1), seen)
    assert titles(figure)[3] == "frame 2 (the query's)"


def test_many_frames_are_thinned_out_around_the_query():
    figure = plot(patterns.spatial((40, 2, 2)), grid=(40, 2, 2), query=(17, 0, 0))
    shown = titles(figure)[1:]
    assert len(shown) == 12 and "frame 17 (the query's)" in shown and shown[0] == "frame 0"


def test_some_heads_and_a_title():
    figure = plot(LAYOUTS["tiles"], heads=[1], title="Tiles")
    assert len(images(figure)) == 1 and figure.get_suptitle() == "Tiles"
    assert titles(figure)[0].startswith("head 1: ")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": [2]}, ValueError, r"heads: expected some of 0 to 1, got \[2\]"),
        ({"heads": []}, ValueError, "heads: expected some of 0 to 1"),
        ({"sample": 1}, ValueError, "sample: expected 0 to 0, got 1"),
        ({"grid": (9, 9, 9)}, ValueError, r"grid: 0 \+ 9 x 9 x 9 tokens, expected at most the layout's 215 keys"),
        ({"grid": GRID, "query": (5, 0, 0)}, ValueError, r"query: expected a place inside the grid \(5, 6, 7\)"),
        ({"grid": GRID, "query": 215}, ValueError, "query: expected a token below 215"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        plot(LAYOUTS["tiles"], **options)
    with pytest.raises(TypeError, match="layout: expected a BlockLayout, got int"):
        plot(3)
