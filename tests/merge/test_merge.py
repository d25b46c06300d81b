"""merge: against brute force in float64, its sizes, its gradient, and rows of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge import brute
from merge.merge_cases import DTYPES, LAYOUTS, MODES, generator, laid_out, merge, merge_bwd, normal, signs

from saccade import merge as M
from saccade.merge import MergePlan
from saccade.testing import check_budget, poison

NAN = float("nan")


def random_plan(batch, tokens, r, seed=0, device="cpu"):
    """Many tokens a row, different in every sample."""
    return M.match(signs((batch, tokens, 4), seed=seed, device=device, distinct=5), r)


def hub_plan(tokens, device="cpu"):
    """One row takes all but the others' heads: 0 and the last token."""
    target = torch.full((1, tokens), 1, dtype=torch.int32)
    target[0, [0, 1, -1]] = -1
    return M.build_plan(torch.zeros(1, tokens), target, r=max(tokens - 3, 0)).to(device)


def sizes(batch, tokens, seed=0, device="cpu"):
    return torch.randint(1, 9, (batch, tokens, 1), generator=generator(seed)).float().to(device)


def test_by_hand():
    x = torch.tensor([[[1.0, -1.0], [3.0, 5.0], [7.0, 7.0], [9.0, 1.0]]], dtype=torch.float64)
    plan = M.build_plan(torch.tensor([[0.5, 0.0, 0.0, 0.9]]), torch.tensor([[2, -1, -1, 2]]), r=2)
    size = torch.tensor([[[3.0], [1.0], [1.0], [4.0]]])
    for mode, expected in {
        "mean": [[3.0, 5.0], [(3 + 7 + 36) / 8, (-3 + 7 + 4) / 8]],
        "sum": [[3.0, 5.0], [17.0, 7.0]],
        "max": [[3.0, 5.0], [9.0, 7.0]],
        "replace": [[3.0, 5.0], [7.0, 7.0]],
    }.items():
        y, total, log_total = M.merge(x, plan, size, mode=mode, log_size=True)
        torch.testing.assert_close(y[0], torch.tensor(expected, dtype=torch.float64))
        assert total[0, :, 0].tolist() == [1.0, 8.0]
        torch.testing.assert_close(log_total, total.log())
    y, total = M.merge(x, plan, size, mode="weighted", weight=torch.tensor([[1.0, 2.0, 0.0, 3.0]]))
    torch.testing.assert_close(y[0, 1], torch.tensor([(1 + 27) / 4, (-1 + 3) / 4], dtype=torch.float64))
    assert total[0, :, 0].tolist() == [1.0, 8.0]  # sizes, not weights


@pytest.mark.parametrize("mode", MODES)
def test_reference_equals_brute_force(mode):
    for seed in range(4):
        plan = random_plan(2, 19, 3 * seed, seed)
        x, size = normal((2, 19, 3), torch.float64, seed=seed), sizes(2, 19, seed)
        for weight in (None, size):
            y, total = M.merge(x, plan, weight, mode=mode, impl="reference")
            for b in range(2):
                own = None if weight is None else weight[b, :, 0].tolist()
                want = brute.merge(x[b].tolist(), own, plan.inverse[b].tolist(), plan.head[b].tolist(), mode)
                torch.testing.assert_close(y[b], torch.tensor(want[0], dtype=torch.float64), atol=1e-14, rtol=1e-14)
                assert total[b, :, 0].tolist() == want[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matches_float64(implementation, mode, dtype):
    impl, device = implementation
    for i, (batch, tokens, width, r) in enumerate(
        [(1, 2, 1, 1), (2, 33, 7, 16), (3, 40, 64, 20), (2, 129, 12, 60), (1, 130, 33, 65), (1, 10, 520, 4)]
    ):
        plan = random_plan(batch, tokens, r, i)
        x = normal((batch, tokens, width), dtype, seed=i, layout=LAYOUTS[i % 5])
        size = sizes(batch, tokens, i)
        for weight in (None, size, size[:1, :, 0]):
            on = None if weight is None else weight.to(device)
            got = M.merge(x.to(device), plan.to(device), on, mode=mode, log_size=True, impl=impl)
            peer = M.merge(x, plan, weight, mode=mode, log_size=True, impl="reference")
            truth = M.merge(x.double(), plan, weight, mode=mode, log_size=True, impl="reference")
            assert got[0].dtype == dtype and got[0].is_contiguous()
            assert got[1].dtype == got[2].dtype == torch.float32
            for name, *parts in zip(("y", "size", "log"), got, peer, truth, strict=True):
                check_budget(f"{name} {tokens} {width}", *parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_long_rows(implementation, mode, dtype):
    """Rows of thousands of members beside rows of one."""
    impl, device = implementation
    for tokens in (34, 35, 36, 67, 3003):
        plan = hub_plan(tokens)
        assert plan.rows == 3
        x = normal((2, tokens, 20), dtype, seed=tokens)
        got = M.merge(x.to(device), plan.to(device), sizes(2, tokens, 1, device), mode=mode, impl=impl)
        peer = M.merge(x, plan, sizes(2, tokens, 1), mode=mode, impl="reference")
        truth = M.merge(x.double(), plan, sizes(2, tokens, 1), mode=mode, impl="reference")
        for name, *parts in zip(("y", "size"), got, peer, truth, strict=True):
            check_budget(f"{name} {tokens}", *parts)
        assert torch.equal(got[0][:, 0].cpu(), x[:, 0]) and torch.equal(got[0][:, 2].cpu(), x[:, -1])


@pytest.mark.parametrize("mode", [*MODES, "weighted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(implementation, mode, layout):
    impl, device = implementation
    plan = random_plan(2, 50, 20, device=device)
    x = normal((2, 50, 24), torch.bfloat16, device=device)
    weight = torch.rand(2, 50, generator=generator(1)).to(device) if mode == "weighted" else None
    want, _ = M.merge(x, plan, mode=mode, weight=weight, impl=impl)
    got, _ = M.merge(laid_out(x, layout), plan, mode=mode, weight=weight, impl=impl)
    assert torch.equal(want, got)
    one = plan.narrow(0)
    spread = x[:1].expand(3, -1, -1)
    y, _ = M.merge(spread, one, mode=mode, weight=None if weight is None else weight[:1], impl=impl)
    assert torch.equal(y, want[:1].expand(3, -1, -1))


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_zero(every, mode):
    impl, device = every
    plan = M.match(signs((3, 24, 16), device=device), threshold=0.4, impl=impl)
    x = normal((3, 24, 40), device=device)
    poisoned = poison(x), poison(x[:, :, 0])
    del poisoned  # the allocator hands the poisoned blocks to the outputs
    y, size, log_size = M.merge(x, plan, mode=mode, log_size=True, impl=impl)
    pad = ~plan.valid
    assert pad.any() and (y[pad] == 0).all() and (size[pad] == 0).all() and (log_size[pad] == -float("inf")).all()
    assert not y.isnan().any() and torch.equal(size[..., 0], (plan.to_source().sum(2)).float())


def test_max_keeps_nan_and_infinities(every):
    impl, device = every
    inf = float("inf")
    x = torch.tensor([[[1.0, inf, -inf, -5.0], [NAN, NAN, -inf, inf], [NAN, -inf, inf, -inf], [3.0, 3.0, 3.0, 3.0]]])
    plan = M.build_plan(torch.zeros(1, 4), torch.tensor([[1, -1, -1, -1]]), r=1).to(device)
    for dtype in DTYPES:
        leaf = x.detach().clone().to(device, dtype).requires_grad_()
        y, _ = M.merge(leaf, plan, mode="max", impl=impl)
        assert y[0, 0, :2].isnan().all() and y[0, 0, 2:].tolist() == [-inf, inf]
        assert y[0, 1].isnan().tolist() == [True, False, False, False] and y[0, 2].tolist() == [3.0] * 4
        y.backward(torch.ones_like(y))
        assert leaf.grad[0].tolist() == [[0, 0, 1, 0], [1, 1, 0, 1], [1] * 4, [1] * 4]


def test_nan_stays_in_its_row(every):
    impl, device = every
    plan = random_plan(1, 30, 10, device=device)
    x = normal((1, 30, 9), device=device)
    for mode in MODES:
        clean, _ = M.merge(x, plan, mode=mode, impl=impl)
        bad = x.clone()
        bad[0, 7] = NAN
        y, _ = M.merge(bad, plan, mode=mode, impl=impl)
        other = torch.arange(plan.rows, device=device) != plan.inverse[0, 7]
        assert torch.equal(y[0, other], clean[0, other])


def test_rows_whose_weights_are_zero(every):
    """Sizes of padding are 0: a row of it is 0 and passes no gradient on; weights of 0 alone count alike."""
    impl, device = every
    plan = M.build_plan(torch.zeros(1, 4), torch.tensor([[1, -1, 3, -1]]), r=2).to(device)
    x = normal((1, 4, 5), device=device).requires_grad_()
    size = torch.tensor([[0.0, 0.0, 2.0, 0.0]], device=device)
    y, total = M.merge(x, plan, size, impl=impl)
    y.sum().backward()
    assert (y[0, 0] == 0).all() and total[0, :, 0].tolist() == [0.0, 2.0] and torch.equal(y[0, 1], x[0, 2])
    assert x.grad[0].sum(1).tolist() == [0.0, 0.0, 5.0, 0.0]
    y, _ = M.merge(x, plan, mode="weighted", weight=size, impl=impl)
    torch.testing.assert_close(y[0, 0], x[0, :2].mean(0))
    assert torch.equal(y[0, 1], x[0, 2])


def test_a_weight_of_zero_does_not_count(every):
    impl, device = every
    plan = M.build_plan(torch.zeros(1, 3), torch.tensor([[1, -1, -1]]), r=1).to(device)
    x = torch.tensor([[[3e38], [1.0], [2.0]]], device=device)
    y, _ = M.merge(x, plan, mode="weighted", weight=torch.tensor([[0.0, 5.0, 1.0]], device=device), impl=impl)
    assert y[0, :, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("shape, r", [((0, 6, 4), 2), ((2, 0, 4), 0), ((2, 6, 0), 2), ((2, 1, 3), 0)])
@pytest.mark.parametrize("mode", MODES)
def test_empty(every, mode, shape, r):
    impl, device = every
    plan = random_plan(1, shape[1], r, device=device)
    x = torch.ones(shape, device=device, requires_grad=True)
    y, size = M.merge(x, plan, mode=mode, impl=impl)
    assert y.shape == (shape[0], shape[1] - r, shape[2]) and size.shape == (shape[0], shape[1] - r, 1)
    y.sum().backward()
    assert x.grad.shape == shape
    M.unmerge(y, plan, impl=impl)


def gradient(impl, x, plan, up, mode, **weights):
    x = x.detach().requires_grad_()
    y, _ = M.merge(x, plan, mode=mode, impl=impl, **weights)
    return torch.autograd.grad(y, x, up)[0]


@pytest.mark.parametrize("mode", [*MODES, "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(implementation, mode, dtype):
    impl, device = implementation
    for plan, batch in [
        (random_plan(2, 33, 16, 1), 2),
        (random_plan(1, 33, 10, 2), 3),
        (hub_plan(200), 2),
        (M.match(signs((2, 24, 16)), threshold=0.25), 2),
    ]:
        tokens = plan.tokens
        x = normal((batch, tokens, 17), dtype, seed=3)
        up = normal((batch, plan.rows, 17), dtype, seed=4)
        weights = {"size": sizes(batch, tokens, 5)}
        if mode == "weighted":
            weights["weight"] = torch.rand(batch, tokens, generator=generator(6))
        on = {k: v.to(device) for k, v in weights.items()}
        truth = gradient("reference", x.double(), plan, up.double(), mode, **weights)
        peer = gradient("reference", x, plan, up, mode, **weights)
        got = gradient(impl, x.to(device), plan.to(device), up.to(device), mode, **on)
        check_budget(f"dx {tokens}", got, peer, truth, factor=3.0)
        dense, expanded = (
            gradient(impl, x.to(device), plan.to(device), u.to(device), mode, **on)
            for u in (torch.ones_like(up), up.new_ones(1).expand_as(up))
        )
        assert torch.equal(dense, expanded)


@pytest.mark.parametrize("mode", [*MODES, "weighted"])
def test_gradcheck(mode):
    plan = M.match(signs((2, 9, 16)), threshold=0.0)
    x = normal((2, 9, 2), torch.float64).requires_grad_()
    kw = {"weight": torch.rand(2, 9, generator=generator(1))} if mode == "weighted" else {}
    run = lambda x: M.merge(x, plan, sizes(2, 9), mode=mode, **kw)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, x)


def test_gradient_of_max_goes_to_the_first(every):
    """Among equals the first member alone, also in the reference: the gradient is that of the op, not shared out."""
    impl, device = every
    plan = hub_plan(50, device)
    x = torch.randint(0, 3, (2, 50, 6), generator=generator(1)).float().to(device).requires_grad_()
    for dtype in DTYPES:
        leaf = x.detach().to(dtype).requires_grad_()
        y, _ = M.merge(leaf, plan, mode="max", impl=impl)
        y.backward(torch.full_like(y, 3.0))
        for b in range(2):
            for c in range(6):
                own = x[b, 1:49, c].tolist()
                want = [0.0] * 48
                want[own.index(max(own))] = 3.0
                assert leaf.grad[b, 1:49, c].tolist() == want


def test_backward_reference_is_the_gradient_of_the_reference():
    for mode, code in MODES.items():
        for plan in (random_plan(2, 21, 8), M.match(signs((2, 24, 16)), threshold=0.25)):
            x = normal((2, plan.tokens, 3), torch.float64, seed=1)
            up = normal((2, plan.rows, 3), torch.float64, seed=2)
            weight = sizes(2, plan.tokens)[..., 0]
            want = gradient("reference", x, plan, up, mode, size=weight)
            got = merge_bwd("reference", up, x, weight, None, plan, code)
            torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)


def test_dropped_tokens_have_no_gradient(every):
    impl, device = every
    metric = signs((1, 12, 16), device=device)
    metric[0, [0, 2, 4, 6]] = NAN
    plan = M.match(metric, 4, impl=impl)
    assert int(plan.dropped) == 2
    for mode in MODES:
        x = normal((1, 12, 3), device=device).requires_grad_()
        y, _ = M.merge(x, plan, mode=mode, impl=impl)
        y.sum().backward()
        lost = plan.inverse[0] < 0
        assert (x.grad[0, lost] == 0).all() and not y.isnan().any()


def test_no_second_derivative(implementation):
    """The kernels have none: it is refused, never 0 without a word."""
    impl, device = implementation
    plan = random_plan(1, 12, 4, device=device)
    x = normal((1, 12, 3), device=device).requires_grad_()
    rows = normal((1, 8, 3), device=device).requires_grad_()
    for leaf, run in ((x, lambda: M.merge(x, plan, impl=impl)[0]), (rows, lambda: M.unmerge(rows, plan, impl=impl))):
        (first,) = torch.autograd.grad(run().square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_one_plan_used_twice(implementation):
    """For several tensors, with gradients and without, forward and back: a plan does not change."""
    impl, device = implementation
    plan = random_plan(2, 40, 15, device=device)
    before = {k: v.clone() for k, v in vars(plan).items() if isinstance(v, torch.Tensor)}
    x = normal((2, 40, 8), device=device).requires_grad_()
    z = normal((2, 40, 24), torch.bfloat16, device=device)
    first = M.merge(x, plan, impl=impl)[0]
    M.merge(z, plan, mode="max", impl=impl)
    second = M.merge(x * 2, plan, impl=impl)[0]
    (first.sum() + second.sum()).backward(retain_graph=True)
    once = x.grad.clone()
    x.grad = None
    (first.sum() + second.sum()).backward()
    assert torch.equal(once, x.grad) and torch.equal(second, first * 2)
    assert all(torch.equal(v, getattr(plan, k)) for k, v in before.items())


def test_sizes_get_no_gradient(every):
    impl, device = every
    plan = random_plan(1, 10, 4, device=device)
    size = sizes(1, 10, device=device).requires_grad_()
    y, total = M.merge(normal((1, 10, 3), device=device), plan, size, impl=impl)
    assert not y.requires_grad and not total.requires_grad


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.data())
def test_merge_then_unmerge_projects(batch, tokens, data):
    """Means: doing it twice changes nothing (the values are small whole numbers over powers of two). Heads: replace brings them back."""
    r = data.draw(st.integers(0, tokens // 2))
    plan = random_plan(batch, tokens, r, data.draw(st.integers(0, 50)))
    x = torch.randint(-8, 9, (batch, tokens, 3), generator=generator(r)).float()
    y, size = M.merge(x, plan)
    once = M.unmerge(y, plan)
    again, same = M.merge(once, plan)
    assert torch.equal(size, same)
    torch.testing.assert_close(again, y, atol=1e-5, rtol=0)
    y, _ = M.merge(x, plan, mode="replace")
    head = plan.head.long()[..., None].expand(-1, -1, 3)
    assert torch.equal(y, x.gather(1, head)) and torch.equal(M.unmerge(y, plan).gather(1, head), y)
    assert torch.equal(M.merge(M.unmerge(y, plan), plan, mode="replace")[0], y)
    total = M.merge(x, plan, mode="sum")[0].sum(1)
    torch.testing.assert_close(total, x.sum(1), atol=0, rtol=0)  # sums of whole numbers are exact


def test_merging_again_and_again_conserves_sizes(every):
    impl, device = every
    x, size = signs((2, 64, 16), device=device), None
    for r in (20, 11, 8, 5):
        plan = M.match(x, r, impl=impl)
        x, size = M.merge(x, plan, size, impl=impl)
        assert size.sum((1, 2)).tolist() == [64.0, 64.0]


def test_raw_totals(implementation):
    """total is the sum of weights in every mode, and 1 for each member where there are none."""
    impl, device = implementation
    plan: MergePlan = random_plan(2, 31, 12, device=device)
    x = normal((2, 31, 5), device=device)
    count = plan.ptr.diff(dim=1).float()
    for mode in MODES.values():
        _, total, log_total = merge(impl, x, None, plan, mode)
        assert torch.equal(total, count)
        torch.testing.assert_close(log_total, count.log())
