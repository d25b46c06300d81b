"""`Steps`: which denoising step a call is, from what a root's forward is given; nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Steps"]


def _value(timestep: Any) -> float | None:
    """The timestep as a number, where reading it costs nothing: of several (a batch, tokens of known frames) the largest."""
    if isinstance(timestep, (int, float)):
        return float(timestep)
    if isinstance(timestep, torch.Tensor) and timestep.device.type == "cpu" and timestep.numel():
        return float(timestep.max())
    return None


@dataclass(eq=False)
class Steps:
    """Counts denoising steps from 0.

    A timestep with another value is another step, and where the values turn back a new video has begun. On a GPU values are not read: there
    a new object is a new step, and only a pipeline's scheduler, or `reset`, tells of a new video.

    Attributes:
        now: the step.
        told: the step that the user tells, in place of counting; None: count.
    """

    now: int = 0
    told: int | None = None
    _seen: Any = None
    _value: float | None = None
    _down: bool | None = None  # whether values fall from step to step
    _index: int | None = None  # what the scheduler said last
    _trusted: bool = True

    def see(self, timestep: Any = None, index: int | None = None) -> bool:
        """Take note of a call.

        Args:
            timestep: what the root was given: a number, a tensor, or None.
            index: the step by the pipeline's scheduler, or None. It is believed as long as it moves when timesteps do: a loop of the user's
                own may leave it standing.

        Returns:
            Whether a new video has begun.
        """
        before = self.now
        fresh, turned = self._compare(timestep)
        if self.told is not None:
            self.now = self.told
            return self.now < before
        if index is not None and fresh and self._index == index and not turned:
            self._trusted = False
        self._index = index
        if index is not None and self._trusted:
            self.now = index
        elif turned:
            self.now = 0
        elif fresh:
            self.now += 1
        return turned or self.now < before

    def _compare(self, timestep: Any) -> tuple[bool, bool]:
        """(whether it is another step than that of the last call, whether values turned back)."""
        if timestep is None:
            return False, False
        value, last, first = _value(timestep), self._value, self._seen is None
        if value is None or last is None:
            fresh, turned = timestep is not self._seen and not first, False
        elif value == last:
            fresh, turned = False, False
        else:
            down = value < last
            turned = self._down is not None and down is not self._down
            self._down = self._down if turned else down
            fresh = True
        self._seen, self._value = timestep, value
        return fresh, turned

    def __deepcopy__(self, memo: dict[int, Any]) -> Steps:
        """A copied model begins a video of its own."""
        return Steps(told=self.told)

    def reset(self) -> None:
        """The next call is step 0 of a new video."""
        self.__init__(told=self.told)  # type: ignore[misc]
