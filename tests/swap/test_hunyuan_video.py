"""HunyuanVideo: joint attention with masked text, in blocks of two streams and of one."""

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
    return joint.hunyuan_video()


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
