"""Token merging of image models as their papers have it: ToMe, tomesd, AuroraCap. Those of video are in `presets_video`.

Each returns a configured object. `parity=True` gives what the published code gives, quirks included; without it the quirk is mended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from saccade._arguments import items, number, whole
from saccade._dispatch import Impl
from saccade.merge.modules import TokenMerger
from saccade.merge.partition import Grid
from saccade.merge.schedule import MergeSchedule

__all__ = ["TowerMerging", "auroracap", "tome", "tomesd"]


@dataclass(frozen=True)
class TowerMerging:
    """How a vision tower merges between attention and MLP; `saccade.swap.timm.merge_tokens` takes it.

    Args:
        schedule: tokens to merge in each layer.
        proportional: whether log(size) is added to the attention scores of each key (ToMe, eq. 1).
        order: of the rows, as `TokenMerger` has it.
    """

    schedule: MergeSchedule
    proportional: bool = True
    order: Literal["position", "similarity", "split", "distill", "distill_similarity"] = "position"

    def merger(self, impl: Impl = "auto") -> TokenMerger:
        """The module that merges; give it the layer as `index`."""
        return TokenMerger(self.schedule, order=self.order, impl=impl)


def tome(
    r: int | MergeSchedule, class_token: bool = True, distill_token: bool = False, parity: bool = False
) -> TokenMerger:
    """ToMe's bipartite soft matching (arXiv 2210.09461, section 3.2; proportional attention is its eq. 1).

    Tokens 0, 2, 4, ... choose among 1, 3, 5, ... by cosine; the r most similar are merged into a mean weighted by size. Give it the
    keys of attention, mean over heads, as metric. r is cut to (tokens - protected) // 2.

    Args:
        r: tokens to merge, or a schedule.
        class_token: token 0 is a class token.
        distill_token: the next is a distillation token.
        parity: rows in the order that ToMe leaves them: unmerged ones, then destinations; the unmerged by falling similarity where
            there is no class token; with a distillation token [unmerged 0, destination 0, unmerged 1.., destination 1..]. Otherwise
            rows lie as their tokens did. Neither has an epsilon in the norm. A token of zeros has similarity 0 here, with or without
            parity; upstream it is NaN, and merged first.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> y, size, plan = merge.tome(2)(torch.randn(1, 9, 4))
        >>> y.shape[1], plan.head[0, 0].item()
        (7, 0)
    """
    order: Literal["position", "similarity", "split", "distill", "distill_similarity"] = "position"
    if parity and distill_token:
        order = "distill" if class_token else "distill_similarity"
    elif parity:
        order = "split" if class_token else "similarity"
    return TokenMerger(r, protect=_protected(class_token, distill_token), order=order)


def _protected(class_token: bool, distill_token: bool) -> int | list[int]:
    """A lone distillation token is token 1 where the published code looks for it."""
    if distill_token and not class_token:
        return [1]
    return int(class_token) + int(distill_token)


def tomesd(
    ratio: float | MergeSchedule,
    grid: Sequence[int],
    cell: Sequence[int] = (2, 2),
    seed: int | None = None,
    parity: bool = False,
    *,
    share_batch: bool = False,
    reuse: int = 1,
) -> TokenMerger:
    """Token merging for Stable Diffusion (arXiv 2303.17604, section 4): one destination in every cell, then unmerge.

    int(N ratio) tokens are merged into plain means, without sizes. The published code compares the hidden states that come into the
    block, of full width; `saccade` takes any metric, and the mean of attention's keys over heads is far cheaper.

    Args:
        ratio: share of all tokens to merge; at most 1 - 1 / (cell's area), the share of the sources.
        grid: (H, W), or (T, H, W).
        cell: (h, w), or (t, h, w).
        seed: None takes the first token of each cell (upstream's no_rand); a number draws one from (seed, index) for every plan,
            never from the global generator.
        parity: too large a ratio is cut without a message, as upstream does, and rows come as upstream leaves them: unmerged by
            falling similarity, then destinations. Otherwise it raises ValueError, and rows lie as their tokens did.
        share_batch: one plan for all samples (both branches of classifier-free guidance).
        reuse: keep a plan for so many steps.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> merger = merge.tomesd(0.5, (8, 8))
        >>> x = torch.randn(2, 64, 16)
        >>> y, _, plan = merger(x)
        >>> y.shape[1], merger.unmerge(y, plan).shape[1]
        (32, 64)
    """
    sizes, edges = items(grid, "grid"), items(cell, "cell")
    partition = Grid(tuple(sizes), tuple(edges), seed)
    amounts = ratio.amounts if isinstance(ratio, MergeSchedule) else (float(number(ratio, "ratio")),)
    total = partition.grid[0] * partition.grid[1] * partition.grid[2]
    most = partition.sources(total)
    for value in amounts if not parity else ():
        if (int(total * value) if isinstance(value, float) else value) > most:
            raise ValueError(
                f"ratio: cells of {partition.cell} on a grid {partition.grid} leave {most} of {total} tokens to merge, "
                f"a share of {most / total:.4f}; got {value}"
            )
    return TokenMerger(
        ratio if isinstance(ratio, MergeSchedule) else amounts[0],
        partition=partition,
        order="similarity" if parity else "position",
        clamp=parity,
        share_batch=share_batch,
        reuse=reuse,
    )


def auroracap(
    kept_ratio: float, layers: int, grid: Sequence[int], parity: bool = False, *, class_token: bool = True
) -> TowerMerging:
    """AuroraCap's visual token merging (arXiv 2410.03051, section 2.1): the same r in every layer of the vision tower.

    r = int(H W (1 - kept_ratio) / layers). Features are taken behind layer `layers - 1`, where one merge is missing and every r was
    rounded down, so more than kept_ratio H W tokens are left: `schedule.tokens(H * W + 1)[-2] - 1` of them.

    Args:
        kept_ratio: the share of tokens that is kept, 0 < kept_ratio <= 1 (upstream's visual_token_merge_ratio).
        layers: of the tower.
        grid: (H, W) patches.
        parity: no proportional attention, and rows as ToMe leaves them. Upstream adds log(size) along the queries, where softmax
            cancels it, so its weights were trained without; the default adds it along the keys, as ToMe's eq. 1 has it.
        class_token: token 0 is protected. Upstream does that for SigLIP too, whose token 0 is a patch.

    Example:
        >>> from saccade import merge
        >>> merge.auroracap(0.1, 32, (27, 27)).schedule.tokens(730)[-2] - 1
        109
    """
    kept, count = float(number(kept_ratio, "kept_ratio", 0)), whole(layers, "layers", 1)
    if kept > 1:
        raise ValueError(f"kept_ratio: expected a share of the tokens, 0 < kept_ratio <= 1, got {kept_ratio}")
    height, width = (whole(n, f"grid[{i}]", 1) for i, n in enumerate(items(grid, "grid", 2)))
    r = int(height * width * (1 - kept) / count)
    schedule = MergeSchedule.constant(r, count, protected=int(class_token))
    order: Literal["split", "similarity"] = "split" if class_token else "similarity"
    return TowerMerging(schedule, proportional=not parity, order=order if parity else "position")
