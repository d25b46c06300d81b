"""Vision attention of the Qwen-VL families in one call for all frames or windows, where stock calls attention for each of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from saccade.attention import BlockLayout, patterns, sparse_attention
from saccade.swap.attend import Context, unfit_heads
from saccade.swap.recipe import Rule
from saccade.swap.source import with_globals
from saccade.swap.transformers._qwen_sources import forward_of

__all__ = ["Offsets", "Packed", "PackedSite", "packed_forward", "packing"]

Tensor = torch.Tensor
_NAMES = ("cu_seqlens", "window_index", "cu_window_seqlens")
_KEPT = 8  # sizes of videos whose offsets and layouts are kept


Known = list[tuple[Tensor, BlockLayout]]


@dataclass(eq=False)
class Packed:
    """The layouts of one vision tower, by the offsets of its sequences.

    The tower hands the same tensors of offsets to all its blocks, so a layout is found by the identity of the tensor.
    """

    context: Context
    known: Known = field(default_factory=list)

    def find(self, offsets: Tensor) -> BlockLayout | None:
        """The layout of these offsets [n + 1], or None."""
        for known, layout in self.known:
            if known is offsets:
                return layout
        return None


@dataclass(eq=False)
class PackedSite:
    """Lies on an attention module, so that a copied model has its own.

    Args:
        packed: of the tower.
        rule: that chose the call.
        stock: a forward that calls attention for each sequence.
        one: a forward that calls it once.
    """

    packed: Packed
    rule: Rule
    stock: Any
    one: Any

    def forward_for(self, module: Any, hidden: Tensor) -> Any:
        """Which of the two can serve a call."""
        reason = unfit_heads(module.head_dim, hidden.dtype)
        if reason is None and module.training and module.attention_dropout:
            reason = f"attention dropout of {module.attention_dropout} in training"
        if reason is None:
            return self.one
        self.packed.context.unserved(self.rule, reason)
        return self.stock


def packed_forward(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """hidden_states [N, C], the sequences of all frames or windows one after another -> [N, C]."""
    forward = self._saccade_packed.forward_for(self, hidden_states)
    out: Tensor = forward(self, hidden_states, cu_seqlens, position_embeddings, **kwargs)
    return out


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, cu_seq_lens_q: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls an attention interface: [1, H, N, D] -> ([1, N, H, D], no weights)."""
    layout = module._saccade_packed.packed.find(cu_seq_lens_q)
    if layout is None:  # a block that is called by itself, or whose arguments were moved to another device
        layout = patterns.packed(cu_seq_lens_q, query.shape[2])
    return sparse_attention(query, key, value, layout, scale=scaling).transpose(1, 2), None


class _Interfaces:
    """In place of the registry of attention functions."""

    @staticmethod
    def get_interface(*_: Any) -> Any:
        return _attention


def _flash(*_: Any, **__: Any) -> bool:
    return True  # the branch of stock that makes one call


def _longest(*_: Any, **__: Any) -> None:
    return None  # no kernel of ours asks for it, and stock would wait for the device


@functools.lru_cache(maxsize=64)
def packing(forward: Any) -> Any:
    """A copy of an attention forward that makes one call for all sequences."""
    return with_globals(
        forward,
        ALL_ATTENTION_FUNCTIONS=_Interfaces,
        is_flash_attention_requested=_flash,
        get_max_seqlen=_longest,
    )


@dataclass(eq=False)
class Offsets:
    """A pre-hook of the tower: hands it the offsets that stock would compute, and builds their layouts before any block runs.

    Offsets of the last few sizes are kept, also the order of the windows: stock computes them anew in each call.
    """

    packed: Packed
    kept: dict[Any, tuple[dict[str, Tensor], Known]] = field(default_factory=dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, root: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """See the class."""
        tokens = (args[0] if args else kwargs["hidden_states"]).shape[0]
        given = {name: kwargs[name].clone() for name in _NAMES if kwargs.get(name) is not None}
        if given:  # the caller computed them, and may write new ones into the same tensors
            offsets, self.packed.known = given, _layouts(given, tokens)
        else:
            grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
            offsets, self.packed.known = self._kept(root, grid, tokens)
        return args, {**kwargs, **offsets}

    def _kept(self, root: nn.Module, grid: Tensor, tokens: int) -> tuple[dict[str, Tensor], Known]:
        key = (tuple(tuple(one) for one in grid.tolist()), grid.device)
        if key not in self.kept:
            while len(self.kept) >= _KEPT:
                del self.kept[next(iter(self.kept))]
            with torch.inference_mode(False), torch.no_grad():  # they outlive the call
                offsets = _offsets_of(root, grid.clone())
                self.kept[key] = offsets, _layouts(offsets, tokens)
        return self.kept[key]


def _layouts(offsets: dict[str, Tensor], tokens: int) -> Known:
    return [(cut, patterns.packed(cut, tokens)) for name, cut in offsets.items() if name != "window_index"]


def _offsets_of(root: Any, grid: Tensor) -> dict[str, Tensor]:
    """By the tower's own functions."""
    scope = forward_of(root).__globals__
    offsets: dict[str, Tensor] = {"cu_seqlens": scope["get_vision_attention_seqlens"](grid, root.config)[0]}
    if "get_vision_window_index" in scope:
        sizes = {name: getattr(root, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        order, windows = scope["get_vision_window_index"](grid, **sizes)
        offsets |= {"window_index": order, "cu_window_seqlens": windows}
    return offsets
