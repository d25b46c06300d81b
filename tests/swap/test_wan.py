"""Wan: lossless equals stock, sparse sees what its layout shows, restore leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel

import saccade
from saccade.swap import SwapRefused
from swap import models


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    return models.wan()


def inputs(model, frames: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return models.wan_inputs(model, frames, dtype)


def test_lossless(model):
    models.check_lossless(model, inputs(model))


def test_restore(model):
    models.check_restore(model, inputs(model), "lossless")
    models.check_restore(model, inputs(model), "wan-aggressive")


def test_every_attention_is_reported(model):
    report = saccade.plan(model, "balanced")
    paths = {row.path for row in report.rows if row.kind == "attention"}
    assert paths == {f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in ("attn1", "attn2")}
    assert all(row.reason == "no rule of the recipe" for row in report.rows if row.role == "cross")


def test_steps(model):
    """The first steps are dense; a new timestep object is a new step."""
    given = inputs(model)
    recipe = {"rules": [
        {"kernel": "dense", "steps": [0, 2]},
        {"kernel": "sliding_tile", "params": {"tile": [1, 4, 4], "window": [1, 1, 1]}},
    ]}  # fmt: skip
    with torch.no_grad():
        stock = model(**given).sample
        with saccade.accelerated(model, recipe) as report:
            errors = []
            for _ in range(3):
                given["timestep"] = given["timestep"].clone()
                twice = [model(**given).sample for _ in range(2)]  # with and without the prompt: one step
                assert torch.equal(*twice)
                errors.append(float((twice[0] - stock).abs().max()))
            report.reset()
            given["timestep"] = given["timestep"].clone()
            again = float((model(**given).sample - stock).abs().max())
    assert errors[0] == errors[1] == again < 1e-4 < errors[2]


def test_changed_source(model, monkeypatch):
    from saccade.swap.diffusers import wan

    monkeypatch.setitem(wan._TESTED, "WanAttnProcessor.__call__", {"another"})
    report = saccade.accelerate(model, "lossless")
    assert not report.swapped and not report.applied
    assert all("untested source" in row.reason for row in report.skipped) and len(report.skipped) == 1 + len(
        model.blocks
    )
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, "lossless", strict=True)


def test_copies_have_their_own(model):
    given = inputs(model)
    original = copy.deepcopy(model)
    with torch.no_grad():
        stock = original(**given).sample
        saccade.accelerate(original, "wan-aggressive").set_step(10)
        other = copy.deepcopy(original)
        saccade.restore(original)
        assert torch.equal(original(**given).sample, stock)
        assert not torch.equal(other(**given).sample, stock)
        saccade.restore(other)
        assert torch.equal(other(**given).sample, stock)
