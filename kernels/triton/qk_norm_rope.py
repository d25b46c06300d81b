"""Launchers of `qk_norm_rope` and its gradient; saccade/reference/qk_norm_rope.py is the specification.

A row must be summed in one order, wherever it lies and however many rows there are. The order follows from how wide a vector the
compiler may load, so tensors that are not aligned for the full width are brought through an aligned copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saccade._triton import launch
from saccade._triton.qk_norm_rope_head import qk_norm_rope_head_bwd_kernel, qk_norm_rope_head_kernel
from saccade._triton.qk_norm_rope_row import qk_norm_rope_row_kernel
from saccade._triton.qk_norm_rope_row_bwd import qk_norm_rope_row_dw_kernel, qk_norm_rope_row_dx_kernel
from saccade._triton.sum_rows import sum_rows

if TYPE_CHECKING:
    import torch

# Of the kernel that sums weight gradients over whole rows: heads and blocks of tokens a program takes.
DW_HEADS = 2  # of a program; 1 where each has angles of its own, which take registers too
DW_TILES = 8


def _spec_args(x, steps, shift, begin, end, interleaved, align) -> dict[str, Any]:
    axes, _, pairs = steps.shape
    return {
        "D": x.shape[-1], "R": pairs, "AXES": axes, "SHIFT": shift, "BEGIN": begin, "END": end,
        "INTERLEAVED": interleaved, "ALIGN": align, **launch.widths(x.shape[-1], pairs, interleaved),
    }  # fmt: skip


def _head_args(q, k, steps, rows) -> tuple[int, dict[str, Any]]:
    """Number of programs of the kernels over heads, and their sizes."""
    groups, blocks = steps.shape[1], launch.token_blocks(rows, q.shape[2])
    tiles = -(-q.shape[2] // blocks["BLOCK_S"])
    k_heads = 0 if k is None else k.shape[1]
    per_group = max(q.shape[1], k_heads) // groups
    chunks = launch.head_chunks(q.shape[0] * tiles * groups, per_group, blocks["BLOCK_H"])
    sizes = {
        "tokens": q.shape[2], "tiles": tiles, "groups": groups, "chunks": chunks,
        "q_per_group": q.shape[1] // groups, "k_per_group": k_heads // groups, "HAS_K": k_heads > 0,
    }  # fmt: skip
    return q.shape[0] * tiles * groups * chunks, {**sizes, **blocks}


def _forward(q, q_out, k, k_out, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row):
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    align = launch.vector(q, steps.shape[2], interleaved)
    present = [x for x in (q, q_out, k, k_out) if x is not None]
    if not launch.regular(present, align):
        pairs = [(x, y, launch.aligned(x)) for x, y in ((q, q_out), (k, k_out)) if x is not None]
        copies = [copy for _, _, copy in pairs]
        qc, kc = copies[0], copies[1] if k is not None else None
        _forward(qc, qc, kc, kc, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row)
        for _, y, copy in pairs:
            y.copy_(copy)
        return
    q_weight, k_weight = launch.weight(q_weight), launch.weight(k_weight)
    args = _spec_args(q, steps, shift, begin, end, interleaved, align)
    k_heads = 0 if k is None else k.shape[1]
    k, k_out = (q, q_out) if k is None else (k, k_out)
    args |= {
        "q_ptr": q, "q_out_ptr": q_out, "k_ptr": k, "k_out_ptr": k_out, "step_ptr": steps, "scale": scale, "eps": eps,
        "q_weight_ptr": q if q_weight is None else q_weight, "WEIGHT_Q": q_weight is not None,
        "k_weight_ptr": q if k_weight is None else k_weight, "WEIGHT_K": k_weight is not None,
    }  # fmt: skip
    args |= launch.position_args(positions) | launch.stride_args(align, q=q, q_out=q_out, k=k, k_out=k_out)
    config = launch.config("norm_row" if row else "norm_head", args)
    with launch.on_device(q):
        if row:
            blocks = launch.row_blocks(config.rows, q.shape[1], k_heads, steps.shape[1] > 1)
            tiles = -(-q.shape[2] // blocks["BLOCK_S"])
            qk_norm_rope_row_kernel[(q.shape[0] * tiles,)](
                tokens=q.shape[2], tiles=tiles, groups=steps.shape[1], Q_HEADS=q.shape[1], K_HEADS=k_heads,
                GROUPED=steps.shape[1] > 1, **args, **blocks, **launch.options(config),
            )  # fmt: skip
        else:
            programs, sizes = _head_args(q, k if k_heads else None, steps, config.rows)
            qk_norm_rope_head_kernel[(programs,)](**args, **sizes, **launch.options(config))


def qk_norm_rope(
    q, k, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row
):  # fmt: skip
    """q [B, Hq, S, D] and k [B, Hk, S, D] (or None) normalised and turned; the second result is empty without k."""
    q_out = launch.empty_like(q)
    k_out = q.new_empty(0) if k is None else launch.empty_like(k)
    _forward(
        q, q_out, k, None if k is None else k_out,
        q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row,
    )  # fmt: skip
    return q_out, k_out


def qk_norm_rope_(q, k, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row):
    """The same in place."""
    _forward(q, q, k, k, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row)


def _head_backward(dq, dk, q, k, dx, q_weight, k_weight, args, positions, steps, align):
    """Both tensors in one kernel; returns the weights' partial sums [programs, D], None without a weight."""
    config = launch.config("norm_head_bwd", args)
    programs, sizes = _head_args(q, k, steps, config.rows)
    partial = [
        None if w is None or x is None else q.new_empty((programs, q.shape[-1]), dtype=launch.float32())
        for w, x in ((q_weight, q), (k_weight, k))
    ]
    q_dx, k_dx = dx
    k, dk, k_dx = (q, dq, q_dx) if k is None else (k, dk, k_dx)
    with launch.on_device(q):
        qk_norm_rope_head_bwd_kernel[(programs,)](
            q_ptr=q, q_dy_ptr=dq, q_dx_ptr=q_dx, k_ptr=k, k_dy_ptr=dk, k_dx_ptr=k_dx,
            q_weight_ptr=q if q_weight is None else q_weight, k_weight_ptr=q if k_weight is None else k_weight,
            q_partial_ptr=positions if partial[0] is None else partial[0], WEIGHT_Q=partial[0] is not None,
            k_partial_ptr=positions if partial[1] is None else partial[1], WEIGHT_K=partial[1] is not None,
            **launch.position_args(positions),
            **launch.stride_args(align, q=q, q_dy=dq, q_dx=q_dx, k=k, k_dy=dk, k_dx=k_dx),
            **args, **sizes, **launch.options(config),
        )  # fmt: skip
    return partial


def _row_backward(dy, x, dx, weight, args, positions, steps, align):
    """One tensor; returns the weight's partial sums [N, H * D], None without a weight."""
    import torch

    batch, heads, tokens, head_dim = x.shape
    config = launch.config("norm_row_bwd", args)
    blocks = launch.row_blocks(config.rows, heads, 0, False)
    block_s, block_h = blocks["BLOCK_S"], blocks["BLOCK_H"]
    tiles = -(-tokens // block_s)
    common = {
        "position_ptr": positions, "tokens": tokens, "groups": steps.shape[1], "HEADS": heads, "GROUPED": steps.shape[1] > 1,
         **launch.position_args(positions), **args, **launch.options(config),
    }  # fmt: skip
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    with launch.on_device(x):
        qk_norm_rope_row_dx_kernel[(batch * tiles,)](
            x_ptr=x, dy_ptr=dy, dx_ptr=dx, weight_ptr=x if weight is None else weight, rstd_ptr=rstd, tiles=tiles,
            WEIGHT=weight is not None, BLOCK_S=block_s, BLOCK_H=block_h,
            **launch.stride_args(align, x=x, dy=dy, dx=dx), **common,
        )  # fmt: skip
        if weight is None:
            return None
        tiles = -(-tokens // (config.rows * DW_TILES))
        partial = torch.empty((batch * tiles, heads * head_dim), dtype=torch.float32, device=x.device)
        common.pop("eps")
        unroll = 1 if common["GROUPED"] else DW_HEADS
        qk_norm_rope_row_dw_kernel[(batch * tiles * -(-heads // unroll),)](
            x_ptr=x, dy_ptr=dy, rstd_ptr=rstd, partial_ptr=partial, tiles=tiles, tiles_per_program=DW_TILES,
            UNROLL=unroll, ROWS=config.rows, **launch.stride_args(align, x=x, dy=dy), **common,
        )  # fmt: skip
    return partial


def qk_norm_rope_bwd(
    dq, dk, q, k, q_weight, k_weight, positions, steps, shift, begin, end, interleaved, scale, eps, row
):  # fmt: skip
    """Gradients (of q, of k, of q_weight, of k_weight); those of the weights are fp32, what has no tensor gets an empty one."""
    f32 = launch.float32()
    q_grad = launch.empty_like(q)
    k_grad = q.new_empty(0) if k is None else launch.empty_like(k)
    weight_grads = [q.new_zeros(0 if w is None else w.shape[0], dtype=f32) for w in (q_weight, k_weight)]
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return q_grad, k_grad, *weight_grads
    align = launch.vector(q, steps.shape[2], interleaved)

    def usable(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or launch.regular((x,), align) else launch.aligned(x)

    q_dx, k_dx = (None if x is None else usable(x) for x in (q_grad, None if k is None else k_grad))
    q_weight, k_weight = launch.weight(q_weight), launch.weight(k_weight)
    dq, dk, q, k = usable(dq), usable(dk), usable(q), usable(k)
    args = _spec_args(q, steps, shift, begin, end, interleaved, align) | {"step_ptr": steps, "scale": scale, "eps": eps}
    if row:
        partial = [
            None if x is None or x.numel() == 0 else _row_backward(dy, x, dx, w, args, positions, steps, align)
            for dy, x, dx, w in ((dq, q, q_dx, q_weight), (dk, k, k_dx, k_weight))
        ]
    else:
        partial = _head_backward(dq, dk, q, k, (q_dx, k_dx), q_weight, k_weight, args, positions, steps, align)
    for grad, dx in ((q_grad, q_dx), (k_grad, k_dx)):
        if dx is not None and dx is not grad:
            grad.copy_(dx)
    weight_grads = [grad if p is None else sum_rows(p) for grad, p in zip(weight_grads, partial, strict=True)]
    return q_grad, k_grad, *weight_grads
