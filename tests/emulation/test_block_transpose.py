"""block_transpose on the emulated GPU: the same lists as the reference."""

from __future__ import annotations

import pytest
import torch
from emulation.attention_structs import BlockLists
from emulation.block_structs import BlockTransposeArgs
from emulation.cuda_emulator import call, workspace

from saccade.reference.block_transpose import block_transpose

Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    starts: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor, ids: torch.Tensor | None, columns: int
) -> Lists:
    batch, heads, rows = starts.shape
    flat = indices.flatten()
    t_starts, t_counts = (torch.full((batch, heads, columns), -9, dtype=torch.int32) for _ in range(2))
    t_indices = torch.full_like(flat, -9)
    t_ids = torch.full_like(flat, -9) if ids is not None else flat.new_empty(0)
    args = BlockTransposeArgs()
    args.lists = BlockLists(
        starts.data_ptr(), counts.data_ptr(), flat.data_ptr(), None if ids is None else ids.data_ptr()
    )
    args.groups, args.rows, args.columns, args.entries = batch * heads, rows, columns, flat.numel()
    args.t_starts, args.t_counts = t_starts.data_ptr(), t_counts.data_ptr()
    args.t_indices, args.t_ids = t_indices.data_ptr(), None if ids is None else t_ids.data_ptr()
    space = workspace("block_transpose", "block_transpose", args)
    args.workspace = space.data_ptr()
    call("block_transpose", "block_transpose", args)
    return t_starts, t_counts, t_indices, t_ids


def lists(batch: int, heads: int, rows: int, columns: int, density: float, packed: bool) -> Lists:
    generator = torch.Generator().manual_seed(rows + columns)
    chosen = torch.rand(batch, heads, rows, columns, generator=generator) < density
    counts = chosen.sum(-1, dtype=torch.int32)
    if packed:
        indices = chosen.nonzero()[:, 3].int()
        starts = (counts.flatten().cumsum(0).int() - counts.flatten()).view(counts.shape)
    else:
        indices = chosen.int().argsort(dim=-1, descending=True, stable=True).int().contiguous()
        starts = (torch.arange(counts.numel(), dtype=torch.int32) * columns).view(counts.shape)
    ids = torch.randperm(indices.numel(), generator=generator).int().view(indices.shape)
    return starts, counts, indices, ids


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70), (70, 300), (5, 12400)])
def test_same_lists(rows: int, columns: int, packed: bool) -> None:
    starts, counts, indices, ids = lists(1, 2 if columns < 1000 else 1, rows, columns, 0.2, packed)
    for some in (ids, None):
        got, want = run(starts, counts, indices, some, columns), block_transpose(starts, counts, indices, some, columns)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_whole(density: float) -> None:
    case = lists(2, 1, 40, 20, density, False)
    assert all(torch.equal(a, b) for a, b in zip(run(*case, 20), block_transpose(*case, 20), strict=True))


def test_no_rows() -> None:
    empty = torch.zeros(1, 1, 0, dtype=torch.int32)
    got = run(empty, empty, empty[0], None, 5)
    assert (got[0] == 0).all() and (got[1] == 0).all()
