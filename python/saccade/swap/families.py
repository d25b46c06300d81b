"""Which adapter knows a module. Adapters are imported when first asked for; none imports transformers, diffusers or timm."""

from __future__ import annotations

import functools
import importlib

from torch import nn

from saccade.swap.site import Adapter

__all__ = ["adapter_of", "adapters", "looks_like_attention"]

# Modules that define ADAPTERS, a list of Adapter objects.
_MODULES: tuple[str, ...] = (
    "diffusers.wan",
    "diffusers.ltx",
    "diffusers.ltx2",
    "transformers.visual_tokens",
    "transformers.towers",
    "transformers.timesformer",
    "timm",
    "open_clip",
    "diffusers.hunyuan_video",
    "diffusers.hunyuan_video15",
    "diffusers.cogvideox",
    "diffusers.mochi",
    "transformers.qwen_vision",
    "transformers.qwen_text",
)


@functools.cache
def adapters() -> dict[tuple[str, str], Adapter]:
    """Adapters by their package ("" for any) and the class name of their root."""
    found: dict[tuple[str, str], Adapter] = {}
    for name in _MODULES:
        for adapter in importlib.import_module(f"saccade.swap.{name}").ADAPTERS:
            for root in adapter.roots:
                key = adapter.package, root
                if key in found:
                    raise RuntimeError(f"{root} belongs to {found[key].family} and to {adapter.family}")
                found[key] = adapter
    return found


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter whose root a module is, or None."""
    for cls in type(module).__mro__:
        for package in (cls.__module__.partition(".")[0], ""):
            adapter = adapters().get((package, cls.__name__))
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
