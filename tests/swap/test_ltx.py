"""LTX-Video: lossless equals stock, sparse sees what its layout shows, what cannot be served runs stock and says so."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")

import saccade
from swap import models
from swap import models_ltx as ltx


@pytest.fixture(scope="module")
def model():
    return ltx.ltx()


def coordinates(given):
    """Coordinates of the grid's tokens, [B, 3, S], in seconds and pixels, as LTXConditionPipeline gives them."""
    grid = torch.cartesian_prod(*(torch.arange(given[name]).float() for name in ("num_frames", "height", "width")))
    scale = torch.tensor([8 / 25, 32.0, 32.0])
    return (grid * scale + 3.0).T.expand(2, -1, -1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lossless(model, dtype):
    model = copy.deepcopy(model).to(dtype)
    given = {name: x.to(dtype) if "states" in name else x for name, x in ltx.ltx_inputs().items()}
    report = models.check_lossless(model, given, double=ltx.ltx_double(model), expect=4)
    assert {row.path for row in report.swapped} == {"rope", *(f"transformer_blocks.{i}.attn1" for i in range(3))}


@pytest.mark.parametrize("how", ["coordinates", "no scale"])
def test_other_positions(model, how):
    given = ltx.ltx_inputs()
    given["rope_interpolation_scale"] = None
    if how == "coordinates":
        given["video_coords"] = coordinates(given)
    models.check_lossless(model, given, double=ltx.ltx_double(model), expect=4)


def test_attention_alone(model):
    """Without the rotary site the tables stay, and stock's own function turns."""
    recipe = {"rules": [{"kernel": "dense", "role": "self"}]}
    models.check_lossless(model, ltx.ltx_inputs(), recipe, double=ltx.ltx_double(model), expect=3)


def test_restore(model):
    models.check_restore(model, ltx.ltx_inputs(), "lossless")
    models.check_restore(model, ltx.ltx_inputs(), "ltx-aggressive")


def test_every_attention_is_reported(model):
    report = saccade.plan(model, "balanced")
    assert {row.path for row in report.rows if row.kind == "attention"} == ltx.attention_paths(model)
    assert all(row.reason == "no rule of the recipe" for row in report.rows if row.role == "cross")


def test_sparse(model):
    given, twin = ltx.ltx_inputs(), ltx.masked(model, ltx.one_tile_mask(), "rows")
    exact = ltx.masked(ltx.ltx_double(model), ltx.one_tile_mask(), "rows")
    want, stock = models.run(exact, models.in_double(given))[0], models.run(twin, given)[0]
    with saccade.accelerated(model, ltx.ONE_TILE) as report:
        ours = models.run(model, given)[0]
        assert not report.notes
    models.within(ours, stock, want, 2, "output")
    dense = models.run(model, given)[0]
    assert float((dense - stock).abs().max()) > 1000 * float((ours - stock).abs().max())


def test_conditioning_tokens_run_stock(model):
    """Tokens without a grid: LTXConditionPipeline gives coordinates alone."""
    given = ltx.ltx_inputs()
    given["video_coords"] = coordinates(given)
    stock = models.run(model, {**given})[0]
    for name in ("num_frames", "height", "width"):
        del given[name]
    with saccade.accelerated(model, {"rules": ltx.ONE_TILE["rules"][1:]}) as report:
        with pytest.warns(UserWarning, match="grid of the tokens is not known"):
            ours = models.run(model, given)[0]
        assert torch.equal(ours, stock) and len(report.notes) == 1
    strict = {"rules": [{**ltx.ONE_TILE["rules"][1], "on_unsupported": "error"}]}
    with saccade.accelerated(model, strict), pytest.raises(ValueError, match="grid of the tokens"):
        models.run(model, given)


def test_changed_source(model, monkeypatch):
    from saccade.swap.diffusers import ltx as adapter

    monkeypatch.setitem(adapter._TESTED, "apply_rotary_emb", {"another"})
    report = saccade.plan(model, "lossless")
    assert [row.path for row in report.skipped] == ["rope"] and "apply_rotary_emb" in report.skipped[0].reason
    monkeypatch.setitem(adapter._TESTED, "LTXVideoAttnProcessor.__call__", {"another"})
    report = saccade.plan(model, "lossless")
    assert not report.swapped and len(report.skipped) == 4
    assert all("untested source" in row.reason for row in report.skipped)


def test_copies_have_their_own(model):
    models.check_copies(model, ltx.ltx_inputs(), ltx.ONE_TILE)


@pytest.mark.parametrize("recipe", ["lossless", ltx.ONE_TILE], ids=["lossless", "sparse"])
def test_compiled(model, recipe):
    ltx.check_compiled(model, model.transformer_blocks[1], ltx.ltx_inputs(), recipe)


def test_checkpointing(model):
    ltx.check_checkpointing(model, model.transformer_blocks[1], ltx.ltx_inputs(), ltx.ONE_TILE)


@pytest.mark.parametrize("first", ["lora", "swap"])
def test_lora(first):
    """Adapters work over the swap and under it: the layers are called, their weights are not read."""
    peft = pytest.importorskip("peft")
    model, given = ltx.ltx(), ltx.ltx_inputs()
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    if first == "swap":
        saccade.accelerate(model, "lossless", strict=True)
    torch.manual_seed(1)
    model.add_adapter(config)
    saccade.restore(model)
    models.check_lossless(model, given, double=ltx.ltx_double(model), expect=4)
    saccade.accelerate(model, "lossless", strict=True)
    with_lora = models.run(model, given)[0]
    model.disable_adapters()
    assert float((models.run(model, given)[0] - with_lora).abs().max()) > 1e-3
