"""`merge_tokens` in timm's ViTs: equal to an oracle in float64, exact restoration, and refusal of code that is not known."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", minversion="1.0.29")

from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

from saccade import merge  # noqa: E402
from saccade.merge import MergeSchedule  # noqa: E402
from saccade.swap import SwapRefused, timm_forwards  # noqa: E402
from saccade.swap.timm import merge_tokens, restore  # noqa: E402
from swap.models_timm import images  # noqa: E402
from swap.models_timm import timm_vit as make  # noqa: E402
from swap.timm_oracle import VARIANTS, attributes, expected, oracle_logits  # noqa: E402


@pytest.fixture
def model():
    return make()


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
