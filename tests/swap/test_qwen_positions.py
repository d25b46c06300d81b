"""HoPE and VideoRoPE in place of M-RoPE: the right positions, the right rotation, also while generating; or a reason."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

import saccade
from saccade.demo import exact
from saccade.rope import multimodal_positions
from saccade.swap.edit import apply_all
from saccade.swap.transformers import _qwen_sources as sources
from saccade.swap.transformers.qwen_rotary import turned_by
from swap import models
from swap import models_qwen as qwen

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
T, H, W = qwen.GRID[0], qwen.GRID[1] // 2, qwen.GRID[2] // 2
SEGMENTS = [6, (T, H, W), 5]


def recipe(positions: str = "hope", gamma: float | None = 0.75) -> dict:
    params = {"positions": positions} | ({} if gamma is None else {"gamma": gamma})
    return {"rules": [{"kernel": "rotary", "role": "text", "params": params}]}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return qwen.qwen(family)


def hope_oracle(model, family):
    """float64: the formula of the frequencies in place of the model's, at whatever positions come."""
    copied = exact.double(model)
    vision = exact.vision_turn(copied.config.vision_config.rope_parameters["rope_theta"])
    apply_all(turned_by(copied, text=exact.hope_turn(1e4), vision=vision))
    return copied


def test_positions_and_rotation(family, model):
    given = qwen.qwen_inputs(family)
    place, _ = multimodal_positions(SEGMENTS, rule="hope", gamma=0.75)
    assert place.is_floating_point()
    there = {**given, "position_ids": place[:, None].expand(3, 3, -1)}
    want, _ = models.run(hope_oracle(model, family), models.in_double(there))
    peer = copy.deepcopy(model)
    apply_all(turned_by(peer, text=exact.hope_turn(1e4)))  # fp32 torch
    stock = models.run(peer, there)[0]
    with saccade.accelerated(model, recipe()) as report:
        assert "hope" in report.swapped[0].change
        models.within(models.run(model, given)[0], stock, want, 2, "logits")
    assert float((stock - models.run(model, given)[0]).abs().max()) > 0.01


@pytest.mark.parametrize(("rule", "gamma"), [("hope", 1.5), ("hope", 2), ("videorope", None), ("videorope", 0.5)])
def test_index(family, model, rule, gamma):
    """Two samples, padded left and right, the second with an image before its video."""
    video, image = (T, H, W), (1, 2, 3)
    first, second = [6, video, 5], [3, image, 2, video, 1]
    want = [multimodal_positions(one, rule=rule, gamma=gamma) for one in (first, second)]
    kinds = [[0] * 6 + [2] * T * H * W + [0] * 5, [0] * 3 + [1] * 6 + [0] * 2 + [2] * T * H * W + [0]]
    width = 2 + max(map(len, kinds))
    rows, masks = [], []
    for kind, left in zip(kinds, (True, False), strict=True):
        pad = [0] * (width - len(kind))
        rows.append(pad + kind if left else kind + pad)
        masks.append([0] * len(pad) + [1] * len(kind) if left else [1] * len(kind) + [0] * len(pad))
    kinds_, mask = torch.tensor(rows), torch.tensor(masks)
    with saccade.accelerated(model, recipe(rule, gamma)):
        place, delta = model.model.get_rope_index(
            torch.zeros_like(kinds_), mm_token_type_ids=kinds_, attention_mask=mask,
            image_grid_thw=torch.tensor([[1, 4, 6]]), video_grid_thw=torch.tensor([qwen.GRID] * 2),
        )  # fmt: skip
        with pytest.raises(ValueError, match="does not fit the grids"):
            model.model.get_rope_index(torch.zeros_like(kinds_), kinds_, None, torch.tensor([qwen.GRID] * 2), mask)
    for n, (positions, after) in enumerate(want):
        assert torch.equal(place[:, n, mask[n].bool()].double(), positions.double())
        assert not place[:, n, ~mask[n].bool()].any()
        assert float(delta[n, 0]) == after - positions.shape[1]


def test_generation(family, model):
    """What the cache holds and where later tokens stand agree with a forward over everything, at positions made by hand."""
    given = {
        name: value[:1] if name != "pixel_values_videos" else value[: T * H * W * 4]
        for name, value in qwen.qwen_inputs(family).items()
    }
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad(), saccade.accelerated(model, recipe()):
        out = model.generate(**given, **options)
        place, _ = multimodal_positions([*SEGMENTS[:-1], SEGMENTS[-1] + 4], rule="hope", gamma=0.75)
        whole = {
            **given, "input_ids": out.sequences, "position_ids": place[:, None], "attention_mask": torch.ones_like(out.sequences),
            "mm_token_type_ids": torch.nn.functional.pad(given["mm_token_type_ids"], (0, 4)),
        }  # fmt: skip
        logits = model(**whole).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(out.scores, 1), logits, rtol=1e-4, atol=1e-4)


def test_restore(family, model):
    model.model.rope_deltas = None
    given = qwen.placed(model, family)
    models.check_restore(model, given, recipe())
    assert not any("get_rope_index" in vars(module) for module in model.modules())


def test_a_copy_computes_its_own(family, model):
    given = qwen.qwen_inputs(family)
    saccade.accelerate(model, recipe())
    ours = models.run(model, given)[0]
    other = copy.deepcopy(model)
    saccade.restore(model)
    model.model.rope_deltas = None
    assert other.model.get_rope_index.__self__ is other.model
    assert torch.equal(models.run(other, given)[0], ours)
    assert model.model.rope_deltas is None


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"positions": "hope"}, "gamma: hope needs a number"),
        ({"positions": "hope", "gamma": -1}, "gamma: expected a number above 0"),
        ({"positions": "hope", "gamma": True}, "gamma: expected a number above 0"),
        ({"positions": "tad"}, "positions: expected mrope, hope or videorope"),
        ({"gamma": 1.0}, "has no temporal stride"),
    ],
)
def test_refused_parameters(family, model, params, why):
    report = saccade.plan(model, {"rules": [{"kernel": "rotary", "role": "text", "params": params}]})
    (row,) = report.skipped
    assert row.reason.startswith(why) or why in row.reason


def test_refused_places(family, model, monkeypatch):
    rules = recipe()
    del rules["rules"][0]["role"]
    report = saccade.plan(model, rules)
    assert [row.role for row in report.swapped] == ["text"]
    assert "role='text'" in report.skipped[0].reason
    (row,) = saccade.plan(model.model.language_model, recipe()).skipped
    assert "give the whole model" in row.reason
    monkeypatch.setitem(sources._TESTED, f"{type(model.model).__name__}.get_rope_index", {"another"})
    (row,) = saccade.plan(model, recipe()).skipped
    assert "get_rope_index has an untested source" in row.reason
    assert saccade.plan(model, recipe("mrope", None)).swapped


def test_time_as_text_is_refused():
    (row,) = saccade.plan(qwen.qwen("qwen3_vl"), recipe()).skipped
    assert "nothing to act on" in row.reason
