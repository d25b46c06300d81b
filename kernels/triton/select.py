"""The r largest of a row of scores, the first among equals: found by counting digits, without a sort.

A key is a 32-bit unsigned number in the order of the scores; 0 is no candidate.
"""

import triton
import triton.language as tl

# What a score is a key of.
PLAN = tl.constexpr(0)  # candidates have a target and reach the threshold
LARGEST = tl.constexpr(1)  # NaN is least of all
NEAREST = tl.constexpr(2)  # distances >= 0, the smallest first; infinite ones are no candidates


@triton.jit
def load_keys(score_ptr, target_ptr, index, m, threshold, KIND: tl.constexpr):
    """Keys of the scores at `index`, uint32; 0 outside the mask. -0.0 equals 0.0."""
    x = tl.load(score_ptr + index, mask=m, other=0.0)
    u = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    if KIND == NEAREST:
        key, candidate = 0x80000000 - u, x < float("inf")
    else:
        key = tl.where((u >> 31) != 0, u ^ 0xFFFFFFFF, u | 0x80000000)
        if KIND == PLAN:
            candidate = (tl.load(target_ptr + index, mask=m, other=-1) >= 0) & (x >= threshold)
        else:
            key, candidate = tl.where(x == x, key, 1), m
    return tl.where(m & candidate, key, 0).to(tl.uint32)


@triton.jit
def block_at(number, start, BLOCK: tl.constexpr):
    """`number` less `start`, int32, as places in a block count: BLOCK stands for all beyond, -1 for all before."""
    return tl.maximum(tl.minimum(number - start, BLOCK), -1).to(tl.int32)


@triton.jit
def select_cut(score_ptr, target_ptr, tokens, r, threshold, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """(cut, last, number): chosen are the keys above `cut`, and those equal to it up to index `last`; `number` in all."""
    bin = tl.arange(0, 256)
    i = tl.arange(0, BLOCK)
    need = tl.zeros((), tl.int64) + r
    number = need
    cut = tl.zeros((), tl.uint32)
    for digit in range(4):
        shift = (tl.full((), 24, tl.int32) - 8 * digit).to(tl.uint32)
        count = tl.zeros((256,), tl.int64)
        for start in range(0, tokens, BLOCK):
            key = load_keys(
                score_ptr + start, target_ptr + start, i, i < block_at(tokens, start, BLOCK), threshold, KIND
            )
            own = ((key >> shift) >> 8 == cut) & (key != 0)
            count += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=own).to(tl.int64)
        if digit == 0:
            number = tl.minimum(need, tl.sum(count))
            need = number
        above = tl.sum(count) - tl.cumsum(count, 0)  # keys with a larger digit
        here = (above < need) & (above + count >= need)
        cut = (cut << 8) | tl.sum(tl.where(here, bin, 0)).to(tl.uint32)
        need -= tl.sum(tl.where(here, above, 0))
    last = tl.full((), -1, tl.int64)
    seen = tl.zeros((), tl.int64)
    for start in range(0, tokens, BLOCK):  # the place of the last of the equals that are needed
        m = i < block_at(tokens, start, BLOCK)
        key = load_keys(score_ptr + start, target_ptr + start, i, m, threshold, KIND)
        equal = ((key == cut) & m).to(tl.int32)
        here = tl.max(tl.where((equal != 0) & (tl.cumsum(equal, 0) == block_at(need, seen, BLOCK)), i, -1))
        last = tl.where(here >= 0, start + here, last)
        seen += tl.sum(equal)
    if number == 0:
        cut = tl.full((), 0xFFFFFFFF, tl.uint32)
        last = tl.full((), -1, tl.int64)
    return cut, last, number


@triton.jit
def is_chosen(key, index, cut, last):
    """Whether keys are among those that `select_cut` found."""
    return (key > cut) | ((key == cut) & (index <= last))
