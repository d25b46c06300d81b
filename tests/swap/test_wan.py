"""Wan: lossless equals stock, sparse sees what its layout shows, restore leaves nothing behind."""

from __future__ import annotations

import copy
import types

import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import WanTransformer3DModel

import saccade
from saccade.swap import SwapRefused
from swap import models, models_ltx


@pytest.fixture(scope="module")
def model() -> WanTransformer3DModel:
    return models.wan()


def inputs(model, frames: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return models.wan_inputs(model, frames, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lossless(model, dtype):
    models.check_lossless(copy.deepcopy(model).to(dtype), inputs(model, dtype=dtype))


def test_attention_alone(model):
    """Without the rotary site the tables stay and turn as in stock."""
    models.check_lossless(model, inputs(model), {"rules": [{"kernel": "dense", "role": "self"}]}, expect=3)


@pytest.mark.parametrize("variant", ["image", "vace", "animate"])
def test_variants(variant):
    """Models with other roots and blocks, and with image keys in cross-attention, which stays stock."""
    if variant == "image":
        model = models.wan(image_dim=8, added_kv_proj_dim=96, num_layers=2)
        given = inputs(model)
        given["encoder_hidden_states"] = torch.randn(2, 512, 16, generator=torch.Generator().manual_seed(4))
        given["encoder_hidden_states_image"] = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(5))
    else:
        model = getattr(models_ltx, f"wan_{variant}")()
        given = getattr(models_ltx, f"wan_{variant}_inputs")()
    report = models.check_lossless(model, given)
    assert {row.path for row in report.rows if row.kind == "attention"} == models_ltx.attention_paths(model)
    selves = {path for path in models_ltx.attention_paths(model) if path.endswith("attn1")}
    assert {row.path for row in report.swapped} == {"rope", *selves}
    models.check_restore(model, given, "wan-aggressive")


def test_dense_layers_of_vace():
    """A control block has the number of the layer that it controls."""
    rules = [{"kernel": "dense", "layers": [0, 1]}, {"kernel": "sliding_tile", "role": "self"}]
    report = saccade.plan(models_ltx.wan_vace(), {"rules": rules})
    dense = {row.path for row in report.rows if row.kernel == "dense"}
    assert dense == {"blocks.0.attn1", "vace_blocks.0.attn1"}


def test_sparse(model):
    """Against the model itself under a mask that shows each token its own tile."""
    given, grid = inputs(model), (3, 8, 10)
    tiles = {"tile": [1, 3, 4], "window": [1, 1, 1]}
    mask = models_ltx.one_tile_mask(grid)
    want = models.run(models_ltx.masked(copy.deepcopy(model).double(), mask, "heads"), models.in_double(given))[0]
    stock = models.run(models_ltx.masked(model, mask, "heads"), given)[0]
    recipe = {"rules": [{"kernel": "rotary"}, {"kernel": "sliding_tile", "role": "self", "params": tiles}]}
    with saccade.accelerated(model, recipe) as report:
        ours = models.run(model, given)[0]
        assert not report.notes
    models.within(ours, stock, want, 2, "output")
    assert float((models.run(model, given)[0] - stock).abs().max()) > 100 * float((ours - stock).abs().max())


class Pipeline:
    """As much of a diffusers pipeline as a swap sees: Wan 2.2 has an expert for noisy and one for clear steps."""

    def __init__(self, model):
        self.scheduler = types.SimpleNamespace(step_index=None)
        self.components = {
            "vae": torch.nn.Linear(2, 2),
            "transformer": copy.deepcopy(model),
            "transformer_2": copy.deepcopy(model),
            "scheduler": self.scheduler,
            "tokenizer": None,
        }


def test_pipeline(model):
    """Both experts are swapped, and the step is the scheduler's, whichever of them runs."""
    pipe, given = Pipeline(model), inputs(model)
    stock = models.run(model, given)[0]
    rules = [
        {"kernel": "dense", "steps": [0, 3]},
        {"kernel": "sliding_tile", "params": {"tile": [1, 4, 4], "window": [1, 1, 1]}},
    ]
    first, second = pipe.components["transformer"], pipe.components["transformer_2"]
    report = saccade.accelerate(pipe, {"rules": rules})
    assert {row.path for row in report.swapped} == {
        f"{name}.blocks.{i}.attn1" for name in ("transformer", "transformer_2") for i in range(3)
    }

    def error(one):
        return float((models.run(one, given)[0] - stock).abs().max())

    assert error(first) < 1e-4
    pipe.scheduler.step_index = 2
    assert error(first) < 1e-4 and error(second) < 1e-4
    pipe.scheduler.step_index = 3
    assert error(second) > 1e-3 and error(first) > 1e-3
    copied = copy.deepcopy(second)  # is in no pipeline: it starts at step 0
    assert error(copied) < 1e-4
    watches = [hook for hook in copied._forward_pre_hooks.values() if hasattr(hook, "pipeline")]
    assert len(watches) == 1 and watches[0].pipeline is None
    pipe.scheduler.step_index = None
    assert error(first) < 1e-4
    saccade.restore(pipe)
    assert error(first) == error(second) == 0.0


def test_restore(model):
    models.check_restore(model, inputs(model), "lossless")
    models.check_restore(model, inputs(model), "wan-aggressive")


def test_every_attention_is_reported(model):
    report = saccade.plan(model, "balanced")
    paths = {row.path for row in report.rows if row.kind == "attention"}
    assert paths == {f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in ("attn1", "attn2")}
    assert all(row.reason == "no rule of the recipe" for row in report.rows if row.role == "cross")


def test_steps(model):
    """The first steps are dense; another timestep is another step; where timesteps turn back, a new video begins."""
    given = inputs(model)
    recipe = {"rules": [
        {"kernel": "dense", "steps": [0, 2]},
        {"kernel": "sliding_tile", "params": {"tile": [1, 4, 4], "window": [1, 1, 1]}},
    ]}  # fmt: skip
    at = [dict(given, timestep=torch.full((2,), time)) for time in (900, 600, 300)]
    with torch.no_grad():
        stock = [model(**call).sample for call in at]
        with saccade.accelerated(model, recipe) as report:
            for _ in range(2):
                twice = [
                    [model(**call).sample for _ in range(2)] for call in at
                ]  # with and without the prompt: one step
                assert all(torch.equal(*pair) for pair in twice)
                errors = [float((pair[0] - want).abs().max()) for pair, want in zip(twice, stock, strict=True)]
                assert max(errors[:2]) < 1e-4 < errors[2]
            report.set_step(7)
            assert float((model(**at[0]).sample - stock[0]).abs().max()) > 1e-4


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


def test_plans_are_reused_until_their_recall_falls(model):
    """A plan serves `every` steps; with a recall, one that catches too little is made anew at the next step."""
    given = inputs(model)
    for params, planned in (
        ({"keep": 0.5, "every": 3}, 2),
        ({"keep": 0.5, "recall": 1.0}, 5),
        ({"keep": 0.5, "recall": 1e-6}, 1),
    ):
        with torch.no_grad(), saccade.accelerated(model, {"rules": [{"kernel": "top_k", "params": params}]}) as report:
            for time in (900, 800, 700, 600, 500):
                model(**dict(given, timestep=torch.full((2,), time)))
            (slot,) = report.contexts[0].slots
            assert slot.cache.planned == planned * len(model.blocks), params
            model(**dict(given, timestep=torch.full((2,), 900)))  # another video: its plans are its own
            assert slot.cache.planned == (planned + 1) * len(model.blocks), params


def test_a_part_of_a_pipeline_is_restored_alone(model):
    pipe = type("Pipe", (), {})()
    pipe.components = {"transformer": model, "transformer_2": copy.deepcopy(model)}
    report = saccade.accelerate(pipe, "lossless")
    stock = copy.deepcopy(model)
    saccade.restore(stock)
    saccade.restore(pipe.components["transformer_2"])
    assert report.applied and "processor" in vars(model.blocks[0].attn1)
    assert type(model.blocks[0].attn1.processor).__name__ == "WanProcessor"
    assert type(pipe.components["transformer_2"].blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    saccade.restore(pipe)
    assert not report.applied and type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_a_pattern_that_does_not_fit_is_said(model):
    """One tile of two sees an even window of tiles, which only a whole axis may be: stock runs, or an error comes, as the rule wants."""
    given, window = inputs(model), {"tile": [1, 2, 2], "window": [1, 2, 2]}
    stock, _ = models.run(model, given)
    with saccade.accelerated(model, {"rules": [{"kernel": "sliding_tile", "params": window}]}) as report:
        with pytest.warns(UserWarning, match="window: expected odd numbers"):
            assert torch.equal(models.run(model, given)[0], stock)
        assert len(report.notes) == 1
    rule = {"kernel": "sliding_tile", "params": window, "on_unsupported": "error"}
    with saccade.accelerated(model, {"rules": [rule]}), pytest.raises(ValueError, match="window: expected odd numbers"):
        models.run(model, given)


def test_what_cannot_be_pickled_says_so(model):
    import pickle

    with saccade.accelerated(model, "lossless"), pytest.raises(TypeError, match="restore it first"):
        pickle.dumps(model)
    pickle.dumps(model)


def test_another_class_of_that_name_is_left_alone():
    class WanTransformer3DModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attention = torch.nn.MultiheadAttention(8, 2)

    report = saccade.plan(torch.nn.Sequential(WanTransformer3DModel()), "lossless")
    assert [row.path for row in report.rows] == ["0.self_attention"] and report.rows[0].reason


@pytest.mark.parametrize(
    ("options", "said"),
    [({"grid": (3, 4)}, "grid: exp"), ({"grid": (0, 2, 2)}, "grid"), ({"text": -1}, "text")],
)
def test_bad_sizes(model, options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        saccade.plan(model, "lossless", **options)


def test_a_transformer_outlives_its_pipeline(model):
    """Neither the report nor the hook keeps the other parts alive, and a copied part is copied alone."""
    import gc
    import weakref

    pipe = Pipeline(model)
    saccade.accelerate(pipe, "lossless")
    first, gone = pipe.components["transformer"], weakref.ref(pipe.components["transformer_2"])
    copied = copy.deepcopy(first)
    del pipe
    gc.collect()
    assert gone() is None
    saccade.restore(first)
    saccade.restore(copied)
    assert type(copied.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_rules_without_a_site_are_said(model):
    report = saccade.plan(model, {"rules": [{"kernel": "radial", "layers": [7, 9]}, {"kernel": "dense"}]})
    assert report.unused == ("radial in wan",) and "no site: radial in wan" in str(report)
