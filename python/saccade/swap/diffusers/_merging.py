"""Token merging around the self-attention of a video's blocks, as tomesd has it: fewer rows attend, and every token takes its row back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from saccade.merge import Grid, MergePlan, match, merge, merge_positions, unmerge
from saccade.swap.attend import Context
from saccade.swap.diffusers._processor import Processor
from saccade.swap.recipe import Rule
from saccade.swap.site import Choice, Site

__all__ = ["MASKED", "Merged", "Merging", "MergingProcessor", "Rows", "merge_site", "merging_of"]

Tensor = torch.Tensor
CELLS = ((1, 2, 2), (2, 2, 2))  # one destination in each: a quarter of the tokens, or an eighth
_EXACT = ("stock", "dense")
MASKED = "the model gave a mask of queries and keys"
_RAN = "no tokens were merged"


@dataclass(frozen=True, eq=False)
class Rows:
    """Every token as a row of its own: nothing is merged.

    Attributes:
        hidden: [B, S, C].
    """

    hidden: Tensor

    def positions(self, positions: Tensor) -> Tensor:
        """Of the rows, from those of the tokens, [A, S] or [A, B, S]."""
        return positions

    def tables(self, tables: tuple[Tensor, Tensor], axis: int) -> tuple[Tensor, Tensor]:
        """Of the rows, from those of the tokens, which lie along `axis`; axis 0 is the batch, or broadcast."""
        return tables

    def back(self, out: Tensor) -> Tensor:
        """[B, S, C] of the rows [B, M, C]."""
        return out


@dataclass(frozen=True, eq=False)
class Merged(Rows):
    """Rows that stand for several tokens. A row turns as the token does whose place it takes.

    Attributes:
        hidden: [B, M, C].
        plan: which token goes to which row.
        bias: log of the number of tokens of each row, fp32 [B, M], or None where attention is not proportional.
    """

    plan: MergePlan
    bias: Tensor | None

    def positions(self, positions: Tensor) -> Tensor:
        """[A, B, M]; [A, M] where there is one sample and positions have no batch."""
        return merge_positions(self.plan, positions)

    def tables(self, tables: tuple[Tensor, Tensor], axis: int) -> tuple[Tensor, Tensor]:
        """Each of batch B, M along `axis`."""
        head = self.plan.head.long().clamp(min=0)
        head = head.view(head.shape[0], *(head.shape[1] if i == axis else 1 for i in range(1, tables[0].ndim)))
        cos, sin = (torch.take_along_dim(table, head, axis) for table in tables)
        return cos, sin

    def back(self, out: Tensor) -> Tensor:
        """[B, S, C]: every token takes the row that it was merged into."""
        whole: Tensor = unmerge(out, self.plan)
        return whole


@dataclass(eq=False)
class Merging:
    """How the tokens of one self-attention merge (tomesd, arXiv 2303.17604, section 4; log(size): ToMe, arXiv 2210.09461, eq. 1).

    One token of each cell is a destination, all others may merge into any of them, the most alike (by the cosine of what comes into
    attention) first. Cells are 1 x 2 x 2 tokens, or 2 x 2 x 2 where so few are kept that a quarter would be too many; an axis that is
    shorter than the cell has cells of its own length. Queries, keys, values, attention and the output layer see merged rows only.

    Parameters of the rule "merge":
        keep: the share of the tokens that attend, at least 1/8. At 1 nothing changes, not a bit.
        proportional: whether log(size) is added to the scores of each key (default True). Backends that take no mask then give way to
            torch's own attention; with False the model's backend runs.

    Merging is approximate, and no preset has it. It goes with exact attention only ("dense", "stock", or no rule): a sparse pattern counts
    on the grid, which merged rows have left, so where a rule puts one into the same attention at any step, merging is refused there.
    Nothing merges, and a note says so, where a call has no grid, tokens beyond it, a mask, or ranks that share the sequence.
    """

    context: Context
    rule: Rule

    def __call__(self, hidden: Tensor, blocked: str | None = None) -> Rows:
        """The rows of hidden [B, S, C]; those of `blocked`, a reason, are the tokens themselves."""
        keep = float(self.rule.params["keep"])
        tokens = self.context.tokens
        r = round(hidden.shape[1] * (1 - keep))
        if r == 0:
            return Rows(hidden)
        if blocked is None and tokens is None:
            blocked = "the grid of the tokens is not known"
        elif blocked is None and tokens is not None and not tokens.video == tokens.length == hidden.shape[1]:
            blocked = f"expected the {tokens.video} tokens of the grid alone, got {hidden.shape[1]}"
        if blocked is not None or tokens is None:
            self.context.unserved(self.rule, blocked or "", ran=_RAN)
            return Rows(hidden)
        partition = _partition(tokens.grid, r)
        if partition is None:
            self.context.unserved(self.rule, f"cells of a grid {tokens} cannot lose so many tokens", ran=_RAN)
            return Rows(hidden)
        plan = match(hidden.detach(), r, partition=partition)
        rows, _, log_size = merge(hidden, plan, log_size=True)
        return Merged(rows, plan, log_size[..., 0] if self.rule.params.get("proportional", True) else None)


def _partition(grid: tuple[int, int, int], r: int) -> Grid | None:
    """The smallest cells of which r tokens can merge, or None."""
    for cell in CELLS:
        partition = Grid(grid, tuple(min(edge, size) for edge, size in zip(cell, grid, strict=True)))
        if r <= partition.sources(math.prod(grid)):
            return partition
    return None


class MergingProcessor(Processor):
    """A processor of self-attention over video tokens alone, which may merge them.

    Attributes:
        merging: how; None: not.
    """

    merging: Merging | None = None

    def rows(self, hidden: Tensor, blocked: str | None = None) -> Rows:
        """What attends, of hidden [B, S, C]; `blocked` is a reason why nothing may merge in this call, or None."""
        if self.merging is None:
            return Rows(hidden)
        parallel = getattr(self, "_parallel_config", None)
        if parallel is not None and parallel.context_parallel_config is not None:
            blocked = "each rank holds a part of the tokens only"
        return self.merging(hidden, blocked)

    def among(self, rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, M, H, D] of the rows; q, k and v are in that order of axes too."""
        if not isinstance(rows, Merged):
            return self.attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if rows.bias is not None:
            return self.attend(q, k, v, key_bias=rows.bias).transpose(1, 2)
        return self.attend(q, k, v, stock=lambda: self._backend(q, k, v)).transpose(1, 2)

    def _backend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self._stock(q, k, v, None, None).transpose(1, 2)


def merge_site(path: str, module: Any, tokens: int, layer: int, depth: int, reason: str | None) -> Site:
    """The site of merging around a self-attention module over `tokens` tokens."""
    sizes = (tokens, tokens)
    return Site(path, module, "merge", "self", frozenset({"merge"}), layer, depth, reason, tokens=sizes)


def merging_of(choice: Choice | None, attention: Choice | None, context: Context) -> Merging | None:
    """What a merge site's choice says, or None; `reason` and `change` of the choice are set.

    Args:
        choice: of the merge site.
        attention: of the same module as an attention site, where a rule holds there.
        context: of the model.
    """
    if choice is None:
        return None
    rule = choice.rules[0]
    choice.reason = _reason(rule, attention)
    if choice.reason is not None:
        return None
    tokens = choice.site.tokens[0]
    left = tokens - round(tokens * (1 - float(rule.params["keep"])))
    choice.change = f"{left} of {tokens} tokens attend; every token takes its row back"
    return Merging(context, rule)


def _reason(rule: Rule, attention: Choice | None) -> str | None:
    if "r" in rule.params:
        return "params.r: a schedule over layers is for towers; tokens come back behind each attention here: use keep"
    if "keep" not in rule.params:
        return "params.keep: expected the share of the tokens that attend, got none"
    keep, least = rule.params["keep"], 1 / math.prod(CELLS[-1])
    if keep > 1 or keep < least:
        return f"params.keep: expected a share from {least} (one token of a cell) to 1, got {keep}"
    for other in () if attention is None or attention.reason is not None else attention.rules:
        if other.kernel not in _EXACT:
            return f"{other.kernel} goes here, which counts on the grid of the tokens; merged rows have none"
    return None
