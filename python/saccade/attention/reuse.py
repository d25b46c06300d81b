"""`PlanCache`: one plan over several denoising steps, renewed by a rule."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade._arguments import number, whole
from saccade.attention import _check
from saccade.attention.importance import attention_lse
from saccade.attention.layout import BlockLayout

__all__ = ["PlanCache", "attention_recall"]

Tensor = torch.Tensor


def attention_recall(q: Tensor, k: Tensor, lse: Tensor, *, rows: int = 64, scale: float | None = None) -> Tensor:
    """The share of the attention that a layout has caught, over sampled queries: mean of exp(lse - lse of all keys).

    Costs rows / Sq of half a dense attention. The queries sampled are spread evenly, always the same ones.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hk, Sk, D].
        lse: [B, H, Sq] fp32, of `sparse_attention(..., return_lse=True)` on the same q, k and scale, without a bias.
        rows: queries sampled.
        scale: of q.k; 1 / sqrt(D) where None.

    Returns:
        A scalar fp32 tensor on the device, between 0 and 1; nothing waits for it.

    Example:
        >>> import torch
        >>> from saccade.attention.reuse import attention_recall
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> float(attention_recall(q, k, torch.full((1, 1, 4), 2.0).log()))  # two of four keys alike
        0.5
    """
    q, k = _check.check_qk(q, k)
    rows = whole(rows, "rows", 1)
    if not isinstance(lse, Tensor) or lse.shape != q.shape[:3]:
        got = list(lse.shape) if isinstance(lse, Tensor) else type(lse).__name__
        raise ValueError(f"lse: expected {list(q.shape[:3])}, one for every query, got {got}")
    count = min(rows, q.shape[2])
    if count == 0:
        return torch.ones((), device=q.device)
    places = (torch.arange(count, device=q.device) * q.shape[2] + q.shape[2] // 2) // count
    every = attention_lse(q, k, rows=places, scale=scale)
    share = (lse.detach().index_select(2, places) - every).exp()
    return torch.where(every == float("-inf"), 1.0, share).mean().float()


@dataclass
class _Entry:
    layout: BlockLayout
    step: int
    sizes: tuple[Any, ...]
    recall: Tensor | None = None  # on the host, valid after `ready`
    ready: Any = None


@dataclass
class PlanCache:
    """Plans of the layers of a diffusion transformer, reused over steps (Xia et al. 2025, AdaSpa, arXiv 2502.21079).

    Which blocks matter changes little from one denoising step to the next. A layer's plan is made anew where it has none, where the
    sizes of q and k have changed, where it is `every` steps old, or where the recall measured last (`observe`) fell below `recall`.
    The recall is read one call later, when the device has long computed it, so nothing waits.

    Args:
        plan: `plan(q, k) -> BlockLayout`, for instance `functools.partial(top_k, keep=0.25)`.
        every: steps that a plan serves; None: until its recall falls.
        recall: share of the attention, above 0 and at most 1, below which a plan is renewed; None: not measured.
        dense_steps: the first steps, which get a dense layout (published recipes leave the first quarter dense).
        rows: queries sampled by `observe`.

    Attributes:
        planned, reused: calls that made a plan and calls that took one, for reports.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from saccade.attention.plan import top_k
        >>> cache = PlanCache(partial(top_k, keep=2), every=4)
        >>> q = k = torch.randn(1, 2, 256, 64)
        >>> layouts = [cache(q, k, key="layer 0", step=step) for step in range(6)]
        >>> cache.planned, cache.reused, layouts[0] is layouts[3], layouts[3] is layouts[4]
        (2, 4, True, False)
    """

    plan: Callable[[Tensor, Tensor], BlockLayout]
    every: int | None = None
    recall: float | None = None
    dense_steps: int = 0
    rows: int = 64
    planned: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    _entries: dict[Hashable, _Entry] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.plan):
            raise TypeError(f"plan: expected a function of q and k, got {type(self.plan).__name__}")
        if self.every is not None:
            whole(self.every, "every", 1)
        if self.recall is not None and not 0.0 < number(self.recall, "recall") <= 1.0:
            raise ValueError(f"recall: expected a share, above 0 and at most 1, got {self.recall}")
        if self.every is None and self.recall is None:
            raise ValueError(
                "every: expected a number of steps, or a recall in its place; a plan would never be renewed"
            )
        whole(self.dense_steps, "dense_steps", 0)
        whole(self.rows, "rows", 1)

    def __call__(self, q: Tensor, k: Tensor, *, key: Hashable = 0, step: int) -> BlockLayout:
        """The layout for q [B, H, Sq, D] and k [B, Hk, Sk, D] of the layer `key` at a step, which counts from 0."""
        whole(step, "step", 0)
        sizes = (tuple(q.shape), tuple(k.shape), q.device)
        held = self._entries.get(key)
        if step < self.dense_steps:
            if held is None or held.sizes != sizes or held.step >= 0:
                dense = BlockLayout.dense(q.shape[2], k.shape[2], device=q.device)
                self._entries[key] = held = _Entry(dense, -1, sizes)
            return held.layout
        if held is None or self._stale(held, sizes, step):
            self._entries[key] = held = _Entry(self.plan(q, k), step, sizes)
            self.planned += 1
        else:
            self.reused += 1
        return held.layout

    def _stale(self, held: _Entry, sizes: tuple[Any, ...], step: int) -> bool:
        if held.step < 0 or held.sizes != sizes or step < held.step:  # step < held.step: another video has begun
            return True
        if self.every is not None and step - held.step >= self.every:
            return True
        if self.recall is None or held.recall is None:
            return False
        if held.ready is not None:
            held.ready.synchronize()
        return not float(held.recall) >= self.recall

    def observe(
        self, q: Tensor, k: Tensor, lse: Tensor, *, key: Hashable = 0, scale: float | None = None
    ) -> Tensor | None:
        """Measure the recall of the plan that the layer `key` was last given, where the rule asks for it.

        Args:
            q, k: as given to the attention.
            lse: [B, H, Sq] fp32, of `sparse_attention(..., return_lse=True)`.
            key: of the layer.
            scale: as given to the attention.

        Returns:
            The recall, a scalar on the device, or None where it is not measured.
        """
        held = self._entries.get(key)
        if held is None:
            raise ValueError(f"key: no plan has been made for {key!r}")
        if self.recall is None or held.step < 0:
            return None
        found = attention_recall(q, k, lse, rows=self.rows, scale=scale)
        if found.is_cuda:
            held.recall = torch.empty((), pin_memory=True)
            held.recall.copy_(found, non_blocking=True)
            held.ready = torch.cuda.Event()
            held.ready.record()
        else:
            held.recall = found
        return found

    def last_recall(self, key: Hashable = 0) -> float | None:
        """The recall that was measured last for the layer `key`; waits for the device."""
        held = self._entries.get(key)
        if held is None or held.recall is None:
            return None
        if held.ready is not None:
            held.ready.synchronize()
        return float(held.recall)

    def clear(self) -> None:
        """Forget all plans: before another video, if its steps do not begin at 0 again."""
        self._entries.clear()
