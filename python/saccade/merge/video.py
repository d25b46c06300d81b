"""`VideoMerger`: the frames of a chunk merged with each other, then with the tokens of the chunks before (VidToMe)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saccade._arguments import number, whole
from saccade._dispatch import Impl
from saccade.merge.match import match
from saccade.merge.merge import Mode, merge
from saccade.merge.partition import Index, mix
from saccade.merge.plan import MergePlan
from saccade.merge.unmerge import unmerge

__all__ = ["VideoMerger", "VideoPlan", "compose"]


def compose(first: MergePlan, second: MergePlan) -> MergePlan:
    """One plan that does what `first` and then `second` do: N tokens to the rows of `second`."""
    if first.rows != second.tokens:
        raise ValueError(f"second: expected a plan for the {first.rows} rows of first, got one for {second.tokens}")
    batch = max(first.batch, second.batch)
    inner, outer = (p.inverse.long().expand(batch, -1) for p in (first, second))
    inverse = torch.where(inner >= 0, outer.gather(1, inner.clamp(min=0)), -1)
    by_row = torch.where(inverse >= 0, inverse, second.rows)
    sizes = torch.zeros(batch, second.rows + 1, dtype=torch.long, device=inverse.device)
    sizes.scatter_add_(1, by_row, torch.ones_like(by_row))
    ptr = torch.nn.functional.pad(sizes[:, : second.rows].cumsum(1), (1, 0))
    members = by_row.argsort(dim=1, stable=True)
    place = torch.arange(first.tokens, device=inverse.device)
    members = torch.where(place < ptr[:, -1:], members, -1)
    heads, kept = (p.head.long().expand(batch, -1) for p in (first, second))
    head = torch.where(kept >= 0, heads.gather(1, kept.clamp(min=0)), -1)
    parts = (t.int().contiguous() for t in (inverse, ptr, members, head, second.counts.expand(batch)))
    return MergePlan(*parts)


@dataclass(frozen=True)
class VideoPlan:
    """Plans of one chunk.

    Args:
        within: tokens of all frames to local rows; None where there is one frame.
        across: local rows, and behind them the bank, to the rows of attention; None where there is no bank.
        tokens: of all frames.
        mode, impl: of `merge` and `unmerge`.
    """

    within: MergePlan | None
    across: MergePlan | None
    tokens: int
    mode: Mode = "replace"
    impl: Impl = "auto"

    @property
    def rows(self) -> int:
        """Local rows: those of the chunk, before the bank joins them."""
        return self.tokens if self.within is None else self.within.rows

    def merge(self, x: torch.Tensor, bank: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, F * N, C] (and the bank [B, G, C]) to rows [B, M, C]."""
        if self.within is not None:
            x = merge(x, self.within, mode=self.mode, impl=self.impl)[0]
        if self.across is None:
            return x
        if bank is None:
            raise ValueError("bank: expected the tokens that the plan was made with, got None")
        return merge(torch.cat((x, bank), 1), self.across, mode=self.mode, impl=self.impl)[0]

    def unmerge(self, y: torch.Tensor) -> torch.Tensor:
        """Rows [B, M, C] to the chunk's tokens [B, F * N, C]; what belongs to the bank alone is left out."""
        if self.across is not None:
            y = unmerge(y, self.across, impl=self.impl)[:, : self.rows]
        return y if self.within is None else unmerge(y, self.within, impl=self.impl)


class VideoMerger(nn.Module):
    """Merges the tokens of a chunk of frames along time, and with a bank of tokens kept from other chunks (arXiv 2312.10656, 3.2).

    Locally, every `stride`-th frame from a random one is a destination, and so is every token left over before; `ratio` of the other
    tokens take the value of their best match, until one frame is left. Then chunk and bank are sources and destinations, or the other
    way round. The result is the next bank. No state is kept here: the caller holds the bank, where it likes.

    Args:
        frames: of a chunk.
        ratio: share of the sources merged in each local round.
        stride: distance of the destination frames.
        bank_ratio: share of the sources merged between chunk and bank.
        mode: "replace" (VidToMe) or "mean".
        share_batch: one plan for all samples (VidToMe's align_batch).
        seed: with `index`, decides phases and roles.
    """

    def __init__(
        self,
        frames: int,
        *,
        ratio: float = 0.9,
        stride: int = 4,
        bank_ratio: float = 0.8,
        mode: Mode = "replace",
        share_batch: bool = True,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.frames, self.stride, self.seed = (
            whole(frames, "frames", 1),
            whole(stride, "stride", 2),
            whole(seed, "seed", 0),
        )
        for name, value in (("ratio", ratio), ("bank_ratio", bank_ratio)):
            if not 0 <= number(value, name) <= 1:
                raise ValueError(f"{name}: expected a share of the sources, 0 to 1, got {value}")
        if mode not in ("replace", "mean"):
            raise ValueError(f"mode: expected 'replace' or 'mean', got {mode!r}")
        self.ratio, self.bank_ratio, self.mode, self.share_batch, self.impl = ratio, bank_ratio, mode, share_batch, impl

    def forward(
        self, x: torch.Tensor, bank: torch.Tensor | None = None, *, index: int = 0
    ) -> tuple[torch.Tensor, VideoPlan]:
        """Plan and merge.

        Args:
            x: [B, F * N, C], frame by frame.
            bank: [B, G, C], rows of another chunk; None for the first.
            index: of the chunk and step, for the random choices.

        Returns:
            (rows [B, M, C], which are the next bank too; their plan).
        """
        if x.shape[1] % self.frames:
            raise ValueError(f"x: {self.frames} frames do not divide {x.shape[1]} tokens")
        within, y = self._within(x, index)
        across = None
        if bank is not None:
            chunk_is_source = self._draw(index, self.frames) % 2 == 0
            joint = torch.cat((y, bank), 1)
            chunk, rest = range(y.shape[1]), range(y.shape[1], joint.shape[1])
            src, dst = ([chunk], [rest]) if chunk_is_source else ([rest], [chunk])
            across = self._plan(joint, src, dst, self.bank_ratio)
            y = merge(joint, across, mode=self.mode, impl=self.impl)[0]
        return y, VideoPlan(within, across, x.shape[1], self.mode, self.impl)

    def _draw(self, index: int, level: int) -> int:
        """A number of (seed, index, level); no tensor is asked, so nothing waits and nothing breaks a graph."""
        counter: Any = level
        return int(mix(counter, self.seed, index))

    def _plan(self, x: torch.Tensor, src: list[range], dst: list[range], ratio: float) -> MergePlan:
        sources, destinations = (
            torch.cat([torch.arange(r.start, r.stop, dtype=torch.int32, device=x.device) for r in runs])
            for runs in (src, dst)
        )
        plan: MergePlan = match(
            x,
            int(sources.shape[0] * ratio),
            partition=Index(destinations, sources),
            order="split",
            share_batch=self.share_batch,
            impl=self.impl,
        )
        return plan

    def _within(self, x: torch.Tensor, index: int) -> tuple[MergePlan | None, torch.Tensor]:
        plan: MergePlan | None = None
        frames, each, spare = self.frames, x.shape[1] // self.frames, 0
        while frames > 1:
            phase = self._draw(index, frames) % min(self.stride, frames)
            kept = range(phase, frames, self.stride)
            tokens = [range(spare + f * each, spare + (f + 1) * each) for f in range(frames)]
            src = [tokens[f] for f in range(frames) if f not in kept]
            dst = [range(spare), *(tokens[f] for f in kept)]
            own = self._plan(x, src, dst, self.ratio)
            x = merge(x, own, mode=self.mode, impl=self.impl)[0]
            plan = own if plan is None else compose(plan, own)
            # Rows are now [unmerged sources | earlier leftovers | destination frames].
            sources = len(src) * each
            spare, frames = spare + sources - int(sources * self.ratio), len(kept)
        return plan, x
