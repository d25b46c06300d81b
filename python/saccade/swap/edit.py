"""Reversible changes of single objects: an attribute laid over an instance, a hook on a module.

A class, a module's globals and `torch.nn` are never touched, so a second model in the process keeps its own behaviour.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

__all__ = ["Attribute", "Edit", "PreHook", "apply_all", "method", "undo_all"]


class _Missing:
    """Stands for no attribute; a class, so that a deep copy is the same object."""


class Edit(Protocol):
    """A change that `undo` takes back exactly."""

    path: str

    def apply(self) -> None:
        """Put it in place."""

    def covered(self) -> str | None:
        """What lies on top of the change, so that it cannot be undone now; or None."""

    def undo(self) -> None:
        """Take it back; nothing happens where it is not in place."""


@dataclass(eq=False)
class Attribute:
    """`target.name = value` in the instance's own `__dict__`: it hides a method of the class, or a submodule of that name.

    A submodule stays where it is registered, so state_dict keys do not change.
    """

    path: str
    target: Any
    name: str
    value: Any
    _before: Any = field(default=_Missing, init=False)
    _done: bool = field(default=False, init=False)

    def apply(self) -> None:
        """Put it in place."""
        self._before = vars(self.target).get(self.name, _Missing)
        vars(self.target)[self.name] = self.value
        self._done = True

    def covered(self) -> str | None:
        """What was put over it, or None."""
        if self._done and vars(self.target).get(self.name) is not self.value:
            return f"{self.path}: {self.name} was replaced after the swap"
        return None

    def undo(self) -> None:
        """Take it back."""
        if not self._done:
            return
        if self._before is _Missing:
            vars(self.target).pop(self.name, None)
        else:
            vars(self.target)[self.name] = self._before
        self._done, self._before = False, _Missing


@dataclass(eq=False)
class PreHook:
    """A forward pre-hook that sees positional and keyword arguments; `hook` is an object, so that a copied model has its own."""

    path: str
    target: nn.Module
    hook: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
    _handle: Any = field(default=None, init=False)

    def apply(self) -> None:
        """Put it in place, before other hooks: they may change or split the arguments."""
        self._handle = self.target.register_forward_pre_hook(self.hook, prepend=True, with_kwargs=True)

    def covered(self) -> str | None:
        """Nothing can lie on top of a hook."""
        return None

    def undo(self) -> None:
        """Take it back."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def method(function: Callable[..., Any], module: nn.Module) -> types.MethodType:
    """`function` bound to one instance."""
    return types.MethodType(function, module)


def apply_all(edits: Sequence[Edit]) -> None:
    """All of them, or, where one fails, none."""
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.apply()
    except BaseException:
        for edit in reversed(done):
            edit.undo()
        raise


def undo_all(edits: Sequence[Edit]) -> None:
    """Take all back, last first; RuntimeError, and nothing changed, where something lies on top of one."""
    covered = [reason for edit in edits if (reason := edit.covered()) is not None]
    if covered:
        more = f" and {len(covered) - 1} more" if len(covered) > 1 else ""
        raise RuntimeError(f"{covered[0]}{more}; undo that first, then restore")
    for edit in reversed(edits):
        edit.undo()
