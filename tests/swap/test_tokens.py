"""Windows that come as near to a density as windows can."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saccade.attention import patterns
from saccade.swap.tokens import Tokens, tile_windows, token_window

edge = st.integers(1, 24)
grids = st.tuples(edge, edge, edge)
tiles = st.tuples(*[st.integers(1, 8)] * 3)
density = st.floats(0.001, 1)


@given(grids, st.integers(0, 9), st.integers(0, 9))
def test_tokens(grid, prefix, suffix):
    tokens = Tokens(grid, prefix, suffix)
    assert tokens.length == prefix + tokens.video + suffix and tokens.video == math.prod(grid)
    assert str(tokens).startswith(" x ".join(map(str, grid))) and ("of text" in str(tokens)) == bool(prefix + suffix)


def allowed(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if n % 2 == 1 or n == count]


@given(grids, tiles, density)
def test_tile_windows_are_the_nearest(grid, tile, density):
    counts = [math.ceil(size / edge) for size, edge in zip(grid, tile, strict=True)]
    found = tile_windows(grid, tile, density)
    assert all(n in allowed(count) for n, count in zip(found, counts, strict=True))

    def distance(window):
        return abs(math.log(math.prod(window) / math.prod(counts) / density))

    every = list(itertools.product(*map(allowed, counts)))
    assert distance(found) <= min(map(distance, every)) + 1e-6
    assert tile_windows(grid, tile, 1.0) == tuple(counts)
    assert tile_windows(grid, tile, density) == found


@given(st.integers(1, 9), tiles)
def test_cubes_get_even_windows(count, tile):
    """Among equal shares the window is the same on every axis, where there is such a one."""
    grid = tuple(count * edge for edge in tile)
    for n in allowed(count):
        assert tile_windows(grid, tile, n**3 / count**3) == (n, n, n)


@given(grids, tiles, density)
def test_larger_densities_give_no_smaller_windows(grid, tile, density):
    assert math.prod(tile_windows(grid, tile, density)) <= math.prod(tile_windows(grid, tile, min(1.0, 1.5 * density)))
    assert math.prod(token_window(grid, density)) <= math.prod(token_window(grid, min(1.0, 1.5 * density)))


@given(grids, density)
def test_token_windows(grid, density):
    window = token_window(grid, density)
    assert all(1 <= n <= size for n, size in zip(window, grid, strict=True))
    assert token_window(grid, 1.0) == grid
    axes = sum(size > 1 for size in grid)
    for n, size in zip(window, grid, strict=True):  # half a token from the same share of every axis
        assert n == 1 or abs(n - size * density ** (1 / max(axes, 1))) <= 0.5 + 1e-9
        assert size > 1 or n == 1


@pytest.mark.parametrize(
    ("grid", "tiled"), [((0, 4, 4), (1, 1, 1)), ((3, 0, 0), (1, 1, 1)), ((0, 0, 0), (1, 1, 1)), ((1, 1, 1), (1, 1, 1))]
)
def test_empty_and_single_axes(grid, tiled):
    assert tile_windows(grid, (2, 2, 2), 0.2) == tiled
    assert all(n >= 1 for n in token_window(grid, 0.2))


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 3)] * 3), density)
def test_the_patterns_take_them(grid, tile, density):
    tile = tuple(map(min, tile, grid))
    layout = patterns.sliding_tile(grid, tile, tile_windows(grid, tile, density))
    counts = [math.ceil(size / edge) for size, edge in zip(grid, tile, strict=True)]
    if all(size % edge == 0 for size, edge in zip(grid, tile, strict=True)):
        share = math.prod(tile_windows(grid, tile, density)) / math.prod(counts)
        assert float(layout.to_mask().double().mean()) == pytest.approx(share)
    mask = patterns.neighborhood(grid, token_window(grid, density)).to_mask()
    assert float(mask.double().mean()) == pytest.approx(math.prod(token_window(grid, density)) / math.prod(grid))
