"""What users do to diffusers models besides, before and after a swap: compiling, adapters, caches, casting, offloading."""

from __future__ import annotations

import copy
import types

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

import saccade
from saccade.swap.diffusers._processor import plain_rms_norm
from saccade.swap.edit import Attribute
from swap import models
from swap import models_ltx as checks

TILES = {
    "rules": [
        {"kernel": "rotary"},
        {"kernel": "sliding_tile", "role": "self", "params": {"tile": [1, 4, 4], "window": [1, 1, 1]}},
    ]
}
DENSE_THEN_TILES = {"rules": [{"kernel": "dense", "steps": [0, 1]}, *TILES["rules"]]}
ORDERS = pytest.mark.parametrize("first", ["swap", "other"])


@pytest.fixture
def model():
    torch._dynamo.reset()
    return models.wan()


@pytest.fixture(scope="module")
def given():
    return models.wan_inputs(models.wan())


def both(model, given, recipe, change, first):
    """The model with `change` and the recipe, put there in one order or the other."""
    if first == "swap":
        report = saccade.accelerate(model, recipe, strict=True)
        change(model)
    else:
        change(model)
        report = saccade.accelerate(model, recipe, strict=True)
    return report, models.run(model, given)[0]


@pytest.mark.parametrize("recipe", ["lossless", TILES], ids=["lossless", "sparse"])
def test_blocks_share_one_graph(model, given, recipe):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    with saccade.accelerated(model, recipe):
        plain = models.run(model, given)[0]
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = [models.run(model, given)[0] for _ in range(2)]
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled[0], plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(*compiled)


def test_dense_then_sparse_are_two_graphs(model, given):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    report = saccade.accelerate(model, DENSE_THEN_TILES)
    plain = []
    for step in range(4):
        report.set_step(step)
        plain.append(models.run(model, given)[0])
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for step in range(4):
        report.set_step(step)
        torch.testing.assert_close(models.run(model, given)[0], plain[step], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2
    assert not torch.equal(plain[0], plain[1]) and torch.equal(plain[1], plain[2])


def test_a_new_resolution_is_served_compiled(model):
    small, large = models.wan_inputs(model, 2), models.wan_inputs(model, 3)
    saccade.accelerate(model, TILES)
    plain = [models.run(model, given)[0] for given in (small, large)]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for given, want in zip((small, large, small), (*plain, plain[0]), strict=True):
        torch.testing.assert_close(models.run(model, given)[0], want, rtol=1e-5, atol=1e-5)


@ORDERS
def test_whole_model_compiled(model, given, first):
    """Swapped before or after `torch.compile`; the layouts are built outside of the graph, of which there is one a step kind."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    plain = models.run(accelerated(copy.deepcopy(model), TILES), given)[0]
    stock = models.run(model, given)[0]
    if first == "swap":
        saccade.accelerate(model, TILES, strict=True)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    if first == "other":
        saccade.accelerate(compiled, TILES, strict=True)
    torch.testing.assert_close(models.run(compiled, given)[0], plain, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    saccade.restore(compiled)
    torch.testing.assert_close(models.run(compiled, given)[0], stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["lossless", TILES], ids=["lossless", "sparse"])
def test_checkpointing(model, given, recipe):
    checks.check_checkpointing(model, model.blocks[1], given, recipe)


@ORDERS
def test_lora(model, given, first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)

    def add(model):
        torch.manual_seed(1)
        model.add_adapter(config)

    _, ours = both(model, given, "lossless", add, first)
    saccade.restore(model)
    stock = models.run(model, given)[0]
    want = models.run(copy.deepcopy(model).double(), models.in_double(given))[0]
    models.within(ours, stock, want, 2, "output")
    models.check_lossless(model, given)  # gradients of the adapters, too
    model.disable_adapters()
    assert float((models.run(model, given)[0] - stock).abs().max()) > 1e-3


@ORDERS
def test_first_block_cache(model, given, first):
    """The cache keeps its own behaviour: it skips the blocks behind the first where that one changes little."""
    config = diffusers.FirstBlockCacheConfig(threshold=0.2)
    calls = []
    model.blocks[2].ffn.register_forward_pre_hook(lambda *_: calls.append(1))

    def twice(model):
        with model.cache_context("cond"), torch.no_grad():
            return [model(**given).sample for _ in range(2)]

    stock = copy.deepcopy(model)
    stock.enable_cache(config)
    want = twice(stock)
    calls.clear()
    if first == "swap":
        saccade.accelerate(model, "lossless", strict=True)
        model.enable_cache(config)
    else:
        model.enable_cache(config)
        saccade.accelerate(model, "lossless", strict=True)
    ours = twice(model)
    assert len(calls) == 1  # the second call was served from the cache
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    model.disable_cache()
    saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], models.run(models.wan(), given)[0])


def test_pyramid_attention_broadcast(model, given):
    """Its hooks lie around the attention modules; a swap made before or after runs inside of them."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    report = saccade.accelerate(model, TILES, strict=True)
    assert len(report.swapped) == 4
    sparse = models.run(model, given)[0]
    model.disable_cache()
    assert torch.equal(models.run(model, given)[0], sparse)
    assert len(saccade.accelerate(model, TILES, strict=True).swapped) == 4  # hooks that are gone leave no trace
    saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], models.run(models.wan(), given)[0])


@ORDERS
def test_layerwise_casting(model, given, first):
    """Weights rest in another dtype and are cast for each call of their layer."""

    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    stock = copy.deepcopy(model)
    cast(stock)
    want = models.run(stock, given)[0]
    _, ours = both(model, given, "lossless", cast, first)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@ORDERS
def test_group_offload(model, given, first):
    """On a CPU the weights stay where they are, but the hooks run; norms under hooks are called, not read."""

    def offload(model):
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")

    want = models.run(model, given)[0]
    try:
        offload(copy.deepcopy(model))
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"diffusers refuses it here: {error}")
    report = saccade.accelerate(model, TILES) if first == "swap" else None
    offload(model)
    if first == "other":
        report = saccade.accelerate(model, TILES)
    assert {row.path for row in report.skipped} <= {"rope"}
    assert not plain_rms_norm(model.blocks[0].attn1.norm_q)
    sparse = models.run(model, given)[0]
    torch.testing.assert_close(sparse, models.run(accelerated(models.wan(), TILES), given)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, want, rtol=1e-4, atol=1e-4)


def accelerated(model, recipe):
    saccade.accelerate(model, recipe, strict=True)
    return model


@ORDERS
def test_fused_projections(model, given, first):
    stock = copy.deepcopy(model)
    stock.fuse_qkv_projections()
    want = models.run(stock, given)[0]
    _, ours = both(model, given, "lossless", lambda model: model.fuse_qkv_projections(), first)
    assert model.blocks[0].attn1.fused_projections
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], models.run(models.wan(), given)[0])


def test_attention_backend(model, given):
    """The backend that a user sets rests on the stock processor, serves what stays stock, and outlives the swap."""
    from saccade.swap.diffusers.wan import WanProcessor

    saccade.accelerate(model, "lossless", strict=True)
    inner = model.blocks[0].attn1.processor
    assert isinstance(inner, WanProcessor)
    try:
        model.set_attention_backend("_native_math")
        assert inner.stock._attention_backend == inner._attention_backend == "_native_math"
        models.run(model, given)
        saccade.restore(model)
        assert model.blocks[0].attn1.processor is inner.stock
        assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
        saccade.accelerate(model, "lossless")
        model.reset_attention_backend()
        saccade.restore(model)
        assert model.blocks[0].attn1.processor._attention_backend is None
    finally:
        model.set_attention_backend("native")  # diffusers keeps the last one for the process
        model.reset_attention_backend()


def test_two_models_two_recipes(model, given):
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    stock = models.run(model, given)[0]
    saccade.accelerate(model, "lossless")
    saccade.accelerate(other, TILES)
    exact, sparse = models.run(model, given)[0], models.run(other, given)[0]
    assert torch.equal(models.run(third, given)[0], stock)
    torch.testing.assert_close(exact, stock, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, stock, rtol=1e-3, atol=1e-3)
    saccade.restore(model)
    assert torch.equal(models.run(other, given)[0], sparse)


def test_the_last_recipe_holds(model, given):
    stock = models.run(model, given)[0]
    sparse = models.run(accelerated(copy.deepcopy(model), TILES), given)[0]
    with models.unchanged(model):
        first = saccade.accelerate(model, "lossless")
        second = saccade.accelerate(model, TILES)
        assert (first.applied, second.applied) == (False, True)
        assert torch.equal(models.run(model, given)[0], sparse)
        saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], stock)


@pytest.mark.parametrize("before", [None, TILES], ids=["stock", "accelerated"])
def test_a_swap_that_fails_in_the_middle(model, given, before, monkeypatch):
    """All of it or nothing: the model stays as it was, accelerated before or not."""
    if before is not None:
        saccade.accelerate(model, before)
    was = models.run(model, given)[0]
    apply, left = Attribute.apply, [2]

    def failing(self):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("the third edit")
        apply(self)

    processors = [block.attn1.processor for block in model.blocks]
    with monkeypatch.context() as patch:
        patch.setattr(Attribute, "apply", failing)
        with pytest.raises(MemoryError):
            saccade.accelerate(model, "lossless")
    assert torch.equal(models.run(model, given)[0], was)
    assert [block.attn1.processor for block in model.blocks] == processors
    saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], models.run(models.wan(), given)[0])


def test_a_patch_on_top_must_go_first(model, given):
    saccade.accelerate(model, "lossless")
    model.blocks[1].attn1.set_processor(type(model.blocks[1].attn1.processor.stock)())
    with pytest.raises(RuntimeError, match=r"blocks.1.attn1: processor was replaced after the swap"):
        saccade.restore(model)


def test_a_foreign_forward_stays(model):
    model.blocks[1].attn1.forward = types.MethodType(lambda self, *_: None, model.blocks[1].attn1)
    report = saccade.plan(model, TILES)
    reasons = {row.path: row.reason for row in report.skipped}
    assert reasons["blocks.1.attn1"] == "its forward was replaced by someone else"
    assert len(report.swapped) == 2 and "rope" in reasons  # the tables must stay where one reader is unknown


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"ring_degree": 2}, "a ring shows each rank a part of the keys"),
        ({"ulysses_degree": 2, "ulysses_anything": True}, "unequal shares"),
        ({"ulysses_degree": 4}, "2 heads cannot be shared by 4 ranks"),
    ],
)
def test_what_ranks_cannot_share_goes_to_stock(model, config, why):
    """With its parallel configuration, so that stock's own exchange takes place; what is shared: test_context_parallel."""
    parallel = diffusers.ParallelConfig(context_parallel_config=diffusers.ContextParallelConfig(**config))
    report = saccade.accelerate(model, TILES)
    processor, seen = model.blocks[0].attn1.processor, []
    processor._parallel_config = parallel
    assert processor.stock._parallel_config is parallel
    processor._dispatch = lambda q, k, v, **options: seen.append(options["parallel_config"]) or q
    q = torch.zeros(1, 8, 2, 48)
    with pytest.warns(UserWarning, match=why):
        processor.attention(q, q, q)
    assert seen == [parallel] and len(report.notes) == 1


def test_ranks_that_cannot_share_can_be_an_error(model):
    rules = [{**TILES["rules"][1], "on_unsupported": "error"}]
    saccade.accelerate(model, {"rules": rules})
    processor, q = model.blocks[0].attn1.processor, torch.zeros(1, 8, 2, 48)
    config = diffusers.ContextParallelConfig(ring_degree=2)
    processor._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)
    with pytest.raises(ValueError, match="a ring"):
        processor.attention(q, q, q)
