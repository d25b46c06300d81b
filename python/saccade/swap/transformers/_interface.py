"""Attention of transformers' vision towers: their own forward, in which one call goes to Saccade.

A tower's attention asks `ALL_ATTENTION_FUNCTIONS` for a function of q, k and v. In the copy of its forward that an accelerated module has,
that name means a `Registry`, and everything else is the library's.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from saccade.attention import sparse_attention
from saccade.swap.attend import Attend, Context, dense_layout, unfit_heads
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.source import replaced, untested, with_globals

__all__ = ["Call", "KeyBias", "Watch", "attention_edits", "forward_reason"]

Tensor = torch.Tensor
_STATE = "_saccade_attention"


@dataclass(eq=False)
class Call:
    """What the modules of one tower must know of a call.

    Attributes:
        context: of the tower: its rules, and notes.
        weights: whether attention maps were asked for, which only stock attention gives.
    """

    context: Context = field(default_factory=Context)
    weights: bool = False


class Watch:
    """A pre-hook of the tower: writes what was asked for into the `Call`."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self, root: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See the class."""
        asked = kwargs.get("output_attentions")
        self.call.weights = bool(getattr(root.config, "output_attentions", False) if asked is None else asked)
        self.call.context.begin(None, torch.device("cpu"))


class KeyBias(NamedTuple):
    """Takes the place of an attention mask where tokens are merged; attention then returns its keys in place of its weights.

    Args:
        bias: [B, 1, S] fp32, added to the scores of each key; None while every token is one.
    """

    bias: Tensor | None


@dataclass(eq=False)
class _State:
    """Lies in the attention module's own __dict__: a copied model has its own. `attend` None: stock attention."""

    call: Call
    attend: Attend | None


@dataclass(frozen=True, eq=False)
class Registry:
    """Stands for `ALL_ATTENTION_FUNCTIONS`, and holds the real one."""

    stock: Any

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """As the real one's; what the module asked for runs where Saccade does not."""
        return partial(_attention, self.stock, name, default)


def _attention(
    registry: Any,
    name: str,
    default: Callable[..., Any],
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [B, H, S, D] -> ([B, S, H, D], weights or None; the keys [B, H, S, D] where `mask` is a `KeyBias`)."""
    state: _State = vars(module)[_STATE]
    merging = type(mask) is KeyBias
    given = None if merging else mask
    if state.attend is not None:
        reason = _unserved(given, dropout, state.call.weights, kwargs)
        if reason is not None:
            state.attend.decline(reason)
        elif not merging or mask.bias is None:
            out = state.attend(q, k, v, scale=scaling).transpose(1, 2)
            return out, k if merging else None
    if merging and mask.bias is not None:
        return _biased(q, k, v, mask.bias, scaling, dropout), k
    stock = registry.get_interface(name, default)
    out, weights = stock(module, q, k, v, given, scaling=scaling, dropout=dropout, **kwargs)
    return out, k if merging else weights


def _unserved(mask: Any, dropout: float, weights: bool, more: dict[str, Any]) -> str | None:
    """Why only stock attention can serve a call, or None."""
    if mask is not None or more.get("is_causal") or more.get("cu_seq_lens_q") is not None:
        return "the model gave a mask"
    if weights:
        return "attention maps were asked for"
    return f"attention dropout of {dropout} in training" if dropout else None


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Attention [B, S, H, D] with a bias [B, 1, S] of each key.

    On a CPU Saccade's kernel was measured to be the faster one, with the bias as without; it has no dropout, and float64 is torch's.
    """
    if q.device.type == "cpu" and not dropout and unfit_heads(q.shape[3], q.dtype) is None:
        layout = dense_layout(q.shape[2], k.shape[2])
        return sparse_attention(q, k, v, layout, key_bias=bias[:, 0], scale=scale).transpose(1, 2)
    mask = bias[:, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)


@functools.cache
def _copy(forward: types.FunctionType) -> types.FunctionType:
    """The forward of an attention class, once for all modules of that class."""
    return with_globals(forward, ALL_ATTENTION_FUNCTIONS=Registry(forward.__globals__["ALL_ATTENTION_FUNCTIONS"]))


def attention_edits(path: str, module: nn.Module, call: Call, attend: Attend | None) -> list[Edit]:
    """The copied forward of one attention module, and what it reads."""
    forward: Any = type(module).forward
    return [
        Attribute(path, module, _STATE, _State(call, attend)),
        Attribute(path, module, "forward", method(_copy(forward), module)),
    ]


def forward_reason(module: nn.Module, tested: dict[str, set[str]], versions: str) -> str | None:
    """Why the forward of a module cannot be replaced; or None."""
    cls = type(module)
    reason = untested(f"{cls.__name__}.forward", cls.forward, tested, versions)
    if reason is None and (reason := replaced(module)) is not None:
        reason = f"{cls.__name__}: {reason}"
    return reason
