"""What attention must give, on one head, computed in stretches of queries: the oracle of the gate."""

from __future__ import annotations

import torch

from saccade.attention import BlockLayout

Tensor = torch.Tensor
_ROWS = 1024


def shown(layout: BlockLayout, rows: slice) -> Tensor:
    """[rows, Sk] bool of head 0: which keys these queries see. Whole blocks alone, tokens in order."""
    blocks = layout.block_map()[0, 0, rows.start // layout.q_block : -(-rows.stop // layout.q_block)] > 0
    mask = blocks.repeat_interleave(layout.q_block, 0).repeat_interleave(layout.k_block, 1)
    first = rows.start // layout.q_block * layout.q_block
    return mask[rows.start - first : rows.stop - first, : layout.k_len]


def attention(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, dtype: torch.dtype, dout: Tensor | None = None):  # type: ignore[no-untyped-def]
    """[out], or [dq, dk, dv] where `dout` is given, of q, k, v [S, D] in `dtype`; probabilities are rounded to it before they multiply."""
    work = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(dtype).to(work) for x in (q, k, v))
    out, dq, dk, dv = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = q.shape[-1] ** -0.5
    narrow = lambda x: x.to(dtype).to(work)  # noqa: E731
    for first in range(0, len(q), _ROWS):
        rows = slice(first, min(first + _ROWS, len(q)))
        s = (q[rows] @ k.T * scale).masked_fill(~shown(layout, rows), float("-inf"))
        p = s.softmax(-1)
        out[rows] = narrow(p) @ v
        if dout is not None:
            grad = dout[rows].to(work)
            dv += narrow(p).T @ grad
            ds = p * (grad @ v.T - (grad * out[rows]).sum(-1, keepdim=True))
            dq[rows] = narrow(ds) @ k * scale
            dk += narrow(ds).T @ q[rows] * scale
    return [out.to(dtype)] if dout is None else [x.to(dtype) for x in (dq, dk, dv)]
