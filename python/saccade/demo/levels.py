"""One model at several levels side by side: copies that share its weights, times of their parts, and `restore` at the end."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import saccade
from saccade.demo import measure
from saccade.demo.checks import Check
from saccade.swap import Report
from saccade.testing import same_state, state_of, twin

__all__ = ["LEVELS", "Variant", "restored", "time_parts", "variants"]

LEVELS = ("stock", "lossless", "balanced", "aggressive")
Run = Callable[[Any], torch.Tensor]


@dataclass(eq=False)
class Variant:
    """A copy of a model at one level.

    Args:
        level: of `LEVELS`.
        model: the copy; its parameters and buffers are those of the model that was given.
        before: its `state_of` before anything was swapped.
        report: of `accelerate`; None: stock.
        out: of a forward.
        seconds: median of each part of a forward, of the "rest", and of the "whole".
    """

    level: str
    model: Any
    before: dict[str, Any]
    report: Report | None = None
    out: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def sites(self) -> int:
        """How many were swapped."""
        return 0 if self.report is None else len(self.report.swapped)


def variants(model: nn.Module, run: Run, *, step: int | None = None, **options: Any) -> list[Variant]:
    """A copy for each level, that has run once.

    Args:
        model: stock; it stays as it is.
        run: a forward.
        step: of denoising, that the copies are told, or None.
        options: of `accelerate`.
    """
    found = []
    for level in LEVELS:
        one = twin(model)
        variant = Variant(level, one, state_of(one))
        if level != "stock":
            variant.report = saccade.accelerate(one, level, **options)
            if step is not None:
                variant.report.set_step(step)
        variant.out = run(one)
        found.append(variant)
    return found


class _Clock:
    """Seconds that calls of some modules take, by part, for each call of `__call__`; hooks are there from `start` to `stop`."""

    def __init__(self, variant: Variant, run: Run, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        self.variant, self.run, self.parts = variant, run, parts
        self.spent: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = {}
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Put the hooks in place, around those of the swap."""
        for part, modules in self.parts.items():
            for module in modules:
                begun: list[float] = []

                def before(*_: Any, begun: list[float] = begun) -> None:
                    begun.append(time.perf_counter())

                def after(*_: Any, part: str = part, begun: list[float] = begun) -> None:
                    self._now[part] += time.perf_counter() - begun.pop()

                self._hooks.append(module.register_forward_pre_hook(before, prepend=True))
                self._hooks.append(module.register_forward_hook(after))

    def stop(self) -> None:
        """Take them out."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self) -> None:
        """One forward."""
        self._now = dict.fromkeys(self.parts, 0.0)
        begun = time.perf_counter()
        self.run(self.variant.model)
        whole = time.perf_counter() - begun
        for part, seconds in {**self._now, "rest": whole - sum(self._now.values()), "whole": whole}.items():
            self.spent[part].append(seconds)


def time_parts(
    found: Sequence[Variant], run: Run, parts: Mapping[str, Callable[[Any], Sequence[nn.Module]]], budget: float
) -> None:
    """Set `seconds` of all variants, which take turns.

    Args:
        found: that have run.
        run: a forward.
        parts: by name, the modules that they are, none inside another.
        budget: seconds in all.
    """
    clocks = [_Clock(v, run, {name: part(v.model) for name, part in parts.items()}) for v in found]
    for clock in clocks:
        clock.start()
    try:
        measure.time_calls(list(clocks), budget=budget)
    finally:
        for clock in clocks:
            clock.stop()
    for clock in clocks:
        clock.variant.seconds = {part: statistics.median(times) for part, times in clock.spent.items()}


def restored(name: str, found: Sequence[Variant], run: Run) -> Check:
    """Restore all variants: the same objects under the same names, and stock's bits."""
    wrong = []
    for variant in found[1:]:
        saccade.restore(variant.model)
        if not same_state(variant.before, state_of(variant.model)):
            wrong.append(f"{variant.level} left attributes behind")
        elif not torch.equal(run(variant.model), found[0].out):
            wrong.append(f"{variant.level} left other bits behind")
    detail = "; ".join(wrong) or f"same attributes, same bits after {', '.join(v.level for v in found[1:])}"
    return Check(name, not wrong, detail)
