"""Merging around the self-attention of Wan, LTX-Video and LTX-2: against its definition by matrices, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

import saccade
from swap import models, oracle_dit
from swap import models_ltx as ltx

GATED = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
         "perturbed_attn": True, "rope_type": "split"}  # fmt: skip


def wan_case(**changes):
    model = models.wan(num_layers=2, **changes)
    return model, models.wan_inputs(model), copy.deepcopy(model).double(), oracle_dit.Wan, (3, 8, 10)


def ltx_case():
    model = ltx.ltx(num_layers=2)
    return model, ltx.ltx_inputs(), ltx.ltx_double(model), oracle_dit.LTX, ltx.GRID


def ltx2_case(**changes):
    if not hasattr(diffusers, "LTX2VideoTransformer3DModel"):
        pytest.skip("diffusers has LTX-2 from 0.37")
    model = ltx.ltx2(**changes)
    return model, ltx.ltx2_inputs(), ltx.ltx2_double(model), oracle_dit.LTX2, ltx.GRID


CASES = {
    "wan": wan_case,
    "ltx": ltx_case,
    "ltx2": ltx2_case,
    "ltx2 split": lambda: ltx2_case(rope_type="split"),
    "ltx2 gated": lambda: ltx2_case(**GATED),
}
ONE = ["wan", "ltx", "ltx2"]


def recipe(keep=0.5, *more, on_unsupported="skip", layers=None, **params):
    rule = {"kernel": "merge", "params": {"keep": keep, **params}, "on_unsupported": on_unsupported, "layers": layers}
    return {"rules": [rule, *more]}


def blocks_of(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


def by_definition(model, oracle, *args):
    """The model with the oracle around each video self-attention."""
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        block.attn1.processor = oracle(block.attn1.processor, *args)
    return model


FUSED = [{"kernel": "rotary"}, {"kernel": "dense", "role": "self"}]


@pytest.mark.parametrize(
    "case,keep,cell,proportional,more",
    [
        *((name, 0.5, (1, 2, 2), True, more) for name in CASES for more in ([], FUSED)),
        ("wan", 0.2, (2, 2, 2), True, FUSED),
        ("wan", 0.2, (2, 2, 2), True, []),
        ("wan", 0.5, (1, 2, 2), False, []),
        ("wan", 0.5, (1, 2, 2), False, FUSED),
        ("ltx2 gated", 0.2, (2, 2, 2), False, FUSED),
    ],
)
def test_definition(case, keep, cell, proportional, more):
    """Output within twice, gradients within three times the error of the definition in fp32, against it in float64."""
    model, given, double, oracle, grid = CASES[case]()
    single = by_definition(model, oracle, grid, cell, keep, proportional)
    exact = by_definition(double, oracle, grid, cell, keep, proportional)
    stock = models.run(model, given)[0]
    budgets, errors = {}, {}
    for seed in (1, 2):
        want, want_grads = models.run(exact, models.in_double(given), backward=True, seed=seed)
        other, other_grads = models.run(single, given, backward=True, seed=seed)
        with saccade.accelerated(model, recipe(keep, *more, proportional=proportional), strict=True) as report:
            ours, grads = models.run(model, given, backward=True, seed=seed)
        assert not report.notes, report.notes
        models.within(ours, other, want, 2, "output")
        assert float((want - stock).abs().max()) > 1e-3 > 10 * float((want - ours).abs().max())
        assert grads.keys() == want_grads.keys() == other_grads.keys()
        for found, one in ((budgets, other_grads), (errors, grads)):
            for name, grad in one.items():
                kind = re.sub(r"\d+", "#", name)
                found[kind] = max(found.get(kind, 0.0), float((grad.double() - want_grads[name]).abs().max()))
    for kind, error in errors.items():
        assert error <= 3 * budgets[kind], f"gradient of {kind}: error {error:.3e}, definition {budgets[kind]:.3e}"


@pytest.mark.parametrize("case", ONE)
def test_fewer_rows_run(case):
    """The linear layers see merged rows too; in the layers that the rule names."""
    model, given, *_ = CASES[case]()
    tokens, seen = {"wan": 240}.get(case, 144), []
    blocks = blocks_of(model)
    layers = [blocks[i].attn1 for i in (0, 1)]
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, args[0].shape[1])))
        for i, attn in enumerate(layers)
        for linear in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    ]
    with saccade.accelerated(model, recipe(0.75, layers=[1, None])):
        models.run(model, given)
    for hook in hooks:
        hook.remove()
    assert seen == [(0, tokens)] * 4 + [(1, tokens * 3 // 4)] * 4


@pytest.mark.parametrize("case", ONE)
def test_all_kept(case):
    """keep=1 gives the bits of the same recipe without it, and of stock where there is no other rule."""
    model, given, *_ = CASES[case]()
    for more in ([], FUSED, FUSED[1:]):
        with saccade.accelerated(model, {"rules": more}):
            want = models.run(model, given)[0]
        with saccade.accelerated(model, recipe(1.0, *more), strict=True) as report:
            assert torch.equal(models.run(model, given)[0], want)
        assert not report.notes


@pytest.mark.parametrize("case", ONE)
def test_restore(case):
    model, given, *_ = CASES[case]()
    models.check_restore(model, given, recipe())
    models.check_restore(model, given, recipe(0.5, *FUSED))


@pytest.mark.parametrize("case", ONE)
def test_deterministic_and_copied(case):
    model, given, *_ = CASES[case]()
    stock = models.run(model, given)[0]
    saccade.accelerate(model, recipe())
    merged = models.run(model, given)[0]
    twin = copy.deepcopy(model)
    saccade.restore(model)
    assert torch.equal(models.run(model, given)[0], stock) and not torch.equal(merged, stock)
    assert torch.equal(models.run(twin, given)[0], merged)
    assert twin_processor(twin).merging.context is not twin_processor(copy.deepcopy(twin)).merging.context
    saccade.restore(twin)
    assert torch.equal(models.run(twin, given)[0], stock)


def twin_processor(model):
    return blocks_of(model)[0].attn1.processor


@pytest.mark.parametrize("more", [[], FUSED], ids=["merge", "all"])
@pytest.mark.parametrize("case", [*ONE, "ltx2 split"])
def test_compiled(case, more):
    model, given, *_ = CASES[case]()
    ltx.check_compiled(model, blocks_of(model)[1], given, recipe(0.5, *more))


@pytest.mark.parametrize("case", ["wan", "ltx"])
def test_checkpointing(case):
    model, given, *_ = CASES[case]()
    ltx.check_checkpointing(model, blocks_of(model)[1], given, recipe(0.5, *FUSED))


def test_half_precision():
    """bf16 is as near to the definition in float64 as the definition in bf16 is."""
    model, given, double, oracle, grid = wan_case()
    model, given = model.bfloat16(), models.wan_inputs(model, dtype=torch.bfloat16)
    double = copy.deepcopy(model).double()
    layers = (model, double)
    single, exact = (by_definition(one, oracle, grid, (1, 2, 2), 0.5) for one in layers)
    for one in (single, exact):  # which rows merge follows from bits: the same in both
        one.blocks = one.blocks[:1]
    model.blocks = model.blocks[:1]
    single.blocks[0].attn1.processor.turn = _in_float(single.blocks[0].attn1.processor.turn)
    want, other = models.run(exact, models.in_double(given))[0], models.run(single, given)[0]
    with saccade.accelerated(model, recipe(0.5, *FUSED), strict=True):
        ours = models.run(model, given)[0]
    assert ours.dtype == torch.bfloat16
    models.within(ours, other, want, 2, "output")


def _in_float(turn):
    return lambda attn, q, k, tables: tuple(
        x.bfloat16() for x in turn(attn, q.float(), k.float(), [t.float() for t in tables])
    )


# ---- reports and refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ONE)
def test_rows(case):
    """A row for each self-attention of the video, and none elsewhere; no preset merges."""
    model, *_ = CASES[case]()
    name = "blocks" if case == "wan" else "transformer_blocks"
    report = saccade.plan(model, recipe(), grid=(4, 8, 10))
    rows = [row for row in report.rows if row.kind == "merge"]
    assert [row.path for row in rows] == [f"{name}.{i}.attn1" for i in range(len(blocks_of(model)))]
    assert {row.change for row in rows} == {"160 of 320 tokens attend; every token takes its row back"}
    assert set(report.swapped) == set(rows) and {row.kernel for row in rows} == {"merge"}
    for level in ("lossless", "conservative", "balanced", "aggressive"):
        assert all(row.kind != "merge" for row in saccade.plan(model, level).swapped)


def test_changed_source(monkeypatch):
    from saccade.swap.diffusers import wan

    model, *_ = wan_case()
    monkeypatch.setitem(wan._TESTED, "WanAttnProcessor.__call__", {"another"})
    report = saccade.accelerate(model, recipe())
    assert not report.applied and len(report.skipped) == 2
    assert all("untested source" in row.reason for row in report.skipped)


@pytest.mark.parametrize(
    "params,said",
    [
        ({"r": 8}, "params.r: a schedule over layers is for towers"),
        ({"r": 8, "keep": 0.5}, "params.r: a schedule over layers is for towers"),
        ({}, "params.keep: expected the share"),
        ({"keep": 0.1}, "params.keep: expected a share from 0.125"),
    ],
)
def test_parameters_refused(params, said):
    model, given, *_ = wan_case()
    stock = models.run(model, given)[0]
    with saccade.accelerated(model, {"rules": [{"kernel": "merge", "params": params}]}) as report:
        assert not report.applied and len(report.skipped) == 2
        assert all(row.reason.startswith(said) for row in report.skipped), report
        assert torch.equal(models.run(model, given)[0], stock)


def test_sparse_goes_first():
    """Where a sparse pattern goes, at whatever step, merging is refused; in the other layers it stays."""
    model, given, *_ = wan_case()
    sparse = {
        "kernel": "sliding_tile",
        "role": "self",
        "layers": [0, 1],
        "params": {"tile": [1, 4, 4], "window": [1, 1, 1]},
    }
    late = [{"kernel": "dense", "role": "self", "steps": [0, 3]}, sparse]
    for more in ([sparse], late):
        with saccade.accelerated(model, {"rules": more}) as report:
            want = models.run(model, given)[0]
        with saccade.accelerated(model, recipe(0.5, *more)) as report:
            (row,) = report.skipped
            assert (row.path, row.kind) == ("blocks.0.attn1", "merge")
            assert "sliding_tile goes here" in row.reason
            assert model.blocks[0].attn1.processor.merging is None
            assert model.blocks[1].attn1.processor.merging is not None
            model.blocks[1].attn1.processor.merging = None
            assert torch.equal(models.run(model, given)[0], want)


def unmerged(model, given, said):
    """Nothing merges, and one note says why; with "error" it raises."""
    with saccade.accelerated(model, {"rules": []}):
        want = models.run(model, given)[0]
    with saccade.accelerated(model, recipe()) as report, pytest.warns(UserWarning, match=said):
        assert torch.equal(models.run(model, given)[0], want)
    (note,) = report.notes
    assert said in note and note.endswith("no tokens were merged"), note
    with saccade.accelerated(model, recipe(on_unsupported="error")), pytest.raises(ValueError, match=said):
        models.run(model, given)


def test_no_grid():
    """Conditioning tokens of LTX-Video have coordinates, but no grid."""
    model, *_ = ltx_case()
    extra = ltx.ltx_inputs(extra=10)
    t, h, w = ltx.GRID
    extra["video_coords"] = torch.rand(2, 3, t * h * w + 10, generator=torch.Generator().manual_seed(3)) * 50
    unmerged(model, extra, "the grid of the tokens is not known")


def test_tokens_beyond_the_grid():
    model, given, *_ = ltx2_case()
    tokens = given["hidden_states"].shape[1]
    more = ltx.ltx2_inputs()
    more["hidden_states"] = torch.cat([more["hidden_states"], more["hidden_states"][:, :10]], 1)
    more["video_coords"] = torch.rand(2, 3, tokens + 10, 2, generator=torch.Generator().manual_seed(3)) * 50
    unmerged(model, more, "expected the 144 tokens of the grid alone, got 154")


def test_small_grids():
    """One frame has cells of its own; a grid that is one cell cannot lose half of its tokens thrice over."""
    model, *_ = wan_case()
    given = models.wan_inputs(model, frames=1)
    with saccade.accelerated(model, recipe(0.25)) as report:
        out = models.run(model, given)[0]
    assert not report.notes
    want = models.run(by_definition(model, oracle_dit.Wan, (1, 8, 10), (1, 2, 2), 0.25), given)[0]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    with saccade.accelerated(model, recipe(0.125)) as report, pytest.warns(UserWarning, match="cannot lose so many"):
        models.run(model, given)
    assert len(report.notes) == 1


def test_masks():
    model, given, *_ = wan_case()
    stock, hidden = model.blocks[0].attn1, torch.randn(2, 240, 96, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, 1, 240, 240)
    with torch.no_grad():
        want = stock(hidden, None, mask, None)
        with saccade.accelerated(model, recipe()) as report:
            models.run(model, given)
            assert not report.notes
            with pytest.warns(UserWarning, match="a mask of queries and keys"):
                assert torch.equal(stock(hidden, None, mask, None), want)


def test_perturbation():
    """Guidance by skipped layers: samples that keep their values, in rows as the others."""
    model, *_ = ltx2_case(**GATED)
    plain = ltx.ltx2_inputs()
    given = {**plain, "spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([0.0, 1.0])}
    with saccade.accelerated(model, recipe(), strict=True) as report:
        ours, without = models.run(model, given)[0], models.run(model, plain)[0]
    assert not report.notes
    torch.testing.assert_close(ours[1], without[1], rtol=1e-4, atol=1e-5)
    assert float((ours[0] - without[0]).abs().max()) > 1e-3
    attn, hidden = model.transformer_blocks[0].attn1, torch.randn(2, 144, 80)
    mask = (torch.arange(144) % 2).float()[None, :, None]
    with torch.no_grad():
        want = attn(hidden, perturbation_mask=mask)
        with saccade.accelerated(model, recipe()) as report:
            models.run(model, plain)
            with pytest.warns(UserWarning, match="differs from token to token"):
                torch.testing.assert_close(attn(hidden, perturbation_mask=mask), want, rtol=1e-5, atol=1e-6)
    assert len(report.notes) == 1


def test_shared_sequence():
    """Ranks hold a part of the tokens each: nothing merges."""
    model, given, *_ = wan_case()
    hidden = torch.randn(2, 240, 96)
    with saccade.accelerated(model, recipe()) as report:
        models.run(model, given)
        processor = model.blocks[0].attn1.processor
        processor._parallel_config = type("Config", (), {"context_parallel_config": object()})()
        try:
            with pytest.warns(UserWarning, match="each rank holds a part"):
                assert processor.rows(hidden).hidden is hidden
        finally:
            processor._parallel_config = None
        assert processor.rows(hidden).hidden.shape[1] == 120
    assert len(report.notes) == 1
