"""Token merging around the self-attention of a video's blocks as it is defined: by matrices, with the stock modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def row_of(x: Tensor, grid: tuple[int, ...], cell: tuple[int, ...], r: int) -> Tensor:
    """Of each token of x [S, C] the token that it ends up in, [S]: the r sources most like a destination merge into it."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).view(-1, 3)
    cells = torch.tensor([n // c * c for n, c in zip(grid, cell, strict=True)])
    first = ((place % torch.tensor(cell) == 0) & (place < cells)).all(1)
    sources, destinations = (~first).nonzero()[:, 0], first.nonzero()[:, 0]
    x = F.normalize(x.detach().double(), dim=-1)
    best, where = (x[sources] @ x[destinations].t()).max(1)
    merged = best.sort(descending=True, stable=True).indices[:r]
    out = torch.arange(len(x))
    out[sources[merged]] = destinations[where[merged]]
    return out


class Oracle:
    """In place of a stock processor; `_turn` is the family's rotation by tables."""

    def __init__(self, stock: Any, grid: Any, cell: Any, keep: float, proportional: bool = True) -> None:
        self.scope = type(stock).__call__.__globals__
        self.grid, self.cell, self.keep, self.proportional = grid, cell, keep, proportional

    def out(self, attn: Any, hidden: Tensor, rotary: Any) -> Tensor:
        """[B, S, C] for hidden [B, S, C]."""
        samples = []
        for i, x in enumerate(hidden):
            goal = row_of(x, self.grid, self.cell, round(len(x) * (1 - self.keep)))
            heads = goal.unique()
            matrix = (goal == heads[:, None]).to(x.dtype)  # [M, S]
            size = matrix.sum(1)
            rows = ((matrix @ x) / size[:, None])[None]
            q, k = attn.norm_q(attn.to_q(rows)), attn.norm_k(attn.to_k(rows))
            tables = [t[i : i + 1] if len(t) > 1 else t for t in rotary]
            q, k = self.turn(attn, q, k, [t.index_select(self.axis(t), heads) for t in tables])
            q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in (q, k, attn.to_v(rows)))
            mask = size.log()[None, None, None] if self.proportional else None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            out = self.finish(attn, rows, out)
            samples.append(matrix.t() @ attn.to_out[0](out)[0])
        return torch.stack(samples)

    def axis(self, table: Tensor) -> int:
        """The axis of tokens."""
        return 1

    def finish(self, attn: Any, rows: Tensor, out: Tensor) -> Tensor:
        """What lies between attention and the output layer."""
        return out


class Wan(Oracle):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.out(attn, hidden_states, rotary_emb)

    def turn(self, attn, q, k, tables):
        cos, sin = (t[..., 0::2] for t in tables)

        def turned(x):
            pairs = torch.view_as_complex(x.unflatten(2, (attn.heads, -1, 2)))
            return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(2)

        return turned(q), turned(k)


class LTX(Oracle):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self.out(attn, hidden_states, image_rotary_emb)

    def turn(self, attn, q, k, tables):
        turn = self.scope["apply_rotary_emb"]
        return turn(q, tables), turn(k, tables)


class LTX2(Oracle):
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None,
        key_rotary_emb=None, perturbation_mask=None, all_perturbed=None,
    ):  # fmt: skip
        return self.out(attn, hidden_states, query_rotary_emb)

    def turn(self, attn, q, k, tables):
        turn = self.scope[f"apply_{attn.rope_type}_rotary_emb"]
        return turn(q, tables), turn(k, tables)

    def axis(self, table):
        return table.ndim - 2

    def finish(self, attn, rows, out):
        if attn.to_gate_logits is None:
            return out
        gates = 2 * torch.sigmoid(attn.to_gate_logits(rows))
        return (out.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2)
