"""Methods of single instances: known by their source, replaced, and put back exactly.

A class, a module's globals and `torch.nn` are never touched, so a second model in the process keeps its own behaviour.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from saccade.swap.source import SwapRefused, fingerprint, with_globals

__all__ = ["Site", "Swap", "SwapRefused", "fingerprint", "with_globals"]


@dataclass(frozen=True)
class Site:
    """One module whose `forward` is to be replaced.

    `forward` takes the module first, as a method does; `reason` says why the site is refused, or is None.
    """

    path: str
    module: nn.Module
    role: str
    forward: Callable[..., Any] | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.path} ({type(self.module).__name__}, {self.role}): {self.reason or 'swapped'}"


class Swap:
    """Replaces `forward` of all sites at once, and puts it back: `apply`, `restore`, or `with swap:`.

    Where one site is refused, none is touched. `restore` leaves the same attributes as before, also after an exception,
    and does nothing where nothing is applied.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = tuple(sites)
        self._done: list[tuple[nn.Module, types.MethodType]] = []

    @property
    def refused(self) -> tuple[Site, ...]:
        """Sites that were not recognised."""
        return tuple(site for site in self.sites if site.reason is not None)

    @property
    def active(self) -> bool:
        """Whether the replacements are in place."""
        return bool(self._done)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        return "\n".join(str(site) for site in self.sites)

    def apply(self) -> Swap:
        """Put the replacements in place; SwapRefused, and nothing changed, where a site is refused."""
        if self._done:
            raise SwapRefused("this swap is already applied")
        taken = [
            Site(s.path, s.module, s.role, reason="its forward was replaced by someone else")
            for s in self.sites
            if "forward" in vars(s.module)
        ]
        refused = [*self.refused, *taken]
        if refused or not self.sites:
            lines = [str(site) for site in refused] or ["no site was found"]
            raise SwapRefused("nothing was swapped:\n  " + "\n  ".join(dict.fromkeys(lines)))
        try:
            for site in self.sites:
                assert site.forward is not None
                method = types.MethodType(site.forward, site.module)
                site.module.forward = method
                self._done.append((site.module, method))
        except BaseException:
            self.restore()
            raise
        return self

    def restore(self) -> None:
        """Take the replacements away again; RuntimeError, and nothing changed, where another patch lies on top."""
        covered = [type(m).__name__ for m, method in self._done if vars(m).get("forward") is not method]
        if covered:
            raise RuntimeError(
                f"forward of {len(covered)} modules ({covered[0]}) was replaced after the swap; undo that first"
            )
        while self._done:
            module, _ = self._done.pop()
            del module.forward

    def __enter__(self) -> Swap:
        return self.apply()

    def __exit__(self, *error: object) -> None:
        self.restore()
