"""unmerge: rows back to tokens, with residual and gate, and its gradients."""

from __future__ import annotations

import pytest
import torch
from merge.merge_cases import DTYPES, LAYOUTS, generator, laid_out, normal, signs

from saccade import merge as M
from saccade.testing import check_budget

GATES = {"none": None, "all": ("B", "N"), "sample": ("B", 1), "token": (1, "N"), "column": (1, 1)}


def gate_of(kind, batch, tokens, width, dtype, seed=9):
    if GATES[kind] is None:
        return None
    shape = [{"B": batch, "N": tokens}.get(n, n) for n in GATES[kind]]
    return normal((*shape, width), dtype, seed=seed)


def plan_of(batch, tokens, r, seed=0, dropped=False):
    metric = signs((batch, tokens, 4), seed=seed, distinct=5)
    if dropped:
        metric[:, ::4] = float("nan")
    return M.match(metric, r)


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def test_by_hand():
    y = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    plan = M.build_plan(torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[2, -1, -1]]), r=1)
    residual = torch.tensor([[[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]]], dtype=torch.float64)
    gate = torch.tensor([[[2.0, -1.0]]], dtype=torch.float64)
    assert M.unmerge(y, plan)[0].tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    out = M.unmerge(y, plan, residual=residual, gate=gate)
    assert out[0].tolist() == [[16.0, -4.0], [22.0, -2.0], [36.0, -4.0]]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(implementation, gate, dtype):
    impl, device = implementation
    for i, (batch, shared, tokens, width, r) in enumerate(
        [
            (2, False, 33, 7, 12),
            (3, True, 64, 64, 20),
            (1, False, 130, 129, 50),
            (2, True, 1, 1, 0),
            (1, False, 9, 1280, 3),
        ]
    ):
        for dropped in (False, True):
            plan = plan_of(1 if shared else batch, tokens, r, i, dropped and tokens > 1)
            y = normal((batch, plan.rows, width), dtype, seed=i, layout=LAYOUTS[i % 5])
            g = gate_of(gate, batch, tokens, width, dtype)
            for residual in (None, normal((batch, tokens, width), dtype, seed=i + 50, layout=LAYOUTS[(i + 1) % 5])):
                a, b, c = on(device, y, residual, g)
                out = M.unmerge(a, plan.to(device), residual=b, gate=c, impl=impl)
                peer = M.unmerge(y, plan, residual=residual, gate=g, impl="reference")
                wide = [None if t is None else t.double() for t in (y, residual, g)]
                truth = M.unmerge(wide[0], plan, residual=wide[1], gate=wide[2], impl="reference")
                assert out.dtype == dtype and out.is_contiguous()
                check_budget(f"{tokens} {width} {dropped}", out, peer, truth)
                if residual is None and g is None:
                    assert torch.equal(out.cpu(), peer)  # a copy


def test_brute_force(every):
    impl, device = every
    plan = plan_of(2, 20, 9, dropped=True)
    assert (plan.inverse < 0).any()
    y = normal((2, plan.rows, 3))
    out = M.unmerge(y.to(device), plan.to(device), impl=impl)
    for b in range(2):
        for n, row in enumerate(plan.inverse[b].tolist()):
            assert out[b, n].tolist() == (y[b, row].tolist() if row >= 0 else [0.0] * 3)


def test_dropped_tokens_take_nothing(every):
    """Not even a NaN of the row that a careless index would read, nor an infinite gate times 0 in place of y."""
    impl, device = every
    plan = plan_of(1, 20, 9, dropped=True).to(device)
    lost = plan.inverse[0] < 0
    y = torch.full((1, plan.rows, 5), float("nan"), device=device)
    residual = normal((1, 20, 5), device=device)
    out = M.unmerge(y, plan, residual=residual, impl=impl)
    assert torch.equal(out[0, lost], residual[0, lost]) and out[0, ~lost].isnan().all()


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(impl, plan, y, residual, gate, up):
    y, residual, gate = leaves(y, residual, gate)
    out = M.unmerge(y, plan, residual=residual, gate=gate, impl=impl)
    return torch.autograd.grad(out, [t for t in (y, residual, gate) if t is not None], up)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(implementation, gate, dtype):
    impl, device = implementation
    for batch, shared, tokens, r in [(2, False, 33, 12), (3, True, 40, 20), (2, False, 200, 99)]:
        plan = plan_of(1 if shared else batch, tokens, r, 1, dropped=tokens == 40)
        y = normal((batch, plan.rows, 9), dtype, seed=1)
        g = gate_of(gate, batch, tokens, 9, dtype)
        residual = normal((batch, tokens, 9), dtype, seed=2)
        up = normal((batch, tokens, 9), dtype, seed=3)
        wide = [None if t is None else t.double() for t in (y, residual, g, up)]
        truth = gradients("reference", plan, *wide)
        peer = gradients("reference", plan, y, residual, g, up)
        got = gradients(impl, plan.to(device), *on(device, y, residual, g, up))
        for name, *parts in zip(("dy", "dresidual", "dgate"), got, peer, truth, strict=False):
            assert parts[0].dtype == dtype
            check_budget(f"{name} {tokens}", *parts, factor=3.0)
        summed = gradients(impl, plan.to(device), *on(device, y, residual, g), up.new_ones(1).to(device).expand_as(up))
        dense = gradients(impl, plan.to(device), *on(device, y, residual, g), torch.ones_like(up).to(device))
        assert all(torch.equal(a, b) for a, b in zip(summed, dense, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate):
    plan = plan_of(2, 8, 3, dropped=True)
    y, residual = normal((2, plan.rows, 2), torch.float64), normal((2, 8, 2), torch.float64, seed=1)
    inputs = leaves(y, residual, gate_of(gate, 2, 8, 2, torch.float64))
    run = lambda y, residual, g: M.unmerge(y, plan, residual=residual, gate=g)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_gradients_of_some_inputs(implementation, wanted):
    impl, device = implementation
    plan = plan_of(2, 20, 8)
    tensors = [normal((2, plan.rows, 4)), normal((2, 20, 4), seed=1), normal((2, 1, 4), seed=2)]
    both = []
    for name, where in ((impl, device), ("reference", "cpu")):
        own = [t.detach().to(where).requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        out = M.unmerge(own[0], plan.to(where), residual=own[1], gate=own[2], impl=name)
        out.square().sum().backward()
        assert all((t.grad is not None) == (i in wanted) for i, t in enumerate(own))
        both.append([own[i].grad.cpu() for i in wanted])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(implementation, layout):
    impl, device = implementation
    plan = plan_of(2, 50, 20).to(device)
    y, residual, gate = (
        normal((2, n, 24), torch.bfloat16, seed=s, device=device) for s, n in enumerate((plan.rows, 50, 50))
    )
    want = M.unmerge(y, plan, residual=residual, gate=gate, impl=impl)
    moved = [laid_out(t, layout) for t in (y, residual, gate)]
    assert torch.equal(M.unmerge(moved[0], plan, residual=moved[1], gate=moved[2], impl=impl), want)
    flat = M.unmerge(y[:1].expand(2, -1, -1), plan, gate=gate[:1, :1].expand(2, 50, -1), impl=impl)
    assert torch.equal(flat, M.unmerge(y[:1].repeat(2, 1, 1), plan, gate=gate[:1, :1], impl=impl))


def test_unmerge_of_merge_is_the_mean_of_the_group(every):
    impl, device = every
    plan = plan_of(2, 40, 16).to(device)
    x = torch.randint(-4, 5, (2, 40, 3), generator=generator(0)).float().to(device)
    back = M.unmerge(M.merge(x, plan, impl=impl)[0], plan, impl=impl)
    same = plan.inverse[:, :, None] == plan.inverse[:, None, :]
    want = (same.double() @ x.double()) / same.sum(2, keepdim=True)
    torch.testing.assert_close(back.double(), want, atol=1e-6, rtol=0)
