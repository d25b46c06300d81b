"""Products of rows with rows, [A, B] fp32: the inner part of match and knn_density.

Every product is summed over its columns in one order, whichever tile it falls into, so equal rows have equal products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import launch
from saccade._triton.matrix import INTERPRET


@triton.jit
def load_block(p_row, m_row, column, C: tl.constexpr):
    """A tile for `tl.dot`: rows along one axis, columns along the other. The interpreter cannot multiply bfloat16."""
    x = tl.load(p_row + column, mask=m_row & (column < C), other=0.0)
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def held_block(p_a, m_a, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first columns of a [A, 1]: all of them where a block holds them."""
    return load_block(p_a, m_a, tl.arange(0, BLOCK_K)[None, :], C)


@triton.jit
def products(
    a, p_a, m_a, p_b, m_b, C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Rows a [BLOCK_A, 1] with rows b [1, BLOCK_B]; `a` is the held block, of use where C <= BLOCK_K."""
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    k = tl.arange(0, BLOCK_K)
    if C <= BLOCK_K:
        total = tl.dot(a, load_block(p_b, m_b, k[:, None], C), total, input_precision="ieee")
    else:
        for start in range(0, C, BLOCK_K):
            a = load_block(p_a, m_a, (start + k)[None, :], C)
            total = tl.dot(a, load_block(p_b, m_b, (start + k)[:, None], C), total, input_precision="ieee")
    return total


def block_k(channels: int, element_size: int) -> int:
    """Columns multiplied at once."""
    held, streamed = (128, 64) if element_size == 2 else (32, 32)
    whole = max(16, launch.power_of_two(channels))
    return whole if whole <= held else streamed
