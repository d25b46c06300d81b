"""Rotary embeddings of the Qwen-VL families: positions in place of tables, and q and k turned where attention has them.

Stock makes tables of cos and sin once per forward and hands them through every layer. Here the rotary module hands on the positions,
and attention, a copy of its own forward in which one function means another, turns q and k by them: any `RopeSpec` can be used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from saccade.rope import RopeSpec, apply_rope, mrope, mrope_interleaved, qwen_vision
from saccade.swap.edit import Attribute, Edit, method
from saccade.swap.source import with_globals
from saccade.swap.transformers._qwen_sources import forward_of

__all__ = ["Turn", "by_spec", "positions_edit", "rotating", "text_spec", "turned_by", "vision_spec"]

Tensor = torch.Tensor
Turn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [B, Hq, S, D], k [B, Hk, S, D], positions [A, B|1, S]) -> q and k, turned."""

TEXT, VISION = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"


def text_spec(config: Any, *, interleaved: bool = False) -> RopeSpec:
    """M-RoPE of a text config; ValueError where its rope_type is not the plain one.

    Args:
        config: of the text model.
        interleaved: pairs t, h, w in turn, as in Qwen3-VL, in place of three runs.
    """
    parameters = config.rope_parameters
    if parameters["rope_type"] != "default":
        raise ValueError(f"rope_type {parameters['rope_type']!r} is not served, only the plain one")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    make, usual = (mrope_interleaved, [24, 20, 20]) if interleaved else (mrope, [16, 24, 24])
    return make(int(width), parameters["rope_theta"], parameters.get("mrope_section", usual))


def vision_spec(tower: Any) -> RopeSpec:
    """The two-dimensional embedding of a vision tower; ValueError where its rope_type is another."""
    parameters = tower.config.rope_parameters
    if parameters.get("rope_type", "axial") != "axial":
        raise ValueError(f"rope_type {parameters['rope_type']!r} is not served, only the axial one")
    return qwen_vision(tower.blocks[0].attn.head_dim, parameters["rope_theta"])


def frequencies_reason(rotary: Any, spec: RopeSpec) -> str | None:
    """The spec comes from the config, so a buffer that was changed by hand must not be passed over."""
    buffer = getattr(rotary, "inv_freq", None)
    if not isinstance(buffer, Tensor):
        return "it has no inv_freq"
    if buffer.device.type == "meta":
        return None
    expected = torch.tensor(spec.inv_freq[: buffer.numel()], dtype=torch.float64)
    # Computed in fp32 at best, where a power is off by its logarithm (up to 14 for base 1e6) times an eps.
    eps = max(torch.finfo(dtype).eps for dtype in (buffer.dtype, torch.float32))
    if getattr(rotary, "attention_scaling", 1.0) != 1.0 or not torch.allclose(
        buffer.double().cpu(), expected, rtol=32 * eps, atol=0.0
    ):
        return "its frequencies are not those of the model's config"
    return None


@functools.lru_cache(maxsize=64)
def by_spec(spec: RopeSpec) -> Turn:
    """Turned by `apply_rope`."""

    def turn(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        out, k_out = apply_rope(q, k, positions, spec)
        assert k_out is not None
        return out, k_out

    return turn


# What the rotary modules return in place of (cos, sin): the positions, twice, because their callers unpack two.
def _text_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    positions = position_ids.expand(3, -1, -1)
    return positions, positions


def _vision_positions(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return position_ids, position_ids  # [N, 2]: a tower with windows sorts the rows into them, as it does with tables


def _text_call(turn: Turn) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, positions: Tensor, _: Tensor) -> Any:
        return turn(q, k, positions)

    return rotate


def _vision_call(turn: Turn) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, positions: Tensor, _: Tensor) -> Any:
        q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))  # [N, H, D] -> [1, H, N, D], a view
        return tuple(x.squeeze(0).transpose(0, 1) for x in turn(q, k, positions.t().unsqueeze(1)))

    return rotate


@functools.lru_cache(maxsize=64)
def rotating(forward: Any, name: str, turn: Turn) -> Any:
    """A copy of an attention forward whose function `name` turns q and k by positions."""
    return with_globals(forward, **{name: (_text_call if name == TEXT else _vision_call)(turn)})


def positions_edit(path: str, rotary: nn.Module, name: str) -> Edit:
    """The rotary module hands on positions."""
    return Attribute(path, rotary, "forward", method(_text_positions if name == TEXT else _vision_positions, rotary))


def turned_by(model: nn.Module, *, text: Turn | None = None, vision: Turn | None = None) -> list[Edit]:
    """Edits after which any function of (q, k, positions) turns q and k: a formula to judge kernels by, for instance.

    Args:
        model: holds the text model and the vision tower.
        text, vision: see `Turn`; None leaves that part alone.
    """
    edits: list[Edit] = []
    for path, module in model.named_modules():
        if text is not None and isinstance(getattr(module, "rotary_emb", None), nn.Module):
            edits += _edits(path, module, "rotary_emb", "layers", "self_attn", TEXT, text)
        if vision is not None and isinstance(getattr(module, "rotary_pos_emb", None), nn.Module):
            edits += _edits(path, module, "rotary_pos_emb", "blocks", "attn", VISION, vision)
    return edits


def _edits(path: str, tower: Any, rotary: str, layers: str, attention: str, name: str, turn: Turn) -> list[Edit]:
    edits = [positions_edit(f"{path}.{rotary}", getattr(tower, rotary), name)]
    for i, layer in enumerate(getattr(tower, layers)):
        module = getattr(layer, attention)
        forward = method(rotating(forward_of(module), name, turn), module)
        edits.append(Attribute(f"{path}.{layers}.{i}.{attention}", module, "forward", forward))
    return edits
