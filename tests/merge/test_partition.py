"""Partitions: their lists against loops, windows, random choices, and how many tokens they let merge."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from merge import brute
from merge.merge_cases import generator, signs

from saccade import merge as M
from saccade.merge.partition import mix
from saccade.reference.match import allowed

CPU = torch.device("cpu")


def grid_destinations(grid, cell):
    (_, rows, columns), starts = grid, [range(0, n - c + 1, c) for n, c in zip(grid, cell, strict=True)]
    return [(t * rows + h) * columns + w for t, h, w in itertools.product(*starts)]


FIXED = {
    "alternate": (M.Alternate(), 11, [1, 3, 5, 7, 9]),
    "alternate one": (M.Alternate(), 1, []),
    "alternate none": (M.Alternate(), 0, []),
    "strided": (M.Strided(3), 11, [2, 5, 8]),
    "strided long": (M.Strided(9), 5, []),
    "grid": (M.Grid((2, 4, 6), (2, 2, 3)), 48, [0, 3, 12, 15]),
    "grid of a frame": (M.Grid((4, 4)), 16, [0, 2, 8, 10]),
    "grid with a rest": (M.Grid((3, 5, 7), (2, 2, 3)), 105, grid_destinations((3, 5, 7), (2, 2, 3))),
    "grid all": (M.Grid((1, 1, 3), (1, 1, 1)), 3, [0, 1, 2]),
    "frames": (M.Frames(5, 2), 15, [0, 1, 2, 6, 7, 8, 12, 13, 14]),
    "frames phase": (M.Frames(5, 3, phase=1), 10, [2, 3, 8, 9]),
    "frames none": (M.Frames(5, 2), 0, []),
    "frames one": (M.Frames(1, 4), 3, [0, 1, 2]),
    "index": (M.Index([4, 0, 2]), 6, [4, 0, 2]),
    "index none": (M.Index([]), 3, []),
    "index tensor": (M.Index(torch.tensor([5, 1])), 6, [5, 1]),
}


def check_lists(partition, tokens):
    src, dst = partition.lists(tokens, CPU)
    assert src.dtype == dst.dtype == torch.int32 and src.is_contiguous() and dst.is_contiguous()
    assert src.shape == (1, partition.sources(tokens)) and dst.shape == (1, partition.destinations(tokens))
    src, dst = src[0].tolist(), dst[0].tolist()
    assert sorted(src + dst) == list(range(tokens))
    return src, dst


@pytest.mark.parametrize("name", FIXED)
def test_lists(name):
    partition, tokens, expected = FIXED[name]
    src, dst = check_lists(partition, tokens)
    assert dst == expected
    assert src == sorted(src)


def test_index_with_sources_of_its_own():
    src, dst = M.Index([1, 5], [2, 0]).lists(8, CPU)
    assert src[0].tolist() == [2, 0] and dst[0].tolist() == [1, 5]
    x = signs((1, 8, 16))
    plan = M.match(x, 2, partition=M.Index([1, 5], [2, 0]))
    assert plan.rows == 6 and set(plan.head[0].tolist()) == {1, 3, 4, 5, 6, 7}
    apart = M.Index(torch.tensor([[1, 5], [0, 2]]), torch.tensor([[2, 0], [3, 1]]))
    both = M.match(signs((2, 8, 16)), 1, partition=apart)
    for b in range(2):
        one = M.Index(apart.dst[b].tolist(), apart.src[b].tolist())
        assert torch.equal(M.match(signs((2, 8, 16))[b : b + 1], 1, partition=one).inverse[0], both.inverse[b])


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_random_choices(seed):
    for step in range(6):
        grid = M.Grid((2, 7, 9), (2, 3, 2), seed=seed, step=step)
        _, dst = check_lists(grid, 126)
        cells = [(0, n // 9 % 7 // 3, n % 9 // 2) for n in dst]
        assert cells == list(itertools.product(range(1), range(2), range(4)))  # one in each, in their order
        _, dst = check_lists(M.Random(13, seed=seed, step=step), 40)
        assert dst == sorted(dst)
        frames = M.Frames(11, 4, phase="random", seed=seed, step=step)
        _, dst = check_lists(frames, 22)
        assert dst[0] // 2 == frames.first < 4


def test_random_choices_differ_and_repeat():
    for make in (
        lambda s, t: M.Grid((1, 32, 32), (1, 2, 2), seed=s, step=t),
        lambda s, t: M.Random(300, seed=s, step=t),
    ):
        lists = [tuple(make(s, t).lists(1024, CPU)[1][0].tolist()) for s in range(3) for t in range(4)]
        assert len(set(lists)) == 12
        assert lists[1] == tuple(make(0, 0).at(1).lists(1024, CPU)[1][0].tolist())
    phases = [M.Frames(64, 8, phase="random").at(t).first for t in range(200)]
    assert set(phases) == set(range(8)) and max(phases.count(p) for p in range(8)) < 60


def test_random_choices_leave_the_generator_alone():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    M.match(signs((1, 64, 4)), 3, partition=M.Random(20))
    M.match(signs((1, 64, 4)), 3, partition=M.Grid((8, 8), seed=4))
    assert torch.equal(torch.rand(3), want)


def test_random_bits_are_fair():
    """Each offset in a cell of 4 about as often, for many seeds; neighbours do not agree more than chance."""
    cells = torch.arange(4096)
    for seed in (0, 1, 2, 2**31, 2**40 + 3):
        pick = mix(cells, seed, 0) % 4
        counts = torch.bincount(pick, minlength=4)
        assert (counts - 1024).abs().max() < 6 * math.sqrt(768)
        assert abs(int((pick[1:] == pick[:-1]).sum()) - 1024) < 6 * math.sqrt(768)
        later = mix(cells, seed, 1) % 4
        assert abs(int((pick == later).sum()) - 1024) < 6 * math.sqrt(768)
        assert (mix(cells, seed, 0) >= 0).all() and mix(17, seed, 5) == int(mix(torch.tensor([17]), seed, 5))


def test_random_bits_stay():
    """The plans of a seed stay the same from release to release, and on every device."""
    assert mix(torch.arange(4), 3, 2).tolist() == [1884830286, 1994324310, 1954214532, 1754822641]
    assert mix(5, 2**40, 7) == 1965714672


WINDOWS = {
    "alternate 0": (M.Alternate(), 9, 0),
    "alternate 1": (M.Alternate(), 10, 1),
    "alternate all": (M.Alternate(), 9, 99),
    "strided 2": (M.Strided(3), 17, 1),
    "grid 0": (M.Grid((3, 5, 7), (1, 2, 2)), 105, (0, 0, 0)),
    "grid 1": (M.Grid((3, 5, 7), (1, 2, 2)), 105, (1, 1, 1)),
    "grid lines": (M.Grid((3, 5, 7), (1, 2, 2), seed=5), 105, (0, 1, 9)),
    "grid time": (M.Grid((4, 4, 4), (2, 2, 2)), 64, (1, 0, 0)),
    "grid of a frame": (M.Grid((6, 6)), 36, (1, 2)),
}


def brute_window(partition, tokens, window):
    """Whether source i may choose the j-th destination, by its cell."""
    src, dst = (x[0].tolist() for x in partition.lists(tokens, CPU))
    if isinstance(partition, M.Strided):
        last = tokens // partition.k - 1
        return [[abs(min(s // partition.k, last) - d // partition.k) <= window for d in dst] for s in src]
    reach = (0, *window) if len(window) == 2 else window
    _, rows, columns = partition.grid

    def cell(n):
        place = (n // (rows * columns), n // columns % rows, n % columns)
        return [min(p // c, m - 1) for p, c, m in zip(place, partition.cell, partition.cells, strict=True)]

    return [[all(abs(a - b) <= r for a, b, r in zip(cell(s), cell(d), reach, strict=True)) for d in dst] for s in src]


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    partition, tokens, window = WINDOWS[name]
    ranges = partition.ranges(tokens, window, CPU)
    assert ranges.dtype == torch.int32 and ranges.is_contiguous()
    places = partition.destinations(tokens)
    assert allowed(ranges, places)[0].tolist() == brute_window(partition, tokens, window)
    assert (ranges >= 0).all() and (ranges <= places).all() and (ranges[..., 0] <= ranges[..., 1]).all()
    assert (ranges[:, :, 1:, 0] >= ranges[:, :, :-1, 1]).all(), "runs ascend and do not overlap, empty ones too"


@pytest.mark.parametrize("name", WINDOWS)
def test_match_in_windows(every, name):
    """Every source has a destination in reach, so all of them can be merged."""
    impl, device = every
    partition, tokens, window = WINDOWS[name]
    x = signs((1, tokens, 16), seed=3, device=device)
    r = partition.sources(tokens)
    plan = M.match(x, r, partition=partition, window=window, impl=impl)
    assert int(plan.dropped) == 0
    src, dst = (i[0].tolist() for i in partition.lists(tokens, CPU))
    score, target = brute.match(x[0].double().tolist(), src, dst, "cosine", brute_window(partition, tokens, window))
    for s in src:
        assert int(plan.head[0, plan.inverse[0, s]]) == target[s] and float(plan.score[0, s]) == score[s]


def can_merge(partition, tokens, window, protect):
    src, dst = (i[0].tolist() for i in partition.lists(tokens, CPU))
    reach = brute_window(partition, tokens, window) if window is not None else [[True] * len(dst)] * len(src)
    return sum(
        s not in protect and any(ok and d not in protect for d, ok in zip(dst, reach[i], strict=True))
        for i, s in enumerate(src)
    )


CLAMPS = {
    "none": (M.Alternate(), 9, None),
    "one token": (M.Alternate(), 1, None),
    "no destination": (M.Strided(9), 5, None),
    "window": (M.Alternate(), 12, 0),
    "grid": (M.Grid((4, 4)), 16, None),
    "grid window": (M.Grid((4, 4)), 16, (0, 0)),
    "random": (M.Random(3), 12, None),
    "frames": (M.Frames(4, 2), 8, None),
    "index": (M.Index([0, 3]), 6, None),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_r_is_held_against_what_can_be_merged(name):
    """Exactly: one more raises and names the limit; the limit itself drops nothing, whatever form protect takes."""
    partition, tokens, window = CLAMPS[name]
    x = signs((1, tokens, 16), seed=4)
    for seed in range(6):
        g = generator(seed)
        places = sorted(torch.randperm(tokens, generator=g)[: seed * tokens // 6].tolist())
        mask = torch.zeros(tokens, dtype=torch.bool)
        mask[places] = True
        most = can_merge(partition, tokens, window, places)
        for protect in (places, [p - tokens for p in places], mask, mask[None]):
            kw = {"partition": partition, "window": window, "protect": protect}
            assert int(M.match(x, most, **kw).dropped) == 0
            with pytest.raises(
                ValueError, match=f"r: at most {most} of {tokens} tokens can be merged .* got r={most + 1}"
            ):
                M.match(x, most + 1, **kw)
    for first in range(min(tokens, 5) + 1):
        most = can_merge(partition, tokens, window, range(first))
        M.match(x, most, partition=partition, window=window, protect=first)
        with pytest.raises(ValueError, match=f"r: at most {most} of"):
            M.match(x, most + 1, partition=partition, window=window, protect=first)


def test_limit_of_masks_that_differ():
    x = signs((2, 10, 16), seed=5)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :6] = True
    with pytest.raises(ValueError, match="r: at most 2 of 10"):
        M.match(x, 3, protect=mask)
    assert M.match(x, 7, protect=mask, whole_batch=True).counts.sum() == 13
    with pytest.raises(ValueError, match="r: at most 7 of 20"):
        M.match(x, 8, protect=mask, whole_batch=True)


def test_forms_of_protect_agree(implementation):
    impl, device = implementation
    x = signs((2, 20, 16), seed=6, device=device)
    mask = torch.zeros(20, dtype=torch.bool, device=device)
    mask[:3] = True
    plans = [
        M.match(x, 5, protect=p, impl=impl)
        for p in (3, [0, 1, 2], (2, 0, 1, 1), range(3), [-20, 1, -18], mask, mask[None], mask.expand(2, -1))
    ]
    assert all(torch.equal(p.inverse, plans[0].inverse) for p in plans)
    assert (plans[0].inverse[:, :3] == torch.arange(3, device=device)).all()
    none = M.match(x, 5, impl=impl)
    assert all(
        torch.equal(M.match(x, 5, protect=p, impl=impl).inverse, none.inverse) for p in (0, [], torch.zeros_like(mask))
    )


def test_lists_made_in_odd_modes_do_no_harm():
    """The cached lists serve later calls: those of inference mode, fake tensors and dispatch modes must not."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert M.match(torch.empty(2, 29, 4), 2, partition=M.Strided(4), impl="reference").rows == 27
    with torch.inference_mode():
        M.match(signs((2, 31, 4)), 2, partition=M.Strided(4))
    for tokens in (29, 31):
        x = signs((2, tokens, 4)).requires_grad_()
        y, _ = M.merge(x, M.match(x, 2, partition=M.Strided(4), order="split"))
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_ratio():
    x = signs((2, 21, 16))
    assert M.match(x, ratio=0.25).rows == 21 - 5
    assert M.match(x, ratio=0.25, whole_batch=True).counts.sum() == 42 - 10
    assert M.match(x, ratio=0.0).rows == 21
    with pytest.raises(ValueError, match=r"ratio: at most 11 of 21 tokens .* got ratio=0.6 \(12 tokens\)"):
        M.match(x, ratio=0.6)
