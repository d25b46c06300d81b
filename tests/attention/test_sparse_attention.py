"""sparse_attention over implementations: outputs, LSE and every gradient inside the error budget of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention.attention_cases import DTYPES, HEAD_DIMS, LAYOUTS, expected, generator, inputs, normal, results

from saccade.attention import BlockLayout, sparse_attention
from saccade.reference.sparse_attention import sparse_attention as reference
from saccade.testing import check_budget

NAMES = ("dq", "dk", "dv", "dbias", "dkey_bias")


def check(
    impl, device, layout, shape, dtype, *, bias=None, key_bias=None, strides="bhsd", scale=None, seed=0, dlse=True
):
    batch, heads, head_dim = shape[0], shape[1], shape[5]
    q, k, v = inputs(*shape, dtype, seed=seed, strides=strides)
    scale = head_dim**-0.5 if scale is None else scale
    dout = normal(q.shape, dtype, seed=seed + 90)
    dlse = normal(q.shape[:3], seed=seed + 91) if dlse else None
    tensors = [q, k, v, bias, key_bias]
    mask = layout.to_mask().expand(batch, heads, -1, -1)
    exact, same = expected(tensors, mask, scale, dout, dlse)
    there = [None if t is None else t.to(device) for t in (*tensors, dout, dlse)]
    moved = layout.to(device)

    def ours(q, k, v, bias, key_bias):
        return sparse_attention(q, k, v, moved, bias=bias, key_bias=key_bias, scale=scale, return_lse=True, impl=impl)

    out, lse, grads = results(ours, there[:5], there[5], there[6])
    check_budget("out", out, same[0], exact[0])
    check_budget("lse", lse, same[1], exact[1])
    names = [n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, ours_, same_, exact_ in zip(names, grads, same[2], exact[2], strict=True):
        check_budget(name, ours_, same_, exact_, factor=3.0)
    return out, lse, grads


def test_by_hand():
    q = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    v = torch.arange(24, dtype=torch.float64).reshape(1, 1, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out, lse = reference(q, v, v, mask[None, None], key_bias=torch.tensor([[0.0, 9.0, 0.0]], dtype=torch.float64))
    assert torch.equal(out[0, 0, 0], (v[0, 0, 0] + v[0, 0, 2]) / 2) and lse[0, 0, 0] == torch.tensor(2.0).double().log()
    assert torch.equal(out[0, 0, 1], torch.zeros(8).double()) and lse[0, 0, 1] == float("-inf")


def test_gradients_of_the_specification():
    mask = torch.rand(2, 2, 5, 7, generator=generator(0)) < 0.6
    mask[0, 0, 2] = False
    tensors = [x.double().requires_grad_() for x in inputs(2, 2, 1, 5, 7, 8)]
    tensors += [
        normal((1, 2, 5, 7), seed=3).double().requires_grad_(),
        normal((2, 7), seed=4).double().requires_grad_(),
    ]
    torch.autograd.gradcheck(lambda q, k, v, b, kb: reference(q, k, v, mask, b, kb, 0.3)[0], tensors)
    seen = mask.any(-1)
    torch.autograd.gradcheck(lambda q, k, v, b, kb: reference(q, k, v, mask, b, kb, 0.3)[1][seen], tensors)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_of_layout(implementation, kind, dtype):
    impl, device = implementation
    for seed, (shape, blocks, strides) in enumerate(
        [
            ((1, 2, 2, 200, 200, 64), (64, 64), "bhsd"),
            ((2, 4, 2, 130, 190, 32), (64, 128), "bshd"),
            ((1, 3, 1, 65, 321, 80), (128, 64), "packed"),
            ((1, 2, 1, 257, 127, 128), (128, 128), "bshd"),
        ]
    ):
        layout = LAYOUTS[kind](shape[0], shape[1], *shape[3:5], *blocks, seed)
        check(impl, device, layout, shape, dtype, strides=strides, seed=seed)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_and_odd_lengths(implementation, dtype, head_dim):
    impl, device = implementation
    for seed, (q_len, k_len) in enumerate([(1, 1), (63, 65), (100, 31)]):
        layout = LAYOUTS["bits"](1, 2, q_len, k_len, 64, 64, seed)
        check(impl, device, layout, (1, 2, 2, q_len, k_len, head_dim), dtype, seed=seed)


@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_its_gradient(implementation, dtype, shared):
    impl, device = implementation
    shape = (2, 4, 2, 90, 150, 64)
    for kind in ("bits", "causal", "window"):
        layout = LAYOUTS[kind](2, 4, 90, 150, 64, 64, 5)
        for bias_dtype in {dtype, torch.float32}:
            bias = normal((*shared, 90, 150), bias_dtype, seed=6)
            key_bias = normal((2, 150), seed=7)
            check(impl, device, layout, shape, dtype, bias=bias, key_bias=key_bias, seed=8)


def test_key_bias_shared_by_the_batch(implementation):
    impl, device = implementation
    layout = LAYOUTS["whole"](2, 1, 70, 90, 64, 64)
    check(impl, device, layout, (2, 2, 2, 70, 90, 64), torch.float32, key_bias=normal((1, 90), seed=1), dlse=False)


def test_swinbert_bias_hides_almost_everything(implementation):
    """-10^4 (1 - sigma): differences far beyond the range of exp, and a gradient that still is that of float64."""
    impl, device = implementation
    bias = -1e4 * (1 - torch.sigmoid(normal((1, 1, 100, 100), seed=2)))
    bias[..., range(100), range(100)] = 0.0
    check(impl, device, BlockLayout.dense(100, 100), (2, 2, 2, 100, 100, 64), torch.float32, bias=bias, dlse=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_is_torch_sdpa(implementation, dtype):
    impl, device = implementation
    q, k, v = inputs(2, 4, 4, 333, 333, 64, dtype, device=device)
    out = sparse_attention(q, k, v, BlockLayout.dense(333, 333, device=device), impl=impl)
    torch_out = F.scaled_dot_product_attention(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    check_budget("out", out, torch_out, exact)


@pytest.mark.parametrize("q_len, k_len", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_empty(implementation, q_len, k_len):
    impl, device = implementation
    layout = BlockLayout.dense(q_len, k_len, device=device)
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, q_len, k_len, 64, device=device))
    out, lse = sparse_attention(q, k, v, layout, return_lse=True, impl="reference" if impl == "cuda" else impl)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    if k_len == 0:
        assert not out.any() and (lse == float("-inf")).all()
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_no_samples(implementation):
    impl, device = implementation
    q, k, v = inputs(0, 2, 2, 70, 70, 64, torch.bfloat16, device=device)
    assert sparse_attention(q, k, v, BlockLayout.dense(70, 70, device=device), impl=impl).shape == q.shape


def test_outputs_are_laid_out_as_inputs(implementation):
    impl, device = implementation
    q, k, v = inputs(2, 4, 4, 70, 70, 64, torch.bfloat16, device=device, strides="bshd")
    out = sparse_attention(q, k, v, BlockLayout.dense(70, 70, device=device), impl=impl)
    assert out.transpose(1, 2).is_contiguous()


def test_proportional_attention_of_merged_tokens(implementation):
    """A token of size n counts as n equal tokens (ToMe, equation 1)."""
    impl, device = implementation
    q, k, v = inputs(1, 2, 2, 40, 40, 64, device=device)
    sizes = torch.randint(1, 5, (40,), generator=generator(1)).to(device)
    out = sparse_attention(
        q, k, v, BlockLayout.dense(40, 40, device=device), key_bias=sizes.float().log()[None], impl=impl
    )
    again = sparse_attention(
        q,
        *(x.repeat_interleave(sizes, 2) for x in (k, v)),
        BlockLayout.dense(40, int(sizes.sum()), device=device),
        impl=impl,
    )
    assert (out - again).abs().max() < 1e-5
