"""The float64 model that errors are measured against.

`model.double()` is not one: transformers computes the tables of cos and sin in fp32 whatever the dtype (`.float()` in both
rotary modules), rotates in fp32 in vision attention, and normalises in fp32 in every RMSNorm. Its result carries the very
errors that are to be measured. So the twin here is a copy of the stock model in float64 in which these three places, and
nothing else, are written again as their formulas in the dtype of their input:

    rotation   angle = position * base^(-2i/d), y = x cos + rotate_half(x) sin, without tables, specs or code of Saccade
    RMSNorm    x / sqrt(mean(x^2) + eps) * weight

Scaled-dot-product attention, linear layers, activations and the loss are float64 in torch as they are. In fp32 the same
formulas are plain torch: the peer of Saccade for embeddings that transformers does not have (HoPE).
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch

from saccade.swap.edit import apply_all, undo_all
from saccade.swap.transformers.qwen_rotary import Turn, turned_by

__all__ = ["double", "hope_turn", "mrope_turn", "plain", "vision_turn"]


def _frequencies(count: int, base: float, like: torch.Tensor) -> torch.Tensor:
    return base ** (-torch.arange(count, dtype=like.dtype, device=like.device) / count)


def _rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x [B, H, S, D] by angle [B, S, D / 2], pairs (i, i + D / 2)."""
    cos, sin = (torch.cat((f(angle),) * 2, -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _turn(x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(x, angle), _rotate(y, angle)


def mrope_turn(base: float, sections: list[int]) -> Turn:
    """Pairs in three runs, turned by t, h, w."""

    def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        theta = _frequencies(q.shape[-1] // 2, base, q)
        rows = [p.expand(n, *p.shape) for p, n in zip(positions.to(q.dtype), sections, strict=True)]
        return _turn(q, k, torch.cat(rows).permute(1, 2, 0) * theta)

    return turn


def hope_turn(base: float) -> Turn:
    """The first three quarters of the pairs turned by h, w, h, w, ...; the others stay (arXiv 2505.20444, sec. 4.1)."""

    def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = q.shape[-1] // 2
        theta = _frequencies(pairs, base, q)
        _, h, w = positions.to(q.dtype)
        place = torch.stack((h, w), -1).repeat(1, 1, pairs // 2)  # [B, S, pairs]
        return _turn(q, k, place * torch.where(torch.arange(pairs) < 3 * pairs // 4, theta, 0.0))

    return turn


def vision_turn(base: float) -> Turn:
    """The first half of the pairs turned by h, the second by w, each with frequencies from 1 down."""

    def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        theta = _frequencies(q.shape[-1] // 4, base, q)
        return _turn(q, k, torch.cat([p[..., None] * theta for p in positions.to(q.dtype)], -1))

    return turn


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    weighted: torch.Tensor = self.weight * scaled
    return weighted


def double(model: Any) -> Any:
    """A float64 copy of the model with RMSNorm in float64; its rotary embeddings are still to be replaced by `plain`."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
    return twin


@contextlib.contextmanager
def plain(model: Any, text: Turn | None = None) -> Iterator[None]:
    """The model's rotary embeddings as the formulas above, in the dtype of q; `text` instead of its own M-RoPE."""
    text_config, vision_config = model.config.text_config, model.config.vision_config
    parameters = text_config.rope_parameters
    own = mrope_turn(parameters["rope_theta"], list(parameters.get("mrope_section", [16, 24, 24])))
    edits = turned_by(model, text=text or own, vision=vision_turn(vision_config.rope_parameters["rope_theta"]))
    apply_all(edits)
    try:
        yield
    finally:
        undo_all(edits)
