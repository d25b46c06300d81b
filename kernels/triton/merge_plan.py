"""Which tokens are merged, and the rows that remain; saccade/reference/merge_plan.py is the specification.

Five launches: rows of the tokens that stay (a program per sample), tokens joined to their targets, rows summed up to `ptr`, members
dropped into their rows in any order, members put in order. A short sequence needs one (merge_plan_small.py). Where the best are taken of
the whole batch, a launch before finds the score from which they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.merge_plan_small import SMALL, merge_plan_small_kernel
from saccade._triton.select import PLAN, block_at, is_chosen, load_keys, select_cut

BLOCK = 4096  # tokens of a tile of the kernels that take a whole sample
LANES = 128  # tokens of a program of the others
CHUNK = 16  # members of a row compared at once

MERGED = tl.constexpr(-2)  # stands in `inverse` until the token has joined its target


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_cut_kernel(score_ptr, target_ptr, cut_ptr, tokens, r, threshold, BLOCK: tl.constexpr):
    """cut [2] int64: key and place from which tokens of the whole batch are merged."""
    cut, last, _ = select_cut(score_ptr, target_ptr, tokens, r, threshold, PLAN, BLOCK)
    tl.store(cut_ptr, cut.to(tl.int64))
    tl.store(cut_ptr + 1, last)


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_rows_kernel(
    score_ptr, target_ptr, cut_ptr, inverse_ptr, ptr_ptr, head_ptr, counts_ptr, tokens, rows, r, threshold,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row of every token that stays; ptr [B, rows + 1] holds how many members the next row has: 1 each, or 0."""
    i_b = tl.program_id(0).to(tl.int64)
    p_score, p_target, p_inverse = score_ptr + i_b * tokens, target_ptr + i_b * tokens, inverse_ptr + i_b * tokens
    i = tl.arange(0, BLOCK)
    p_ptr, p_head = ptr_ptr + i_b * (rows.to(tl.int64) + 1), head_ptr + i_b * rows
    if WHOLE:
        cut = tl.load(cut_ptr).to(tl.uint32)
        last = tl.load(cut_ptr + 1) - i_b * tokens
        number = tl.zeros((), tl.int64)
        for start in range(0, tokens, BLOCK):
            m = i < block_at(tokens, start, BLOCK)
            key = load_keys(p_score + start, p_target + start, i, m, threshold, PLAN)
            number += tl.sum((m & is_chosen(key, i, cut, block_at(last, start, BLOCK))).to(tl.int32))
    else:
        cut, last, number = select_cut(p_score, p_target, tokens, r, threshold, PLAN, BLOCK)
    excess = tl.maximum(tokens - number - rows, 0)
    unfit_before = tl.zeros((), tl.int64)
    kept_before = tl.zeros((), tl.int64)
    for start in range(0, tokens, BLOCK):
        m = i < block_at(tokens, start, BLOCK)
        key = load_keys(p_score + start, p_target + start, i, m, threshold, PLAN)
        merged = m & is_chosen(key, i, cut, block_at(last, start, BLOCK))
        unfit = m & (~merged) & (tl.load(p_target + start + i, mask=m, other=0) == -2)
        dropped = unfit & (tl.cumsum(unfit.to(tl.int32), 0) <= block_at(excess, unfit_before, BLOCK))
        kept = m & (~merged) & (~dropped)
        row = tl.cumsum(kept.to(tl.int32), 0) - 1
        used = kept & (row < block_at(rows, kept_before, BLOCK))
        own = tl.where(merged, MERGED, tl.where(used, row + kept_before.to(tl.int32), -1))
        tl.store(p_inverse + start + i, own, mask=m)
        tl.store(p_head + kept_before + row, start + i, mask=used)
        unfit_before += tl.sum(unfit.to(tl.int32))
        kept_before += tl.sum(kept.to(tl.int32))
    count = tl.minimum(kept_before, rows)
    tl.store(counts_ptr + i_b, count.to(tl.int32))
    tl.store(p_ptr, 0)
    for start in range(0, rows, BLOCK):
        m, used = i < block_at(rows, start, BLOCK), i < block_at(count, start, BLOCK)
        tl.store(p_ptr + 1 + start + i, used.to(tl.int32), mask=m)
        tl.store(p_head + start + i, -1, mask=m & (~used))


@triton.jit
def _lane(tiles, LANES: tl.constexpr):
    """Sample and token or slot of every lane."""
    pid = tl.program_id(0)
    return (pid // tiles).to(tl.int64), (pid % tiles).to(tl.int64) * LANES + tl.arange(0, LANES)


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_join_kernel(
    target_ptr, inverse_ptr, ptr_ptr, ticket_ptr, tokens, rows, tiles, LANES: tl.constexpr
):  # fmt: skip
    """Row of every merged token, the sizes of the rows, and a ticket: its number among the members that came so far."""
    i_b, i = _lane(tiles, LANES)
    m = i < tokens
    p_inverse = inverse_ptr + i_b * tokens
    merged = m & (tl.load(p_inverse + i, mask=m, other=-1) == MERGED)
    target = tl.load(target_ptr + i_b * tokens + i, mask=merged, other=0)
    row = tl.load(p_inverse + target, mask=merged, other=-1)
    row = tl.maximum(row, -1)
    p_size = ptr_ptr + i_b * (rows.to(tl.int64) + 1) + 1
    ticket = tl.atomic_add(p_size + tl.maximum(row, 0), 1, mask=merged & (row >= 0), sem="relaxed")
    tl.store(p_inverse + i, row, mask=merged)
    tl.store(ticket_ptr + i_b * tokens + i, tl.where(merged & (row >= 0), ticket, 0), mask=m)


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_ptr_kernel(ptr_ptr, rows, BLOCK: tl.constexpr):
    """Sizes to their running sums, in place."""
    p_size = ptr_ptr + tl.program_id(0).to(tl.int64) * (rows.to(tl.int64) + 1) + 1
    before = tl.zeros((), tl.int32)
    for start in range(0, rows, BLOCK):
        row = tl.zeros((BLOCK,), tl.int64) + start + tl.arange(0, BLOCK)
        size = tl.load(p_size + row, mask=row < rows, other=0)
        tl.store(p_size + row, tl.cumsum(size, 0) + before, mask=row < rows)
        before += tl.sum(size)


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_drop_kernel(
    inverse_ptr, ptr_ptr, ticket_ptr, loose_ptr, tokens, rows, tiles, LANES: tl.constexpr
):  # fmt: skip
    """loose [B, N]: tokens in their rows, in the order of their tickets."""
    i_b, i = _lane(tiles, LANES)
    m = i < tokens
    row = tl.load(inverse_ptr + i_b * tokens + i, mask=m, other=-1)
    m = m & (row >= 0)
    begin = tl.load(ptr_ptr + i_b * (rows.to(tl.int64) + 1) + row, mask=m, other=0)
    ticket = tl.load(ticket_ptr + i_b * tokens + i, mask=m, other=0)
    tl.store(loose_ptr + i_b * tokens + begin + ticket, i.to(tl.int32), mask=m)


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_order_kernel(
    inverse_ptr, ptr_ptr, loose_ptr, members_ptr, tokens, rows, tiles, LANES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """members [B, N]: the place of a token in its row is the number of smaller ones there."""
    i_b, i = _lane(tiles, LANES)
    p_ptr, p_loose = ptr_ptr + i_b * (rows.to(tl.int64) + 1), loose_ptr + i_b * tokens
    p_members = members_ptr + i_b * tokens
    number = tl.load(p_ptr + rows)
    m = i < number
    token = tl.load(p_loose + i, mask=m, other=0)
    row = tl.load(inverse_ptr + i_b * tokens + token, mask=m, other=0)
    begin = tl.load(p_ptr + row, mask=m, other=0)
    end = tl.load(p_ptr + row + 1, mask=m, other=0)
    place = tl.zeros((LANES,), tl.int32)
    for start in range(0, tl.max(end - begin), CHUNK):
        other = begin[:, None] + (start + tl.arange(0, CHUNK))[None, :]
        smaller = tl.load(p_loose + other, mask=other < end[:, None], other=0x7FFFFFFF) < token[:, None]
        place += tl.sum(smaller.to(tl.int32), 1)
    tl.store(p_members + begin + place, token, mask=m)
    tl.store(p_members + i, -1, mask=(i >= number) & (i < tokens))


def merge_plan(score, target, rows, r, threshold, whole_batch):
    """Inverse [B, N], ptr [B, rows + 1], members [B, N], head [B, rows] and counts [B], int32, from score and target [B, N]."""
    import torch

    score, target = score.float().contiguous(), target.contiguous()
    batch, tokens = score.shape
    new = lambda *shape: target.new_empty(shape)  # noqa: E731
    inverse, ptr, members, head, counts = (
        new(batch, tokens), new(batch, rows + 1), new(batch, tokens), new(batch, rows), new(batch),
    )  # fmt: skip
    results = inverse, ptr, members, head, counts
    if batch == 0:
        return results
    r, threshold = max(0, min(r, tokens * (batch if whole_batch else 1))), float(threshold)
    with launch.on_device(score):
        cut = None
        if whole_batch and batch > 1:
            cut = target.new_empty(2, dtype=torch.int64)
            merge_plan_cut_kernel[(1,)](
                score,
                target,
                cut,
                batch * tokens,
                r,
                threshold,
                BLOCK=BLOCK,
                num_warps=16,
                maxnreg=128,
                **matrix.OPTIONS,
            )
        whole = cut is not None
        cut = ptr if cut is None else cut
        block = next((n for n in SMALL if max(tokens, rows) <= n), None)
        if block is not None:
            merge_plan_small_kernel[(batch,)](
                score, target, cut, *results, tokens, rows, r, threshold,
                WHOLE=whole, BLOCK=block, num_warps=8 if block > 256 else 4, **matrix.OPTIONS,
            )  # fmt: skip
            return results
        ticket, loose = new(batch, tokens), new(batch, tokens)
        merge_plan_rows_kernel[(batch,)](
            score, target, cut, inverse, ptr, head, counts, tokens, rows, r, threshold,
            WHOLE=whole, BLOCK=BLOCK, num_warps=16, maxnreg=128, **matrix.OPTIONS,
        )  # fmt: skip
        tiles = -(-tokens // LANES)
        grid, lanes = (batch * tiles,), {"LANES": LANES, "num_warps": 4, **matrix.OPTIONS}
        if tokens:
            merge_plan_join_kernel[grid](target, inverse, ptr, ticket, tokens, rows, tiles, **lanes)
        merge_plan_ptr_kernel[(batch,)](ptr, rows, BLOCK=BLOCK, num_warps=8, **matrix.OPTIONS)
        if tokens:
            merge_plan_drop_kernel[grid](inverse, ptr, ticket, loose, tokens, rows, tiles, **lanes)
            merge_plan_order_kernel[grid](inverse, ptr, loose, members, tokens, rows, tiles, CHUNK=CHUNK, **lanes)
    return results
