"""The gradients of sparse_attention on the emulated GPU, held against those of the reference in float64."""

from __future__ import annotations

from ctypes import c_int
from dataclasses import replace

import pytest
import torch
from emulation.attention_cases import (
    BF16,
    F16,
    F32,
    INF,
    NAN,
    Inputs,
    Problem,
    causal,
    head_strides,
    output,
    pointer,
    problem,
    random_mask,
    random_order,
    reference,
    untouched,
)
from emulation.attention_structs import SparseAttentionGradArgs
from emulation.cuda_emulator import call, library

from saccade.attention.layout import BlockLayout
from saccade.reference.sparse_attention import sparse_attention
from saccade.testing.budget import check_budget

Tensor = torch.Tensor
NAMES = ("dq", "dk", "dv", "dkey_bias")


def run(p: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> list[Tensor]:
    """dq, dk, dv, delta and, with a key_bias, dkey_bias [B, H, Sk]."""
    inputs = Inputs(p, backward=True)
    results = [output(x) for x in (p.q, p.k, p.v)]
    grads = [x for x, _ in results]
    delta = torch.full(lse.shape, NAN)
    dkey_bias = None if p.key_bias is None else torch.full((*p.q.shape[:2], p.k.shape[2]), NAN)
    args = SparseAttentionGradArgs(
        *(inputs.args, dout.data_ptr(), out.data_ptr(), head_strides(dout), head_strides(out)),
        *(lse.data_ptr(), pointer(dlse), *(x.data_ptr() for x in grads), *(head_strides(x) for x in grads)),
        *(pointer(dkey_bias), delta.data_ptr(), None),
    )
    call("sparse_attention_bwd", "sparse_attention_bwd", args)
    for grad, buffer in results:
        untouched(grad, buffer)
    return [*grads, delta, *([] if dkey_bias is None else [dkey_bias])]


def gradients(p: Problem, dout: Tensor, dlse: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """dq, dk, dv and dkey_bias [B, H, Sk] of the mathematics in `dtype`."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    heads = p.q.shape[:2]
    bias = None if p.bias is None else p.bias.to(dtype)
    leaves = [q, k, v]
    if p.key_bias is not None:  # apart for every head: as a bias that rows share
        keys = p.key_bias.to(dtype)[:, None, None].expand(*heads, 1, -1).clone().requires_grad_()
        leaves.append(keys)
        bias = keys if bias is None else bias + keys
    if dtype in (F16, BF16):
        out, lse = eager(q, k, v, p.layout.to_mask(), bias, p.scale)
    else:
        out, lse = sparse_attention(q, k, v, p.layout.to_mask(), bias, None, p.scale)
    total = (out * dout.to(dtype)).sum()
    if dlse is not None:
        total = total + (torch.where(lse > -INF, lse, 0.0) * dlse.to(dtype)).sum()
    found = torch.autograd.grad(total, leaves)
    return [x.view(*heads, -1) if i == 3 else x for i, x in enumerate(found)]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """As torch would compute it in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * scale
    s = (s if bias is None else s + bias).masked_fill(~mask, -INF)
    empty = (s == -INF).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return p @ v, torch.logsumexp(s.masked_fill(empty, 0.0).float(), -1).to(s.dtype)


def check(p: Problem, with_dlse: bool = False, seed: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    dout = torch.randn(p.q.shape, generator=g).to(p.q.dtype)
    dlse = torch.randn(p.q.shape[:3], generator=g) if with_dlse else None
    out, lse = (x.to(t) for x, t in zip(reference(p, F32), (p.q.dtype, F32), strict=True))
    grads = run(p, dout, dlse, out, lse)
    exact_out = reference(p)[0]
    delta = (dout.double() * out.double()).sum(-1) - (0.0 if dlse is None else dlse.double())
    assert exact_out.shape == out.shape
    check_budget(
        "delta", grads[3], (dout.float() * out.float()).sum(-1) - (0 if dlse is None else dlse), delta, factor=3
    )
    exact, peer = (gradients(p, dout, dlse, t) for t in (torch.float64, p.q.dtype))
    for name, got, same, wide in zip(NAMES, [*grads[:3], *grads[4:]], peer, exact, strict=False):
        check_budget(name, got, same.to(got.dtype), wide, factor=3)
    return grads


def dense(q_len: int, k_len: int, q_block: int = 64, k_block: int = 64) -> BlockLayout:
    return BlockLayout.dense(q_len, k_len, q_block=q_block, k_block=k_block)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(40, F16), (64, BF16), (80, F16), (96, BF16), (128, F16), (128, BF16), (256, F16), (200, BF16)],
)
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(problem(dense(70, 80), width=width, dtype=dtype), with_dlse=True)


@pytest.mark.parametrize(("width", "q_block", "k_block"), [(64, 64, 128), (64, 128, 64), (256, 128, 128)])
def test_blocks(width: int, q_block: int, k_block: int) -> None:
    check(problem(BlockLayout.from_mask(random_mask(70, 140), q_block=q_block, k_block=k_block), width=width))


@pytest.mark.parametrize("room", [82, 100])
def test_stages(room: int) -> None:
    """A multiprocessor with room for two blocks of one stage, and one with room for two of two: same bits."""
    p = problem(causal(150), dtype=BF16)
    library("sparse_attention_bwd").emulated_multiprocessor(c_int(room * 1024))
    try:
        grads = check(p)
    finally:
        library("sparse_attention_bwd").emulated_multiprocessor(c_int(100 * 1024))
    assert all(torch.equal(a, b) for a, b in zip(grads, check(p), strict=True))


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (65, 2), (1, 65), (5, 0), (0, 5)])
def test_lengths(q_len: int, k_len: int) -> None:
    grads = check(problem(dense(q_len, k_len), dtype=BF16, width=32))
    assert q_len > 0 or (grads[1] == 0).all()


def test_heads_that_share_keys_and_lists_of_their_own() -> None:
    block_map = random_mask(2, 4, 2, 2, seed=3)
    block_map[1, 2, 1] = False
    layout = BlockLayout.from_block_map(block_map, q_len=100, k_len=90)
    check(problem(layout, (4, 2), 32, batch=2, dtype=BF16, key_bias=2), with_dlse=True)


def test_boxes_and_orders() -> None:
    orders = {"q_order": random_order((1, 2), 90, 128, 1), "k_order": random_order((1, 1), 90, 128, 2)}
    check(problem(causal(90, 64, **orders), (2, 1), 64, bias=(1, 2), bias_dtype=F32))


def test_keys_without_a_position() -> None:
    order = random_order((1, 1), 90, 128, 2)
    order[order == 13] = -1
    layout = replace(dense(64, 128), k_len=90, k_order=order)
    _, dk, dv, _, dkey_bias = check(problem(layout, width=32, key_bias=1))
    assert (dk[:, :, 13] == 0).all() and (dv[:, :, 13] == 0).all() and (dkey_bias[:, :, 13] == 0).all()


def test_a_bias_that_hides_all() -> None:
    p = problem(dense(70, 70), bias=(1, 1), bias_dtype=F32, width=32)
    assert p.bias is not None
    p.bias[:, :, 3] = p.bias[:, :, 66] = -INF
    dq = check(p)[0]
    assert (dq[:, :, [3, 66]] == 0).all()


@pytest.mark.parametrize("memory", ["bhsd", "odd"])
def test_memory(memory: str) -> None:
    p = problem(causal(70), (2, 1), 40, memory=memory)
    plain = Problem(*(x.contiguous() for x in (p.q, p.k, p.v)), p.layout, scale=p.scale)
    out, lse = (x.to(t) for x, t in zip(reference(p, F32), (p.q.dtype, F32), strict=True))
    for got, wanted in zip(run(p, out, None, out, lse), run(plain, out, None, out, lse), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["bits", "box"])
def test_what_is_not_finite_spoils_only_what_it_meets(kind: str, dtype: torch.dtype) -> None:
    seen = random_mask(70, 100) & (torch.arange(100) != 17)
    seen[40] = False
    layout = BlockLayout.from_mask(seen) if kind == "bits" else causal(70)
    p = problem(layout, width=64, dtype=dtype, seed=1)
    dout = torch.randn(p.q.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    clean = [x.to(t) for x, t in zip(reference(p, F32), (dtype, F32), strict=True)]
    wanted = run(p, dout, None, *clean)
    bad = replace(p, q=p.q.clone(), k=p.k.clone(), v=p.v.clone())
    spoilt_dout = dout.clone()
    bad.q[0, 0, 50, 3] = bad.k[0, 0, 60, 1] = NAN
    bad.v[0, 0, 62, 5] = INF
    bad.k[0, 0, 17] = bad.v[0, 0, 17] = NAN if kind == "bits" else 0.5  # seen by none, or left as it need not be
    spoilt_dout[0, 0, 40 if kind == "bits" else 55] = NAN
    mask = layout.to_mask()[0, 0]
    rows = mask[:, [60, 62, *([] if kind == "bits" else [17])]].any(-1)
    rows[[40, 50, 55]] = True
    out, lse = (x.clone() for x in clean)
    out[0, 0, rows], lse[0, 0, rows & mask.any(-1)] = NAN, NAN
    got = run(bad, spoilt_dout, None, out, lse)
    keys = mask[rows].any(0)
    keys[[17, 60, 62]] = True
    assert torch.equal(got[0][0, 0, ~rows], wanted[0][0, 0, ~rows])
    for a, b in zip(got[1:3], wanted[1:3], strict=True):
        assert torch.equal(a[0, 0, ~keys], b[0, 0, ~keys])
    assert not got[0][0, 0, 40].isnan().any() or kind == "box"


def test_float32_is_refused() -> None:
    p = problem(dense(4, 4), dtype=F32)
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        run(p, p.q, None, p.q, torch.zeros(1, 1, 4))
