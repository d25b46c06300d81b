"""Plans from scores: against brute force, with ties, NaN, infinities and too few candidates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge import brute
from merge.merge_cases import check_plan, merge_plan, same_plan, signs

from saccade import merge as M
from saccade._load import BINARY
from saccade.merge import MergePlan

INF, NAN = math.inf, math.nan
VALUES = (-INF, -1.5, -0.0, 0.0, 0.25, 0.25, 1.0, 3.0e38, INF, NAN)


@st.composite
def scored(draw):
    """Scores and valid targets of a few samples, the rows and the limits."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(0, 14))
    scores, targets = [], []
    for _ in range(batch):
        kinds = draw(st.lists(st.sampled_from(["source", "stays", "broken"]), min_size=tokens, max_size=tokens))
        stays = [i for i, k in enumerate(kinds) if k == "stays"]
        broken = [i for i, k in enumerate(kinds) if k == "broken"]
        target, score = [], []
        for kind in kinds:
            goal = draw(st.sampled_from(stays or broken)) if kind == "source" and (stays or broken) else None
            target.append(goal if goal is not None else -2 if kind == "broken" else -1)
            score.append(draw(st.sampled_from(VALUES)))
        scores.append(score)
        targets.append(target)
    r = draw(st.integers(0, batch * tokens + 1))
    rows = draw(st.one_of(st.just(tokens), st.just(max(tokens - r, 0)), st.integers(0, tokens)))
    threshold = draw(st.sampled_from([-INF, -0.0, 0.0, 0.25, 5.0, INF]))
    return scores, targets, rows, r, threshold, draw(st.booleans())


def expected(scores, targets, rows, r, threshold, whole):
    batch = len(scores)
    if whole:
        merged = brute.chosen(scores, targets, r, threshold)
        merged = [{n for b, n in merged if b == own} for own in range(batch)]
    else:
        merged = [{n for _, n in brute.chosen([s], [t], r, threshold)} for s, t in zip(scores, targets, strict=True)]
    parts = []
    for target, own in zip(targets, merged, strict=True):
        inverse, head, count = brute.plan(target, own, rows)
        parts.append((inverse, *brute.members(inverse, rows), head, count))
    return parts


def check_against_brute_force(impl, device, case):
    scores, targets, rows, r, threshold, whole = case
    shape = (len(scores), len(scores[0]))
    score = torch.tensor(scores, dtype=torch.float32, device=device).reshape(shape)
    target = torch.tensor(targets, dtype=torch.int32, device=device).reshape(shape)
    plan = MergePlan(*merge_plan(impl, score, target, rows, r, threshold, whole))
    check_plan(plan)
    for b, parts in enumerate(expected(*case)):
        for name, part in zip(("inverse", "ptr", "members", "head", "counts"), parts, strict=True):
            assert getattr(plan, name)[b].tolist() == part, name


@settings(max_examples=120, deadline=None)
@given(scored())
def test_reference_equals_brute_force(case):
    check_against_brute_force("reference", "cpu", case)


@settings(max_examples=200, deadline=None)
@given(scored())
def test_cpu_equals_brute_force(case):
    assert BINARY.problem is None, BINARY.problem
    check_against_brute_force("cpu", "cpu", case)


def random_case(batch, tokens, seed, *, ties=True, broken=0.05):
    """Scores and targets [B, N] of any size: every other token is a destination."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, (batch, tokens), generator=g).float() - 1.0
    score = values if ties else torch.randn(batch, tokens, generator=g)
    target = torch.randint(0, max(tokens // 2, 1), (batch, tokens), generator=g) * 2 + 1
    target = target.clamp(max=max(tokens - 1, 0)).int()
    stays = torch.arange(tokens) % 2 == 1
    target = torch.where(stays | (target % 2 == 0), -1, target)
    bad = ~stays & (torch.rand(batch, tokens, generator=g) < broken)
    return torch.where(stays | bad, -INF, score), torch.where(bad, -2, target).int()


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 127, 256, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("ties", [True, False])
def test_sizes_equal_the_reference(implementation, tokens, ties):
    impl, device = implementation
    for batch, whole in [(1, False), (3, False), (3, True)]:
        score, target = random_case(batch, tokens, tokens + batch, ties=ties)
        for r in sorted({0, 1, tokens // 3, tokens // 2}):
            for threshold in (-INF, 0.0):
                rows = tokens if whole or threshold == 0 else tokens - r
                arguments = (rows, r, threshold, whole)
                want = MergePlan(*merge_plan("reference", score, target, *arguments))
                got = MergePlan(*merge_plan(impl, score.to(device), target.to(device), *arguments))
                assert same_plan(want, got), (batch, whole, r, threshold)


@pytest.mark.parametrize("rows", [0, 1, 500, 900, 1000])
def test_too_few_candidates(implementation, rows):
    """What is not finite is dropped first, in order; then the last tokens."""
    impl, device = implementation
    score, target = random_case(2, 1000, 5, broken=0.3)
    for r in (0, 3, 200):
        want = MergePlan(*merge_plan("reference", score, target, rows, r))
        got = MergePlan(*merge_plan(impl, score.to(device), target.to(device), rows, r))
        check_plan(got)
        assert same_plan(want, got)


def test_r_beyond_32_bits(implementation):
    impl, device = implementation
    score, target = random_case(2, 40, 6)
    want = MergePlan(*merge_plan("reference", score, target, 40, 40))
    got = MergePlan(*merge_plan(impl, score.to(device), target.to(device), 40, 2**40))
    assert same_plan(want, got)


def test_dropped_tokens_by_hand():
    score = torch.tensor([[0.5, -INF, -INF, -INF, 0.9]])
    target = torch.tensor([[1, -1, -2, -2, 1]], dtype=torch.int32)
    inverse, ptr, members, head, counts = merge_plan("reference", score, target, 2, 1)
    assert inverse.tolist() == [[0, 1, -1, -1, 1]]  # 4 is merged; of 0, 1, 2, 3 two find no room: 2 and 3
    assert ptr.tolist() == [[0, 1, 3]] and members.tolist() == [[0, 1, 4, -1, -1]]
    assert head.tolist() == [[0, 1]] and counts.tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.data(),
    st.sampled_from(["position", "similarity", "split"]),
    st.booleans(),
)
def test_plans_hold_together(batch, tokens, data, order, share):
    """match of the public API, by whatever implementation runs here."""
    partition = data.draw(st.sampled_from([M.Alternate(), M.Strided(3), M.Random(max(tokens // 4, 1), seed=3)]))
    r = data.draw(st.integers(0, partition.sources(tokens) if partition.destinations(tokens) else 0))
    threshold = data.draw(st.sampled_from([None, 0.0, 0.5, 2.0]))
    metric = signs(
        (batch, tokens, 4), seed=data.draw(st.integers(0, 99)), distinct=data.draw(st.sampled_from([None, 3]))
    )
    plan = M.match(metric, r, partition=partition, threshold=threshold, order=order, share_batch=share)
    check_plan(plan)
    assert plan.batch == (1 if share else batch)
    assert plan.rows == (tokens - r if threshold is None else tokens)
    assert plan.dropped.tolist() == [0] * plan.batch
    _, size = M.merge(torch.ones(batch, tokens, 1), plan)
    assert size.sum((1, 2)).tolist() == [float(tokens)] * batch
    merged = tokens - plan.counts
    assert (merged <= r).all() and (threshold is not None or (merged == r).all())
    assert torch.equal(plan.to_source().sum(1), (plan.inverse >= 0).long())


@pytest.mark.parametrize("kind", ["cosine", "dot", "l2"])
def test_r_best_are_merged(every, kind):
    """By the brute force from the metric to the plan, r from none to all."""
    impl, device = every
    x = signs((2, 15, 16), seed=1, device=device)
    x = x if kind == "cosine" else (x * 2).round()
    src, dst = list(range(0, 15, 2)), list(range(1, 15, 2))
    pairs = [brute.match(x[b].double().tolist(), src, dst, kind) for b in range(2)]
    for r in range(9):
        plan = M.match(x, r, score=kind, impl=impl)
        for b, parts in enumerate(expected([p[0] for p in pairs], [p[1] for p in pairs], 15 - r, r, -INF, False)):
            assert plan.inverse[b].tolist() == parts[0] and plan.head[b].tolist() == parts[3]
    for r in (0, 5, 16):
        plan = M.match(x, r, score=kind, whole_batch=True, impl=impl)
        for b, parts in enumerate(expected([p[0] for p in pairs], [p[1] for p in pairs], 15, r, -INF, True)):
            assert plan.inverse[b].tolist() == parts[0] and int(plan.counts[b]) == parts[4]
        assert 30 - int(plan.counts.sum()) == r


def test_share_batch_takes_the_best_of_any_sample(every):
    impl, device = every
    x = signs((3, 17, 16), seed=2, device=device)
    src, dst = list(range(0, 17, 2)), list(range(1, 17, 2))
    pairs = [brute.match(x[b].double().tolist(), src, dst, "cosine") for b in range(3)]
    score, target = [-INF] * 17, [-1] * 17
    for n in src:
        b = max(range(3), key=lambda b: (pairs[b][0][n], -b))
        score[n], target[n] = pairs[b][0][n], pairs[b][1][n]
    plan = M.match(x, 6, share_batch=True, impl=impl)
    assert plan.batch == 1 and plan.inverse[0].tolist() == expected([score], [target], 11, 6, -INF, False)[0][0]


def test_orders(every):
    """The rows of ToMe: unmerged sources, the most similar first, then destinations."""
    impl, device = every
    x = signs((2, 21, 16), seed=3, device=device)
    x[0, 4] = float("nan")
    plain = M.match(x, 5, impl=impl)
    for order in ("similarity", "split"):
        plan = M.match(x, 5, order=order, impl=impl)
        check_plan(plan)
        for b in range(2):
            sources = [h for h in plain.head[b].tolist() if h % 2 == 0]
            if order == "similarity":
                sources.sort(key=lambda h: -float(plain.score[b, h]))
            assert plan.head[b].tolist() == sources + [h for h in plain.head[b].tolist() if h % 2]
            where = {h: i for i, h in enumerate(plan.head[b].tolist())}
            old = plain.inverse[b].tolist()
            assert plan.inverse[b].tolist() == [where[int(plain.head[b, i])] for i in old]


def test_orders_put_padding_last(every):
    impl, device = every
    x = signs((2, 12, 16), seed=4, device=device)
    for order in ("similarity", "split"):
        plan = M.match(x, threshold=0.25, order=order, impl=impl)
        check_plan(plan)
        check_plan(plan.compact())


def test_plan_of_own_scores(implementation):
    impl, device = implementation
    score, target = random_case(2, 64, 7, broken=0.0)
    want = M.build_plan(score, target, r=9, impl="reference")
    got = M.build_plan(score.to(device), target.long().to(device), r=9, impl=impl)
    assert same_plan(want, got) and got.rows == 55
    none = M.build_plan(score.to(device), target.to(device), impl=impl)
    assert none.rows == 64 and int(none.counts[0]) == 64 - int((target[0] >= 0).sum())


class TestMergePlan:
    def plan(self):
        x = signs((3, 20, 16), seed=5)
        return M.match(x, threshold=0.25)

    def test_save_and_load(self, tmp_path):
        plan = self.plan()
        plan.save(tmp_path / "plan.pt")
        back = MergePlan.load(tmp_path / "plan.pt")
        assert same_plan(plan, back) and torch.equal(plan.score, back.score) and back.cu_rows is None
        packed = M.match(signs((1, 20, 16)), 2, cu_seqlens=[0, 8, 20])
        packed.save(tmp_path / "packed.pt")
        assert MergePlan.load(tmp_path / "packed.pt").cu_rows.tolist() == [0, 6, 16]
        torch.save({"a": 1}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="file: this is no saved MergePlan"):
            MergePlan.load(tmp_path / "other.pt")
        torch.save({"saccade_merge_plan": 99}, tmp_path / "new.pt")
        with pytest.raises(ValueError, match="file: expected version 1"):
            MergePlan.load(tmp_path / "new.pt")

    def test_one_sample_of_a_plan(self):
        plan = self.plan()
        x = torch.randn(3, 20, 6)
        whole, _ = M.merge(x, plan)
        for b in (0, 2, -1):
            one = plan.narrow(b)
            assert one.batch == 1
            assert torch.equal(M.merge(x[b][None], one)[0][0], whole[b])
        for b in (3, -4):
            with pytest.raises(ValueError, match=r"batch: expected a sample of the plan's 3, got"):
                plan.narrow(b)

    def test_compact(self):
        plan = self.plan()
        small = plan.compact()
        check_plan(small)
        assert small.rows == int(plan.counts.max()) < plan.rows
        x = torch.randn(3, 20, 6)
        full, size = M.merge(x, plan)
        y, size_small = M.merge(x, small)
        assert torch.equal(y, full[:, : small.rows]) and torch.equal(size_small, size[:, : small.rows])
        assert (full[:, small.rows :] == 0).all() and (size[:, small.rows :] == 0).all()
        assert torch.equal(M.unmerge(y, small), M.unmerge(full, plan))

    def test_views(self):
        plan = self.plan()
        assert torch.equal(plan.valid.sum(1).int(), plan.counts)
        source = plan.to_source()
        assert source.shape == (3, plan.rows, 20) and torch.equal(source.any(2), plan.valid)
        assert same_plan(plan, plan.to("cpu"))
        with pytest.raises(AttributeError):
            plan.inverse = plan.ptr
