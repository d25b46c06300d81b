"""`Merging`: how many tokens each layer of a vision tower merges, and the merging itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from saccade._arguments import number
from saccade.merge.merge import merge
from saccade.merge.modules import TokenMerger
from saccade.merge.plan import MergePlan
from saccade.merge.schedule import MergeSchedule, cut, share

__all__ = ["Merging", "Sizes", "lacking", "merge_between", "schedule_of", "weighted_mean"]

Tensor = torch.Tensor
Sizes = tuple[Tensor | None, Tensor | None]
"""size [B, N, 1] and log(size) [B, 1, N]; None while every token is one."""


def lacking(params: Mapping[str, Any]) -> str | None:
    """Why a rule for merging does not say enough; or None."""
    return None if "keep" in params or "r" in params else "keep or r is needed"


def schedule_of(r: Any, layers: int, prefix: int) -> MergeSchedule:
    """A schedule over `layers` from tokens for each layer, a share, a list, or a schedule; the first `prefix` tokens stay."""
    if isinstance(r, (int, float)):
        r = MergeSchedule.constant(r, layers)
    elif not isinstance(r, MergeSchedule):
        r = MergeSchedule.of(r, layers)
    if r.axis != "layer":
        raise ValueError("r: expected a schedule over layers, got one over steps")
    return MergeSchedule.of(r.amounts, layers, protected=max(prefix, r.protected))


@dataclass(eq=False)
class Merging:
    """What a tower that merges must know (ToMe, arXiv 2210.09461, section 3). It holds no parameters.

    Args:
        merger: compares tokens; `protect` counts the prefix tokens, which stay. Its amount is not used where `keep` is given.
        layers: of the tower.
        keep: the share of the tokens that are left behind the last layer, prefix tokens not counted: as many are merged in every layer,
            but for one; None: the merger's schedule decides.
        proportional: whether log(size) is added to the scores of each key.
        early: with `keep`, layers merge fewer and fewer tokens, evenly from twice the mean to almost none (ToMe's decreasing schedule):
            faster for the same `keep`.
        size: [B, M, 1] of the rows that went out last, for a pooling that is called by itself; None where there are none.
    """

    merger: TokenMerger
    layers: int
    keep: float | None = None
    proportional: bool = True
    early: bool = False
    size: Tensor | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any], layers: int, prefix: int, *, early: bool = False) -> Merging:
        """From the parameters of a rule: "keep" or "r", and "proportional".

        Raises:
            ValueError, TypeError: naming the parameter.
        """
        if ("keep" in params) == ("r" in params):
            raise ValueError(f"params: merge takes one of keep and r, got {', '.join(sorted(params)) or 'neither'}")
        proportional = params.get("proportional", True)
        if not isinstance(proportional, bool):
            raise TypeError(f"params.proportional: expected True or False, got {proportional!r}")
        if "r" in params:
            try:
                schedule = schedule_of(params["r"], layers, prefix)
            except (TypeError, ValueError) as error:
                raise type(error)(f"params.r: {error}") from error
            return cls(TokenMerger(schedule, protect=schedule.protected), layers, None, proportional, early)
        keep = number(params["keep"], "params.keep", 0)
        if keep > 1:
            raise ValueError(f"params.keep: expected a share of the tokens, 0 < keep <= 1, got {keep}")
        return cls(TokenMerger(0, protect=prefix), layers, float(keep), proportional, early)

    @property
    def prefix(self) -> int:
        """Tokens at the front that stay."""
        protect: Any = self.merger.protect
        return int(protect or 0)

    def amounts(self, tokens: int) -> list[int]:
        """Tokens that each layer merges when `tokens` come in; never more than half of those that may be merged."""
        schedule: Any = self.merger.amount
        left, out = tokens, []
        total = 0 if self.keep is None else round((tokens - self.prefix) * (1 - self.keep))
        for i in range(self.layers):
            if self.keep is None:
                wanted = share(schedule.amounts[i], left)
            elif self.early:
                ahead = 1 - (i + 1) / self.layers
                wanted = round(total * (1 - ahead * ahead)) - (tokens - left)
            else:
                wanted = total // self.layers + (i < total % self.layers)
            out.append(cut(wanted, left, self.prefix))
            left -= out[-1]
        return out

    def merge(
        self, x: Tensor, metric: Tensor, r: int, size: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, MergePlan]:
        """Merge r tokens.

        Args:
            x: [B, N, D].
            metric: [B, N, C] or [B, H, N, C], what is compared.
            r: how many.
            size: [B, N, 1] or None.

        Returns:
            (rows [B, N - r, D], size [B, N - r, 1], the bias of each key [B, 1, N - r], or None where it is not proportional, the plan).
        """
        plan = self.merger.match(metric.detach(), r=r)
        x, size, log_size = merge(x, plan, size, log_size=True, impl=self.merger.impl)
        return x, size, log_size.transpose(1, 2) if self.proportional else None, plan

    def change(self, tokens: int, width: int, mlp_ratio: float) -> str:
        """For a report: what `tokens` tokens of `width` channels become, and the share of the blocks' FLOPs that is left."""
        amounts = self.amounts(tokens)
        ratio = MergeSchedule(tuple(amounts), protected=self.prefix).flops_ratio(
            tokens, width=width, mlp_ratio=mlp_ratio
        )
        return f"{tokens} tokens become {tokens - sum(amounts)}, {_runs(amounts)}; {ratio:.2f} of the blocks' FLOPs"


def _runs(amounts: Sequence[int]) -> str:
    low, high = min(amounts), max(amounts)
    return f"{low} fewer after each attention" if low == high else f"{low} to {high} fewer after each attention"


def merge_between(blocks: Iterable[Any], x: Tensor, merging: Merging, *, checkpointed: bool) -> tuple[Tensor, Sizes]:
    """Run blocks that merge: block(x, merging=, r=, sizes=) -> (x, sizes). Before the first merge they run as stock."""
    sizes: Sizes = (None, None)
    for one, r in zip(blocks, merging.amounts(x.shape[1]), strict=True):
        if sizes[0] is None and r == 0:
            x = checkpoint(one, x, use_reentrant=False) if checkpointed else one(x)
        elif checkpointed:
            x, sizes = checkpoint(one, x, merging=merging, r=r, sizes=sizes, use_reentrant=False)
        else:
            x, sizes = one(x, merging=merging, r=r, sizes=sizes)
    return x, sizes


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """The mean [B, D] of rows x [B, M, D], each counted `size` [B, M, 1] times."""
    return ((x * size).sum(1) / size.sum(1)).to(x.dtype)
