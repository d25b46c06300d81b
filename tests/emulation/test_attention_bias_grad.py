"""The gradient of a shared bias on the emulated GPU, held against the reference in float64."""

from __future__ import annotations

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
    boxed,
    causal,
    head_strides,
    problem,
    random_mask,
    random_order,
    reference,
)
from emulation.attention_structs import AttentionBiasGradArgs
from emulation.cuda_emulator import call, workspace

from saccade.attention.layout import BlockLayout
from saccade.reference.attention_bias_grad import attention_bias_grad
from saccade.testing.budget import check_budget

Tensor = torch.Tensor


def run(p: Problem, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Takes what the raw op takes."""
    assert p.bias is not None
    inputs = Inputs(p)
    dbias = torch.full(p.bias.shape, NAN, dtype=p.bias.dtype)
    args = AttentionBiasGradArgs(
        *(inputs.args, dout.data_ptr(), head_strides(dout), lse.data_ptr(), delta.data_ptr(), dbias.data_ptr()),
        *p.bias.shape[:2],
        None,
    )
    space = workspace("attention_bias_grad", "attention_bias_grad", args)
    args.workspace = space.data_ptr()
    call("attention_bias_grad", "attention_bias_grad", args)
    return dbias


def given(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """dout, and lse and delta as the op gets them."""
    dout = torch.randn(p.q.shape, generator=torch.Generator().manual_seed(7)).to(p.q.dtype)
    out, lse = reference(p, F32)
    return dout, lse, (dout.float() * out).sum(-1)


def in_dtype(p: Problem, dout: Tensor, lse: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference in float64 or float32; in 16 bits each sample and head is rounded, as eager's gradient of a sum is."""
    assert p.bias is not None
    wide = torch.promote_types(dtype, F32)
    tensors = [x.to(wide) for x in (dout, p.q, p.k, p.v, lse, delta)]
    key_bias = None if p.key_bias is None else p.key_bias.to(wide)
    whole = p.bias.to(wide).expand(*p.q.shape[:2], -1, -1)
    if dtype == wide:
        return attention_bias_grad(*tensors, p.layout.to_mask(), p.bias.to(wide), key_bias, p.scale)
    group = p.q.shape[1] // p.k.shape[1]
    q, k, v, g = (x.to(dtype) for x in (p.q, p.k.repeat_interleave(group, 1), p.v.repeat_interleave(group, 1), dout))
    s = (q @ k.mT * p.scale + whole.to(dtype)).to(dtype)
    s = s if key_bias is None else s + key_bias.to(dtype)[:, None, None]
    seen = p.layout.to_mask().expand_as(s) & (lse > -INF)[..., None]
    weights = torch.exp(s - lse.to(dtype)[..., None]).masked_fill(~seen, 0.0)
    ds = (weights * (g @ v.mT - delta.to(dtype)[..., None])).masked_fill(~seen, 0.0)
    shared = [axis for axis in (0, 1) if p.bias.shape[axis] == 1]
    return ds.sum(shared, keepdim=True) if shared else ds


def check(p: Problem) -> Tensor:
    assert p.bias is not None
    dout, lse, delta = given(p)
    dbias = run(p, dout, lse, delta)
    exact, peer = (in_dtype(p, dout, lse, delta, t) for t in (torch.float64, p.q.dtype))
    check_budget("dbias", dbias, peer.to(dbias.dtype), exact, factor=3)
    seen = p.layout.to_mask().expand(*p.q.shape[:2], -1, -1)
    for axis in (0, 1):
        seen = seen.any(axis, keepdim=True) if p.bias.shape[axis] == 1 else seen
    assert (dbias[~seen] == 0).all()
    return dbias


def dense(q_len: int, k_len: int, q_block: int = 64, k_block: int = 64) -> BlockLayout:
    return BlockLayout.dense(q_len, k_len, q_block=q_block, k_block=k_block)


@pytest.mark.parametrize(("width", "dtype"), [(40, F16), (64, BF16), (96, F16), (128, BF16), (256, F16)])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(problem(dense(70, 80), (2, 1), width=width, dtype=dtype, bias=(1, 1)))


@pytest.mark.parametrize("kind", [None, F32])
@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_who_shares_it(shared: tuple[int, int], kind: torch.dtype | None) -> None:
    layout = BlockLayout.from_mask(random_mask(1, 2, 40, 70))
    check(problem(layout, (2, 2), 32, batch=2, dtype=BF16, bias=shared, bias_dtype=kind, key_bias=2))


def test_lists_of_every_head_and_sample() -> None:
    block_map = random_mask(2, 2, 2, 3, share=0.4, seed=3)
    block_map[:, :, 1, 1] = False
    layout = BlockLayout.from_block_map(block_map, q_len=100, k_len=150)
    check(problem(layout, (2, 1), 32, batch=2, bias=(1, 1)))


def test_more_items_than_a_round_looks_up() -> None:
    block_map = torch.zeros(65, 2, 1, 1, dtype=torch.bool)
    block_map[3, 1] = block_map[64, 0] = True
    check(problem(BlockLayout.from_block_map(block_map, q_len=20, k_len=30), (2, 2), 32, batch=65, bias=(1, 1)))


@pytest.mark.parametrize(("width", "q_block", "k_block"), [(64, 64, 128), (256, 128, 128)])
def test_blocks(width: int, q_block: int, k_block: int) -> None:
    layout = BlockLayout.from_mask(random_mask(70, 140), q_block=q_block, k_block=k_block)
    check(problem(layout, width=width, bias=(1, 1)))


@pytest.mark.parametrize("kind", [None, F32])
@pytest.mark.parametrize("own", [False, True])
def test_orders(own: bool, kind: torch.dtype | None) -> None:
    """One order for all, and one for each head: then heads add up what they have, one after the other."""
    heads = (1, 2) if own else (1, 1)
    k_order = random_order(heads, 90, 128, 2)
    k_order[k_order == 13] = -1
    layout = causal(90, 64, q_order=random_order(heads, 90, 128, 1), k_order=k_order)
    dbias = check(problem(layout, (2, 2), 40, dtype=BF16, bias=(1, 1), bias_dtype=kind))
    assert (dbias[..., 13] == 0).all()


def test_three_axes() -> None:
    g = torch.Generator().manual_seed(0)
    at = torch.randint(0, 5, (1, 1, 3, 64), generator=g)
    low = torch.randint(0, 4, (1, 1, 3, 64), generator=g)
    box = torch.stack((low, low + 2), 2)
    check(problem(boxed(torch.ones(1, 1, 1, 1), box, at, 50, 60), bias=(1, 1)))


@pytest.mark.parametrize("memory", ["bhsd", "odd"])
def test_memory(memory: str) -> None:
    p = problem(causal(70), (2, 1), 40, memory=memory, bias=(1, 2))
    plain = Problem(*(x.contiguous() for x in (p.q, p.k, p.v)), p.layout, p.bias, scale=p.scale)
    assert torch.equal(run(p, *given(p)), run(plain, *given(p)))


def test_what_is_not_finite_spoils_only_its_pairs() -> None:
    p = problem(BlockLayout.from_mask(random_mask(70, 100)), bias=(1, 1), bias_dtype=F32, width=32)
    dout, lse, delta = given(p)
    wanted = run(p, dout, lse, delta)
    p.q[0, 0, 5, 3] = p.k[0, 0, 20, 1] = p.v[0, 0, 33, 0] = dout[0, 0, 66] = NAN
    got = run(p, dout, lse, delta)
    meets = torch.zeros(70, 100, dtype=torch.bool)
    meets[[5, 66]] = meets[:, [20, 33]] = True
    meets &= p.layout.to_mask()[0, 0]
    assert torch.equal(got[0, 0].isnan(), meets) and torch.equal(got[0, 0][~meets], wanted[0, 0][~meets])


@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 3, 4), (1, 0, 4), (1, 3, 0), (1, 1, 2)])
def test_lengths(batch: int, q_len: int, k_len: int) -> None:
    p = problem(dense(q_len, k_len), batch=batch, width=32, bias=(1, 1))
    dbias = check(p)
    assert batch > 0 or (dbias == 0).all()


def test_float32_is_refused() -> None:
    p = problem(dense(4, 4), dtype=F32, bias=(1, 1))
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        run(p, *given(p))
