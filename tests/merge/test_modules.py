"""`TokenMerger` and `VideoMerger`: what they keep, what they reuse, and that torch.compile takes them whole."""

from __future__ import annotations

import copy

import pytest
import torch

from saccade import merge
from saccade.merge import (
    Alternate,
    Frames,
    Grid,
    MergeSchedule,
    Random,
    TokenMerger,
    VideoMerger,
    compose,
)


def tokens(n=12, d=6, batch=2, seed=0):
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("inverse", "ptr", "members", "head", "counts"))


def test_it_is_match_merge_and_unmerge():
    x, metric, size = tokens(), tokens(seed=1), torch.full((2, 12, 1), 2.0)
    y, total, plan = TokenMerger(4, protect=1)(x, metric, size)
    expected = merge.match(metric, 4, protect=1)
    values, sizes = merge.merge(x, expected, size)
    assert same(plan, expected) and torch.equal(y, values) and torch.equal(total, sizes)
    residual = tokens(seed=2)
    merger = TokenMerger(4)
    assert torch.equal(merger.unmerge(y, plan, residual=residual), merge.unmerge(y, plan, residual=residual))


def test_amounts():
    x = tokens()
    for amount, rows in ((3, 9), (0.25, 9), (100, 6), (0, 12), (MergeSchedule.of([0, 5]), 7)):
        assert TokenMerger(amount)(x, index=1 if isinstance(amount, MergeSchedule) else 0)[0].shape[1] == rows
    y, size, plan = TokenMerger(threshold=2.0)(x)
    assert y.shape[1] == 12 and plan.counts.tolist() == [12, 12] and float(size.sum()) == 24
    y, size, plan = TokenMerger(threshold=-2.0)(x)
    assert plan.counts.tolist() == [6, 6] and float(size.sum()) == 24
    with pytest.raises(ValueError, match="r: at most 6 of 12 tokens"):
        TokenMerger(7, clamp=False)(x)
    y, _, plan = TokenMerger(3, whole_batch=True)(x)
    assert int(plan.counts.sum()) == 24 - 6


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_the_clamp_holds_for_any_prefix(prefix):
    for n in range(prefix + 1, 16):
        y, size, plan = TokenMerger(100, protect=prefix)(tokens(n))
        assert y.shape[1] == n - (n - prefix) // 2
        assert torch.equal(y[:, :prefix], tokens(n)[:, :prefix]) and plan.dropped.sum() == 0
        assert float(size.sum()) == 2 * n


def test_a_schedule_brings_its_protected_tokens():
    merger = TokenMerger(MergeSchedule.constant(100, 2, protected=3))
    assert merger.protect == 3
    assert torch.equal(merger(tokens())[0][:, :3], tokens()[:, :3])


def test_an_index_outside_of_the_schedule():
    merger = TokenMerger(MergeSchedule.constant(2, 3))
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"index: the schedule has entries 0 to 2, got {index}"):
            merger(tokens(), index=index)


def test_modes_pass_through():
    x = tokens()
    for mode in ("mean", "sum", "max", "replace"):
        y, _, plan = TokenMerger(4, mode=mode)(x)
        assert torch.equal(y, merge.merge(x, plan, mode=mode)[0])


def test_no_parameters_no_state():
    merger = TokenMerger(4, reuse=2)
    merger(tokens())
    assert not merger.state_dict() and not list(merger.parameters()) and not list(merger.buffers())
    assert "reuse=2" in repr(merger) and "Alternate" in repr(merger)


def test_reuse():
    merger = TokenMerger(4, reuse=3)
    plans = [merger.match(tokens(seed=i), index=i) for i in range(7)]
    assert plans[0] is plans[1] is plans[2] and plans[3] is plans[5] and plans[6] is not plans[5]
    assert not same(plans[0], plans[3])
    # What does not fit is made anew, and kept.
    other = merger.match(tokens(20), index=7)
    assert other.tokens == 20 and merger.match(tokens(20, seed=5), index=8) is other
    assert merger.match(tokens(20, batch=3), index=8).batch == 3
    merger.reset()
    assert merger.cached is None
    shared = TokenMerger(4, reuse=2, share_batch=True)
    plan = shared.match(tokens(), index=0)
    assert plan.batch == 1 and shared.match(tokens(batch=5), index=1) is plan
    scheduled = TokenMerger(MergeSchedule.per_step([4, 2], 2), reuse=2)
    assert scheduled.match(tokens(), index=0).rows == 8 and scheduled.match(tokens(), index=1).rows == 10
    assert TokenMerger(4).match(tokens()) is not TokenMerger(4).match(tokens())


def test_a_given_plan_is_used():
    x = tokens()
    plan = merge.match(tokens(seed=9), 2)
    assert TokenMerger(5)(x, plan=plan)[2] is plan


@pytest.mark.parametrize(
    "partition", [Grid((3, 4), seed=1), Random(6, seed=1), Frames(4, stride=4, phase="random", seed=3)]
)
def test_random_partitions_choose_anew_for_every_index(partition):
    merger = TokenMerger(3, partition=partition)
    heads = [merger.match(tokens(), index=i).head for i in range(8)]
    assert torch.equal(heads[0], merger.match(tokens()).head)
    assert any(not torch.equal(heads[0], h) for h in heads[1:])


def test_fixed_partitions_do_not():
    merger = TokenMerger(3, partition=Grid((3, 4)))
    assert same(merger.match(tokens(), index=0), merger.match(tokens(), index=5))


def test_per_head_keys():
    keys = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(1))
    assert TokenMerger(4).match(keys).batch == 2
    assert same(TokenMerger(4).match(keys), TokenMerger(4).match(keys.mean(1)))
    assert TokenMerger(4, heads="per_head").match(keys).batch == 6


def test_gradients_reach_the_values():
    x = tokens().requires_grad_()
    merger = TokenMerger(4, protect=1)
    y, _, plan = merger(x)
    merger.unmerge(y * y, plan).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and float(x.grad.abs().min()) > 0


@pytest.mark.parametrize(
    "merger",
    [
        TokenMerger(4, protect=1),
        TokenMerger(100, protect=3),
        TokenMerger(0.25, partition=Grid((3, 4)), order="similarity", share_batch=True),
        TokenMerger(4, order="distill", protect=2),
        TokenMerger(MergeSchedule.constant(3, 2, protected=1), reuse=2),
        TokenMerger(threshold=0.3),
    ],
    ids=["plain", "clamped", "grid", "distill", "reuse", "threshold"],
)
def test_compiled_whole(merger):
    eager = copy.deepcopy(merger)

    def step(module, x, size):
        y, size, plan = module(x, None, size)
        return y, size, module.unmerge(y, plan)

    x, size = tokens(), torch.ones(2, 12, 1)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(merger, x, size)
    for a, b in zip(got, step(eager, x, size), strict=True):
        assert torch.equal(a, b)
    if merger.reuse > 1:
        assert merger.cached is not None and same(merger.cached, eager.cached)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "amount: expected r"),
        ({"amount": -1}, ValueError, r"amounts\[0\]"),
        ({"amount": 2.0}, ValueError, r"amounts\[0\]: expected a share"),
        ({"amount": 3, "partition": 2}, TypeError, "partition: expected a Partition, got int"),
        ({"amount": 3, "mode": "median"}, ValueError, "mode: "),
        ({"amount": 3, "order": "random"}, ValueError, "order: "),
        ({"amount": 3, "score": "l1"}, ValueError, "score: "),
        ({"amount": 3, "heads": "all"}, ValueError, "heads: "),
        ({"amount": 3, "reuse": 0}, ValueError, "reuse: "),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        TokenMerger(**options)


# ---- chunks of frames ----------------------------------------------------------------------------------------------------
def test_compose_is_the_product_of_the_two():
    x = tokens(20, batch=3)
    first = merge.match(x, 6)
    second = merge.match(merge.merge(x, first)[0], 5, partition=Alternate())
    whole = compose(first, second)
    product = second.to_source().float() @ first.to_source().float()
    assert torch.equal(whole.to_source().float(), product)
    once, twice = merge.merge(x, whole, mode="replace")[0], merge.merge(x, first, mode="replace")[0]
    assert torch.equal(once, merge.merge(twice, second, mode="replace")[0])
    y = torch.randn_like(once)
    assert torch.equal(merge.unmerge(y, whole), merge.unmerge(merge.unmerge(y, second), first))
    assert whole.check(x, "x", 20, "tokens") is None
    rebuilt = [sorted(whole.members[b, i:j].tolist()) for b in range(3) for i, j in [whole.ptr[b, 2:4].tolist()]]
    assert rebuilt == [(whole.inverse[b] == 2).nonzero()[:, 0].tolist() for b in range(3)]
    with pytest.raises(ValueError, match="second: expected a plan for the 14 rows"):
        compose(first, first)


def test_video_counts_and_the_way_back():
    x = tokens(5 * 8, batch=2)
    for index in range(6):
        merger = VideoMerger(5, seed=2)
        y, plan = merger(x, index=index)
        assert y.shape[1] == plan.rows < 40
        again, _ = merger(x, index=index)
        assert torch.equal(y, again)
        assert torch.equal(plan.merge(x), y)
        back = plan.unmerge(y)
        assert back.shape == x.shape
        # Every value is one that some token of the sample had.
        assert bool((back[:, :, None] == x[:, None]).all(-1).any(-1).all())
        assert plan.within.batch == 1 and int(plan.within.dropped.sum()) == 0


def test_a_bank_takes_both_roles():
    x, rows = tokens(4 * 8), set()
    merger = VideoMerger(4, seed=1)
    bank, first = merger(x)
    for index in range(8):
        y, plan = merger(tokens(4 * 8, seed=4), bank, index=index)
        local = plan.rows
        assert plan.across.tokens == local + bank.shape[1]
        sources = local if merger._draw(index, 4) % 2 == 0 else bank.shape[1]
        assert y.shape[1] == local + bank.shape[1] - int(sources * 0.8)
        assert plan.unmerge(y).shape == x.shape and torch.equal(plan.merge(tokens(4 * 8, seed=4), bank), y)
        rows.add(merger._draw(index, 4) % 2)
    assert rows == {0, 1}
    with pytest.raises(ValueError, match="bank: expected"):
        plan.merge(x)
    assert first.across is None


def test_one_frame_merges_nothing_by_itself():
    x = tokens(8)
    y, plan = VideoMerger(1)(x)
    assert y is x and plan.within is None and torch.equal(plan.unmerge(y), x)


def test_video_compiled_whole():
    def step(x, bank):
        y, plan = VideoMerger(5, mode="mean")(x, bank, index=1)
        return y, plan.unmerge(y)

    torch._dynamo.reset()
    x, bank = tokens(40), tokens(10, seed=3)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, bank)
    for a, b in zip(got, step(x, bank), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoMerger(0), "frames: "),
        (lambda: VideoMerger(4, stride=1), "stride: "),
        (lambda: VideoMerger(4, ratio=1.5), "ratio: "),
        (lambda: VideoMerger(4, mode="sum"), "mode: "),
        (lambda: VideoMerger(3)(tokens(8)), "x: 3 frames do not divide 8 tokens"),
    ],
)
def test_bad_video_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
