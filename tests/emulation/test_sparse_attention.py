"""sparse_attention on the emulated GPU, held against the reference within the error of eager attention."""

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
    eager,
    head_strides,
    output,
    problem,
    random_mask,
    random_order,
    reference,
    untouched,
)
from emulation.attention_structs import SparseAttentionArgs
from emulation.cuda_emulator import call

from saccade.attention.layout import BlockLayout
from saccade.testing.budget import check_budget

Tensor = torch.Tensor


def run(p: Problem) -> tuple[Tensor, Tensor]:
    """Takes what the raw op takes."""
    inputs = Inputs(p)
    out, buffer = output(p.q)
    lse = torch.full(p.q.shape[:3], NAN)
    args = SparseAttentionArgs(inputs.args, out.data_ptr(), head_strides(out), lse.data_ptr(), None)
    call("sparse_attention", "sparse_attention", args)
    untouched(out, buffer)
    return out, lse


def check(p: Problem) -> tuple[Tensor, Tensor]:
    out, lse = run(p)
    exact, exact_lse = reference(p)
    peer, peer_lse = eager(p)
    check_budget("out", out, peer, exact)
    finite = exact_lse > -INF
    assert torch.equal(lse > -INF, finite)
    assert (out[~finite] == 0).all()
    check_budget("lse", lse[finite], peer_lse[finite], exact_lse[finite])
    return out, lse


def dense(q_len: int, k_len: int, q_block: int = 64, k_block: int = 64) -> BlockLayout:
    return BlockLayout.dense(q_len, k_len, q_block=q_block, k_block=k_block)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", [32, 40, 64, 72, 96, 128, 192, 256])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(problem(dense(70, 130), width=width, dtype=dtype))


@pytest.mark.parametrize(
    ("width", "q_block", "k_block"),
    [(64, 64, 128), (64, 128, 64), (64, 128, 128), (96, 128, 128), (128, 128, 128), (256, 128, 128)],
)
def test_blocks(width: int, q_block: int, k_block: int) -> None:
    check(problem(BlockLayout.from_mask(random_mask(130, 140), q_block=q_block, k_block=k_block), width=width))


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 65), (65, 1), (5, 0)])
def test_lengths(q_len: int, k_len: int) -> None:
    out, lse = check(problem(dense(q_len, k_len), dtype=BF16))
    assert k_len > 0 or ((out == 0).all() and (lse == -INF).all())


def test_no_queries() -> None:
    assert run(problem(dense(0, 5)))[0].shape == (1, 1, 0, 64)


def test_lists_of_every_head_and_sample() -> None:
    """Blocks in some order of density, one row of blocks with none, kv heads shared by two heads."""
    block_map = random_mask(2, 4, 2, 3, seed=3)
    block_map[1, 2, 1] = False
    p = problem(BlockLayout.from_block_map(block_map, q_len=100, k_len=150), (4, 2), 32, batch=2, dtype=BF16)
    _, lse = check(p)
    assert (lse[1, 2, 64:] == -INF).all()


def test_causal() -> None:
    check(problem(causal(150), (2, 1), 40, dtype=BF16))
    check(problem(causal(150, 128), width=64))


def test_a_box_of_three_axes_with_orders() -> None:
    """Tiles of a video: holes among queries and keys, a sink that all see, another order for every head."""
    g = torch.Generator().manual_seed(0)
    q_len, k_len = 90, 100
    at = torch.randint(0, 5, (1, 2, 3, 192), generator=g)
    at[:, :, 0, 70] = -(2**31)
    low = torch.randint(0, 4, (1, 2, 3, 128), generator=g)
    box = torch.stack((low, low + torch.randint(0, 4, low.shape, generator=g)), 2)
    block_map = torch.tensor([[[[1, 2, 0], [2, 1, 1]], [[1, 1, 2], [0, 1, 0]]]])
    orders = {"q_order": random_order((1, 2), q_len, 128, 1), "k_order": random_order((1, 2), k_len, 192, 2)}
    layout = boxed(block_map, box, at, q_len, k_len, **orders)
    check(problem(layout, (2, 2), 64, dtype=BF16))
    check(problem(layout, (2, 2), 64, dtype=F16, bias=(1, 2), key_bias=1))


@pytest.mark.parametrize(
    ("bias", "kind", "key_bias"),
    [((1, 1), None, 0), ((2, 1), F32, 1), ((1, 2), F32, 0), ((2, 2), None, 2), (None, None, 2)],
)
def test_biases(bias: tuple[int, int] | None, kind: torch.dtype | None, key_bias: int) -> None:
    layout = BlockLayout.from_mask(random_mask(1, 2, 70, 70))
    check(problem(layout, (2, 2), 32, batch=2, dtype=BF16, bias=bias, bias_dtype=kind, key_bias=key_bias))


def test_a_bias_that_hides_all() -> None:
    p = problem(dense(70, 70), bias=(1, 1), bias_dtype=F32)
    assert p.bias is not None
    p.bias[:, :, 3] = p.bias[:, :, 66] = -INF
    p.bias[:, :, 4, 1:] = -INF
    out, _ = check(p)
    assert (out[:, :, [3, 66]] == 0).all() and torch.equal(out[:, :, 4], p.v[:, :, 0])


@pytest.mark.parametrize("scale", [-0.2, 0.0, 30.0])
def test_scales(scale: float) -> None:
    p = problem(causal(70), width=32)
    p.scale = scale
    check(p)


@pytest.mark.parametrize("memory", ["bhsd", "packed", "odd"])
def test_memory(memory: str) -> None:
    p = problem(causal(70), (2, 1), 40, memory=memory)
    plain = Problem(*(x.contiguous() for x in (p.q, p.k, p.v)), p.layout, scale=p.scale)
    for got, wanted in zip(run(p), run(plain), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("kind", ["bits", "box", "holes"])
def test_what_is_not_finite_spoils_only_rows_that_see_it(kind: str, width: int, dtype: torch.dtype) -> None:
    orders = {}
    if kind == "bits":
        layout = BlockLayout.from_mask(random_mask(70, 100) & (torch.arange(100) != 17))
    elif kind == "box":
        layout = causal(70)
    else:
        orders = {name: random_order((1, 1), 60, 128, n) for n, name in enumerate(("q_order", "k_order"))}
        layout = BlockLayout.from_block_map(torch.eye(2, dtype=torch.bool), q_len=60, k_len=60, **orders)
    p = problem(layout, width=width, dtype=dtype, seed=1)
    p.q[0, 0, 5, 3] = NAN
    p.k[0, 0, 17], p.v[0, 0, 17] = INF, NAN
    if kind != "holes":  # there every query sees one of them
        p.k[0, 0, 20, 1], p.v[0, 0, 33, width - 1] = NAN, INF
    spoilt = p.layout.to_mask()[0, 0][:, [17] if kind == "holes" else [17, 20, 33]].any(-1)
    spoilt[5] = True
    out, _ = run(p)
    clean = Problem(*(x.nan_to_num(0, 0, 0) for x in (p.q, p.k, p.v)), layout, scale=p.scale)
    wanted, _ = run(clean)
    assert not spoilt.all() and spoilt.sum() > 5
    assert torch.equal(out[0, 0, ~spoilt], wanted[0, 0, ~spoilt])
    assert out[0, 0, spoilt].isnan().any(-1).all()


def test_float32_is_refused() -> None:
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        run(problem(dense(4, 4), dtype=F32))
