"""What runs in a vision tower of transformers that merges tokens (ToMe, arXiv 2210.09461).

Between attention and MLP of each layer, tokens whose keys are alike become one row. Behind the last layer every token takes its row again,
and so do hidden states that were asked for: pooling, newline tokens and placeholders of a captioner see as many tokens as without merging.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from saccade.merge import MergePlan, unmerge
from saccade.swap.merging import Merging
from saccade.swap.recipe import Rule
from saccade.swap.transformers._interface import Call, KeyBias

__all__ = ["STATE", "Merged", "encoder_forward", "intern_layer", "pre_norm_layer", "tower_forward"]

Tensor = torch.Tensor
STATE = "_saccade_merging"


class Rows(NamedTuple):
    """Where the tokens are.

    Args:
        size: [B, M, 1] fp32, tokens of each row.
        bias: [B, 1, M] fp32, log(size), or None where attention is not proportional.
        place: [B, N] int64, the row of each token, -1 where it has none.
    """

    size: Tensor
    bias: Tensor | None
    place: Tensor

    def plan(self) -> MergePlan:
        """All merges so far as one."""
        ptr = F.pad(self.size[:, :, 0].cumsum(1), (1, 0)).long()
        members = torch.where(self.place >= 0, self.place, self.size.shape[1]).argsort(dim=1, stable=True)
        members = torch.where(torch.arange(members.shape[1], device=ptr.device) < ptr[:, -1:], members, -1)
        head = members.gather(1, ptr[:, :-1])
        counts = torch.full_like(head[:, 0], head.shape[1])
        return MergePlan(*(t.int().contiguous() for t in (self.place, ptr, members, head, counts)))


@dataclass(eq=False)
class Merged:
    """What a tower that merges must know; it lies in the tower's and in its encoder's own __dict__.

    Args:
        merging: how many tokens go where.
        rule: that asked for it.
        call: of the tower.
        layers: the name of the encoder's list of layers.
        given: what its layers take behind the tokens.
        rows: behind each layer of the call that runs, None where nothing was merged yet; empty where the tower runs as stock.
    """

    merging: Merging
    rule: Rule
    call: Call
    layers: str
    given: tuple[None, ...] = ()
    rows: list[Rows | None] = field(default_factory=list)

    def serves(self, mask: Any) -> bool:
        """Whether tokens can be merged in this call; a note says where not."""
        reason = "the tower was given an attention mask" if mask is not None else None
        if self.call.weights:
            reason = "attention maps were asked for, which merged tokens do not have"
        if reason is not None:
            self.call.context.unserved(self.rule, reason, ran="no tokens were merged")
        return reason is None


def _merge(merging: Merging, x: Tensor, keys: Tensor, r: int, rows: Rows | None) -> tuple[Tensor, Rows | None]:
    if r == 0:
        return x, rows
    x, size, bias, plan = merging.merge(x, keys, r, None if rows is None else rows.size)
    place = plan.inverse.long()
    if rows is not None:
        place = torch.where(rows.place >= 0, place.gather(1, rows.place.clamp(min=0)), -1)
    return x, Rows(size, bias, place)


def _bias(rows: Rows | None) -> KeyBias:
    return KeyBias(None if rows is None else rows.bias)


def _pre_norm(self: Any, merging: Merging, r: int, rows: Rows | None, x: Tensor) -> tuple[Tensor, Rows | None]:
    out, keys = self.self_attn(hidden_states=self.layer_norm1(x), attention_mask=_bias(rows))
    x, rows = _merge(merging, x + out, keys, r, rows)
    return x + self.mlp(self.layer_norm2(x)), rows


def _intern(self: Any, merging: Merging, r: int, rows: Rows | None, x: Tensor) -> tuple[Tensor, Rows | None]:
    out, keys = self.attention(self.layernorm_before(x), attention_mask=_bias(rows))
    x, rows = _merge(merging, self.lambda_1 * out + x, keys, r, rows)
    out = self.dropout(self.mlp(self.layernorm_after(x)))
    return (out if self.lambda_2 is None else self.lambda_2 * out) + x, rows


def _layer(self: Any, body: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The class's own forward, or, called by `encoder_forward`, one that merges; checkpointed as the class does it."""
    merging = kwargs.pop("merging", None)
    if merging is None:
        return type(self).forward(self, *args, **kwargs)
    run = partial(body, self, merging, kwargs["r"], kwargs["rows"])
    if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
        return self._gradient_checkpointing_func(run, *args)
    return run(*args)


def pre_norm_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer of SigLIP or CLIP."""
    return _layer(self, _pre_norm, args, kwargs)


def intern_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer of InternVL's tower, with its layer scale."""
    return _layer(self, _intern, args, kwargs)


def encoder_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """An encoder's forward [B, N, D] -> [B, N, D], with merging inside."""
    state: Merged = vars(self)[STATE]
    rest = dict(kwargs)
    mask = rest.pop("attention_mask", None) if len(args) < 2 else args[1]
    x: Tensor = args[0] if args else rest.pop("inputs_embeds" if "inputs_embeds" in rest else "hidden_states")
    amounts = state.merging.amounts(x.shape[1])
    state.rows = []
    if not any(amounts) or not state.serves(mask):
        return type(self).forward(self, *args, **kwargs)
    found: list[Rows | None] = []
    rows: Rows | None = None
    for layer, r in zip(getattr(self, state.layers), amounts, strict=True):
        if rows is None and r == 0:
            x = layer(x, *state.given, **rest)
        else:
            x, rows = layer(x, merging=state.merging, r=r, rows=rows)
        found.append(rows)
    state.rows = found
    assert rows is not None
    output = inspect.unwrap(type(self).forward).__globals__["BaseModelOutput"]
    return output(last_hidden_state=unmerge(x, rows.plan()))


def tower_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A tower's own forward; its hidden states get a row for every token again."""
    state: Merged = vars(self)[STATE]
    wanted = kwargs.pop("return_dict", getattr(self.config, "return_dict", True))
    try:
        out = type(self).forward(self, *args, return_dict=True, **kwargs)
        hidden, rows = out.get("hidden_states"), [None, *state.rows]
    finally:
        state.rows = []
    if hidden is not None and len(rows) == len(hidden):
        pairs = zip(hidden, rows, strict=True)
        out["hidden_states"] = tuple(x if x is None or at is None else unmerge(x, at.plan()) for x, at in pairs)
    return out if wanted is not False else out.to_tuple()
