"""What attention does at one site: the rules of a recipe, at work.

A `Context` belongs to one accelerated model. Its root writes into it, before each call and in plain ints, which tokens come and which
denoising step it is; each site's `Attend` reads it. Layouts of fixed patterns are built there, outside of what torch.compile sees.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from saccade.attention import BlockLayout, PlanCache, patterns, sparse_attention
from saccade.attention.orders import tile_order
from saccade.swap.recipe import Rule
from saccade.swap.steps import Steps
from saccade.swap.tokens import Tokens, tile_windows, token_window

__all__ = ["Attend", "Context", "Slot", "attends", "dense_layout", "fixed_layout", "is_fixed", "sdpa", "unfit_heads"]

Tensor = torch.Tensor
_KEPT = 8  # layouts of one rule: two resolutions, with and without a negative prompt, and some to spare
_DYNAMIC = ("svg", "top_k", "top_p")
_EXACT = ("stock", "dense")


def is_fixed(rule: Rule) -> bool:
    """Whether the pattern follows from the grid alone."""
    return rule.kernel not in (*_DYNAMIC, *_EXACT)


def fixed_layout(rule: Rule, tokens: Tokens, device: Any = None) -> BlockLayout:
    """The layout of a fixed pattern."""
    params, grid = dict(rule.params), tokens.grid
    options: dict[str, Any] = {"prefix": tokens.prefix, "device": device, "block": params.pop("block", 64)}
    if rule.kernel == "frame_causal":
        if tokens.suffix:
            raise ValueError("frame_causal: text behind the video would be seen by no frame, or by all")
        return patterns.frame_causal(grid, **params, **options)
    options["suffix"] = tokens.suffix
    if rule.kernel == "sliding_tile":
        tile = [min(edge, size) for edge, size in zip(params.get("tile", (6, 8, 8)), grid, strict=True)]
        window = params.get("window") or tile_windows(grid, tile, params.get("density", 0.25))
        return patterns.sliding_tile(grid, tile, window, **options)
    if rule.kernel == "neighborhood":
        density = params.pop("density", 0.25)
        params.setdefault("window", token_window(grid, density))
        return patterns.neighborhood(grid, **params, **options)
    makers: dict[str, Callable[..., BlockLayout]] = {
        "spatial": patterns.spatial, "temporal": patterns.temporal, "radial": patterns.radial,
    }  # fmt: skip
    return makers[rule.kernel](grid, **params, **options)


def _planner(rule: Rule, tokens: Tokens, device: torch.device) -> Callable[[Tensor, Tensor], BlockLayout]:
    params = {name: value for name, value in rule.params.items() if name not in ("every", "recall", "tile")}
    tile = [min(edge, size) for edge, size in zip(rule.params.get("tile", (4, 4, 4)), tokens.grid, strict=True)]
    options: dict[str, Any] = {"prefix": tokens.prefix, "suffix": tokens.suffix}
    order = tile_order(tokens.grid, tile, block=params.get("block", 64), device=device, **options)
    options |= {"q_order": order, "k_order": order}
    if rule.kernel == "top_k":
        return partial(patterns.top_k, keep=params.pop("keep", 0.25), **params, **options)
    return partial(patterns.top_p, p=params.pop("p", 0.9), **params, **options)


def unfit_heads(width: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels do not take heads of this width and dtype, or None."""
    if width % 8 or width > 256 or dtype == torch.float64:
        return f"expected head_dim a multiple of 8 up to 256, got {width} in {dtype}"
    return None


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """torch's attention, [B, H, S, D]; heads of k and v may be fewer."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@functools.lru_cache(maxsize=256)
def _dense(queries: int, keys: int) -> BlockLayout:
    with torch.inference_mode(False):  # training may use it next
        return BlockLayout.dense(queries, keys)


def dense_layout(queries: int, keys: int) -> BlockLayout:
    """The layout on the CPU in which every query sees every key; kept, except by compiled code, of which it becomes a part."""
    return BlockLayout.dense(queries, keys) if torch.compiler.is_compiling() else _dense(queries, keys)


@dataclass(eq=False)
class Slot:
    """One rule in one model; what the root writes lies here."""

    rule: Rule
    active: bool = True
    layout: BlockLayout | None = None
    built: dict[Any, Any] = field(default_factory=dict)
    plan: Callable[[Tensor, Tensor], BlockLayout] | None = None
    cache: PlanCache | None = None
    problem: str | None = None

    def prepare(self, tokens: Tokens | None, step: int, device: torch.device) -> None:
        """Decide whether the rule holds at this step, and build what follows from the grid alone."""
        first, last = self.rule.steps or (0, None)
        self.active = first <= step and (last is None or step < last)
        self.layout = self.plan = self.cache = self.problem = None
        if not self.active or self.rule.kernel in _EXACT:
            return
        if tokens is None:
            self.problem = "the grid of the tokens is not known"
            return
        if self.rule.kernel == "svg":
            return
        key = (tokens, device)
        if key not in self.built:
            while len(self.built) >= _KEPT:
                del self.built[next(iter(self.built))]
            try:
                with torch.inference_mode(False), torch.no_grad():  # it outlives the call, which may not train
                    self.built[key] = self._build(tokens, device)
            except (ValueError, TypeError) as error:
                self.problem = f"on {tokens} tokens: {error}"
                return
        self.layout, self.plan, self.cache = self.built[key]

    def _build(self, tokens: Tokens, device: torch.device) -> tuple[BlockLayout | None, Any, PlanCache | None]:
        if is_fixed(self.rule):
            return fixed_layout(self.rule, tokens, device), None, None
        plan = _planner(self.rule, tokens, device)
        recall = self.rule.params.get("recall")
        every = self.rule.params.get("every", 1 if recall is None else None)
        reused = every != 1 or recall is not None
        return None, plan, PlanCache(plan, every=every, recall=recall) if reused else None

    def choose(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, key: Hashable, step: int) -> BlockLayout:
        """The layout for these q, k and v. Under torch.compile each call plans anew: reuse would be a graph of its own."""
        if self.layout is not None:
            return self.layout
        if self.plan is None:
            return patterns.svg(q, k, v, tokens.grid, prefix=tokens.prefix, suffix=tokens.suffix, **self.rule.params)
        if self.cache is None or torch.compiler.is_compiling():
            return self.plan(q, k)
        with torch.inference_mode(False), torch.no_grad():  # plans outlive the call
            return self.cache(q, k, key=key, step=step)


@dataclass(eq=False)
class Context:
    """What the sites of one model must know of a call.

    Attributes:
        tokens: of the sequence that attention sees, or None where the root could not tell.
        steps: counts denoising steps.
        notes: what could not be served, and why; each once.
    """

    slots: list[Slot] = field(default_factory=list)
    tokens: Tokens | None = None
    steps: Steps = field(default_factory=Steps)
    notes: list[str] = field(default_factory=list)

    def slot(self, rule: Rule) -> Slot:
        """The slot of a rule, made where there is none."""
        for slot in self.slots:
            if slot.rule is rule:
                return slot
        self.slots.append(Slot(rule))
        return self.slots[-1]

    @property
    def step(self) -> int:
        """The denoising step, from 0."""
        return self.steps.now

    def begin(
        self, tokens: Tokens | None, device: torch.device, timestep: Any = None, index: int | None = None
    ) -> None:
        """Called by the root before each forward.

        Args:
            tokens: of the sequence.
            device: where layouts are built.
            timestep, index: as in `Steps.see`.
        """
        if self.steps.see(timestep, index):
            self._forget()
        self.tokens = tokens
        for slot in self.slots:
            slot.prepare(tokens, self.step, device)
            if slot.active and slot.problem is not None:
                self.unserved(slot.rule, slot.problem)  # also where compiled code could not say it

    def reset(self) -> None:
        """The next call is step 0 of a new video."""
        self.steps.reset()
        self._forget()

    def _forget(self) -> None:
        """Plans of the last video do not serve the next."""
        for slot in self.slots:
            for _, _, cache in slot.built.values():
                if cache is not None:
                    cache.clear()

    def unserved(self, rule: Rule, reason: str, *, ran: str = "stock attention ran") -> None:
        """A rule cannot serve a call: error, or what stock does and one note, which ends with `ran`."""
        if rule.on_unsupported == "error":
            raise ValueError(f"{rule.kernel}: {reason}")
        note = f"{rule.kernel}: {reason}; {ran}"
        if note not in self.notes and not torch.compiler.is_compiling():
            self.notes.append(note)
            warnings.warn(f"saccade: {note}", stacklevel=3)


@dataclass(eq=False)
class Attend:
    """How one site attends: by the first of its rules that is active.

    "dense" runs Saccade's kernel on a CPU, where it was measured to be faster than torch's; on a GPU it has not been measured, so there it
    runs torch's.
    """

    context: Context
    slots: tuple[Slot, ...]
    key: Hashable = 0

    def rule_now(self) -> Slot | None:
        """The slot that decides this call."""
        for slot in self.slots:
            if slot.active:
                return slot
        return None

    def decline(self, reason: str) -> None:
        """Stock attention is about to run in place of the kernel that was chosen: an error, or a note, as the rule says."""
        slot = self.rule_now()
        if slot is not None and slot.rule.kernel != "stock":
            self.context.unserved(slot.rule, reason)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
        scale: float | None = None,
        stock: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Attention [B, H, S, D] over the tokens of the context.

        Args:
            q, k, v: [B, H, S, D], k and v with H or fewer heads; any strides.
            key_mask: bool [B, S], True where a key may be seen.
            key_bias: fp32 [B, S], added to the scores of each key; in place of a mask.
            scale: of q.k.
            stock: the model's own attention on the same tensors; torch's where None.
        """
        slot = self.rule_now()
        if slot is not None and slot.rule.kernel != "stock":
            layout = self._layout(slot, q, k, v)
            if layout is not None:
                if key_mask is not None:
                    key_bias = torch.zeros_like(key_mask, dtype=torch.float32).masked_fill(~key_mask, float("-inf"))
                return self._sparse(slot, q, k, v, layout, key_bias, scale)
        if stock is not None:
            return stock()
        mask = key_mask if key_bias is None else key_bias.to(q.dtype)
        return sdpa(q, k, v, mask=None if mask is None else mask[:, None, None], scale=scale)

    def _sparse(
        self, slot: Slot, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, bias: Tensor | None, scale: float | None
    ) -> Tensor:
        """The kernel; where plans are kept until their recall falls, that is measured, but not where keys have a bias."""
        cache = slot.cache
        if cache is None or cache.recall is None or bias is not None or torch.compiler.is_compiling():
            return sparse_attention(q, k, v, layout, key_bias=bias, scale=scale)
        out, lse = sparse_attention(q, k, v, layout, scale=scale, return_lse=True)
        cache.observe(q, k, lse, key=self.key, scale=scale)
        return out

    def _layout(self, slot: Slot, q: Tensor, k: Tensor, v: Tensor) -> BlockLayout | None:
        rule, tokens = slot.rule, self.context.tokens
        unfit = unfit_heads(q.shape[3], q.dtype)
        if unfit is not None:
            self.context.unserved(rule, unfit)
            return None
        if rule.kernel == "dense":
            return dense_layout(q.shape[2], k.shape[2]) if q.device.type == "cpu" else None
        if slot.problem is not None or tokens is None:
            self.context.unserved(rule, slot.problem or "the grid of the tokens is not known")
            return None
        if not tokens.length == q.shape[2] == k.shape[2]:
            self.context.unserved(
                rule, f"expected {tokens.length} tokens ({tokens}), got {q.shape[2]} queries and {k.shape[2]} keys"
            )
            return None
        return slot.choose(q, k, v, tokens, self.key, self.context.step)


def attends(context: Context, rules: Sequence[Rule], key: Hashable) -> Attend:
    """The `Attend` of a site: its rules up to the first that holds at every step."""
    used: list[Slot] = []
    for rule in rules:
        used.append(context.slot(rule))
        if rule.steps is None:
            break
    return Attend(context, tuple(used), key)
