"""`TokenMerger`: match, merge and unmerge as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from saccade._arguments import choice, whole
from saccade._dispatch import Impl
from saccade.merge.match import match
from saccade.merge.merge import Mode, merge
from saccade.merge.order import permuted
from saccade.merge.partition import Alternate, Partition
from saccade.merge.plan import MergePlan
from saccade.merge.schedule import MergeSchedule, cut, share
from saccade.merge.unmerge import unmerge

__all__ = ["TokenMerger"]

_SCORES = ("cosine", "dot", "l2")
_ORDERS = ("position", "similarity", "split", "distill", "distill_similarity")


class TokenMerger(nn.Module):
    """Merges tokens that are alike, and gives every token its row back (ToMe, arXiv 2210.09461; tomesd, arXiv 2303.17604).

    It holds no parameters and no buffers, so a model that has one keeps its state_dict. With a fixed r nothing depends on data, and
    `torch.compile(fullgraph=True)` takes it whole.

    Args:
        amount: tokens to merge: an int r, a float share of the tokens, or a `MergeSchedule` (then `index` says which entry). None for no
            limit but `threshold`.
        threshold: merge only where the score is at least this; no schedule of shapes then, the plan has as many rows as tokens.
        partition: which tokens are destinations. Random ones choose anew for every plan, from their seed and `index`.
        protect: tokens that are neither merged nor merged into: the first n, or as `match` takes them. A schedule's own number is used
            where this is None.
        mode: of `merge`: "mean", "sum", "max" or "replace".
        score, heads, window, whole_batch, share_batch, impl: of `match`. For classifier-free guidance, share_batch=True plans once for
            both branches.
        order: rows by "position" (of their destination), "similarity", "split" (both as in `match`), or "distill", which is "split"
            with the rows 0 and 1 those of tokens 0 and 1 (ToMe with a distillation token; "distill_similarity" without a class token).
        clamp: whether r is cut to what can be merged, (tokens - protected) // 2 or the number of sources, as ToMe and tomesd do without
            a message; otherwise too large an r raises.
        reuse: make a plan at every `reuse`-th index only, and use it for those between, where it fits. The plan lies in `self.cached`,
            the only state, and `reset` drops it. 1 keeps nothing.

    Example:
        >>> import torch
        >>> from saccade.merge import TokenMerger
        >>> merger = TokenMerger(2, protect=1)
        >>> x = torch.randn(1, 9, 4)
        >>> y, size, plan = merger(x)
        >>> list(y.shape), size.sum().item(), list(merger.unmerge(y, plan).shape)
        ([1, 7, 4], 9.0, [1, 9, 4])
    """

    def __init__(
        self,
        amount: int | float | MergeSchedule | None = None,
        *,
        threshold: float | None = None,
        partition: Partition = Alternate(),  # noqa: B008  (frozen)
        protect: int | Sequence[int] | torch.Tensor | None = None,
        mode: Mode = "mean",
        score: Literal["cosine", "dot", "l2"] = "cosine",
        heads: Literal["mean", "per_head"] = "mean",
        window: int | tuple[int, ...] | None = None,
        order: Literal["position", "similarity", "split", "distill", "distill_similarity"] = "position",
        whole_batch: bool = False,
        share_batch: bool = False,
        clamp: bool = True,
        reuse: int = 1,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if amount is None and threshold is None:
            raise ValueError("amount: expected r, a share, a MergeSchedule, or a threshold in its place")
        if amount is not None and not isinstance(amount, MergeSchedule):
            amount = MergeSchedule((amount,)).amounts[0]  # checks it
        if not isinstance(partition, Partition):
            raise TypeError(f"partition: expected a Partition, got {type(partition).__name__}")
        if mode not in ("mean", "sum", "max", "replace"):
            raise ValueError(f"mode: expected 'mean', 'sum', 'max' or 'replace', got {mode!r}")
        self.amount, self.threshold, self.partition = amount, threshold, partition
        scheduled = amount.protected or None if isinstance(amount, MergeSchedule) else None
        self.protect = scheduled if protect is None else protect
        self.mode: Mode = mode
        self.order = choice(order, "order", _ORDERS)
        self.score: Any = choice(score, "score", _SCORES)
        self.heads: Any = choice(heads, "heads", ("mean", "per_head"))
        self.window, self.whole_batch, self.share_batch = window, whole_batch, share_batch
        self.clamp, self.reuse, self.impl = clamp, whole(reuse, "reuse", 1), impl
        self.cached: MergePlan | None = None

    def forward(
        self,
        x: torch.Tensor,
        metric: torch.Tensor | None = None,
        size: torch.Tensor | None = None,
        *,
        index: int = 0,
        plan: MergePlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, MergePlan]:
        """Plan and merge.

        Args:
            x: [B, N, D].
            metric: [B, N, C] or [B, H, N, C], what is compared; x itself by default.
            size: [B, N, 1], how many original tokens each stands for; None for 1.
            index: layer or step: the entry of a schedule, the counter of a random partition and of `reuse`.
            plan: use this one, and make none.

        Returns:
            (y [B, M, D], size [B, M, 1] fp32, the plan).
        """
        if plan is None:
            plan = self.match(x if metric is None else metric, index=index)
        y, total = self.merge(x, plan, size)
        return y, total, plan

    def amount_at(self, index: int, tokens: int) -> int | None:
        """Tokens to merge of each sample at `index`, after the cut; None for no limit."""
        given = self.amount
        if isinstance(given, MergeSchedule):
            if not 0 <= index < len(given.amounts):
                raise ValueError(f"index: the schedule has entries 0 to {len(given.amounts) - 1}, got {index}")
            given = given.amounts[index]
        if given is None:
            return None
        r = share(given, tokens)
        if not self.clamp:
            return r
        protect: Any = self.protect
        spared = len(protect) if isinstance(protect, Sequence) else 0
        if _counts(protect):
            spared = protect or 0
            if type(self.partition) is Alternate:
                return cut(r, tokens, spared)
        return max(min(r, self.partition.sources(tokens) - spared), 0)

    def match(self, metric: torch.Tensor, *, index: int = 0, r: int | None = None) -> MergePlan:
        """The plan for a metric [B, N, C] or [B, H, N, C]: a new one, or with `reuse` the one in the cache.

        `r` is how many tokens to merge of each sample; None for the module's own amount at `index`.
        """
        if r is None:
            r = self.amount_at(index, metric.shape[-2])
        if self.reuse > 1 and index % self.reuse and self._fits(metric, r):
            assert self.cached is not None
            return self.cached
        plan = self._match(metric, r, index)
        if self.reuse > 1:
            self.cached = plan
        return plan

    def merge(
        self, x: torch.Tensor, plan: MergePlan, size: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, N, D] to rows [B, M, D], and their sizes [B, M, 1]."""
        return merge(x, plan, size, mode=self.mode, impl=self.impl)

    def unmerge(
        self,
        y: torch.Tensor,
        plan: MergePlan,
        *,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows [B, M, D] back to tokens [B, N, D], as `saccade.merge.unmerge`."""
        out: torch.Tensor = unmerge(y, plan, residual=residual, gate=gate, impl=self.impl)
        return out

    def reset(self) -> None:
        """Forget the plan that `reuse` keeps."""
        self.cached = None

    def extra_repr(self) -> str:
        """What is not at its default."""
        parts = [str(self.amount), type(self.partition).__name__, f"mode={self.mode}"]
        parts += [f"protect={self.protect}"] if self.protect is not None else []
        parts += [f"reuse={self.reuse}"] if self.reuse > 1 else []
        return ", ".join(parts)

    def _fits(self, metric: torch.Tensor, r: int | None) -> bool:
        plan = self.cached
        if plan is None or plan.inverse.device != metric.device or plan.tokens != metric.shape[-2]:
            return False
        samples = metric.shape[0] * (metric.shape[1] if metric.ndim == 4 and self.heads == "per_head" else 1)
        fixed = r is not None and self.threshold is None and not self.whole_batch
        return plan.batch in (1, samples) and (not fixed or plan.rows + (r or 0) == plan.tokens)

    def _match(self, metric: torch.Tensor, r: int | None, index: int) -> MergePlan:
        if r == 0:
            return _identity(metric.shape[-2], metric.device)
        partition: Any = self.partition
        if getattr(partition, "seed", None) is not None and getattr(partition, "phase", "random") == "random":
            partition = partition.at(partition.step + index)
        samples = metric.shape[0] if self.whole_batch and r is not None else 1
        plan = match(
            metric,
            None if r is None else r * samples,
            threshold=self.threshold,
            partition=partition,
            window=self.window,
            protect=self.protect,
            score=self.score,
            heads=self.heads,
            order="similarity" if "similarity" in self.order else "position" if self.order == "position" else "split",
            whole_batch=self.whole_batch,
            share_batch=self.share_batch,
            impl=self.impl,
        )
        return _distill(plan, self.partition) if self.order.startswith("distill") else plan


def _counts(protect: Any) -> bool:
    """Whether `protect` is a number of first tokens."""
    return protect is None or (isinstance(protect, int) and not isinstance(protect, bool))


def _identity(tokens: int, device: torch.device) -> MergePlan:
    """Nothing is merged, and nothing moves, whatever the order: as ToMe and tomesd do for r = 0."""
    place = torch.arange(tokens + 1, dtype=torch.int32, device=device)[None]
    each = place[:, :tokens].contiguous()
    return MergePlan(each, place, each, each, place[0, tokens:].contiguous())


def _distill(plan: MergePlan, partition: Partition) -> MergePlan:
    """Rows [unmerged 0, destination 0, the other unmerged, the other destinations]: class and distillation token in front."""
    first = plan.rows - partition.destinations(plan.tokens)
    rows = torch.arange(plan.rows, device=plan.inverse.device)
    old = torch.cat((rows[: min(first, 1)], rows[first : first + 1], rows[1:first], rows[first + 1 :]))
    return permuted(plan, old.expand(plan.batch, -1))
