"""LTX-2: video self-attention in every variant of the model; audio, text and audio-video attention stay stock and are reported."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers

import saccade
from swap import models
from swap import models_ltx as ltx

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "LTX2VideoTransformer3DModel"), reason="diffusers has LTX-2 from 0.37"
)
VARIANTS = {
    "interleaved": {},
    "split": {"rope_type": "split"},
    "gated": {
        "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
        "perturbed_attn": True, "rope_type": "split",
    },
}  # fmt: skip
OTHERS = {"audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return ltx.ltx2(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain():
    return ltx.ltx2()


def test_lossless(model):
    report = models.check_lossless(model, ltx.ltx2_inputs(), double=ltx.ltx2_double(model), expect=3)
    assert {row.path for row in report.swapped} == {"rope", *(f"transformer_blocks.{i}.attn1" for i in range(2))}


def test_rotation_is_nearer_than_stock(model):
    """q of the video, turned by positions, against the float64 formula: at most stock's own error."""
    given, twin = ltx.ltx2_inputs(), ltx.ltx2_double(model)

    def attention_of(one, values):
        seen = []
        handle = one.transformer_blocks[0].attn1.register_forward_hook(lambda *args: seen.append(args[-1]))
        models.run(one, values)
        handle.remove()
        return seen[0]

    want, stock = attention_of(twin, models.in_double(given)), attention_of(model, given)
    with saccade.accelerated(model, "lossless"):
        ours = attention_of(model, given)
    models.within(ours, stock, want, 1, "attention of the first block")


def test_restore(plain):
    models.check_restore(plain, ltx.ltx2_inputs(), "lossless")
    models.check_restore(plain, ltx.ltx2_inputs(), "ltx2-aggressive")


def test_every_attention_is_reported(plain):
    report = saccade.accelerate(plain, "balanced", strict=True)
    saccade.restore(plain)
    assert {row.path for row in report.rows if row.kind == "attention"} == ltx.attention_paths(plain)
    rest = [row for row in report.rows if row.path.rpartition(".")[2] in OTHERS]
    assert len(rest) == 10 and all(row.reason == "no rule of the recipe" for row in rest)
    assert {row.role for row in rest} == {"audio", "cross"}


def test_sparse(model):
    given = ltx.ltx2_inputs()
    want = models.run(ltx.masked(ltx.ltx2_double(model), ltx.one_tile_mask(), "rows"), models.in_double(given))[0]
    stock = models.run(ltx.masked(model, ltx.one_tile_mask(), "rows"), given)[0]
    with saccade.accelerated(model, ltx.ONE_TILE) as report:
        ours = models.run(model, given)[0]
        assert not report.notes
    models.within(ours, stock, want, 2, "output")
    assert float((models.run(model, given)[0] - stock).abs().max()) > 100 * float((ours - stock).abs().max())


def test_appended_tokens_are_seen_by_all(plain):
    """Keyframes and references behind the grid: every token sees them, and they see everything."""
    given, extra = ltx.ltx2_inputs(), 5
    count = given["hidden_states"].shape[1]
    given["hidden_states"] = torch.cat([given["hidden_states"], given["hidden_states"][:, :extra] + 1], 1)
    coords = plain.rope.prepare_video_coords(2, *ltx.GRID, "cpu")
    given["video_coords"] = torch.cat([coords, coords[:, :, :extra]], 2)
    mask = torch.ones(count + extra, count + extra, dtype=torch.bool)
    mask[:count, :count] = ltx.one_tile_mask()
    want = models.run(ltx.masked(ltx.ltx2_double(plain), mask, "rows"), models.in_double(given))[0]
    stock = models.run(ltx.masked(plain, mask, "rows"), given)[0]
    with saccade.accelerated(plain, ltx.ONE_TILE) as report:
        ours = models.run(plain, given)[0]
        assert not report.notes
    models.within(ours, stock, want, 2, "output")


def test_own_mask_runs_stock(plain):
    """IC-LoRA gives a mask of all pairs: no kernel takes one."""
    given = ltx.ltx2_inputs()
    count = given["hidden_states"].shape[1]
    given["video_self_attention_mask"] = torch.ones(2, count, count)
    given["video_self_attention_mask"][:, :, :7] = 0
    stock = models.run(plain, given)[0]
    warned = pytest.warns(UserWarning, match="mask of queries and keys")
    with saccade.accelerated(plain, {"rules": ltx.ONE_TILE["rules"][1:]}) as report, warned:
        ours = models.run(plain, given)[0]
    assert torch.equal(ours, stock) and len(report.notes) == 1
    with saccade.accelerated(plain, {"rules": [{"kernel": "rotary"}]}):
        ours = models.run(plain, given)[0]
    want = models.run(ltx.ltx2_double(plain), models.in_double(given))[0]
    models.within(ours, stock, want, 2, "output")


@pytest.mark.parametrize("share", ["one", "all"])
def test_perturbation(share):
    """Guidance that shortcuts attention in one sample, or in all, at some blocks."""
    model, given = ltx.ltx2(**VARIANTS["gated"]), ltx.ltx2_inputs()
    given["spatio_temporal_guidance_blocks"] = [1]
    if share == "one":
        given["perturbation_mask"] = torch.tensor([1.0, 0.0])
    models.check_lossless(model, given, double=ltx.ltx2_double(model), expect=3)
    without = {k: v for k, v in given.items() if k not in ("spatio_temporal_guidance_blocks", "perturbation_mask")}
    assert float((models.run(model, given)[0] - models.run(model, without)[0]).abs().max()) > 1e-3


def test_changed_source(plain, monkeypatch):
    from saccade.swap.diffusers import ltx2 as adapter

    monkeypatch.setitem(adapter._TESTED, "LTX2AudioVideoRotaryPosEmbed.forward", {"another"})
    assert [row.path for row in saccade.plan(plain, "lossless").skipped] == ["rope"]
    monkeypatch.setitem(adapter._TESTED, "LTX2Attention.forward", {"another"})
    report = saccade.plan(plain, "lossless")
    assert not report.swapped and len(report.skipped) == 3
    assert all("untested source" in row.reason for row in report.skipped)


def test_copies_have_their_own(plain):
    models.check_copies(plain, ltx.ltx2_inputs(), ltx.ONE_TILE)


@pytest.mark.parametrize("recipe", ["lossless", ltx.ONE_TILE], ids=["lossless", "sparse"])
def test_compiled(model, recipe):
    ltx.check_compiled(model, model.transformer_blocks[1], ltx.ltx2_inputs(), recipe)


def test_checkpointing(plain):
    ltx.check_checkpointing(plain, plain.transformer_blocks[1], ltx.ltx2_inputs(), ltx.ONE_TILE)
