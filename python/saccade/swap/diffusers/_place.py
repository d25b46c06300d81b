"""The edits of a family whose root turns all of its video self-attention by the tables of one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from saccade.rope import RopeSpec
from saccade.swap.attend import Attend, Context, attends
from saccade.swap.diffusers._processor import Processor, Watch
from saccade.swap.edit import Attribute, Edit, PreHook, method
from saccade.swap.site import Choice, Extra
from saccade.swap.tokens import Tokens

__all__ = ["place"]


def place(
    path: str,
    root: nn.Module,
    choices: Sequence[Choice],
    extra: Extra,
    make: Callable[[Any, Attend, RopeSpec | None], Processor],
    sites: Sequence[tuple[str, Any]],
    positions: Callable[..., Any],
    spec_of: Callable[[], RopeSpec],
    watch: tuple[Callable[..., Tokens | None], tuple[str, ...]],
) -> list[Edit]:
    """The edits of a family whose root has one module `rope` for all of its self-attention.

    Args:
        path, root, choices, extra: as `Adapter.edits` gets them.
        make: the family's processor, of the stock one, what attention does, and the rotation.
        sites: path and module of each self-attention.
        positions: takes the place of `rope.forward` where the rotation is fused.
        spec_of: the rotation.
        watch: `tokens_of` and `names` of `Watch`.
    """
    context = Context()
    edits: list[Edit] = []
    rotary = next((choice for choice in choices if choice.site.kind == "rotary"), None)
    chosen = {choice.site.path: choice for choice in choices if choice.site.kind == "attention"}
    spec = None if rotary is None else spec_of()
    if rotary is not None:
        rotary.change = "norm and rotation of q and k in one pass, no tables"
        rope = rotary.site.module
        edits.append(Attribute(rotary.site.path, rope, "forward", method(positions, rope)))
    for name, attn in sites:
        choice = chosen.get(name)
        if choice is None and spec is None:
            continue
        attend = attends(context, choice.rules if choice else (), name)
        edits.append(Attribute(name, attn, "processor", make(attn.processor, attend, spec)))
        if choice is not None:
            choice.change = "processor"
    if edits:
        extra.contexts.append(context)
        edits.append(PreHook(path, root, Watch(context, *watch, extra.pipeline)))
    return edits
