"""What a forward says where its model asks for more than the chosen kernel does."""

from __future__ import annotations

from saccade.swap.attend import Attend

__all__ = ["decline"]


def decline(attend: Attend, reason: str) -> None:
    """Stock attention is about to run in place of the kernel that was chosen: an error, or a note, as the rule says."""
    slot = attend.rule_now()
    if slot is not None and slot.rule.kernel != "stock":
        attend.context.unserved(slot.rule, reason)
