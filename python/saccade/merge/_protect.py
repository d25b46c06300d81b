"""Protected tokens: a number, positions or a mask, as a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import whole
from saccade._tensors import names


def protected(
    protect: Any, tokens: int, batch: int, device: torch.device
) -> tuple[torch.Tensor | None, tuple[int, ...] | None]:
    """Mask [1|B, N] bool (None where no token is protected), and the positions it protects where the host knows them."""
    if protect is None or (isinstance(protect, int) and not isinstance(protect, bool) and protect == 0):
        return None, ()
    if isinstance(protect, torch.Tensor):
        if protect.dtype != torch.bool:
            raise TypeError(f"protect: expected a bool mask, got {names(protect.dtype)}")
        if (
            protect.ndim not in (1, 2)
            or protect.shape[-1] != tokens
            or (protect.ndim == 2 and protect.shape[0] not in (1, batch))
        ):
            raise ValueError(f"protect: expected a mask [{tokens}] or [{batch}, {tokens}], got {list(protect.shape)}")
        if protect.device != device:
            raise ValueError(f"protect: expected the device of metric, {device}, got {protect.device}")
        return (protect if protect.ndim == 2 else protect[None]).contiguous(), None
    if isinstance(protect, Sequence) and not isinstance(protect, (str, bytes)):
        places = [whole(p, f"protect[{i}]") for i, p in enumerate(protect)]
        for p in places:
            if not -tokens <= p < tokens:
                raise ValueError(f"protect: position {p} is outside of {tokens} tokens")
        places = sorted({p % tokens for p in places})
        if not places:
            return None, ()
        if places == list(range(len(places))):
            return first_tokens(len(places), tokens, device), tuple(places)
        mask = torch.zeros(1, tokens, dtype=torch.bool)
        mask[:, places] = True
        return mask.to(device), tuple(places)
    count = whole(protect, "protect", 0)
    if count > tokens:
        raise ValueError(f"protect: {count} is more than the {tokens} tokens")
    return first_tokens(count, tokens, device), tuple(range(count))


def first_tokens(count: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Mask [1, N] of the first tokens."""
    return (torch.arange(tokens, device=device) < count)[None]
