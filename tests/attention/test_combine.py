"""Union, intersection and rows of packed sequences, against the same of masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention.exact import check_exact

from saccade.attention import BlockLayout, patterns
from saccade.attention.combine import concat

GRID = (3, 5, 7)
SIZE = 105 + 5


def random_mask(*shape, share=0.02, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def layouts(block):
    around = {"prefix": 5, "block": block}
    return {
        "nothing": BlockLayout.from_block_map(
            torch.zeros(-(-SIZE // block), -(-SIZE // block), dtype=torch.bool),
            q_len=SIZE,
            k_len=SIZE,
            q_block=block,
            k_block=block,
        ),
        "dense": patterns.dense(SIZE, block=block),
        "causal": patterns.causal(SIZE, block=block),
        "neighborhood": patterns.neighborhood(GRID, 3, **around),
        "radial": patterns.radial(GRID, least=4, **around),
        "bits": BlockLayout.from_mask(random_mask(2, 1, SIZE, SIZE), q_block=block, k_block=block),
        "heads": BlockLayout.from_mask(random_mask(1, 3, SIZE, SIZE, share=0.9), q_block=block, k_block=block),
    }


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations_with_replacement(layouts(64), 2)))
def test_union_and_intersection(one, other, block):
    a, b = layouts(block)[one], layouts(block)[other]
    check_exact(a | b, a.to_mask() | b.to_mask())
    check_exact(a & b, a.to_mask() & b.to_mask())


def test_halves_make_whole_blocks_and_blocks_vanish():
    odd = torch.arange(128)[:, None].expand(128, 128) % 2 == 1
    a, b = BlockLayout.from_mask(odd), BlockLayout.from_mask(~odd)
    assert (a | b).partial is None and float((a | b).density) == 1
    assert (a & b).partial is None and float((a & b).density) == 0


def test_layouts_in_the_same_order_of_tokens():
    a = patterns.sliding_tile((5, 9, 11), (2, 4, 4), (3, 1, 1), prefix=5)
    b = patterns.sliding_tile((5, 9, 11), (2, 4, 4), [(1, 3, 1), (1, 1, 3)], prefix=5)
    check_exact(a | b, a.to_mask() | b.to_mask())
    check_exact(a & b, a.to_mask() & b.to_mask())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (patterns.causal(99), "b: expected the q_len of a, 110, got 99"),
        (patterns.causal(110, block=128), "b: expected the q_block of a, 64, got 128"),
        (patterns.temporal(GRID, prefix=5), "b: expected the q_order of a, none, got one"),
    ],
)
def test_layouts_that_do_not_belong_together(other, message):
    with pytest.raises(ValueError, match=message):
        patterns.causal(110) | other
    with pytest.raises(TypeError, match="b: expected a BlockLayout, got int"):
        patterns.causal(110) & 3


def test_samples_that_do_not_agree():
    a, b = (BlockLayout.from_mask(random_mask(n, 1, 70, 70)) for n in (2, 3))
    with pytest.raises(ValueError, match="b: expected 1 or the 2 batch of a, got 3"):
        a | b


def block_diagonal(masks):
    shape = torch.broadcast_shapes(*(m.shape[:2] for m in masks))
    out = torch.zeros(*shape, sum(m.shape[2] for m in masks), sum(m.shape[3] for m in masks), dtype=torch.bool)
    i = j = 0
    for m in masks:
        out[:, :, i : i + m.shape[2], j : j + m.shape[3]] = m
        i, j = i + m.shape[2], j + m.shape[3]
    return out


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    "names",
    [
        ("causal", "dense"),
        ("causal", "neighborhood", "dense", "causal"),
        ("bits", "radial"),
        ("bits", "neighborhood"),
        ("heads", "nothing", "causal"),
        ("bits", "heads"),
        ("dense",),
    ],
)
def test_concat(names, block):
    parts = [layouts(block)[name] for name in names]
    check_exact(concat(parts), block_diagonal([p.to_mask() for p in parts]))


def test_concat_of_reordered_videos_and_whole_blocks():
    parts = [
        patterns.temporal(GRID, prefix=5),
        patterns.dense(128),
        patterns.sliding_tile((5, 9, 11), (2, 4, 4), (1, 3, 1)),
        patterns.window(GRID, (2, 3, 4)),
        patterns.causal(33, 77),
    ]
    check_exact(concat(parts), block_diagonal([p.to_mask() for p in parts]))
    row = concat([patterns.causal(128), patterns.dense(64), patterns.causal(77)])
    assert row.q_order is None and row.k_order is None
    check_exact(
        row,
        block_diagonal([patterns.causal(128).to_mask(), patterns.dense(64).to_mask(), patterns.causal(77).to_mask()]),
    )


def test_concat_says_what_does_not_fit():
    with pytest.raises(ValueError, match="layouts: expected at least one"):
        concat([])
    with pytest.raises(ValueError, match=r"layouts\[1\]: expected the q_block of the first, 64, got 128"):
        concat([patterns.dense(10), patterns.dense(10, block=128)])
    with pytest.raises(TypeError, match=r"layouts\[0\]: expected a BlockLayout, got str"):
        concat(["causal"])
