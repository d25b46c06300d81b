"""block_pool on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

import pytest
import torch
from emulation.attention_structs import PositionTable
from emulation.block_structs import BlockPoolArgs
from emulation.cuda_emulator import DTYPES, call, strides

from saccade.reference.block_pool import block_pool
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")


def table(x: torch.Tensor | None) -> PositionTable:
    if x is None:
        return PositionTable()
    assert x.is_contiguous() and x.dtype == torch.int32
    return PositionTable(x.data_ptr(), tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in range(2)))


def run(x: torch.Tensor, order: torch.Tensor | None, block: int) -> torch.Tensor:
    batch, heads, tokens, width = x.shape
    blocks = -(-tokens // block) if order is None else order.shape[2] // block
    out = torch.full((batch, heads, blocks, width), NAN)
    sizes = (batch, tokens, heads, width, block, blocks, DTYPES[x.dtype])
    call("block_pool", "block_pool", BlockPoolArgs(x.data_ptr(), strides(x), table(order), *sizes, out.data_ptr()))
    return out


def check(x: torch.Tensor, order: torch.Tensor | None, block: int) -> None:
    exact, eager = block_pool(x.double(), order, block), block_pool(x.float(), order, block)
    check_budget("block_pool", run(x, order, block), eager, exact)


def tokens_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("tokens", "width", "block"), [(130, 64, 64), (65, 72, 64), (1, 8, 128), (200, 256, 128)])
def test_inside_the_budget(dtype: torch.dtype, tokens: int, width: int, block: int) -> None:
    check(tokens_of((1, 2, tokens, width), dtype), None, block)


def test_order_with_holes() -> None:
    order = torch.full((2, 3, 128), -1, dtype=torch.int32)
    order[..., :70] = torch.stack([torch.randperm(100)[:70] for _ in range(6)]).view(2, 3, 70)
    x = tokens_of((2, 3, 100, 40), BF16)
    check(x, order, 64)
    check(x, order[:1, :1].contiguous(), 64)
    assert (run(x, torch.full((1, 1, 64), -1, dtype=torch.int32), 64) == 0).all()


def test_a_token_that_is_not_finite_spoils_its_block_alone() -> None:
    x = tokens_of((1, 1, 192, 64), F16)
    clean = run(x, None, 64)
    x[0, 0, 70, 3] = NAN
    got = run(x, None, 64)
    assert got[0, 0, 1, 3].isnan() and torch.equal(got[0, 0, ::2], clean[0, 0, ::2])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_memory_layouts(dtype: torch.dtype) -> None:
    wide = tokens_of((2, 70, 3, 40), dtype).transpose(1, 2)
    for x in (wide, wide[..., :24], wide[..., 1:25], wide[:1].expand(2, -1, -1, -1)):
        assert torch.equal(run(x, None, 64), run(x.contiguous(), None, 64))


def test_nothing() -> None:
    assert run(torch.zeros(0, 2, 10, 8), None, 64).shape == (0, 2, 1, 8)
    assert run(torch.zeros(1, 2, 0, 8), None, 64).shape == (1, 2, 0, 8)
