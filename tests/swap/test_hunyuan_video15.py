"""HunyuanVideo-1.5: joint attention behind a mask of keys, where stock makes one of queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import saccade
from saccade.swap.diffusers import hunyuan_video15 as adapter
from saccade.swap.tokens import Tokens
from swap import models
from swap import models_joint as joint


@pytest.fixture(scope="module")
def model() -> Any:
    return joint.hunyuan_video15()


def test_lossless(model):
    models.check_lossless(model, joint.hunyuan_video15_inputs(model), expect=3)


def test_restore(model):
    for recipe in ("lossless", "hunyuan_video15-aggressive"):
        models.check_restore(model, joint.hunyuan_video15_inputs(model), recipe)


def test_every_attention_is_reported(model):
    joint.check_sites(model, {"context_embedder.token_refiner.refiner_blocks.0.attn"})


def test_changed_source(model, monkeypatch):
    joint.check_changed_source(
        model,
        adapter,
        ("HunyuanVideo15AttnProcessor2_0.__call__", "Attention.forward", "HunyuanVideo15RotaryPosEmbed.forward"),
        monkeypatch,
    )


def test_stock_rule(model):
    joint.check_stock_rule(model, joint.hunyuan_video15_inputs(model))


def test_dense_by_torch(model, monkeypatch):
    joint.check_dense_by_torch(model, joint.hunyuan_video15_inputs(model), monkeypatch)


def test_sparse(model, monkeypatch):
    joint.check_sparse(model, joint.hunyuan_video15_inputs(model), Tokens((3, 8, 10), suffix=20), monkeypatch)


def test_copies_have_their_own(model):
    joint.check_copies(model, joint.hunyuan_video15_inputs(model))


def test_compiled(model):
    joint.check_compiled(model, model.transformer_blocks[0], joint.hunyuan_video15_inputs(model))


def test_gradient_checkpointing(model):
    joint.check_checkpointing(model, 2, joint.hunyuan_video15_inputs(model))


def test_lora(model):
    joint.check_lora(model, joint.hunyuan_video15_inputs(model))


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
