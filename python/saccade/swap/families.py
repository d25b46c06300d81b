"""Which adapter knows a module. Adapters are imported when first asked for; none imports transformers, diffusers or timm."""

from __future__ import annotations

import functools
import importlib

from torch import nn

from saccade.swap.site import Adapter

__all__ = ["adapter_of", "adapters", "looks_like_attention"]

# Modules that define ADAPTERS, a list of Adapter objects.
_MODULES: tuple[str, ...] = ("diffusers.wan",)


@functools.cache
def adapters() -> dict[str, Adapter]:
    """Adapters by the class name of their root."""
    found: dict[str, Adapter] = {}
    for name in _MODULES:
        for adapter in importlib.import_module(f"saccade.swap.{name}").ADAPTERS:
            for root in adapter.roots:
                if root in found:
                    raise RuntimeError(f"{root} belongs to {found[root].family} and to {adapter.family}")
                found[root] = adapter
    return found


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter whose root a module is, or None."""
    for cls in type(module).__mro__:
        adapter = adapters().get(cls.__name__)
        if adapter is not None:
            return adapter
        if cls is nn.Module:
            break
    return None


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module's class name says attention, and it is the innermost one that does."""
    if "Attention" not in type(module).__name__ and "Attn" not in type(module).__name__:
        return False
    return not any(m is not module and looks_like_attention(m) for m in module.children())
