"""Merging in open_clip's visual tower: equal to an oracle in float64, exact restoration, and refusal of code that is not known."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from merge.tome_oracle import Oracle
from open_clip.transformer import VisionTransformer

import saccade
from saccade.swap import SwapRefused
from saccade.swap import open_clip as swap
from swap import models
from swap.models_timm import images, open_clip_model
from swap.models_timm import open_clip_vit as make


def rule(**params):
    return {"rules": [{"kernel": "merge", "family": "open_clip", "params": params}]}


# ---- oracle ----------------------------------------------------------------------------------------------------------------
def attend(attn, q, kv, size, dim=None):
    """One sample in float64: q [M, D], kv [N, K], sizes [N]; works for torch's attention and for open_clip's own."""
    width, heads = attn.out_proj.out_features, attn.num_heads
    if getattr(attn, "in_proj_weight", None) is not None:
        weights = attn.in_proj_weight.chunk(3)
    else:
        weights = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    q, k, v = (x @ w.T + b for x, w, b in zip((q, kv, kv), weights, attn.in_proj_bias.chunk(3), strict=True))
    q, k, v = (x.view(x.shape[0], heads, width // heads).transpose(0, 1) for x in (q, k, v))
    if hasattr(attn, "ln_q"):
        q, k = attn.ln_q(q), attn.ln_k(k)
    scores = q @ k.transpose(1, 2) / (width // heads) ** 0.5 + size.log()
    out = scores.softmax(-1) @ v
    out = out * attn.head_scale if getattr(attn, "head_scale", None) is not None else out
    out = out.transpose(0, 1).reshape(-1, width)
    return attn.out_proj(attn.ln_inner(out) if hasattr(attn, "ln_inner") else out)


def expected(model, image, amounts, proportional=True):
    """(pooled [D], tokens) of one image, merged as ToMe's paper says, but compared by ln_1's output."""
    x = model._embeds(image[None])[0]
    size = torch.ones(x.shape[0], dtype=torch.float64)
    seen = lambda: size if proportional else torch.ones_like(size)  # noqa: E731
    for block, r in zip(model.transformer.resblocks, amounts, strict=True):
        y = block.ln_1(x)
        out = attend(block.attn, y, y, seen())
        x = x + block.ls_1(block.ln_attn(out) if hasattr(block, "ln_attn") else out)
        n = x.shape[0]
        r = min(r, (n - 1) // 2)
        if r:
            plan = Oracle(y, r, range(0, n, 2), range(1, n, 2), {0})
            order = sorted(range(len(plan.heads)), key=lambda i: plan.heads[i])
            x, size = (t[order] for t in plan.merge(x, size))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    if model.attn_pool is not None:
        pools = [model.attn_pool, model.attn_pool_contrastive]
        x = model.ln_post(x) if pools[1] is not None else x
        tokens = attend(pools[0].attn, pools[0].ln_q(pools[0].query), pools[0].ln_k(x), seen())
        if pools[1] is None:
            tokens = model.ln_post(tokens)
            if model.pool_type == "avg":
                return tokens[1:].mean(0) @ model.proj, tokens[1:]
            return tokens[0] @ model.proj, tokens[1:]
        source = x if model.attn_pool_type == "parallel" else tokens
        weight = seen() if model.attn_pool_type == "parallel" else torch.ones(len(tokens), dtype=torch.float64)
        pooled = attend(pools[1].attn, pools[1].ln_q(pools[1].query), pools[1].ln_k(source), weight)
        return pooled @ model.proj, tokens
    x = x if model.final_ln_after_pool else model.ln_post(x)
    pooled = x[0] if model.pool_type == "tok" else (x[1:] * size[1:, None]).sum(0) / size[1:].sum()
    pooled = model.ln_post(pooled) if model.final_ln_after_pool else pooled
    return pooled @ model.proj, x[1:]


VARIANTS = {
    "plain": {},
    "even_heads": {"heads": 4},  # torch's fast path
    "layer_scale": {"ls_init_value": 0.3},
    "average": {"pool_type": "avg"},
    "norm_last": {"pool_type": "avg", "final_ln_after_pool": True},
    "coca": {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 4},
    "parallel": {"attentional_pool": "parallel", "attn_pooler_queries": 5, "output_dim": 48},
    "cascade": {"attentional_pool": "cascade", "attn_pooler_queries": 5, "output_dim": 48},
    "qk_norm": {"qk_norm": True},
    "every_scale": {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.keys())
def test_output_is_the_oracles(variant):
    model, x = make(output_tokens=True, **VARIANTS[variant]).double(), images(dtype=torch.float64)
    for amounts in ((3, 3, 3, 3), (0, 5, 0, 100)):
        with torch.no_grad(), saccade.accelerated(model, rule(r=list(amounts))) as report:
            assert len(report.swapped) == 1
            got = model(x)
        for b in range(2):
            with torch.no_grad():
                for ours, want in zip(got, expected(model, x[b], amounts), strict=True):
                    torch.testing.assert_close(ours[b].reshape(want.shape), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "coca", "average", "qk_norm"])
def test_not_proportional(variant):
    model, x = make(**VARIANTS[variant]).double(), images(dtype=torch.float64)
    with torch.no_grad(), saccade.accelerated(model, rule(r=4, proportional=False)):
        got = model(x)
    with torch.no_grad():
        want = expected(model, x[0], (4,) * 4, False)[0]
        torch.testing.assert_close(got[0], want, rtol=1e-10, atol=1e-10)
        other = expected(model, x[0], (4,) * 4, True)[0]
    assert not torch.allclose(want, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.keys())
def test_r_0_changes_no_bit(variant):
    model, x = make(**VARIANTS[variant]), images()
    with torch.no_grad():
        stock = model(x)
        for nothing in ({"r": 0}, {"keep": 1}):
            with saccade.accelerated(model, rule(**nothing)) as report:
                assert report.swapped and torch.equal(model(x), stock)
        with saccade.accelerated(model, rule(r=[0, 0, 3, 0])):
            assert not torch.equal(model(x), stock)


# ---- reports ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "CoCa"])
def test_every_attention_is_reported(name):
    model = open_clip_model(name)
    found = {path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    rows = [row for row in saccade.plan(model, "balanced").rows if row.kind == "attention"]
    assert {row.path for row in rows} == found and len(rows) == len(found) >= 5
    assert all(row.family == "open_clip" and "that is no module" in row.reason for row in rows)
    roles = {row.path.split(".")[0]: row.role for row in rows if "cross_attn" not in row.path}
    assert roles.pop("visual") == "vision" and set(roles.values()) == {"text"}
    assert {row.role for row in rows if "cross_attn" in row.path} == ({"cross"} if name == "CoCa" else set())


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "CoCa"])
def test_whole_models(name):
    model, x, text = open_clip_model(name), images(edge=64), torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        stock = model(x, text)
        stock = list(stock.values()) if isinstance(stock, dict) else list(stock)
        with saccade.accelerated(model, "open_clip-balanced", strict=True):
            merged = model(x, text)
            merged = list(merged.values()) if isinstance(merged, dict) else list(merged)
            features = model.encode_image(x)
    assert [m.shape for m in merged] == [s.shape for s in stock]
    assert not torch.equal(merged[0], stock[0]) and torch.equal(merged[1], stock[1])  # the image's, and the text's
    assert features.isfinite().all()
    before = saccade.plan(model, "lossless")
    assert not before.swapped and not before.skipped


def test_two_towers_of_one_name_are_told_apart():
    timm = pytest.importorskip("timm")
    both = nn.ModuleDict({"a": timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1), "b": make()})
    rows = saccade.plan(both, "balanced").rows
    assert {row.path.split(".")[0]: row.family for row in rows} == {"a": "timm", "b": "open_clip"}


# ---- what else runs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["plain", "every_scale", "coca"])
def test_gradients_and_checkpointing(variant):
    stock, x = make(**VARIANTS[variant]).double(), images(dtype=torch.float64)
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(stock).train()
        model.set_grad_checkpointing(checkpointing)
        saccade.accelerate(model, rule(r=4))
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    sum(expected(stock, image, (4,) * 4)[0].square().sum() for image in x).backward()
    for name, p in stock.named_parameters():
        assert torch.equal(grads[0][name], grads[1][name]), name
        torch.testing.assert_close(grads[0][name], p.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    model, x = make(pool_type="avg"), images()
    with torch.no_grad(), saccade.accelerated(model, rule(r=3)):
        full = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        low = model.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    for got in (low, mixed):
        assert float((got.float() - full).abs().max()) < 0.2 * float(full.abs().max())


def test_compiled():
    model, x, tokens = make(pool_type="avg"), images(), torch.randn(2, 26, 48)
    with torch.no_grad(), saccade.accelerated(model, rule(keep=0.5)):
        torch._dynamo.reset()
        block = torch.compile(model.transformer.resblocks[1], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(block(tokens), model.transformer.resblocks[1](tokens), rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_intermediates_are_stocks():
    model, x = make(), images()
    with torch.no_grad():
        stock = model.forward_intermediates(x)
        with saccade.accelerated(model, rule(r=3)):
            model(x)
            ours = model.forward_intermediates(x)
    assert torch.equal(ours["image_features"], stock["image_features"])
    assert all(
        torch.equal(*pair) for pair in zip(ours["image_intermediates"], stock["image_intermediates"], strict=True)
    )


@pytest.mark.parametrize("first", ["lora", "swap"])
def test_lora(first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["attn", "c_fc", "c_proj"], init_lora_weights=False)
    model, x = make(heads=4), images()
    torch.manual_seed(3)
    plain = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        stock = plain(x)
        with saccade.accelerated(plain, rule(r=3)) as report:
            assert report.swapped, str(report)
            want = plain(x)
    assert not torch.equal(stock, want)
    torch.manual_seed(3)
    if first == "swap":
        saccade.accelerate(model, rule(r=3))
    wrapped = peft.get_peft_model(model, config)
    if first == "lora":
        saccade.accelerate(wrapped, rule(r=3))
    out = wrapped(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    out.sum().backward()
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad and "resblocks.0" in name}
    assert grads and all(grad is not None and grad.isfinite().all() for grad in grads.values())
    saccade.restore(wrapped)
    assert "forward" not in vars(model.transformer.resblocks[0])


def test_without_an_amount():
    report = saccade.accelerate(make(), rule())
    assert not report.applied and [row.reason for row in report.skipped] == ["keep or r is needed"]


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks")
    model = make()
    for block in model.transformer.resblocks:
        for module in (block, block.attn):
            hooks.add_hook_to_module(module, hooks.ModelHook())
    (row,) = saccade.plan(model, "balanced").skipped
    assert row.reason == "resblocks.0: accelerate's hooks lie around its forward"
    hooks.remove_hook_from_module(model, recurse=True)
    assert len(saccade.plan(model, "balanced").swapped) == 1


# ---- in and out ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["plain", "coca", "every_scale"])
def test_restore(variant):
    models.check_restore(make(**VARIANTS[variant]), {"x": images()}, "balanced")


def test_an_accelerated_copy_has_its_own():
    models.check_copies(make(), {"x": images()}, rule(r=4))


@pytest.mark.parametrize("what", swap._TESTED)
def test_changed_source(what, monkeypatch):
    model = make(**(VARIANTS["qk_norm"] if "Custom" in what or what == "Attention.forward" else VARIANTS["coca"]))
    monkeypatch.setitem(swap._TESTED, what, {"another"})
    report = saccade.accelerate(model, "balanced")
    assert not report.swapped and not report.applied and f"{what} has an untested source" in report.skipped[0].reason
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, "balanced", strict=True)


class Other(VisionTransformer):
    def _pool(self, x):
        return x[:, 0], x[:, 1:]


def test_unknown_and_replaced_code_is_refused():
    model = Other(80, 16, 48, 2, 3, 2.0, output_dim=20)
    assert "Other._pool has an untested source" in saccade.plan(model, "balanced").skipped[0].reason
    model = make()
    block = model.transformer.resblocks[2]
    for module, name, where in (
        (block, "forward", "resblocks.2"),
        (block, "attention", "resblocks.2"),
        (block.attn, "forward", "resblocks.2.attn"),
    ):
        setattr(module, name, types.MethodType(lambda self, *_, **__: None, module))
        assert saccade.plan(model, "balanced").skipped[0].reason == f"{where}: its {name} was replaced by someone else"
        delattr(module, name)
    block.attn.batch_first = False
    assert "batch_first=True" in saccade.plan(model, "balanced").skipped[0].reason
