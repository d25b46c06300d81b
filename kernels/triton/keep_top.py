"""Indices of the k largest, ascending; saccade/reference/keep_top.py is the specification.

A program takes one sample: it finds the k-th score by counting, then numbers what is kept.
"""

import triton
import triton.language as tl

from saccade._triton import launch, matrix
from saccade._triton.select import LARGEST, block_at, is_chosen, load_keys, select_cut

BLOCK = 4096


@triton.jit(do_not_specialize=matrix.SIZES)
def keep_top_kernel(score_ptr, out_ptr, score_stride, tokens, k, BLOCK: tl.constexpr):
    """out [B, k] int64."""
    i_b = tl.program_id(0).to(tl.int64)
    p_score = score_ptr + i_b * score_stride
    cut, last, _ = select_cut(p_score, p_score, tokens, k, 0.0, LARGEST, BLOCK)
    seen = tl.zeros((), tl.int64)
    i = tl.arange(0, BLOCK)
    for start in range(0, tokens, BLOCK):
        m = i < block_at(tokens, start, BLOCK)
        key = load_keys(p_score + start, p_score + start, i, m, 0.0, LARGEST)
        chosen = m & is_chosen(key, i, cut, block_at(last, start, BLOCK))
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out_ptr + i_b * k + seen + place, (start + i).to(tl.int64), mask=chosen)
        seen += tl.sum(chosen.to(tl.int32))


def block(tokens: int) -> int:
    """Tokens of a tile: one of three sizes."""
    return next((n for n in (256, 1024) if tokens <= n), BLOCK)


def warps(tokens: int) -> int:
    """Warps for such a tile."""
    return max(4, block(tokens) // 256)


def keep_top(scores, k):
    """scores [B, N] to indices [B, k] int64."""
    import torch

    scores = scores.float()
    scores = scores if scores.shape[1] == 1 or scores.stride(1) == 1 else scores.contiguous()
    batch, tokens = scores.shape
    out = scores.new_empty((batch, k), dtype=torch.int64)
    if out.numel():
        stride = 0 if batch == 1 else scores.stride(0)
        with launch.on_device(scores):
            keep_top_kernel[(batch,)](
                scores, out, stride, tokens, k, BLOCK=block(tokens), num_warps=warps(tokens), maxnreg=128, **matrix.OPTIONS
            )  # fmt: skip
    return out
