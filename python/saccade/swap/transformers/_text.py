"""Attention over text: listed in reports, and left alone, because masks and caches are the model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from saccade.swap.edit import Edit
from saccade.swap.families import adapter_of, looks_like_attention
from saccade.swap.site import Adapter, Choice, Site
from saccade.swap.tokens import Tokens

__all__ = ["Text", "text_sites"]


def text_sites(path: str, root: nn.Module) -> list[Site]:
    """Every attention below a root, but for what belongs to another root inside it: a vision tower, a text model with kernels."""
    at = f"{path}." if path else ""
    found = []
    for name, module in _outside(root, ""):
        number = re.search(r"\.(\d+)\.", name)
        layer = None if number is None else int(number[1])
        found.append(Site(at + name, module, "attention", "text", layer=layer))
    return found


def _outside(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if adapter_of(child) is not None:
            continue
        if looks_like_attention(child):
            yield full, child
        yield from _outside(child, full)


class Text(Adapter):
    """A text tower beside a vision tower."""

    package = "transformers"

    def __init__(self, family: str, *roots: str) -> None:
        self.family, self.roots = family, roots

    def sites(self, path: str, root: nn.Module, tokens: Tokens) -> list[Site]:
        """Every attention, without kernels."""
        return text_sites(path, root)

    def edits(self, path: str, root: nn.Module, choices: Sequence[Choice], extra: Any) -> list[Edit]:
        """None."""
        return []
