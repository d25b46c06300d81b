"""Mochi: one call for the batch where stock has a loop, and learned frequencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import saccade
from swap import models
from swap import models_joint as joint


@pytest.fixture(scope="module")
def model() -> Any:
    return joint.mochi()


def test_padding_is_as_in_stock(model):
    """All tokens of a block's outputs; where valid text is not in front, stock moves it there."""
    given = joint.mochi_inputs(model)
    given["encoder_attention_mask"][0, 1::3] = False
    outputs: list[Any] = []
    handle = model.transformer_blocks[0].register_forward_hook(lambda _, args, out: outputs.append(out))
    stock, _ = models.run(model, given)
    with saccade.accelerated(model, "lossless"):
        ours, _ = models.run(model, given)
    handle.remove()
    for got, want in (*zip(outputs[1], outputs[0], strict=True), (ours, stock)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_frequencies_are_read_again():
    """Frozen ones are read once, and again when they change; trained ones get their gradient (see test_lossless)."""
    model = joint.mochi()
    given = joint.mochi_inputs(model)
    with saccade.accelerated(model, "lossless"):
        models.run(model, given)
        rope = vars(model.rope)["forward"]
        first = rope._spec
        models.run(model, given)
        assert rope._spec is first
        with torch.no_grad():
            model.pos_frequencies.mul_(-3)
        ours, _ = models.run(model, given)
        assert rope._spec is not first
    stock, _ = models.run(model, given)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_frozen_frequencies():
    model = joint.mochi()
    model.pos_frequencies.requires_grad_(False)
    models.check_lossless(model, joint.mochi_inputs(model), expect=4)
