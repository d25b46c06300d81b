"""CogVideoX: joint attention of text and the video behind it, with tables that come from outside."""

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
    return joint.cogvideox()


@pytest.mark.parametrize("size", [(16, 24), (20, 12)])
def test_other_sizes(model, size):
    """That of training, and one that is fitted into it."""
    given = joint.cogvideox_inputs(model)
    given["hidden_states"] = joint.noise(1, 4, 4, *size)
    given["encoder_hidden_states"], given["timestep"] = given["encoder_hidden_states"][:1], given["timestep"][:1]
    given["image_rotary_emb"] = joint.cogvideox_tables(model, 4, *size)
    models.check_lossless(model, given, expect=4)


def test_version_1_5():
    model = joint.cogvideox(patch_size_t=2, patch_bias=False)
    models.check_lossless(model, joint.cogvideox_inputs(model), expect=4)


def test_without_rotation():
    model = joint.cogvideox(use_rotary_positional_embeddings=False)
    report = models.check_lossless(model, joint.cogvideox_inputs(model), expect=3)
    assert not [row for row in report.rows if row.kind == "rotary"]


def test_other_tables(model):
    """Tables that are not those of the grid are used as they are, and a note says so; or it is an error."""
    given = joint.cogvideox_inputs(model)
    given["image_rotary_emb"] = tuple(table.flip(0) for table in given["image_rotary_emb"])
    stock, _ = models.run(model, given)
    with saccade.accelerated(model, "lossless") as report, pytest.warns(UserWarning, match="not those of the grid"):
        ours, _ = models.run(model, given)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert report.notes == ("rotary: the tables are not those of the grid; they were used",)
    recipe = {"rules": [{"kernel": "rotary", "on_unsupported": "error"}]}
    with saccade.accelerated(model, recipe), pytest.raises(ValueError, match="not those of the grid"):
        models.run(model, given)


def test_positional_arguments(model):
    given = joint.cogvideox_inputs(model)
    names = ("hidden_states", "encoder_hidden_states", "timestep")
    args = (*(given[name] for name in names), None, None, given["image_rotary_emb"])
    with torch.no_grad(), saccade.accelerated(model, "lossless"):
        assert torch.equal(model(*args).sample, model(**given).sample)


def test_fused_projections():
    model = joint.cogvideox()
    given = joint.cogvideox_inputs(model)
    stock, _ = models.run(model, given)
    model.fuse_qkv_projections()
    with saccade.accelerated(model, "lossless") as report:
        assert len(report.swapped) == 4
        torch.testing.assert_close(models.run(model, given)[0], stock, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    for block in model.transformer_blocks:  # the fused layer is still there, but stock no longer calls it
        torch.nn.init.zeros_(block.attn1.to_qkv.weight)
    with saccade.accelerated(model, "lossless"):
        torch.testing.assert_close(models.run(model, given)[0], stock, rtol=1e-4, atol=1e-4)
