r"""Attention inside the boxes of a grid, behind a prefix that every box sees.

Tokens: P of the prefix, then a grid (t, h, w) in t-major order, cut from the origin into boxes (bt, bh, bw), in t-major order too;
those at the far edges are smaller. With box(i) the grid tokens in the box of i:

    s_ij = scale * q_i . k_j,   keys(i) = prefix + box(i) for a grid token,   all tokens for a prefix token
    lse_i = log sum_{j in keys(i)} exp(s_ij),   out_i = sum_{j in keys(i)} exp(s_ij - lse_i) v_j

With `mean` a prefix token is a query in every box g instead, with the keys prefix + g, and out is the mean of its G results
(TimeSformer's class token, arXiv 2102.05095, sec. 3; Frozen in Time, arXiv 2104.00650, sec. 3.1, has the other form):

    group_lse_gi, group_out_gi as above,   out_i = sum_g group_out_gi / G   (0 where G = 0),   lse_i = 0, which is not used

Gradients, with dP_ij = dout_i . v_j and delta_i = dout_i . out_i over every pair (query, key) that is visible:

    P_ij = exp(s_ij - lse_i),  dS_ij = P_ij (dP_ij - delta_i),  dq_i = scale sum_j dS_ij k_j,  dk_j = scale sum_i dS_ij q_i,
    dv_j = sum_i P_ij dout_i

where a prefix token with `mean` is G queries, each with dout_i / G, group_out_gi and group_lse_gi. Everything is fp32 (fp64 for fp64),
rounded once; lse, group_out and group_lse stay fp32 (fp64). Where all s_ij of a query are -inf: out 0, lse -inf, gradients 0.
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype

Tensor = torch.Tensor


def box_tokens(
    prefix: int, grid: tuple[int, int, int], box: tuple[int, int, int], device: torch.device | None = None
) -> Tensor:
    """Tokens of every box [G, bt * bh * bw] int64, -1 beyond the edges."""
    place = torch.zeros(1, 1, dtype=torch.int64, device=device)
    inside = torch.ones(1, 1, dtype=torch.bool, device=device)
    for n, b in zip(grid, box, strict=True):
        count = -(-n // b)
        at = torch.arange(count, device=device)[:, None] * b + torch.arange(b, device=device)
        rows, columns = place.shape
        place = (place[:, None, :, None] * n + at[None, :, None, :]).reshape(rows * count, columns * b)
        inside = (inside[:, None, :, None] & (at < n)[None, :, None, :]).reshape(rows * count, columns * b)
    return torch.where(inside, place + prefix, -1)


def _grouped(x: Tensor, prefix: int, tokens: Tensor) -> Tensor:
    """Rows of the prefix and of each box, [B, H, G, P + N, D]; those beyond the edges are 0."""
    groups, size = tokens.shape
    b, h, _, d = x.shape
    rows = x[:, :, tokens.clamp(min=0).flatten()].view(b, h, groups, size, d).where((tokens >= 0)[..., None], 0.0)
    return torch.cat((x[:, :, None, :prefix].expand(-1, -1, groups, -1, -1), rows), 3)


def _weights(q: Tensor, k: Tensor, exists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P and lse of queries [..., N, D] and keys [..., M, D], of which those of `exists` [..., M] are seen."""
    s = (scale * q @ k.mT).where(exists[..., None, :], float("-inf"))
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), float("-inf"))
    top = top.where(top != float("-inf"), 0.0).detach()
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    p = torch.where(total == 0, 0.0, e / total.where(total != 0, 1.0))
    return p, (total.log() + top)[..., 0]


def _exists(prefix: int, tokens: Tensor) -> Tensor:
    return torch.cat((tokens.new_ones((tokens.shape[0], prefix), dtype=torch.bool), tokens >= 0), 1)


def _spread(rows: Tensor, tokens: Tensor, out: Tensor) -> Tensor:
    """`out` [B, H, S, ...] with the rows [B, H, G, N, ...] of the boxes written at their tokens."""
    seen = tokens >= 0
    return out.index_copy(2, tokens[seen], rows[:, :, seen])


def axial_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, t: int, h: int, w: int, bt: int, bh: int, bw: int, mean: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Out [B, H, S, D] in q's dtype; lse [B, H, S], group_out [B, H, G, P, D] and group_lse [B, H, G, P] fp32 (fp64).

    group_out and group_lse are empty ([0]) without `mean`.

    Args:
        q, k, v: [B, H, S, D], S = prefix + t * h * w.
        prefix: P, tokens before the grid.
        t, h, w: the grid.
        bt, bh, bw: the box, at least 1 each.
        mean: whether the prefix is a query in every box.
        scale: of the scores.
    """
    wide = compute_dtype(q)
    qw, kw, vw = q.to(wide), k.to(wide), v.to(wide)
    tokens = box_tokens(prefix, (t, h, w), (bt, bh, bw), q.device)
    groups = tokens.shape[0]
    exists = _exists(prefix, tokens)
    queries, keys, values = (_grouped(x, prefix, tokens) for x in (qw, kw, vw))
    if not mean:
        queries = queries[:, :, :, prefix:]
    p, lse = _weights(queries, keys, exists, scale)
    rows = p @ values
    first = prefix if mean else 0
    out, all_lse = _spread(rows[:, :, :, first:], tokens, qw.new_zeros(q.shape)), qw.new_zeros(q.shape[:3])
    all_lse = _spread(lse[:, :, :, first:], tokens, all_lse)
    empty = qw.new_zeros(0)
    if mean:
        group_out, group_lse = rows[:, :, :, :prefix], lse[:, :, :, :prefix]
        out[:, :, :prefix] = group_out.sum(2) / max(groups, 1)
        return out.to(q.dtype), all_lse, group_out.contiguous(), group_lse.contiguous()
    if prefix:
        p, lse = _weights(qw[:, :, :prefix], kw, exists.new_ones(q.shape[2]), scale)
        out[:, :, :prefix], all_lse[:, :, :prefix] = p @ vw, lse
    return out.to(q.dtype), all_lse, empty, empty


def _pair_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, exists: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of attention of queries [..., N, D] over keys [..., M, D]."""
    s = (scale * q @ k.mT).where(exists[..., None, :], float("-inf"))
    lse = lse[..., None]
    p = torch.exp(s - lse.where(lse != float("-inf"), 0.0)).where(exists[..., None, :], 0.0)
    delta = (dout * out).sum(-1, keepdim=True)
    ds = (p * (dout @ v.mT - delta)).where(exists[..., None, :], 0.0)
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ dout


def axial_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group_out: Tensor, group_lse: Tensor,
    prefix: int, t: int, h: int, w: int, bt: int, bh: int, bw: int, mean: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dq, dk, dv [B, H, S, D] in q's dtype, from `dout` and what `axial_attention` returned."""
    wide = compute_dtype(q)
    dow, qw, kw, vw, ow, lse = (x.to(wide) for x in (dout, q, k, v, out, lse))
    tokens = box_tokens(prefix, (t, h, w), (bt, bh, bw), q.device)
    groups = tokens.shape[0]
    exists = _exists(prefix, tokens)
    gdo, gq, gk, gv, go = (_grouped(x, prefix, tokens) for x in (dow, qw, kw, vw, ow))
    glse = _grouped(lse[..., None], prefix, tokens)[..., 0]
    if mean:
        gdo[:, :, :, :prefix] /= max(groups, 1)
        go[:, :, :, :prefix] = group_out
        glse[:, :, :, :prefix] = group_lse
    else:
        gdo, gq, go, glse = (x[:, :, :, prefix:] for x in (gdo, gq, go, glse))
    found = _pair_gradients(gdo, gq, gk, gv, go, glse, exists, scale)
    gradients = []
    for x, first in zip(found, (prefix if mean else 0, prefix, prefix), strict=True):
        whole = _spread(x[:, :, :, first:], tokens, qw.new_zeros(q.shape))
        whole[:, :, :prefix] = x[:, :, :, :first].sum(2) if first else 0.0
        gradients.append(whole)
    if prefix and not mean:
        one = (dow[:, :, :prefix], qw[:, :, :prefix], kw, vw, ow[:, :, :prefix], lse[:, :, :prefix])
        dq, dk, dv = _pair_gradients(*one, exists.new_ones(q.shape[2]), scale)
        gradients[0][:, :, :prefix] += dq
        gradients[1] += dk
        gradients[2] += dv
    dq, dk, dv = (x.to(q.dtype) for x in gradients)
    return dq, dk, dv
