"""TimeSformer: fused attention over time and space equals the hand-written one."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import saccade
from saccade.swap.families import looks_like_attention
from saccade.swap.transformers import timesformer
from swap import models, models_towers

KINDS = {"divided_space_time": 8, "space_only": 4, "joint_space_time": 4}


@pytest.fixture(scope="module")
def model():
    return models_towers.timesformer()


@pytest.mark.parametrize("kind", KINDS)
def test_lossless(kind):
    model = models_towers.timesformer(kind)
    given = models_towers.pixels(model)
    if kind == "space_only":  # the library does not fold the frames back: they stay in the batch
        given["pixel_values"] = given["pixel_values"][:, :1]
    models.check_lossless(model, given, expect=KINDS[kind])


def test_restore(model):
    models.check_restore(model, models_towers.pixels(model), "lossless")


def test_every_attention_is_reported(model):
    report = saccade.plan(model, "lossless")
    found = {name for name, module in model.named_modules() if looks_like_attention(module)}
    assert {row.path for row in report.rows} == found and len(found) == 8
    over_time = [row for row in report.rows if "temporal" in row.path]
    assert len(over_time) == 4
    # 8 frames of 196 places: over time a query sees 8 keys, over space 197
    assert over_time[0].flops[0] == 4 * 48 * 1568 * 8
    assert next(row for row in report.rows if "temporal" not in row.path).flops[0] == 4 * 48 * 8 * 197 * 197


def test_changed_source(model, monkeypatch):
    monkeypatch.setitem(timesformer._TESTED, "TimesformerSelfAttention.forward", {"another"})
    report = saccade.accelerate(model, "lossless")
    assert not report.applied and len(report.skipped) == 8
    assert all("untested source" in row.reason for row in report.skipped)


def test_attention_maps_and_dropout_are_those_of_stock():
    model = models_towers.timesformer(attention_probs_dropout_prob=0.5)
    given = models_towers.pixels(model)
    with torch.no_grad():
        stock = model(**given, output_attentions=True)
        with saccade.accelerated(model):
            ours = model(**given, output_attentions=True)
    assert all(a.shape == b.shape for a, b in zip(stock.attentions, ours.attentions, strict=True))
    torch.testing.assert_close(ours.attentions[-1], stock.attentions[-1], rtol=1e-4, atol=1e-5)
    model.train()
    torch.manual_seed(0)
    stock, _ = models.run(model, given)
    with saccade.accelerated(model):
        torch.manual_seed(0)
        assert torch.equal(models.run(model, given)[0], stock)


@pytest.mark.parametrize("kind", ["maps", "dropout"])
def test_what_cannot_be_served_is_said(kind):
    model = models_towers.timesformer(attention_probs_dropout_prob=0.5).train(kind == "dropout")
    given = {**models_towers.pixels(model), "output_attentions": kind == "maps"}
    reason = "attention maps were asked for" if kind == "maps" else "attention dropout of 0.5 in training"
    with torch.no_grad():
        with saccade.accelerated(model) as report:
            with pytest.warns(UserWarning, match=reason):
                model(**given)
            assert report.notes == (f"dense: {reason}; stock attention ran",)
        strict = {"rules": [{"kernel": "dense", "on_unsupported": "error"}]}
        with saccade.accelerated(model, strict), pytest.raises(ValueError, match=reason):
            model(**given)


def test_copies_have_their_own(model):
    given = models_towers.pixels(model)
    original = copy.deepcopy(model)
    stock, _ = models.run(original, given)
    saccade.accelerate(original)
    other = copy.deepcopy(original)
    saccade.restore(original)
    assert torch.equal(models.run(original, given)[0], stock)
    assert all("forward" not in vars(m) for m in original.modules())
    assert sum("forward" in vars(m) for m in other.modules()) == 8
    saccade.restore(other)
    assert torch.equal(models.run(other, given)[0], stock)


def test_compiled_block(model):
    own = copy.deepcopy(model)
    x = torch.randn(2, 1 + 64, 48)
    with saccade.accelerated(own), torch.no_grad():
        block = own.encoder.layer[0]
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], block(x)[0], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing(model):
    own = copy.deepcopy(model).train()
    given = models_towers.pixels(own)
    with saccade.accelerated(own):
        out, grads = models.run(own, given, backward=True)
        own.gradient_checkpointing_enable()
        again, checkpointed = models.run(own, given, backward=True)
    assert torch.equal(out, again)
    assert all(torch.equal(grads[name], checkpointed[name]) for name in grads)


def test_lora(model):
    peft = pytest.importorskip("peft")
    given = models_towers.pixels(model)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    stock, _ = models.run(wrapped, given)
    with saccade.accelerated(wrapped):
        ours, grads = models.run(wrapped, given, backward=True)
    assert grads and all("lora" in name for name in grads)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
