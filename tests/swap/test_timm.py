"""Token merging in timm's ViTs: equal to an oracle in float64, exact restoration, and refusal of code that is not known."""

from __future__ import annotations

import copy
import math
import types

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", minversion="1.0.29")

from merge.tome_oracle import Oracle  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

import saccade  # noqa: E402
from saccade import merge  # noqa: E402
from saccade.merge import MergeSchedule  # noqa: E402
from saccade.swap import SwapRefused, timm_forwards  # noqa: E402
from saccade.swap import timm as swap  # noqa: E402
from saccade.swap.timm import merge_tokens, restore  # noqa: E402
from swap import models  # noqa: E402
from swap.models_timm import images  # noqa: E402
from swap.models_timm import timm_vit as make  # noqa: E402


@pytest.fixture
def model():
    return make()


# ---- oracle ----------------------------------------------------------------------------------------------------------------
def attend(attn, x, size):
    """One sample [N, D] with eager softmax in float64, and its keys, mean over heads."""
    n, _ = x.shape
    qkv = attn.qkv(x).view(n, 3, attn.num_heads, attn.head_dim)
    q, k, v = (attn.q_norm(qkv[:, 0]), attn.k_norm(qkv[:, 1]), qkv[:, 2])
    out = []
    for h in range(attn.num_heads):
        scores = q[:, h] @ k[:, h].T / math.sqrt(attn.head_dim) + size.log()[None]
        out.append(scores.softmax(-1) @ v[:, h])
    y = attn.norm(torch.cat(out, -1))
    y = y if attn.gate is None else y * attn.gate(x).sigmoid()
    return attn.proj(y), k.mean(1)


def expected(model, image, r, proportional=True):
    """Features [M, D] before the last norm, and sizes [M], of one image, merged as ToMe's paper says."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    prefix = model.num_prefix_tokens
    size = torch.ones(x.shape[0], dtype=torch.float64)
    for block, amount in zip(model.blocks, r, strict=True):
        a, keys = attend(block.attn, block.norm1(x), size if proportional else torch.ones_like(size))
        x = x + block.ls1(a)
        n = x.shape[0]
        amount = min(amount, (n - prefix) // 2)
        if amount:
            plan = Oracle(keys, amount, range(0, n, 2), range(1, n, 2), set(range(prefix)))
            order = sorted(range(len(plan.heads)), key=lambda i: plan.heads[i])  # as the tokens lay
            x, size = (t[order] for t in plan.merge(x, size))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return x, size


def oracle_logits(model, image, r, proportional=True):
    x, size = expected(model, image, r, proportional)
    x = model.norm(x)
    pool, patches = model.global_pool, slice(model.num_prefix_tokens, None)
    if hasattr(model, "head_dist"):
        return (model.head(x[0]) + model.head_dist(x[1])) / 2
    if pool == "token":
        x = x[0]
    elif pool == "map":  # as if each row stood there as often as it has tokens
        rows = x[patches].repeat_interleave(size[patches].long(), 0)
        x = model.attn_pool(rows[None])[0] if proportional else model.attn_pool(x[None, patches])[0]
    elif pool in ("avg", "avgmax"):
        mean = (x[patches] * size[patches, None]).sum(0) / size[patches].sum()
        x = mean if pool == "avg" else (mean + x[patches].amax(0)) / 2
    return model.head(model.fc_norm(x))


VARIANTS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "layer_scale": {"init_values": 0.3},
    "registers": {"reg_tokens": 4},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "average": {"global_pool": "avg"},
    "average_no_class": {"global_pool": "avg", "class_token": False},
    "average_norm_first": {"global_pool": "avg", "fc_norm": False, "class_token": False},
    "average_and_max": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "pre_norm": {"pre_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.keys())
def test_logits_are_the_oracles(variant):
    model, x = make(**VARIANTS[variant]).double(), images(dtype=torch.float64)
    for r in ((3, 3, 3, 3), (0, 5, 0, 100)):
        with torch.no_grad(), merge_tokens(model, list(r)):
            got = model(x)
            assert torch.equal(model.forward_head(model.forward_features(x)), got)
        for b in range(2):
            with torch.no_grad():
                torch.testing.assert_close(got[b], oracle_logits(model, x[b], r), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "map", "average"])
def test_not_proportional(variant):
    model, x = make(**VARIANTS[variant]).double(), images(dtype=torch.float64)
    with torch.no_grad():
        with merge_tokens(model, 4, proportional=False):
            got = model(x)
        torch.testing.assert_close(got[0], oracle_logits(model, x[0], (4,) * 4, False), rtol=1e-10, atol=1e-10)


def test_unfused_and_gated_attention():
    model, x = make().double(), images(dtype=torch.float64)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.gate = nn.Linear(48, 48).double()
    with torch.no_grad(), merge_tokens(model, 4):
        got = model(x)
    with torch.no_grad():
        torch.testing.assert_close(got[1], oracle_logits(model, x[1], (4,) * 4), rtol=1e-10, atol=1e-10)


def test_features_keep_their_order_or_toMes():
    model, x = make().double(), images(dtype=torch.float64)
    with torch.no_grad():
        rows, _ = expected(model, x[0], (4,) * 4)
        with merge_tokens(model, 4):
            features = model.forward_features(x)
        torch.testing.assert_close(features[0], model.norm(rows), rtol=1e-10, atol=1e-10)
        with merge_tokens(model, [4], order="split"):
            split = model.forward_features(x)
        with merge_tokens(model, [4]):
            by_place = model.forward_features(x)
    torch.testing.assert_close(split[:, 0], by_place[:, 0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(split, by_place)
    torch.testing.assert_close(split.sum(1), by_place.sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=VARIANTS.keys())
def test_r_0_changes_no_bit(variant):
    model, x = make(**VARIANTS[variant]), images()
    with torch.no_grad():
        stock, features = model(x), model.forward_features(x)
        with merge_tokens(model, 0):
            assert torch.equal(model(x), stock) and torch.equal(model.forward_features(x), features)
        with merge_tokens(model, [0, 0, 3, 0]):
            assert not torch.equal(model(x), stock)


# ---- what else runs --------------------------------------------------------------------------------------------------------
def test_counts_and_presets(model):
    x = images()
    for r, tokens in (
        (3, 14),
        (0.25, 9),
        ([4, 2], 20),
        (MergeSchedule.linear(3, 1, 4), 26 - 0 - 2 - 4 - 6),
        (merge.auroracap(0.5, 4, (5, 5)), 26 - 12),
        (merge.auroracap(0.5, 4, (5, 5), parity=True), 26 - 12),
    ):
        with torch.no_grad(), merge_tokens(model, r) as merged:
            assert model.forward_features(x).shape[1] == tokens
            assert merged.schedule.tokens(26)[-1] == tokens
    text = str(merge_tokens(model, 3))
    assert "layers: 3 x 4" in text and "blocks.0-3.attn" in text and "1 sites swapped" in text


def test_gradients_and_checkpointing():
    stock, x = make().double(), images(dtype=torch.float64)
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(stock).train()
        model.set_grad_checkpointing(checkpointing)
        merge_tokens(model, 4)
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in grads[0].values())
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    # Against the oracle's own gradient, through the same choice of tokens.
    stock.zero_grad()
    sum(oracle_logits(stock, image, (4,) * 4).square().sum() for image in x).backward()
    for name, p in stock.named_parameters():
        torch.testing.assert_close(grads[0][name], p.grad, rtol=1e-8, atol=1e-9)


def test_training_with_dropout_and_drop_path_runs():
    model = make(drop_path_rate=0.3, attn_drop_rate=0.1, proj_drop_rate=0.1, patch_drop_rate=0.2).train()
    with merge_tokens(model, 2):
        model(images()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    model = make(global_pool="avg")
    x = images()
    with torch.no_grad(), merge_tokens(model, 3):
        full = model(x)
        with torch.autocast("cpu", dtype):
            mixed = model(x)
        low = model.to(dtype)(x.to(dtype))
    assert low.dtype == dtype and mixed.dtype == dtype
    for got in (low, mixed):
        assert float((got.float() - full).abs().max()) < 0.2 * float(full.abs().max())


def test_compiled_whole():
    model, x = make(global_pool="avg", reg_tokens=2, depth=2), images()
    with torch.no_grad(), merge_tokens(model, [4, 100]):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_batch_does_not_change_its_samples(model):
    model, x = model.double(), images(3, dtype=torch.float64)
    with torch.no_grad(), merge_tokens(model, 4):
        together = model(x)
        for b in range(3):
            torch.testing.assert_close(model(x[b : b + 1])[0], together[b], rtol=1e-12, atol=1e-12)


def test_hooks_fire_and_dense_features_are_stocks(model):
    x, seen = images(), []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(type(m).__name__)) for m in model.blocks[1].modules()]
    with torch.no_grad():
        dense = model.forward_intermediates(x, intermediates_only=True)
        seen.clear()
        with merge_tokens(model, 3):
            model(x)
            assert {"Block", "Attention", "Mlp", "LayerNorm", "Linear"} <= set(seen)
            for a, b in zip(dense, model.forward_intermediates(x, intermediates_only=True), strict=True):
                assert torch.equal(a, b)
    for handle in handles:
        handle.remove()


def test_a_mask_is_refused_and_stale_sizes_are_seen():
    model = make(global_pool="avg")
    merge_tokens(model, 3)
    with torch.no_grad():
        with pytest.raises(ValueError, match="attn_mask: expected None"):
            model(images(), is_causal=True)
        features = model.forward_features(images())
        with pytest.raises(ValueError, match=r"x: expected the features \[2, 14, D\]"):
            model.forward_head(features[:, :10])
        model(images())
        assert vars(model)[timm_forwards.MERGING].size is None


def test_the_benchmark_measures_and_judges(monkeypatch):
    from bench import timm_vit
    from bench.timing import Effort

    assert timm_vit.amounts(197, 12) == [4, 8, 13] and timm_vit.amounts(197, 24) == [4, 8]
    assert timm_vit.amounts(577, 24) == [4, 8, 13]
    tiny = make(img_size=112, depth=2)
    monkeypatch.setattr(timm, "create_model", lambda name: tiny)
    results = timm_vit.measure("tiny", 1, "cpu", Effort(0.0, least=2), None)
    assert [(r.r, r.tokens_out, r.status, r.n) for r in results] == [
        (0, 50, "ok", 2), (4, 42, "ok", 2), (8, 34, "ok", 2), (13, 24, "ok", 2)
    ]  # fmt: skip
    assert "forward" not in vars(tiny) and all(len(timm_vit.row(r)) == len(timm_vit.HEADINGS) for r in results)
    judged = [timm_vit.Result("m", 1, 8, 9, 5, ms=1.0, ideal=2.0, measured=m) for m in (1.9, 1.7)]
    assert [c.ok for c in timm_vit.checks([*judged, timm_vit.Result("m", 1, 0, 9, 9)])] == [True, False]
    lame = timm_vit.Result("m", 1, 4, 9, 5, ms=1.0, ideal=1.05, measured=0.97)
    assert timm_vit.checks([lame])[0].ok is False and "1.000x" in timm_vit.checks([lame])[0].wanted
    assert timm_vit.checks([timm_vit.Result("m", 1, 4, 9, 5, reason="wrong")])[0].ok is None


# ---- in and out ------------------------------------------------------------------------------------------------------------
def attributes(model):
    return [(name, id(m), [(k, id(v)) for k, v in vars(m).items()]) for name, m in model.named_modules()]


def test_restored_exactly_and_again(model):
    before, keys, classes = attributes(model), list(model.state_dict()), [type(m) for m in model.modules()]
    source = (Block.forward, VisionTransformer.forward_features, VisionTransformer.pool)
    with torch.no_grad():
        stock = model(images())
    merged = merge_tokens(model, 3)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    assert (Block.forward, VisionTransformer.forward_features, VisionTransformer.pool) == source
    assert [name for name, _ in model.named_modules()] == [name for name, _, _ in before]
    model.load_state_dict(model.state_dict())
    restore(model)
    restore(model)
    merged.restore()
    assert attributes(model) == before
    with pytest.raises(RuntimeError, match="mine"), merge_tokens(model, 3):
        raise RuntimeError("mine")
    assert attributes(model) == before
    with torch.no_grad():
        assert torch.equal(model(images()), stock)


def test_models_are_independent(model):
    other, x = make(), images()
    merge_tokens(model, 3)
    with torch.no_grad():
        assert other.forward_features(x).shape[1] == 26
        merge_tokens(other, 5)
        assert (model.forward_features(x).shape[1], other.forward_features(x).shape[1]) == (14, 6)
        restore(other)
        assert (model.forward_features(x).shape[1], other.forward_features(x).shape[1]) == (14, 26)
        twin = copy.deepcopy(model)
        restore(model)
        assert (model.forward_features(x).shape[1], twin.forward_features(x).shape[1]) == (26, 14)
        assert twin.forward.__self__ is twin and twin.blocks[0].attn.forward.__self__ is twin.blocks[0].attn
        restore(twin)
        assert twin.forward_features(x).shape[1] == 26


def test_a_patch_on_top_is_not_torn_out(model):
    merge_tokens(model, 3)
    ours = model.blocks[0].forward
    model.blocks[0].forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"blocks\.0: forward was replaced after the swap"):
        restore(model)
    assert "forward_features" in vars(model)
    model.blocks[0].forward = ours
    restore(model)


class OtherBlock(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


class OtherModel(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return self.norm(self.blocks(self.patch_embed(x)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(block_fn=OtherBlock), r"blocks\.0 .*OtherBlock\.forward has an untested source"),
        (lambda: make(attn_layer="diff"), r"blocks\.0\.attn .*DiffAttention\.forward has an untested source"),
        (lambda: make(name="vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: OtherModel(img_size=80, embed_dim=48, depth=1, num_heads=3), r"OtherModel\.forward_features has an untested"),
        (lambda: make(global_pool="prr"), "AttentionPoolPrr.forward has an untested source"),
        (lambda: nn.Linear(3, 3), "it is not a timm VisionTransformer"),
        (lambda: timm.create_model("resnet18"), "it is not a timm VisionTransformer"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "untested source"),
    ],
)  # fmt: skip
def test_unknown_code_is_refused(build, message):
    model = build()
    before = attributes(model)
    with pytest.raises(SwapRefused, match=message):
        merge_tokens(model, 3)
    assert attributes(model) == before


def test_what_was_replaced_already_is_refused(model):
    model.blocks[1].attn.forward = types.MethodType(lambda self, x, **_: x, model.blocks[1].attn)
    with pytest.raises(SwapRefused, match=r"blocks\.1\.attn .*its forward was replaced by someone else"):
        merge_tokens(model, 3)
    del model.blocks[1].attn.forward
    merge_tokens(model, 3)
    with pytest.raises(SwapRefused, match="merges tokens already"):
        merge_tokens(model, 3)


@pytest.mark.parametrize(
    ("r", "options", "error", "message"),
    [
        (-1, {}, ValueError, r"amounts\[0\]: .* at least 0"),
        (1.5, {}, ValueError, r"amounts\[0\]: expected a share"),
        ([1] * 5, {}, ValueError, "amounts: 5 entries for 4 layers"),
        ("8", {}, TypeError, "amounts: expected a list"),
        (MergeSchedule.per_step(1, 4), {}, ValueError, "r: expected a schedule over layers"),
        (3, {"order": "similarity"}, ValueError, "order: "),
        (3, {"order": "distill"}, ValueError, "order: 'distill' would not leave the model's 1 prefix tokens"),
        (3, {"score": "l1"}, ValueError, "score: "),
    ],
)
def test_bad_input(model, r, options, error, message):
    before = attributes(model)
    with pytest.raises(error, match=message):
        merge_tokens(model, r, **options)
    assert attributes(model) == before


# ---- by a recipe -----------------------------------------------------------------------------------------------------------
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
        row.family == "timm" and row.kernel == "stock" and row.reason for row in report.rows if row.kind == "attention"
    )


@pytest.mark.parametrize("recipe", ["balanced", "timm-aggressive", rule(r=4, proportional=False)], ids=str)
def test_restore(recipe):
    models.check_restore(make(), {"x": images()}, recipe)


def test_lossless_is_stock(model):
    x = images()
    with torch.no_grad():
        stock = model(x)
        with saccade.accelerated(model, "lossless") as report:
            assert not report.swapped and not report.skipped and torch.equal(model(x), stock)
        with saccade.accelerated(model, "balanced", strict=True):
            assert not torch.equal(model(x), stock)


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
    assert (
        not report.swapped
        and not report.applied
        and "blocks.0 (Block): Block.forward has an untested" in report.skipped[0].reason
    )
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, "balanced", strict=True)


def test_an_accelerated_copy_has_its_own(model):
    x = images()
    with torch.no_grad():
        stock = model(x)
        saccade.accelerate(model, rule(r=4))
        merged, other = model(x), copy.deepcopy(model)
        saccade.restore(model)
        assert torch.equal(model(x), stock) and torch.equal(other(x), merged)
        saccade.restore(other)
        assert torch.equal(other(x), stock)


def test_a_compiled_block_and_tower(model):
    x = images()
    tokens = torch.randn(2, 26, 48)
    with torch.no_grad(), saccade.accelerated(model, rule(keep=0.5)):
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
        ({}, ValueError, "params: merge takes one of keep and r, got neither"),
        ({"keep": 0.5, "r": 3}, ValueError, "params: merge takes one of keep and r, got keep, r"),
        ({"keep": 0}, ValueError, "params.keep: expected a share, .* got 0"),
        ({"keep": 1.5}, ValueError, "params.keep: expected a share, above 0 and at most 1, .* got 1.5"),
        ({"keep": "half"}, TypeError, "params.keep: expected a share, .* got 'half'"),
        ({"keep": 7}, ValueError, "params.keep: expected a share of the tokens, 0 < keep <= 1, got 7"),
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


def test_a_recipe_that_fails_leaves_the_one_before(model):
    report = saccade.accelerate(model, rule(r=3))
    for bad in ("no such preset", rule(), rule(r=[1] * 5)):
        with pytest.raises(ValueError, match="preset|params"):
            saccade.accelerate(model, bad)
        with torch.no_grad():
            assert report.applied and model.forward_features(images()).shape[1] == 14
    with pytest.raises(SwapRefused, match="no rule fits"):
        saccade.accelerate(model, "lossless", strict=True)
    planned = saccade.plan(model, "lossless")
    with torch.no_grad():
        assert not planned.applied and report.applied and model.forward_features(images()).shape[1] == 14
