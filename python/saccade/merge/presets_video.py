"""Merging, pooling and dropping of video tokens as their papers have it: VidToMe, PPLLaVA, FrameFusion, EVS.

Each returns a configured object; where the published code has a quirk of its own, the docstring says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from saccade._arguments import number, whole
from saccade._dispatch import Impl
from saccade.merge.merge import merge
from saccade.merge.plan import MergePlan
from saccade.merge.prompt import PromptPool3d
from saccade.merge.retention import keep_top, retain, select
from saccade.merge.runs import merge_runs
from saccade.merge.video import VideoMerger

__all__ = ["FrameFusion", "Retention", "evs", "framefusion", "ppllava", "vidtome"]


def vidtome(
    frames: int,
    *,
    local_ratio: float = 0.9,
    global_ratio: float = 0.8,
    stride: int = 4,
    mode: Literal["replace", "mean"] = "replace",
    share_batch: bool = True,
    seed: int = 0,
) -> VideoMerger:
    """VidToMe's local and global merging (arXiv 2312.10656, section 3.2): see `VideoMerger`.

    The paper's values are the defaults: 0.9 of the sources in each local round, 0.8 against the bank, every fourth frame from a random
    one, destinations kept as they are, one plan for all samples (its align_batch). Upstream draws from a generator of torch and keeps the
    bank on the CPU; here a counter of (seed, index) draws, and the caller keeps the bank.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> merger = merge.vidtome(4)
        >>> x = torch.randn(2, 4 * 16, 8)
        >>> y, plan = merger(x)
        >>> y.shape[1], plan.unmerge(y).shape[1]  # 16 + 48 - int(48 * 0.9)
        (21, 64)
    """
    return VideoMerger(
        frames,
        ratio=local_ratio,
        bank_ratio=global_ratio,
        stride=stride,
        mode=mode,
        share_batch=share_batch,
        seed=seed,
    )


def ppllava(
    *, image: bool = False, projection: nn.Module | None = None, temperature: float = 0.01, parity: bool = False
) -> PromptPool3d:
    """PPLLaVA's prompt-guided pooling (arXiv 2411.02327, section 3.2): windows of 2 x 3 x 3 tokens, for an image 1 x 3 x 3.

    Args:
        image: one frame.
        projection: the projector's last layer, where it is to be applied here.
        temperature: of the softmax inside a window.
        parity: the projection runs before pooling, on every token, as upstream; otherwise behind it, on one in eighteen. The two are
            equal but for rounding, because the layer is affine and the weights of a window sum to 1.

    Example:
        >>> from saccade import merge
        >>> merge.ppllava().kernel
        (2, 3, 3)
    """
    kernel = (1, 3, 3) if image else (2, 3, 3)
    return PromptPool3d(kernel, temperature=temperature, projection=projection, order="pre" if parity else "post")


@dataclass(frozen=True)
class FrameFusion:
    """What `framefusion` returns.

    Args:
        threshold: lowest cosine of a link between frames.
        least: a layer that merges less than this share of the video tokens is the last that merges.
        budget: tokens times layers that may be spent, as a share of what no merging spends.
        impl: of the ops within.
    """

    threshold: float = 0.6
    least: float = 0.1
    budget: float = 0.3
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        for name in ("least", "budget"):
            if not 0 <= number(getattr(self, name), name) <= 1:
                raise ValueError(f"{name}: expected a share, 0 to 1, got {getattr(self, name)}")

    def merge(
        self, x: torch.Tensor, frames: int, *, prefix: int = 0, suffix: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, MergePlan]:
        """Runs of alike tokens of [B, prefix + T * P + suffix, C] to their mean: rows, of which plan.counts are in use, sizes, plan."""
        plan = merge_runs(x, frames, self.threshold, prefix=prefix, suffix=suffix, impl=self.impl)
        y, size = merge(x, plan, impl=self.impl)
        return y, size, plan

    def rows(self, spent: Sequence[int], tokens: int, layers: int) -> int:
        """Tokens that each remaining layer may have, `spent` being those of the layers so far, so that the sum keeps the budget."""
        whole(tokens, "tokens", 1)
        left = whole(layers, "layers", len(spent) + 1) - len(spent)
        return max(int((self.budget * tokens * layers - sum(spent)) / left), 0)

    def prune(self, importance: torch.Tensor, rows: int) -> torch.Tensor:
        """Indices [B, rows] of the most important tokens, ascending; importance [B, N] is what attention gives them."""
        kept: torch.Tensor = keep_top(importance, min(rows, importance.shape[1]), impl=self.impl)
        return kept


def framefusion(threshold: float = 0.6, *, least: float = 0.1, budget: float = 0.3) -> FrameFusion:
    """FrameFusion (arXiv 2501.01986, section 3): merge what stays the same between frames, then keep what attention looks at.

    In the first layers of the language model, tokens whose cosine with their place in the frame before is at least `threshold` join the
    run's first token as a plain mean. Once a layer merges less than `least`, the most important tokens are kept, so many that the whole
    costs `budget`. Upstream sums in bf16 and takes one sample at a time; sums are fp32 here, for any batch.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> fusion = merge.framefusion()
        >>> x = torch.randn(1, 4, 8).repeat(1, 3, 1)  # three equal frames
        >>> _, _, plan = fusion.merge(x, 3)
        >>> plan.counts.item(), fusion.rows([12, 4], 12, 28)
        (4, 3)
    """
    return FrameFusion(threshold, least, budget)


@dataclass(frozen=True)
class Retention:
    """What `evs` returns: call it with tokens [B, T * P, C], frame by frame."""

    frames: int
    ratio: float
    impl: Impl = "auto"

    def count(self, tokens: int) -> int:
        """Tokens that are kept of so many: known before any is seen."""
        return max(tokens // self.frames, int(tokens * (1 - self.ratio)))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens kept [B, K, C], and their indices [B, K], ascending."""
        kept = retain(x, self.frames, ratio=self.ratio, impl=self.impl)
        return select(x, kept), kept


def evs(frames: int, ratio: float) -> Retention:
    """Efficient video sampling (arXiv 2510.14624) as serving engines have it: drop what does not change from frame to frame.

    Exactly max(P, int(T P (1 - ratio))) tokens stay, the first frame among them; ties go to the earlier token, as upstream's stable
    sort has it.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> keep = merge.evs(3, 0.5)
        >>> y, indices = keep(torch.randn(1, 12, 8))
        >>> y.shape[1] == keep.count(12) == 6, indices[0, :4].tolist()
        (True, [0, 1, 2, 3])
    """
    whole(frames, "frames", 1)
    if not 0 <= number(ratio, "ratio") <= 1:
        raise ValueError(f"ratio: expected the share of tokens to drop, 0 to 1, got {ratio}")
    return Retention(frames, ratio)
