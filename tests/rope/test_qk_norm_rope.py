"""qk_norm_rope: every implementation against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from rope.rope_cases import DTYPES, SPECS, spec

from saccade.rope import apply_rope, qk_norm_rope
from saccade.testing import check_budget, rope_inputs

NAMES = ("d128", "d128-hope", "d128-inter", "d72", "d80-inter-partial", "d96-groups", "d32-heads", "d256-yarn")


def weights(q, k, row, dtype, seed=9):
    g = torch.Generator().manual_seed(seed)
    sizes = [x.shape[1] * x.shape[3] if row else x.shape[3] for x in (q, k)]
    return [(1 + 0.2 * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype).to(q.device) for n in sizes]


def up64(*tensors):
    return [None if t is None else t.double().cpu() for t in tensors]


def test_against_torch_rms_norm():
    s = SPECS["d128"]
    q, k, p = rope_inputs(s, dtype=torch.float64)
    wq, wk = weights(q, k, False, torch.float64)
    got = qk_norm_rope(q, k, p, s, wq, wk, eps=1e-5, impl="reference")
    normed = [torch.nn.functional.rms_norm(x, (128,), w, eps=1e-5) for x, w in ((q, wq), (k, wk))]
    for a, b in zip(got, apply_rope(*normed, p, s, impl="reference"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-13)
    flat = q.transpose(1, 2).flatten(2)  # norm="row": over all heads
    row_w = weights(q, k, True, torch.float64)[0]
    row = torch.nn.functional.rms_norm(flat, (flat.shape[-1],), row_w, eps=1e-6).unflatten(2, (4, 128)).transpose(1, 2)
    got_row, _ = qk_norm_rope(q, None, p, s, row_w, None, norm="row", impl="reference")
    torch.testing.assert_close(got_row, apply_rope(row, None, p, s, impl="reference")[0], atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("norm", ["head", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(implementation, name, dtype, norm):
    impl, device = implementation
    s, row = SPECS[name], norm == "row"
    for tokens, layout, weight_dtype in [(1, "bhsd", dtype), (33, "bshd", torch.float32), (70, "packed", dtype)]:
        # A largest error needs a sample: one token comes in a batch of 32.
        batch = 32 if tokens == 1 else 2
        q, k, p = rope_inputs(
            s, batch=batch, q_heads=8, k_heads=4, tokens=tokens, dtype=dtype, layout=layout, device=device
        )
        wq, wk = weights(q, k, row, weight_dtype)
        got = qk_norm_rope(q, k, p, s, wq, wk, norm=norm, impl=impl)
        peer = qk_norm_rope(q, k, p, s, wq, wk, norm=norm, impl="reference")
        q64, k64, wq64, wk64, p64 = (*up64(q, k, wq, wk), p.cpu())
        truth = qk_norm_rope(q64, k64, p64, s, wq64, wk64, norm=norm, impl="reference")
        for what, a, b, t in zip("qk", got, peer, truth, strict=True):
            check_budget(f"{what} {tokens} {layout}", a, b, t)
        inplace = qk_norm_rope(q, k, p, s, wq, wk, norm=norm, inplace=True, impl=impl)
        assert inplace[0] is q and all(torch.equal(a, b) for a, b in zip(got, inplace, strict=True))


@pytest.mark.parametrize("norm", ["head", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["d128-hope", "d80-inter-partial", "d96-groups", "d256-yarn"])
def test_gradients(implementation, name, dtype, norm):
    impl, device = implementation
    s = SPECS[name]
    q, k, p = rope_inputs(s, q_heads=8, k_heads=4, tokens=70, dtype=dtype, layout="bshd", device=device)
    wq, wk = weights(q, k, norm == "row", dtype)
    g = torch.Generator().manual_seed(11)
    uq, uk = (torch.randn(x.shape, generator=g).to(dtype).to(device) for x in (q, k))

    def grads(impl, q, k, wq, wk, uq, uk):
        leaves = [x.detach().requires_grad_() for x in (q, k, wq, wk)]
        outs = qk_norm_rope(leaves[0], leaves[1], p.to(q.device), s, leaves[2], leaves[3], norm=norm, impl=impl)
        return torch.autograd.grad(outs, leaves, (uq, uk))

    truth = grads("reference", *up64(q, k, wq, wk, uq, uk))
    peer = grads("reference", q, k, wq, wk, uq, uk)
    for what, a, b, t in zip(
        ("q", "k", "q_weight", "k_weight"), grads(impl, q, k, wq, wk, uq, uk), peer, truth, strict=True
    ):
        assert a.dtype == dtype
        check_budget(what, a, b, t, factor=3.0)


@pytest.mark.parametrize("norm", ["head", "row"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck(impl, norm):
    s = spec(10, "interleaved", pairs=4, groups=2)
    q, k, p = rope_inputs(s, q_heads=4, k_heads=2, tokens=3, dtype=torch.float64)
    wq, wk = weights(q, k, norm == "row", torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, wq, wk)]

    def run(q, k, wq, wk):
        return qk_norm_rope(q, k, p, s, wq, wk, norm=norm, impl=impl)

    assert torch.autograd.gradcheck(run, leaves)


def test_without_weights_and_without_k(implementation):
    impl, device = implementation
    s = SPECS["d128"]
    q, _, p = rope_inputs(s, device=device)
    got, none = qk_norm_rope(q, None, p, s, None, None, impl=impl)
    truth, _ = qk_norm_rope(q.double().cpu(), None, p.cpu(), s, None, None, impl="reference")
    peer, _ = qk_norm_rope(q, None, p, s, None, None, impl="reference")
    assert none is None
    check_budget("q", got, peer, truth)


def test_weight_gradient_is_the_same_for_any_thread_count():
    s = SPECS["d72"]
    q, k, p = rope_inputs(s, tokens=500, dtype=torch.bfloat16)
    wq, wk = weights(q, k, False, torch.bfloat16)

    def run():
        leaf = wq.clone().requires_grad_()
        a, b = qk_norm_rope(q, k, p, s, leaf, wk, impl="cpu")
        return torch.autograd.grad(a.sum() + b.sum(), leaf)[0]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(0, 4, 5, 64), (2, 4, 0, 64)])
def test_empty(implementation, shape):
    impl, device = implementation
    q = torch.ones(shape, device=device, requires_grad=True)
    w = torch.ones(64, device=device, requires_grad=True)
    p = torch.zeros(3, shape[2], dtype=torch.int64, device=device)
    out, _ = qk_norm_rope(q, None, p, spec(64), w, None, impl=impl)
    out.sum().backward()
    assert out.shape == q.shape and torch.equal(w.grad, torch.zeros_like(w))
