"""HunyuanVideo: joint attention with masked text, in blocks of two streams and of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import saccade
from saccade.swap.diffusers import hunyuan_video as adapter
from saccade.swap.tokens import Tokens
from swap import models
from swap import models_joint as joint


@pytest.fixture(scope="module")
def model() -> Any:
    return joint.hunyuan_video()


def test_lossless(model):
    models.check_lossless(model, joint.hunyuan_video_inputs(model), expect=5)


def test_restore(model):
    for recipe in ("lossless", "hunyuan_video-aggressive"):
        models.check_restore(model, joint.hunyuan_video_inputs(model), recipe)


def test_every_attention_is_reported(model):
    joint.check_sites(model, {"context_embedder.token_refiner.refiner_blocks.0.attn"})


def test_changed_source(model, monkeypatch):
    joint.check_changed_source(
        model,
        adapter,
        ("HunyuanVideoAttnProcessor2_0.__call__", "Attention.forward", "HunyuanVideoRotaryPosEmbed.forward"),
        monkeypatch,
    )


def test_stock_rule(model):
    joint.check_stock_rule(model, joint.hunyuan_video_inputs(model))


def test_dense_by_torch(model, monkeypatch):
    joint.check_dense_by_torch(model, joint.hunyuan_video_inputs(model), monkeypatch)


def test_sparse(model, monkeypatch):
    joint.check_sparse(model, joint.hunyuan_video_inputs(model), Tokens((3, 8, 10), suffix=12), monkeypatch)


def test_copies_have_their_own(model):
    joint.check_copies(model, joint.hunyuan_video_inputs(model))


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_compiled(model, kind):
    joint.check_compiled(model, getattr(model, kind)[0], joint.hunyuan_video_inputs(model))


def test_gradient_checkpointing(model):
    joint.check_checkpointing(model, 4, joint.hunyuan_video_inputs(model))


def test_lora(model):
    joint.check_lora(model, joint.hunyuan_video_inputs(model))


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_image_to_video(kind):
    model = joint.hunyuan_video(image_condition_type=kind)
    given = joint.hunyuan_video_inputs(model)
    models.check_lossless(model, given, expect=5)
    models.check_restore(model, given, "hunyuan_video-aggressive")


def test_other_tables(monkeypatch):
    """Tables that are not those of the module's attributes stay, with the reason, and attention is swapped all the same."""
    from diffusers.models.transformers import transformer_hunyuan_video as source

    model = joint.hunyuan_video(rope_theta=100.0)
    assert not saccade.plan(model, "lossless").skipped
    stock = source.get_1d_rotary_pos_embed
    monkeypatch.setattr(source, "get_1d_rotary_pos_embed", lambda d, x, *a, **k: stock(d, x / 2, *a, **k))
    report = models.check_lossless(model, joint.hunyuan_video_inputs(model), expect=4)
    assert [(row.path, row.reason) for row in report.skipped] == [("rope", "its tables are not those of its config")]


def test_sections_that_do_not_add_up():
    model = joint.hunyuan_video()
    model.rope.rope_dim = (4, 14, 16)
    (skipped,) = saccade.plan(model, "lossless").skipped
    assert skipped.path == "rope" and "head_dim" in skipped.reason


def test_block_on_its_own(model):
    """A block that is called with stock's tables turns by them."""
    given = joint.hunyuan_video_inputs(model)
    block, seen = model.transformer_blocks[0], []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args))
    models.run(model, given)
    handle.remove()
    with torch.no_grad():
        stock = block(*seen[0])
        with saccade.accelerated(model, "lossless"):
            ours = block(*seen[0])
    for got, want in zip(ours, stock, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
