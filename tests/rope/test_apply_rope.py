"""apply_rope: every implementation against the float64 reference, and the promises about bits and memory."""

from __future__ import annotations

import math

import pytest
import torch
from rope.rope_cases import DTYPES, SPECS, TOKENS, spec

from saccade.rope import RopeSpec, apply_rope
from saccade.testing import check_budget, layouts, poison, rope_inputs


def exact(q, k, positions, s):
    """The reference in float64."""
    q64, k64 = q.double().cpu(), None if k is None else k.double().cpu()
    return apply_rope(q64, k64, positions.cpu(), s, impl="reference")


def test_one_pair_by_hand():
    s = RopeSpec(2, (math.pi / 2,), (0,))  # a quarter turn per position
    x = torch.tensor([[[[3.0, 5.0]] * 4]], dtype=torch.float64)
    out, none = apply_rope(x, None, torch.arange(4), s, impl="reference")
    assert none is None
    expected = torch.tensor([[3.0, 5.0], [-5.0, 3.0], [-3.0, -5.0], [5.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(out[0, 0], expected, atol=4 * torch.finfo(torch.float64).eps * 5, rtol=0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(implementation, name, dtype):
    impl, device = implementation
    s = SPECS[name]
    for tokens, layout, place in [
        (TOKENS[0], "bhsd", torch.int32),
        (TOKENS[1], "bshd", torch.float32),
        (TOKENS[2], "packed", torch.float64),
        (TOKENS[3], "bhsd", torch.int64),
    ]:
        q, k, p = rope_inputs(
            s,
            batch=32 if tokens == 1 else 2,
            q_heads=8,
            k_heads=4,
            tokens=tokens,
            dtype=dtype,
            layout=layout,
            positions=place,
            device=device,
        )
        outs = apply_rope(q, k, p, s, impl=impl)
        peers = apply_rope(q, k, p, s, impl="reference")
        for what, out, peer, truth in zip("qk", outs, peers, exact(q, k, p, s), strict=True):
            check_budget(f"{what} {tokens} {layout} {place}", out, peer, truth)
            assert out.stride() == torch.empty_like(q if what == "q" else k).stride()


@pytest.mark.parametrize("name", SPECS)
def test_float64(name):
    s = SPECS[name]
    q, k, p = rope_inputs(s, q_heads=8, k_heads=4, dtype=torch.float64, positions=torch.float64)
    for out, truth in zip(apply_rope(q, k, p, s, impl="cpu"), exact(q, k, p, s), strict=True):
        torch.testing.assert_close(out, truth, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_gives_the_same_bits(implementation, layout, dtype):
    impl, device = implementation
    for s in SPECS.values():
        q, k, p = rope_inputs(s, q_heads=8, k_heads=4, dtype=dtype, layout=layout, device=device)
        expected = apply_rope(q, k, p, s, impl=impl)
        got = apply_rope(q, k, p, s, inplace=True, impl=impl)
        assert got[0] is q and got[1] is k
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_packed_neighbours_stay_untouched(implementation):
    impl, device = implementation
    s = SPECS["d128"]
    wide = torch.full((1, 9, 3, 4, 128), float("nan"), device=device)
    wide[:, :, 1] = 1.0
    view = wide[:, :, 1].transpose(1, 2)
    apply_rope(view, None, torch.arange(9, device=device).expand(3, -1), s, inplace=True, impl=impl)
    assert wide[:, :, 0].isnan().all() and wide[:, :, 2].isnan().all() and not view.isnan().any()


def test_identity_keeps_every_bit(implementation):
    impl, device = implementation
    s = spec(128, zeros=16)
    q, _, p = rope_inputs(s, device=device)
    odd = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan"), 1e-42], device=device)
    for column in (48, 112):
        q[..., column : column + 5] = odd
    out, _ = apply_rope(q, None, p, s, impl=impl)
    columns = [*range(48, 64), *range(112, 128)]
    assert torch.equal(out[..., columns].view(torch.int32), q[..., columns].view(torch.int32))
    zero = torch.zeros_like(p)
    same, _ = apply_rope(q, None, zero, s, impl=impl)  # position 0 is the identity too
    assert torch.equal(same[..., :48].view(torch.int32), q[..., :48].view(torch.int32))


@pytest.mark.parametrize("place", [2**31, -(2**31), 2**31 - 0.5, 1e6 + 1 / 3])
def test_far_positions(implementation, place):
    """Angles stay right to 1e-7 rad where fp32 products are wrong by whole turns."""
    impl, device = implementation
    s = spec(128, axes=1)
    x = torch.zeros(1, 1, 1, 128, device=device)
    x[..., :64] = 1.0
    p = torch.tensor([place], dtype=torch.float64, device=device)
    out, _ = apply_rope(x, None, p, s, impl=impl)
    cos, sin = out[0, 0, 0, :64].double().cpu(), out[0, 0, 0, 64:].double().cpu()
    import mpmath

    mpmath.mp.dps = 50
    assert isinstance(s.inv_freq, tuple)
    for i, f in enumerate(s.inv_freq):
        angle = mpmath.mpf(place) * mpmath.mpf(f)
        off = mpmath.atan2(sin[i].item(), cos[i].item()) - angle
        off = off - 2 * mpmath.pi * mpmath.nint(off / (2 * mpmath.pi))
        assert abs(off) <= 1e-7, (i, float(off))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_position_that_is_not_finite_gives_nan(implementation, bad):
    impl, device = implementation
    s = spec(64, axes=1)
    p = torch.tensor([1.0, bad, 2.0], dtype=torch.float64, device=device)
    out, _ = apply_rope(torch.ones(1, 2, 3, 64, device=device), None, p, s, impl=impl)
    assert out[:, :, 1].isnan().all() and not out[:, :, [0, 2]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 5, 64), (2, 4, 0, 64), (1, 0, 3, 64)])
def test_empty(implementation, shape):
    impl, device = implementation
    q = torch.ones(shape, device=device)
    out, _ = apply_rope(q, q.clone(), torch.zeros(3, shape[2], dtype=torch.int64, device=device), spec(64), impl=impl)
    assert out.shape == q.shape


def test_deterministic_for_any_split(implementation):
    impl, device = implementation
    s = SPECS["d72"]
    q, k, p = rope_inputs(s, batch=3, tokens=100, dtype=torch.bfloat16, device=device)
    whole, _ = apply_rope(q, k, p, s, impl=impl)
    for b in range(3):
        part, _ = apply_rope(q[b : b + 1, :, 7:90], None, p[:, b : b + 1, 7:90], s, impl=impl)
        assert torch.equal(part, whole[b : b + 1, :, 7:90])


def test_thread_count_changes_no_bit():
    s = SPECS["d96-groups"]
    q, k, p = rope_inputs(s, q_heads=8, k_heads=4, tokens=300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = apply_rope(q, k, p, s, impl="cpu")
        torch.set_num_threads(2)
        two = apply_rope(q, k, p, s, impl="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("name", ["d128-hope", "d80-inter-partial", "d96-groups", "d256-yarn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(implementation, name, dtype):
    impl, device = implementation
    s = SPECS[name]
    q, k, p = rope_inputs(s, q_heads=8, k_heads=4, dtype=dtype, device=device)
    up = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)

    def grads(impl, q, k, p, up):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        a, b = apply_rope(q, k, p, s, impl=impl)
        return torch.autograd.grad((a * up).sum() + (b * up[:, :4]).sum(), (q, k))

    truth = grads("reference", q.double().cpu(), k.double().cpu(), p.cpu(), up.double().cpu())
    for out, peer, t in zip(grads(impl, q, k, p, up), grads("reference", q, k, p, up), truth, strict=True):
        check_budget("grad", out, peer, t, factor=3.0)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["d80-inter-partial", "d96-groups"])
def test_gradcheck(impl, name):
    s = SPECS[name]
    q, k, p = rope_inputs(s, q_heads=4, k_heads=2, tokens=3, dtype=torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, p, s, impl=impl), (q, k), fast_mode=True)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradcheck_of_learned_frequencies(impl):
    q, k, _ = rope_inputs(spec(8), q_heads=4, k_heads=2, tokens=3, dtype=torch.float64)
    p = torch.tensor([[0.5, -1.25, 2.0], [1.0, 0.0, 0.25], [0.0, 3.0, -0.5]], dtype=torch.float64)
    freq = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def run(q, k, freq):
        return apply_rope(q, k, p, RopeSpec(8, freq, None, "interleaved"), impl=impl)

    assert torch.autograd.gradcheck(run, (q.requires_grad_(), k.requires_grad_(), freq))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learned_frequency_gradient(implementation, dtype):
    impl, device = implementation
    q, k, _ = rope_inputs(spec(64), q_heads=4, k_heads=4, tokens=200, dtype=dtype, device=device)
    p = torch.rand(3, 200, generator=torch.Generator().manual_seed(4)).to(device) * 8 - 4
    up = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(dtype).to(device)
    start = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(6))

    def grad(impl, q, k, p, up, freq):
        freq = freq.detach().requires_grad_()
        a, b = apply_rope(q, k, p, RopeSpec(64, freq, None, "interleaved"), impl=impl)
        return torch.autograd.grad((a * up).sum() + (b * up).sum(), freq)[0]

    truth = grad("reference", q.double().cpu(), k.double().cpu(), p.cpu(), up.double().cpu(), start.double())
    peer = grad("reference", q, k, p, up, start.to(device))
    check_budget("inv_freq", grad(impl, q, k, p, up, start.to(device)), peer, truth, factor=3.0)


def test_backward_is_the_inverse(implementation):
    impl, device = implementation
    s = SPECS["d128"]
    q, _, p = rope_inputs(s, device=device)
    q = q.requires_grad_()
    out, _ = apply_rope(q, None, p, s, impl=impl)
    (back,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(back, q.detach(), atol=2e-6, rtol=0)


def test_outputs_are_fully_written(implementation):
    """A poisoned output buffer must not show through: rerun into memory that held NaN."""
    impl, device = implementation
    for s in SPECS.values():
        q, k, p = rope_inputs(s, q_heads=8, k_heads=4, device=device)
        block = poison(q)
        del block  # the allocator hands the poisoned block to the output
        outs = apply_rope(q, k, p, s, impl=impl)
        assert not any(o.isnan().any() for o in outs)
