"""HunyuanVideo-1.5: joint attention behind a mask of keys, where stock makes one of queries and keys."""

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
    return joint.hunyuan_video15()


def test_image_to_video(model):
    models.check_lossless(model, joint.hunyuan_video15_inputs(model, image=True), expect=3)


def test_padding_is_as_in_stock(model):
    """All tokens of a block's outputs, also those that nobody sees."""
    given = joint.hunyuan_video15_inputs(model)
    outputs: list[Any] = []
    handle = model.transformer_blocks[0].register_forward_hook(lambda _, args, out: outputs.append((args[3], *out)))
    models.run(model, given)
    with saccade.accelerated(model, "lossless"):
        models.run(model, given)
    handle.remove()
    (mask, *stock), (_, *ours) = outputs
    assert 0 < mask.sum() < mask.numel()
    for got, want in zip(ours, stock, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
