"""Inputs of the attention tests, layouts of every form, and what torch makes of them in the same precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from saccade.attention import BlockLayout, BlockLists
from saccade.attention.layout import SEEN_BY_ALL
from saccade.reference.sparse_attention import sparse_attention as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64, 72, 80, 96, 128, 256)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, dtype=torch.float32, *, seed=0, device="cpu"):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(device)


def inputs(
    batch, heads, kv_heads, q_len, k_len, head_dim, dtype=torch.float32, *, seed=0, device="cpu", strides="bhsd"
):
    """q, k, v; strides "bhsd", "bshd" (as models hold them) or "packed" (slices of one wider row, NaN between)."""
    out = []
    for i, (h, s) in enumerate(((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))):
        x = normal((batch, h, s, head_dim), dtype, seed=seed * 7 + i, device=device)
        if strides == "bshd":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif strides == "packed":
            wide = torch.full((batch, s, h, 3 * head_dim), float("nan"), dtype=dtype, device=device)
            wide[..., head_dim : 2 * head_dim] = x.transpose(1, 2)
            x = wide[..., head_dim : 2 * head_dim].transpose(1, 2)
        out.append(x)
    return out


def causal_box(n, positions):
    """box and at of a causal predicate; positions behind n see and show nothing in particular."""
    i = torch.arange(positions, dtype=torch.int32)
    box = torch.stack([torch.zeros_like(i), i + 1])[None, None, :, None].contiguous()
    return box, i[None, None, None].contiguous()


def compressed(lists, extra=3):
    """The same lists in one run of entries, with a few unused ones in front."""
    flat, size = lists.indices.flatten(), lists.counts.flatten().long()
    rows = [flat[s : s + c] for s, c in zip(lists.starts.flatten().tolist(), size.tolist(), strict=True)]
    pad = torch.full((extra,), 99, dtype=torch.int32)
    starts = (size.cumsum(0) - size + extra).to(torch.int32).reshape(lists.counts.shape)
    return BlockLists(starts, lists.counts, torch.cat([pad, *rows]).contiguous())


def _map(batch, heads, q_blocks, k_blocks, share, seed):
    return torch.rand(batch, heads, q_blocks, k_blocks, generator=generator(seed)) < share


def blocks_of(n, block):
    return -(-n // block)


def whole(batch, heads, q_len, k_len, q_block, k_block, seed=0):
    """Whole blocks, about half of them, other ones for every sample and head."""
    some = _map(batch, heads, blocks_of(q_len, q_block), blocks_of(k_len, k_block), 0.5, seed)
    return BlockLayout.from_block_map(some, q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block)


def bits(batch, heads, q_len, k_len, q_block, k_block, seed=0):
    """Any mask: whole blocks, blocks in part, queries that see nothing."""
    mask = torch.rand(batch, heads, q_len, k_len, generator=generator(seed)) < 0.4
    mask[..., : q_len // 2, : k_len // 2] = True
    mask[..., q_len // 2 :: 7, :] = False
    return BlockLayout.from_mask(mask, q_block=q_block, k_block=k_block)


def causal(batch, heads, q_len, k_len, q_block, k_block, seed=0):
    """A predicate of one axis; query i sees keys up to i."""
    rows, columns = blocks_of(q_len, q_block), blocks_of(k_len, k_block)
    first_q, first_k = torch.arange(rows)[:, None] * q_block, torch.arange(columns)[None] * k_block
    last_k = first_k + k_block - 1
    full, part = last_k <= first_q, (first_k <= first_q + q_block - 1) & (last_k > first_q)
    n = max(rows * q_block, columns * k_block)
    box, at = causal_box(n, n)
    at = at[..., : columns * k_block].contiguous()
    box = box[..., : rows * q_block].contiguous()
    lists = [
        BlockLayout.from_block_map(m, q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block).full
        for m in (full, part)
    ]
    lists = [compressed(x) for x in lists]
    return BlockLayout.from_lists(q_len, k_len, q_block, k_block, lists[0], partial=lists[1], box=box, at=at)


def window(batch, heads, q_len, k_len, q_block, k_block, seed=0):
    """A predicate of two axes with keys that everybody sees, and tokens in another order, with holes."""
    rows, columns = blocks_of(q_len, q_block) + 1, blocks_of(k_len, k_block) + 1
    q_order = _order(q_len, rows * q_block, seed)[None, None].contiguous()
    k_order = _order(k_len, columns * k_block, seed + 1)[None, None].contiguous()
    low = torch.randint(0, 6, (1, 1, 2, rows * q_block), generator=generator(seed), dtype=torch.int32)
    high = low + torch.randint(0, 6, low.shape, generator=generator(seed + 2), dtype=torch.int32)
    box = torch.stack([low, high], 2).contiguous()
    at = torch.randint(0, 9, (1, 1, 2, columns * k_block), generator=generator(seed + 3), dtype=torch.int32)
    at[..., 0, :: k_block - 1] = SEEN_BY_ALL
    kind = torch.randint(0, 3, (batch, heads, rows, columns), generator=generator(seed + 4))
    sizes = dict(q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block, q_order=q_order, k_order=k_order)
    full = BlockLayout.from_block_map(kind == 2, **sizes).full
    part = BlockLayout.from_block_map(kind == 1, **sizes).full
    rest = dict(q_order=q_order, k_order=k_order, partial=part, box=box, at=at)
    return BlockLayout.from_lists(q_len, k_len, q_block, k_block, full, **rest)


def _order(n, positions, seed):
    order = torch.full((positions,), -1, dtype=torch.int32)
    places = torch.randperm(positions, generator=generator(seed))[:n]
    order[places] = torch.arange(n, dtype=torch.int32)
    return order


LAYOUTS = {"whole": whole, "bits": bits, "causal": causal, "window": window}


def torch_attention(q, k, v, mask, bias, key_bias, scale):
    """What torch makes of it in q's precision: SDPA with a float mask, 0 where a query sees nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if key_bias is not None:
        scores = scores + key_bias.to(q.dtype)[:, None, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    empty = ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, scores.masked_fill(empty, 0.0), scale=scale)
    return out.masked_fill(empty, 0.0)


def results(function, tensors, dout, dlse=None):
    """Outputs and the gradients of every tensor that asks for one; `function` returns out and lse."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out, lse = function(*leaves)
    loss = (out.double() * dout.double()).sum()
    if dlse is not None:
        loss = loss + (lse.double().masked_fill(lse.isinf(), 0.0) * dlse.double()).sum()
    given = [t for t in leaves if t is not None]
    return out.detach(), lse.detach(), torch.autograd.grad(loss, given)


def expected(tensors, mask, scale, dout, dlse=None):
    """(float64 results, results of torch in the same precision), each out, lse and gradients; lse by fp32 arithmetic."""
    wide = [t if t is None else t.double() for t in tensors]
    exact = results(lambda *x: reference(*x[:3], mask, *x[3:], scale), wide, dout, dlse)
    narrow = lambda *x: (torch_attention(*x[:3], mask, *x[3:], scale), reference(*x[:3], mask, *x[3:], scale)[1])  # noqa: E731
    return exact, results(narrow, tensors, dout, dlse)
