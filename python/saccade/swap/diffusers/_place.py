"""The edits of a family: a processor for each attention of the video, the rotation that they share, and the root's hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from saccade.rope import RopeSpec
from saccade.swap.attend import Attend, Context, attends
from saccade.swap.diffusers._merging import MergingProcessor, merging_of
from saccade.swap.diffusers._processor import Processor, Watch
from saccade.swap.edit import Attribute, Edit, PreHook
from saccade.swap.site import Choice, Extra

__all__ = ["FUSED", "place"]

FUSED = "norm and rotation of q and k in one pass, no tables"


def place(
    path: str,
    root: nn.Module,
    choices: Sequence[Choice],
    extra: Extra,
    make: Callable[[Any, Attend, RopeSpec | None], Processor],
    sites: Sequence[tuple[str, Any]],
    spec_of: Callable[[], RopeSpec | None],
    rotary_edits: Callable[[], Sequence[Edit]],
    watch: Callable[[Context, Choice | None], Watch],
    rotary_change: str = FUSED,
) -> list[Edit]:
    """The edits of a family whose root turns all of its video attention alike.

    Args:
        path, root, choices, extra: as `Adapter.edits` gets them.
        make: the family's processor, of the stock one, what attention does, and the rotation.
        sites: path and module of each attention that can be swapped.
        spec_of: the rotation, where it is fused; None: it comes with each call.
        rotary_edits: what makes positions come in place of tables.
        watch: the root's hook, of the context and the choice of the rotation.
        rotary_change: for the report.
    """
    context = Context()
    edits: list[Edit] = []
    rotary = next((choice for choice in choices if choice.site.kind == "rotary"), None)
    chosen, merges = (
        {choice.site.path: choice for choice in choices if choice.site.kind == kind} for kind in ("attention", "merge")
    )
    if rotary is not None and rotary.rules[0].params:
        names = ", ".join(sorted(rotary.rules[0].params))
        rotary.reason = (
            f"params.{names}: the positions of this family follow from the grid; there are no others to take"
        )
        rotary = None
    spec = None if rotary is None else spec_of()
    if rotary is not None:
        rotary.change = rotary_change
        edits += rotary_edits()
    for name, attn in sites:
        choice = chosen.get(name)
        merging = merging_of(merges.get(name), choice, context)
        if choice is None and rotary is None and merging is None:
            continue
        processor = make(attn.processor, attends(context, choice.rules if choice else (), name), spec)
        if isinstance(processor, MergingProcessor):
            processor.merging = merging
        edits.append(Attribute(name, attn, "processor", processor))
        if choice is not None:
            choice.change = "processor"
    if edits:
        extra.contexts.append(context)
        edits.append(PreHook(path, root, watch(context, rotary)))
    return edits
