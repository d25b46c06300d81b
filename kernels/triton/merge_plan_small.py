"""The whole plan of a short sequence in one launch: a program holds a sample, and sorts its tokens by row."""

import triton
import triton.language as tl

from saccade._triton import matrix
from saccade._triton.select import PLAN, is_chosen, load_keys, select_cut

SMALL = (256, 1024)  # tokens that a program can hold


@triton.jit(do_not_specialize=matrix.SIZES)
def merge_plan_small_kernel(
    score_ptr, target_ptr, cut_ptr, inverse_ptr, ptr_ptr, members_ptr, head_ptr, counts_ptr, tokens, rows, r, threshold,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For tokens and rows up to BLOCK; the arguments are those of merge_plan_rows_kernel."""
    i_b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    m, m_row = i < tokens, i < rows
    p_score, p_target = score_ptr + i_b * tokens, target_ptr + i_b * tokens
    if WHOLE:
        cut = tl.load(cut_ptr).to(tl.uint32)
        last = tl.load(cut_ptr + 1) - i_b * tokens
    else:
        cut, last, _ = select_cut(p_score, p_target, tokens, r, threshold, PLAN, BLOCK)
    target = tl.load(p_target + i, mask=m, other=-1)
    merged = m & is_chosen(load_keys(p_score, p_target, i, m, threshold, PLAN), i, cut, last)
    excess = tokens - tl.sum(merged.to(tl.int32)) - rows
    unfit = m & (~merged) & (target == -2)
    dropped = unfit & (tl.cumsum(unfit.to(tl.int32), 0) <= excess)
    kept = (m & (~merged) & (~dropped)).to(tl.int32)
    row = tl.cumsum(kept, 0) - 1
    used = (kept != 0) & (row < rows)
    row = tl.where(used, row, -1)
    joined = tl.gather(row, tl.where(merged, target, 0), 0)
    row = tl.where(merged, joined, row)
    tl.store(inverse_ptr + i_b * tokens + i, row, mask=m)

    p_head = head_ptr + i_b * rows
    count = tl.minimum(tl.sum(kept), rows)
    tl.store(counts_ptr + i_b, count)
    tl.store(p_head + row, i, mask=used)
    tl.store(p_head + i, -1, mask=(i >= count) & m_row)

    p_ptr = ptr_ptr + i_b * (rows + 1)
    size = tl.histogram(tl.maximum(row, 0), BLOCK, mask=m & (row >= 0))
    tl.store(p_ptr, 0)
    tl.store(p_ptr + 1 + i, tl.cumsum(size, 0), mask=m_row)
    order = tl.sort(tl.where(m & (row >= 0), row, BLOCK) * BLOCK + i)
    tl.store(members_ptr + i_b * tokens + i, tl.where(order < BLOCK * BLOCK, order % BLOCK, -1), mask=m)
