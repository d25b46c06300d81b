"""Layouts in files."""

from __future__ import annotations

import os
from typing import Any

import torch

from saccade.attention.layout import TABLES, BlockLayout, BlockLists

__all__ = ["load", "save"]

FORMAT = "saccade.BlockLayout/1"
SIZES = ("q_len", "k_len", "q_block", "k_block")


def save(layout: BlockLayout, path: str | os.PathLike[str]) -> None:
    """Write `layout` to a file of tensors; `load` reads it, on any machine.

    Example:
        >>> import tempfile
        >>> from saccade.attention import patterns
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(patterns.causal(100), folder + "/causal.pt")
        ...     load(folder + "/causal.pt").q_len
        100
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    held: dict[str, Any] = {"format": FORMAT, **{name: getattr(layout, name) for name in SIZES}}
    for name in ("full", "partial"):
        lists = getattr(layout, name)
        held[name] = None if lists is None else list(lists)
    held |= {name: getattr(layout, name) for name in TABLES}
    torch.save(held, path)


def load(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> BlockLayout:
    """Read what `save` wrote. Only tensors and numbers are read, no code; lists are checked as `BlockLayout.from_lists` checks them.

    Raises:
        ValueError: where the file holds something else.
    """
    held = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        found = held.get("format") if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"path: expected a file of {FORMAT}, got {found}")
    missing = {*SIZES, *TABLES, "full", "partial"} - held.keys()
    if missing:
        raise ValueError(f"path: the file lacks {', '.join(sorted(missing))}")
    full, partial = (None if held[name] is None else BlockLists(*held[name]) for name in ("full", "partial"))
    if full is None:
        raise ValueError("path: the file has no list of whole blocks")
    sizes, tables = {name: held[name] for name in SIZES}, {name: held[name] for name in TABLES}
    return BlockLayout.from_lists(**sizes, full=full, partial=partial, **tables)
