"""Recipes on timm's ViTs: exact attention, merging as `merge_tokens` does it, and both together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm", minversion="1.0.29")

import saccade
from saccade.merge import MergeSchedule
from saccade.swap import SwapRefused
from saccade.swap import attend as attending
from saccade.swap import timm as swap
from saccade.swap.timm import merge_tokens, restore
from swap import models
from swap.models_timm import images
from swap.models_timm import timm_vit as make
from swap.timm_oracle import VARIANTS, attributes, oracle_logits


@pytest.fixture
def model():
    return make()


def rule(**params):
    return {"rules": [{"kernel": "merge", "family": "timm", "params": params}]}


@pytest.mark.parametrize("params", [{"r": 3}, {"r": 0.2, "proportional": False}, {"r": [4, 0, 2]}], ids=str)
def test_a_recipe_does_what_merge_tokens_does(model, params):
    x = images()
    with torch.no_grad():
        with merge_tokens(model, params["r"], proportional=params.get("proportional", True)):
            want = model(x)
        with saccade.accelerated(model, rule(**params)) as report:
            assert torch.equal(model(x), want)
    assert [row.path for row in report.swapped] == ["blocks"] and not report.skipped


@pytest.mark.parametrize("variant", ["plain", "map", "average_no_class", "distilled"])
def test_keep_leaves_that_share_and_is_the_oracles(variant):
    model, x = make(**VARIANTS[variant]).double(), images(dtype=torch.float64)
    prefix = model.num_prefix_tokens
    for keep, amounts in ((0.5, (3, 3, 3, 3)), (0.7, (2, 2, 2, 2)), (0.43, (4, 4, 3, 3)), (1, (0, 0, 0, 0))):
        with torch.no_grad(), saccade.accelerated(model, rule(keep=keep)):
            assert model.forward_features(x).shape[1] == prefix + 25 - sum(amounts)
            got = model(x)
            torch.testing.assert_close(got[1], oracle_logits(model, x[1], amounts), rtol=1e-10, atol=1e-10)


def test_keep_follows_the_image():
    model = make(dynamic_img_size=True)
    with torch.no_grad(), saccade.accelerated(model, rule(keep=0.5)):
        for edge, patches in ((80, 25), (160, 100)):
            assert model.forward_features(images(edge=edge)).shape[1] == 1 + patches - round(patches * 0.5)


def test_the_report_says_what_becomes_of_the_tokens(model):
    report = saccade.plan(model, rule(keep=0.5))
    row = next(row for row in report.rows if row.kind == "merge")
    expected = MergeSchedule.constant(3, 4, protected=1).flops_ratio(26, width=48, mlp_ratio=4)
    assert row.change == f"26 tokens become 14, 3 fewer after each attention; {expected:.2f} of the blocks' FLOPs"
    assert not report.applied and "forward" not in vars(model)


@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "class_token": False}, {"attn_layer": "diff"}], ids=str)
def test_every_attention_is_reported(options):
    model = make(**options)
    found = {
        name
        for name, m in model.named_modules()
        if type(m).__name__ in ("Attention", "DiffAttention", "AttentionPoolLatent")
    }
    report = saccade.plan(nn.ModuleDict({"tower": model}), "balanced")
    assert {row.path for row in report.rows if row.kind == "attention"} == {f"tower.{name}" for name in found}
    assert len(found) == 4 + ("global_pool" in options)
    assert all(
        row.family == "timm" and (row.kernel == "dense" or row.reason) for row in report.rows if row.kind == "attention"
    )


@pytest.mark.parametrize("recipe", ["lossless", "balanced", "timm-aggressive", rule(r=4, proportional=False)], ids=str)
def test_restore(recipe):
    models.check_restore(make(), {"x": images()}, recipe)


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.keys())
def test_lossless(variant):
    model = make(**VARIANTS[variant])
    report = models.check_lossless(model, {"x": images()}, expect=4)
    assert not report.skipped and {row.kernel for row in report.swapped} == {"dense"}
    models.check_lossless(model, {"x": images()}, "timm-lossless", expect=4)


def test_lossless_without_fused_attention_and_with_gates():
    model = make()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.gate = nn.Linear(48, 48)
    models.check_lossless(model, {"x": images()}, expect=4)


def test_dense_runs_where_it_can(model, monkeypatch):
    calls = []
    kernel = attending.sparse_attention
    monkeypatch.setattr(
        attending, "sparse_attention", lambda *a, **k: calls.append(k["key_bias"] is not None) or kernel(*a, **k)
    )
    x = images()
    with torch.no_grad(), saccade.accelerated(model, "lossless"):
        model(x)
        assert calls == [False] * 4
        model.forward_features(x, is_causal=True)  # stock
        assert calls == [False] * 4
    calls.clear()
    with torch.no_grad(), saccade.accelerated(model, "balanced", strict=True) as report:
        model(x)
        assert calls == [False, True, True, True] and len(report.swapped) == 5
    calls.clear()
    dropping = make(attn_drop_rate=0.1).train()
    with saccade.accelerated(dropping, "lossless"):
        dropping(x).sum().backward()
        assert not calls


@pytest.mark.parametrize("variant", ["plain", "map", "average", "scale_norm"])
def test_dense_and_merging_equal_merging(variant):
    """Within twice the error that merging has on torch's attention."""
    model, x = make(**VARIANTS[variant]), images()
    want = copy.deepcopy(model).double()
    rules = [{"kernel": "merge", "params": {"keep": 0.5}}, {"kernel": "dense"}]
    with torch.no_grad():
        exact = torch.stack([oracle_logits(want, image, (3, 3, 3, 3)) for image in x.double()])
        with saccade.accelerated(model, {"rules": rules[:1]}):
            stock = model(x)
        with saccade.accelerated(model, {"rules": rules}) as report:
            ours = model(x)
    assert len(report.swapped) == 5
    models.within(ours, stock, exact, 2, "logits")


def test_one_api_takes_back_what_the_other_did(model):
    before = attributes(model)
    merge_tokens(model, 3)
    report = saccade.accelerate(model, rule(r=5))  # in place of the first
    with torch.no_grad():
        assert model.forward_features(images()).shape[1] == 6
    with pytest.raises(SwapRefused, match="merges tokens already"):
        merge_tokens(model, 3)
    assert report.applied
    restore(model)
    assert not report.applied and attributes(model) == before
    merge_tokens(model, 3)
    saccade.restore(model)
    assert attributes(model) == before


def test_changed_source(model, monkeypatch):
    monkeypatch.setitem(swap._TESTED, "block", {"another"})
    report = saccade.accelerate(model, "balanced")
    assert "blocks.0 (Block): Block.forward has an untested" in report.skipped[0].reason
    assert {row.path for row in report.swapped} == {f"blocks.{i}.attn" for i in range(4)}
    monkeypatch.setitem(swap._TESTED, "attention", {"another"})
    report = saccade.accelerate(model, "balanced")
    assert not report.swapped and not report.applied and len(report.skipped) == 5
    assert all("untested source" in row.reason for row in report.skipped)
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, "balanced", strict=True)


def test_an_accelerated_copy_has_its_own(model):
    models.check_copies(model, {"x": images()}, rule(r=4))


@pytest.mark.parametrize("recipe", ["lossless", rule(keep=0.5), "balanced"], ids=["lossless", "merge", "balanced"])
def test_a_compiled_block_and_tower(model, recipe):
    x = images()
    tokens = torch.randn(2, 26, 48)
    with torch.no_grad(), saccade.accelerated(model, recipe):
        torch._dynamo.reset()
        block = torch.compile(model.blocks[1], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(block(tokens), model.blocks[1](tokens), rtol=1e-5, atol=1e-5)
        features = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(features(x), model.forward_features(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["lora", "swap"])
def test_lora(first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1", "proj"], init_lora_weights=False)
    model, x = make(), images()
    torch.manual_seed(3)
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad(), saccade.accelerated(plain, rule(r=3)):
        want = plain(x)
    torch.manual_seed(3)
    if first == "swap":
        saccade.accelerate(model, rule(r=3))
    wrapped = peft.get_peft_model(model, config)
    if first == "lora":
        saccade.accelerate(wrapped, rule(r=3))
    out = wrapped(x)
    assert torch.equal(out, want)
    out.sum().backward()
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad and "blocks.0" in name}
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads.values())
    saccade.restore(wrapped)
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"keep": 0.5, "r": 3}, ValueError, "params: merge takes one of keep and r, got keep, r"),
        ({"keep": 0}, ValueError, "params.keep: expected .* above 0, got 0"),
        ({"keep": 1.5}, ValueError, "params.keep: expected a share, above 0 and at most 1, got 1.5"),
        ({"keep": "half"}, TypeError, "params.keep: expected a number.* got 'half'"),
        ({"keep": 7}, ValueError, "params.keep: expected a share, above 0 and at most 1, got 7"),
        ({"r": -1}, ValueError, "params.r: amounts.0.: .* at least 0, got -1"),
        ({"r": [1] * 5}, ValueError, "params.r: amounts: 5 entries for 4 layers"),
        ({"r": 3, "proportional": 1}, TypeError, "params.proportional: expected True or False, got 1"),
    ],
)
def test_bad_parameters(model, params, error, message):
    before = attributes(model)
    with pytest.raises(error, match=message):
        saccade.accelerate(model, rule(**params))
    assert attributes(model) == before


def test_without_an_amount(model):
    report = saccade.accelerate(model, rule())
    assert not report.applied and [row.reason for row in report.skipped] == ["keep or r is needed"]


@pytest.mark.parametrize("kind", ["mask", "causal", "dropout"])
def test_what_cannot_be_served_is_said(kind):
    model = make(attn_drop_rate=0.25).train(kind == "dropout")
    x = images()
    given = {"mask": {"attn_mask": torch.ones(26, 26, dtype=torch.bool)}, "causal": {"is_causal": True}}.get(kind, {})
    reason = "attention dropout of 0.25 in training" if kind == "dropout" else "the model gave a mask"
    with torch.no_grad():
        with saccade.accelerated(model, "lossless") as report:
            with pytest.warns(UserWarning, match=reason):
                model.forward_features(x, **given)
            assert report.notes == (f"dense: {reason}; stock attention ran",)
        strict = {"rules": [{"kernel": "dense", "on_unsupported": "error"}]}
        with saccade.accelerated(model, strict), pytest.raises(ValueError, match=reason):
            model.forward_features(x, **given)


def test_hooks_of_accelerate(model):
    """While they lie around a forward it stays as it is; what they leave behind does not matter."""
    hooks = pytest.importorskip("accelerate.hooks")
    for module in (model, model.blocks[1], model.blocks[1].attn):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    reasons = {row.path: row.reason for row in saccade.plan(model, "balanced").skipped}
    assert reasons.keys() == {"blocks", "blocks.1.attn"}
    assert all("accelerate's hooks lie around its forward" in reason for reason in reasons.values())
    hooks.remove_hook_from_module(model, recurse=True)
    x = images()
    with torch.no_grad(), saccade.accelerated(model, "balanced", strict=True):
        got = model(x)
    for module in (model, model.blocks[1], model.blocks[1].attn):
        del module.forward
    with torch.no_grad(), saccade.accelerated(model, "balanced"):
        assert torch.equal(got, model(x))


def test_a_recipe_that_fails_leaves_the_one_before(model):
    report = saccade.accelerate(model, rule(r=3))
    for bad in ("no such preset", rule(r=[1] * 5)):
        with pytest.raises(ValueError, match="preset|params"):
            saccade.accelerate(model, bad)
        with torch.no_grad():
            assert report.applied and model.forward_features(images()).shape[1] == 14
    with pytest.raises(SwapRefused, match="no rule fits"):
        saccade.accelerate(model, "wan-balanced", strict=True)
    planned = saccade.plan(model, "lossless")
    with torch.no_grad():
        assert not planned.applied and report.applied and model.forward_features(images()).shape[1] == 14


@pytest.mark.parametrize("recipe", ["lossless", "balanced"])
def test_checkpointing_gives_the_same_gradients(model, recipe):
    model, x, grads = model.train(), images(), []
    saccade.accelerate(model, recipe)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_a_head_that_the_kernel_does_not_take_is_refused():
    report = saccade.plan(make(embed_dim=36), "balanced")
    assert len(report.swapped) == 1 and {row.reason for row in report.skipped} == {
        "expected a head_dim that is a multiple of 8, up to 256, got 12"
    }
