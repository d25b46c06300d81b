"""tomesd's own functions, installed, beside ours with parity: same rows, same way back."""

from __future__ import annotations

import pytest
import torch

from saccade import merge
from saccade.testing import check_budget

peer = pytest.importorskip("tomesd.merge")

CASES = (
    ((8, 8), (2, 2), 0.5),
    ((8, 8), (2, 2), 0.75),
    ((8, 8), (2, 2), 0.95),
    ((6, 9), (2, 3), 0.3),
    ((7, 9), (2, 2), 0.6),
    ((5, 5), (4, 4), 0.5),
)


def inputs(grid, seed=0, width=16, batch=2):
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    metric = torch.randn(batch, n, width, generator=generator, dtype=torch.float64)
    return metric, torch.randn(batch, n, 12, generator=generator, dtype=torch.float64)


def theirs(metric, grid, cell, ratio):
    (h, w), (sy, sx) = grid, cell
    return peer.bipartite_soft_matching_random2d(metric, w, h, sx, sy, int(h * w * ratio), no_rand=True)


def pair(grid, cell, ratio, metric):
    merger = merge.tomesd(ratio, grid, cell, parity=True)
    return merger, merger.match(metric), *theirs(metric, grid, cell, ratio)


def peer_rows(back, rows, batch=2):
    """The row of each token in their plan [B, N]."""
    return back(torch.arange(rows, dtype=torch.float64)[None, :, None].repeat(batch, 1, 1))[..., 0].long()


def as_ours(plan, back, unmerged):
    """Their row for each of ours [B, M]. Unmerged ones are in the same order; destinations come from an unstable sort upstream."""
    rows = peer_rows(back, plan.rows)
    theirs = torch.full((2, plan.rows), -1).scatter_(1, plan.inverse.long(), rows)
    assert torch.equal(theirs.gather(1, plan.inverse.long()), rows), "tokens are grouped otherwise"
    first = torch.arange(unmerged).expand(2, -1)
    assert torch.equal(theirs[:, :unmerged], first) and torch.equal(theirs.sort(1).values[0], torch.arange(plan.rows))
    return theirs[..., None]


@pytest.mark.parametrize(("grid", "cell", "ratio"), CASES)
def test_float64(grid, cell, ratio):
    metric, x = inputs(grid)
    merger, plan, go, back = pair(grid, cell, ratio, metric)
    theirs = as_ours(plan, back, plan.rows - merger.partition.destinations(0)).expand(-1, -1, 12)
    y = merger.merge(x, plan)[0]
    torch.testing.assert_close(y, go(x).gather(1, theirs), rtol=1e-13, atol=1e-13)
    noise = torch.randn(2, plan.rows, 12, dtype=torch.float64)
    assert torch.equal(merger.unmerge(noise.gather(1, theirs), plan), back(noise))


def test_ratio_zero_is_the_identity_for_both():
    metric, x = inputs((4, 4))
    merger, plan, go, back = pair((4, 4), (2, 2), 0.0, metric)
    assert torch.equal(merger.merge(x, plan)[0], x) and torch.equal(go(x), x)
    assert torch.equal(merger.unmerge(x, plan), back(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid", "cell", "ratio"), CASES[:2] + CASES[4:5])
def test_within_the_budget(grid, cell, ratio, dtype):
    metric, x = inputs(grid, seed=1)
    merger, plan, go, back = pair(grid, cell, ratio, metric)  # one plan, so that only merging is compared
    low = x.to(dtype)
    theirs = as_ours(plan, back, plan.rows - merger.partition.destinations(0)).expand(-1, -1, 12)
    y = merger.merge(low, plan)[0]
    check_budget("merge", y, go(low).gather(1, theirs), go(low.double()).gather(1, theirs))
    noise = torch.randn(2, plan.rows, 12).to(dtype)
    assert torch.equal(merger.unmerge(noise.gather(1, theirs), plan), back(noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plan_from_low_precision_is_as_good_as_theirs(dtype):
    """Of the scores in float64, what ours merges must not sum to less than what theirs does, which ranks rounded scores."""
    metric, _ = inputs((8, 8), seed=2, width=64)
    low = metric.to(dtype)
    ours = merge.tomesd(0.5, (8, 8), parity=True).match(low)
    _, back = theirs(low, (8, 8), (2, 2), 0.5)
    unit = torch.nn.functional.normalize(low.double(), dim=-1)
    scores = unit @ unit.mT
    destination = merge.Grid((8, 8)).lists(64, torch.device("cpu"))[1].long()

    def kept(row_of):
        """Sum of the scores of all tokens with the heads of their rows: a destination where the row has one, else its only token."""
        heads = torch.full((2, 32), -1).scatter(1, row_of, torch.arange(64).expand(2, -1))
        heads.scatter_(1, row_of.gather(1, destination.expand(2, -1)), destination.expand(2, -1))
        return float(scores.gather(2, heads.gather(1, row_of)[..., None]).sum())

    assert kept(ours.inverse.long()) >= kept(peer_rows(back, 32)) - 1e-5


def test_too_large_a_ratio():
    metric, _ = inputs((8, 8))
    with pytest.raises(ValueError, match=r"ratio: .* leave 48 of 64 tokens to merge, a share of 0\.7500; got 0\.8"):
        merge.tomesd(0.8, (8, 8))
    assert merge.tomesd(0.8, (8, 8), parity=True).match(metric).rows == 16


def test_a_seed_draws_anew_for_every_index_and_leaves_the_global_generator():
    metric, x = inputs((8, 8), seed=3)
    before = torch.random.get_rng_state()
    merger = merge.tomesd(0.5, (8, 8), seed=7)
    first, again, other = merger.match(metric), merger.match(metric), merger.match(metric, index=1)
    assert torch.equal(first.inverse, again.inverse) and not torch.equal(first.inverse, other.inverse)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert merger.unmerge(merger.merge(x, other)[0], other).shape == x.shape


def test_without_parity_tokens_get_the_same_values_back():
    metric, x = inputs((7, 9), seed=4)
    _merger, _plan, go, back = pair((7, 9), (2, 2), 0.5, metric)
    ours = merge.tomesd(0.5, (7, 9))
    own = ours.match(metric)
    assert torch.equal(own.head, own.head.sort(1).values)
    torch.testing.assert_close(ours.unmerge(ours.merge(x, own)[0], own), back(go(x)), rtol=1e-13, atol=1e-13)


def test_one_plan_for_both_branches_of_guidance():
    metric, x = inputs((8, 8), seed=5)
    merger = merge.tomesd(0.5, (8, 8), share_batch=True)
    plan = merger.match(metric)
    assert plan.batch == 1 and merger.merge(x, plan)[0].shape == (2, 32, 12)
