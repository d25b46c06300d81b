"""Problems of the attention kernels, their arguments, and results to hold them against."""

from __future__ import annotations

from ctypes import c_int64
from dataclasses import dataclass
from typing import Any

import torch
from emulation.attention_structs import AttentionInputs, BlockLayoutArgs, BlockLists, PositionTable
from emulation.cases import poisoned, tensor
from emulation.cuda_emulator import DTYPES

from saccade.attention.layout import BlockLayout
from saccade.attention.layout import BlockLists as Lists
from saccade.reference.block_transpose import block_transpose
from saccade.reference.sparse_attention import sparse_attention

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN, INF = float("nan"), float("inf")
SEEN_BY_ALL = -(2**31)
Tensor = torch.Tensor


@dataclass
class Problem:
    """One problem; everything that the ops take."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    scale: float = 0.125


def problem(
    layout: BlockLayout,
    heads: tuple[int, int] = (1, 1),
    width: int = 64,
    dtype: torch.dtype = F16,
    *,
    batch: int = 1,
    memory: str = "bshd",
    bias: tuple[int, int] | None = None,
    bias_dtype: torch.dtype | None = None,
    key_bias: int = 0,
    seed: int = 0,
) -> Problem:
    """Random values; `bias` gives its batch and heads, `key_bias` its batch."""
    g = torch.Generator().manual_seed(seed)
    q = tensor(batch, heads[0], layout.q_len, width, dtype, memory, g)
    k, v = (tensor(batch, heads[1], layout.k_len, width, dtype, memory, g) for _ in range(2))
    shape = layout.q_len, layout.k_len
    given = None if bias is None else torch.randn(*bias, *shape, generator=g).to(bias_dtype or dtype)
    keys = torch.randn(key_bias, layout.k_len, generator=g) if key_bias else None
    return Problem(q, k, v, layout, given, keys, width**-0.5)


# ---- layouts -------------------------------------------------------------------------------------------------------------


def boxed(
    block_map: Tensor,
    box: Tensor,
    at: Tensor,
    q_len: int,
    k_len: int,
    q_block: int = 64,
    k_block: int = 64,
    **orders: Any,
) -> BlockLayout:
    """A layout from a map [Lb, Lh, nQ, nK] of 0, 1 (in part, by box [.., 2, A, nQ * q_block] and at [.., A, nK * k_block]), 2."""
    full, partial = (
        BlockLayout.from_block_map(block_map == kind, q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block, **orders).full
        for kind in (2, 1)
    )  # fmt: skip
    return BlockLayout(q_len, k_len, q_block, k_block, full, partial, box=box.int(), at=at.int(), **orders)


def causal(length: int, block: int = 64, **orders: Any) -> BlockLayout:
    """Query position i sees keys at positions up to i."""
    blocks = -(-length // block)
    i = torch.arange(blocks * block)
    box = torch.stack((torch.zeros_like(i), i + 1))[None, None, :, None]
    n = torch.arange(blocks)
    block_map = (n[:, None] > n) * 2 + (n[:, None] == n) * 1
    return boxed(block_map[None, None], box, i[None, None, None], length, length, block, block, **orders)


def random_order(shape: tuple[int, int], length: int, positions: int, seed: int) -> Tensor:
    """[*shape, positions]: every token once, and holes between them."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.full((*shape, positions), -1, dtype=torch.int32)
    for one in tokens.flatten(0, 1):
        places = torch.randperm(positions, generator=g)[:length]
        one[places] = torch.arange(length, dtype=torch.int32)
    return tokens


def random_mask(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


# ---- arguments -----------------------------------------------------------------------------------------------------------


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def three(*strides: int) -> Any:
    return (c_int64 * 3)(*strides)


def head_strides(x: Tensor) -> Any:
    assert x.stride(-1) == 1 or x.shape[-1] == 1
    return three(*x.stride()[:3])


def table(x: Tensor | None) -> PositionTable:
    if x is None:
        return PositionTable()
    assert x.is_contiguous() and x.dtype == torch.int32
    return PositionTable(x.data_ptr(), (c_int64 * 2)(*(0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1))))


def lists(x: Lists | None) -> BlockLists:
    if x is None:
        return BlockLists()
    steps = (0 if x.starts.shape[i] == 1 else x.starts.stride(i) for i in (0, 1))
    return BlockLists(*(pointer(t) for t in (x.starts, x.counts, x.indices, x.ids)), (c_int64 * 2)(*steps))


def transposed(x: Lists | None, columns: int) -> Lists | None:
    if x is None:
        return None
    starts, counts, indices, ids = block_transpose(x.starts, x.counts, x.indices, x.ids, columns)
    return Lists(starts, counts, indices, None if x.ids is None else ids)


class Inputs:
    """`AttentionInputs` of a problem, and what must live as long."""

    def __init__(self, p: Problem, backward: bool = False) -> None:
        layout = p.layout
        by_key = [transposed(x, layout.k_blocks) if backward else None for x in (layout.full, layout.partial)]
        self.kept = (p, by_key)
        mine = BlockLayoutArgs(
            *(lists(x) for x in (layout.full, layout.partial, *by_key)),
            pointer(layout.bits),
            *(table(x) for x in (layout.box, layout.at, layout.q_order, layout.k_order)),
            *(0 if layout.at is None else layout.at.shape[2], layout.q_block, layout.k_block),
            *(layout.q_blocks, layout.k_blocks),
        )
        bias_steps = [0, 0, 0]
        if p.bias is not None:
            bias_steps = [0 if p.bias.shape[i] == 1 else p.bias.stride(i) for i in (0, 1)] + [p.bias.stride(2)]
        key_step = 0 if p.key_bias is None or p.key_bias.shape[0] == 1 else p.key_bias.stride(0)
        self.args = AttentionInputs(
            *(pointer(x) for x in (p.q, p.k, p.v)),
            *(head_strides(x) for x in (p.q, p.k, p.v)),
            *(pointer(p.bias), three(*bias_steps), pointer(p.key_bias), key_step),
            *(p.q.shape[0], p.q.shape[2], p.k.shape[2], p.q.shape[1], p.k.shape[1], p.q.shape[3], p.scale),
            *(DTYPES[p.q.dtype], DTYPES[(p.q if p.bias is None else p.bias).dtype], mine),
        )


def output(like: Tensor) -> tuple[Tensor, Tensor]:
    """Poisoned, with the strides of `like`, and the buffer around it."""
    return poisoned(like)


def untouched(out: Tensor, buffer: Tensor) -> None:
    """Nothing around `out` was written."""
    written = torch.zeros_like(buffer, dtype=torch.bool)
    written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    assert buffer[~written].isnan().all(), "wrote outside the output"


# ---- what results are held against ------------------------------------------------------------------------------------------


def reference(p: Problem, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    wide = [None if x is None else x.to(dtype) for x in (p.bias, p.key_bias)]
    return sparse_attention(p.q.to(dtype), p.k.to(dtype), p.v.to(dtype), p.layout.to_mask(), *wide, p.scale)


def eager(p: Problem) -> tuple[Tensor, Tensor]:
    """The mathematics in the dtype of q, as torch computes it: out, and lse of fp32 inputs."""
    group = p.q.shape[1] // p.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (p.k, p.v))
    s = p.q @ k.mT * p.scale
    for x in (p.bias, None if p.key_bias is None else p.key_bias[:, None, None]):
        s = s if x is None else s + x.to(s.dtype)
    s = s.masked_fill(~p.layout.to_mask(), -INF)
    out = torch.where((s == -INF).all(-1, keepdim=True), 0.0, torch.softmax(s, -1)).to(s.dtype) @ v
    return out, reference(p, F32)[1]
