"""Key blocks that each query block sees; saccade/reference/block_select.py is the specification.

A program holds the scores of one query block. What is chosen is found by bits of a key in the order of the scores, from the highest
down: the largest key such that the candidates from it upwards are enough, by number or by weight.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch

TOP, SHARE, THRESHOLD = range(3)
BY_SHARE, BY_THRESHOLD = tl.constexpr(SHARE), tl.constexpr(THRESHOLD)
MOST = 4096  # key blocks of a program

SIZES = ["heads", "group", "q_blocks", "k_blocks", "width", "keep", "p", "scale", "class_stride_b", "class_stride_h"]


@triton.jit
def highest(key, amount, need):
    """The largest key such that the amounts of the keys from it upwards come to `need`, 0 where they never do."""
    cut = tl.zeros((), tl.uint32)
    for n in range(32):
        bit = (tl.full((), 31, tl.int32) - n).to(tl.uint32)
        more = cut | (tl.full((), 1, tl.uint32) << bit)
        enough = tl.sum(tl.where(key >= more, amount, 0), 0) >= need
        cut = tl.where(enough, more, cut)
    return cut


@triton.jit
def store_list(p_count, p_list, chosen, j):
    listed = chosen.to(tl.int32)
    tl.store(p_count, tl.sum(listed, 0))
    tl.store(p_list + tl.cumsum(listed, 0) - 1, j, mask=chosen)


@triton.jit(do_not_specialize=SIZES)
def block_select_kernel(
    q_ptr, k_ptr, class_ptr, count_ptr, index_ptr, p_count_ptr, p_index_ptr,
    heads, group, q_blocks, k_blocks, width, keep, p, scale, class_stride_b, class_stride_h,
    D: tl.constexpr, MODE: tl.constexpr, HAS_CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q [B, H, nQ, D], k [B, Hk, D, nK]."""
    row, rest = tl.program_id(0) % q_blocks, tl.program_id(0) // q_blocks
    i_h, i_b = rest % heads, (rest // heads).to(tl.int64)
    at = rest.to(tl.int64) * q_blocks + row
    j = tl.arange(0, BLOCK)
    there = j < k_blocks
    p_q = q_ptr + at * D
    p_k = k_ptr + (i_b * (heads // group) + i_h // group) * D * k_blocks + j
    score = tl.zeros((BLOCK,), tl.float32)
    for c in range(D):
        score += tl.load(p_q + c) * tl.load(p_k, mask=there, other=0.0)
        p_k += k_blocks
    score *= scale
    score = tl.where(score == score, score, float("-inf"))
    if HAS_CLASSES:
        p_class = class_ptr + i_b * class_stride_b + i_h.to(tl.int64) * class_stride_h + row.to(tl.int64) * k_blocks
        kind = tl.load(p_class + j, mask=there, other=0).to(tl.int32)
    else:
        kind = there.to(tl.int32)
    candidate = (kind == 1) | (kind == 2)
    word = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where((word >> 31) != 0, word ^ 0xFFFFFFFF, word | 0x80000000).to(tl.uint32)
    key = tl.where(candidate, key, 0).to(tl.uint32)  # that of -inf is above 0

    # The first `keep`.
    one = candidate.to(tl.int32)
    cut = highest(key, one, keep)
    equal = candidate & (key == cut)
    left = keep - tl.sum(tl.where(key > cut, one, 0), 0)
    chosen = candidate & ((key > cut) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)) | (tl.sum(one, 0) <= keep))
    chosen = chosen & (keep > 0)
    if MODE != 0:
        best = tl.max(tl.where(candidate, score, float("-inf")), 0)
        weight = tl.where(score == best, 1.0, tl.exp((score - best).to(tl.float64)))
        weight = tl.where(candidate, weight, 0.0)
        need = (tl.zeros((), tl.float64) + p) * tl.sum(weight, 0)
        if MODE == BY_THRESHOLD:
            chosen = chosen | (candidate & (weight >= need))
        else:
            cut = highest(key, weight, need)
            equal = candidate & (key == cut)
            above = tl.sum(tl.where(key > cut, weight, 0.0), 0)
            before = above + weight * (tl.cumsum(equal.to(tl.int32), 0) - 1).to(tl.float64)
            chosen = chosen | (candidate & ((key > cut) | (equal & (before < need))))
    chosen = chosen | (kind == 3) | (kind == 4)
    if HAS_CLASSES:
        partly = (kind == 2) | (kind == 4)
        store_list(p_count_ptr + at, p_index_ptr + at * width, chosen & partly, j)
        chosen = chosen & (partly == 0)
    store_list(count_ptr + at, index_ptr + at * width, chosen, j)


def block_select(q, k, classes, mode, keep, p, scale):
    """counts [B, H, nQ], indices [B, H, nQ, width], p_counts and p_indices, int32."""
    import torch

    (batch, heads, q_blocks, head_dim), (kv_heads, k_blocks) = q.shape, k.shape[1:3]
    if k_blocks > MOST:
        raise ValueError(f"k: expected at most {MOST} key blocks, got {k_blocks}")
    keep = min(keep, k_blocks)
    width = keep if mode == TOP and classes is None else k_blocks
    shape = batch, heads, q_blocks
    counts, indices = (q.new_zeros(s, dtype=torch.int32) for s in (shape, (*shape, width)))
    p_counts, p_indices = (
        q.new_zeros(0 if classes is None else s, dtype=torch.int32) for s in (shape, (*shape, width))
    )
    if counts.numel() == 0 or k_blocks == 0:
        return counts, indices, p_counts, p_indices
    if mode == SHARE and p >= 1:
        mode, keep = TOP, k_blocks
    block = max(64, launch.power_of_two(k_blocks))
    classes = None if classes is None else classes.contiguous()
    with launch.on_device(q):
        block_select_kernel[(counts.numel(),)](
            q.contiguous(), k.mT.contiguous(), counts if classes is None else classes, counts, indices, p_counts, p_indices,
            heads=heads, group=heads // kv_heads, q_blocks=q_blocks, k_blocks=k_blocks, width=width, keep=keep,
            p=struct.unpack("f", struct.pack("f", p))[0], scale=float(scale), **attention_launch.shared_strides("class", classes),
            D=head_dim, MODE=mode, HAS_CLASSES=classes is not None, BLOCK=block, num_warps=min(8, max(4, block // 256)),
        )  # fmt: skip
    return counts, indices, p_counts, p_indices
