"""Which denoising step a call is: by value, by object, by a scheduler; and where a new video begins."""

from __future__ import annotations

import pytest
import torch

from saccade.swap.steps import Steps


class Hidden:
    """A timestep whose value is not to be read, as one on a GPU."""


def counted(steps: Steps, calls) -> list[int]:
    found = []
    for call in calls:
        steps.see(*call) if isinstance(call, tuple) else steps.see(call)
        found.append(steps.now)
    return found


@pytest.mark.parametrize("make", (float, int, lambda v: torch.tensor([v, v]), lambda v: torch.tensor([[0, v]])))
def test_values(make):
    """Two calls a step (with and without the prompt), two videos of three steps."""
    assert counted(Steps(), [make(v) for v in (900, 900, 600, 600, 300, 300) * 2]) == [0, 0, 1, 1, 2, 2] * 2


def test_values_that_rise():
    """Mochi counts noise the other way."""
    assert counted(Steps(), [0.0, 0.4, 0.8, 0.0, 0.4, 0.8]) == [0, 1, 2] * 2


def test_one_step_videos():
    assert counted(Steps(), [999.0, 999.0, 999.0]) == [0, 0, 0]


def test_objects():
    """Nothing of them is read; a new video is told by `reset`."""
    steps = Steps()
    one, two = Hidden(), Hidden()
    assert counted(steps, [one, one, two]) == [0, 0, 1]
    steps.reset()
    assert counted(steps, [one, two]) == [0, 1]


def test_no_timestep():
    assert counted(Steps(), [None, None]) == [0, 0]


def test_a_scheduler():
    calls = [(Hidden(), i) for i in (0, 1, 2, 0, 1)]
    steps = Steps()
    assert counted(steps, calls) == [0, 1, 2, 0, 1]
    assert Steps().see(None, 3) is False


def test_a_scheduler_that_stands_still():
    """The transformer is called in a loop of the user's own: what the scheduler says is no longer believed."""
    assert counted(Steps(), [(float(v), 0) for v in (900, 600, 300, 900, 600)]) == [0, 1, 2, 0, 1]
    assert counted(Steps(), [(float(v), 7) for v in (900, 900, 600)])[:2] == [7, 7]


def test_told():
    steps = Steps(told=5)
    assert counted(steps, [900.0, 600.0]) == [5, 5]
    steps.reset()
    assert counted(steps, [300.0]) == [5]


def test_a_new_video_is_said():
    steps = Steps()
    assert [steps.see(v) for v in (900.0, 600.0, 900.0, 600.0)] == [False, False, True, False]
