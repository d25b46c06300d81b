"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: exact, restored without a trace, known by their source."""

from __future__ import annotations

import copy
import types

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")

import saccade
from saccade.swap import SwapRefused
from saccade.swap.transformers import _qwen_sources as sources
from swap import models
from swap import models_qwen as qwen

ROTARY = {"rules": [{"kernel": "rotary"}]}
PACKED = {"rules": [{"kernel": "dense", "role": "vision"}]}
ATTENTION = {  # vision, text
    "qwen2_vl": ("VisionAttention", "Qwen2VLAttention"),
    "qwen2_5_vl": ("Qwen2_5_VLVisionAttention", "Qwen2_5_VLAttention"),
    "qwen3_vl": ("Qwen3VLVisionAttention", "Qwen3VLTextAttention"),
}


@pytest.fixture(scope="module", params=qwen.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return qwen.qwen(family)


def logits(model, given) -> torch.Tensor:
    return models.run(model, given)[0]


@pytest.mark.parametrize("recipe", ["lossless", ROTARY, PACKED], ids=["lossless", "rotary", "packed"])
def test_lossless(family, model, recipe):
    models.check_lossless(model, qwen.qwen_inputs(family), recipe, expect=2, double=qwen.twin(model, family))


def test_windows_that_the_frame_does_not_fill(family, model):
    """Windows of 4 x 4 patches, frames of 6 x 10, and two videos of different sizes."""
    given = [qwen.tower_inputs(grid, seed) for seed, grid in ((3, (3, 6, 10)), (4, (1, 8, 4)))]
    both = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    tower = model.model.visual
    models.check_lossless(tower, both, expect=4, double=qwen.twin(tower, family))


def test_restore(family, model):
    models.check_restore(model, qwen.placed(model, family), "lossless")
    models.check_restore(model, qwen.placed(model, family), PACKED)


def test_every_attention_is_reported(family, model):
    report = saccade.plan(model, "lossless")
    rows = {row.path: row for row in report.rows if row.kind == "attention"}
    for name, role in zip(ATTENTION[family], ("vision", "text"), strict=True):
        paths = {path for path, module in model.named_modules() if type(module).__name__ == name}
        assert paths and paths == {path for path, row in rows.items() if row.role == role}
    assert all(row.reason == "no rule of the recipe" for row in rows.values() if row.role == "text")
    assert len(report.swapped) == 2 + len(model.model.visual.blocks)
    refused = saccade.plan(model, {"rules": [{"kernel": "dense"}]}).skipped
    assert {row.reason for row in refused} == {"dense cannot go here; kernels that can: none"}


def test_one_call_for_all_sequences(family, model, monkeypatch):
    """Stock calls attention for each window; here it is called once for each block, and layouts are built once."""
    from saccade.swap.transformers import _qwen_packed as packed

    calls, built = [], []
    attention, build = packed.sparse_attention, packed.patterns.packed
    monkeypatch.setattr(packed, "sparse_attention", lambda *a, **k: calls.append(a[3].to_mask()) or attention(*a, **k))
    monkeypatch.setattr(packed.patterns, "packed", lambda *a, **k: built.append(a) or build(*a, **k))
    tower, given = model.model.visual, qwen.tower_inputs()
    with torch.no_grad(), saccade.accelerated(tower, PACKED):
        for _ in range(2):
            tower(**given)
    blocks, (t, h, w) = len(tower.blocks), qwen.GRID
    windows = t * h * w // 16 if family == "qwen2_5_vl" else t
    assert len(calls) == 2 * blocks and len(built) == 1 + (family == "qwen2_5_vl")
    assert float(calls[0].float().mean()) == pytest.approx(1 / windows)


def test_offsets_of_the_caller(family, model):
    """Offsets that the caller computed, and writes anew into the same tensor."""
    tower, given = model.model.visual, qwen.tower_inputs((2, 8, 8))
    cut = torch.tensor([0, 64, 128], dtype=torch.int32)
    with torch.no_grad():
        stock = [
            tower(**given, cu_seqlens=torch.tensor(to, dtype=torch.int32)).pooler_output
            for to in ([0, 64, 128], [0, 32, 128])
        ]
        with saccade.accelerated(tower, PACKED):
            ours = [tower(**given, cu_seqlens=cut).pooler_output]
            cut[1] = 32
            ours.append(tower(**given, cu_seqlens=cut).pooler_output)
    assert not torch.allclose(*stock, rtol=0, atol=1e-3)
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_bf16(family, model):
    tower = copy.deepcopy(model.model.visual).to(torch.bfloat16)
    given = qwen.tower_inputs()
    exact = qwen.twin(tower, family)(**models.in_double(given)).pooler_output
    with torch.inference_mode():
        stock = tower(**given).pooler_output
        with saccade.accelerated(tower) as report:
            first, again = (tower(**given).pooler_output for _ in range(2))
    with saccade.accelerated(tower), torch.no_grad():
        assert torch.equal(tower(**given).pooler_output, first) and torch.equal(first, again)
    assert not report.notes and first.dtype == torch.bfloat16
    models.within(first, stock, exact, 2, "features")


def test_float64_runs_stock_and_says_so(family, model):
    tower = copy.deepcopy(model.model.visual).double()
    given = models.in_double(qwen.tower_inputs())
    with torch.no_grad():
        stock = tower(**given).pooler_output
        with pytest.warns(UserWarning, match="stock attention ran"), saccade.accelerated(tower, PACKED) as report:
            assert torch.equal(tower(**given).pooler_output, stock)
        assert len(report.notes) == 1
        strict = {"rules": [{"kernel": "dense", "role": "vision", "on_unsupported": "error"}]}
        with saccade.accelerated(tower, strict), pytest.raises(ValueError, match="head_dim"):
            tower(**given)


def test_gradient_checkpointing(family, model):
    given = qwen.qwen_inputs(family)
    with saccade.accelerated(model):
        out, grads = models.run(model, given, backward=True)
        model.gradient_checkpointing_enable()
        model.train()
        try:
            again, more = models.run(model, given, backward=True)
        finally:
            model.eval()
            model.gradient_checkpointing_disable()
    assert torch.equal(out, again)
    assert all(torch.equal(more[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compile_a_block_without_breaks(family, model, grad):
    """A block inside its tower, where the tower has built the layouts."""
    torch.compiler.reset()
    tower, given = copy.deepcopy(model.model.visual), qwen.tower_inputs()
    with torch.set_grad_enabled(grad), saccade.accelerated(tower):
        expected = tower(**given).pooler_output
        for block in tower.blocks:
            vars(block)["forward"] = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            found = tower(**given).pooler_output
        if grad:
            found.sum().backward()
        for block in tower.blocks:
            del vars(block)["forward"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_copies_have_their_own(family, model):
    given = qwen.tower_inputs()
    original = copy.deepcopy(model.model.visual)
    stock = logits(original, given)
    saccade.accelerate(original)
    ours = logits(original, given)
    other = copy.deepcopy(original)
    mine, its = (m.blocks[0].attn._saccade_packed.packed for m in (original, other))
    assert mine is not its and other.blocks[1].attn._saccade_packed.packed is its
    saccade.restore(original)
    assert torch.equal(logits(original, given), stock)
    assert torch.equal(logits(other, given), ours) and not torch.equal(ours, stock)
    saccade.restore(other)
    assert torch.equal(logits(other, given), stock)


def test_two_models_do_not_know_each_other(family, model):
    other = copy.deepcopy(model.model.visual)
    stock = logits(other, qwen.tower_inputs())
    with saccade.accelerated(model):
        assert torch.equal(logits(other, qwen.tower_inputs()), stock)


def test_changed_attention(family, model, monkeypatch):
    """An attention that is not known keeps the loop, and no part of the rotation."""
    vision, text = ATTENTION[family]
    monkeypatch.setitem(sources._TESTED, f"{vision}.forward", {"another"})
    report = saccade.accelerate(model)
    saccade.restore(model)
    assert {row.role for row in report.swapped} == {"text"}
    assert len(report.skipped) == 1 + len(model.model.visual.blocks)
    assert all(f"{vision}.forward has an untested source" in row.reason for row in report.skipped)
    monkeypatch.setitem(sources._TESTED, f"{text}.forward", {"another"})
    report = saccade.accelerate(model)
    assert not report.swapped and not report.applied
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, strict=True)


@pytest.mark.parametrize(
    ("function", "rotation", "calls"),
    [("rotate_half", False, True), ("apply_rotary_pos_emb_vision", False, True), ("get_vision_attention_seqlens", True, False),
     ("is_flash_attention_requested", True, False)],
)  # fmt: skip
def test_changed_functions(family, model, monkeypatch, function, rotation, calls):
    monkeypatch.setitem(sources._TESTED, function, {"another"})
    rows = [row for row in saccade.plan(model).rows if row.role == "vision"]
    for row in rows:
        known = rotation if row.kind == "rotary" else calls
        assert (row.reason is None) == known, row
        assert known or f"{function} has an untested source" in row.reason


def test_one_patched_attention(family, model):
    """It keeps its forward, the others are called once; the rotation is all or nothing."""
    tower = copy.deepcopy(model.model.visual)
    given, attn = qwen.tower_inputs(), tower.blocks[1].attn
    attn.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), attn)
    before = attn.forward
    with saccade.accelerated(tower) as report:
        assert attn.forward is before
        ours = logits(tower, given)
    assert {row.path for row in report.skipped} == {"rotary_pos_emb", "blocks.1.attn"}
    assert all("replaced by someone else" in row.reason for row in report.skipped)
    assert len(report.swapped) == len(tower.blocks) - 1
    torch.testing.assert_close(ours, logits(tower, given), rtol=1e-4, atol=1e-4)


def test_what_hooks_left_behind(family, model):
    """accelerate leaves the class's forward bound in the instance: the same sites are swapped."""
    hooks = pytest.importorskip("accelerate.hooks")
    own = copy.deepcopy(model)
    hooks.add_hook_to_module(own.model.visual.blocks[1].attn, hooks.ModelHook())
    assert any("accelerate's hooks lie around its forward" in row.reason for row in saccade.plan(own).skipped)
    hooks.remove_hook_from_module(own, recurse=True)
    assert [row.path for row in saccade.plan(own).swapped] == [row.path for row in saccade.plan(model).swapped]


def test_frequencies_that_the_config_does_not_tell(family, model):
    changed = copy.deepcopy(model)
    changed.model.language_model.rotary_emb.inv_freq /= 4
    changed.model.visual.rotary_pos_emb.inv_freq /= 4
    rotary = [row for row in saccade.plan(changed).rows if row.kind == "rotary"]
    assert len(rotary) == 2 and all("not those of the model's config" in row.reason for row in rotary)


def test_scaled_frequencies_are_refused(family):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    report = saccade.plan(qwen.qwen(family, text={"rope_parameters": scaled}), ROTARY)
    (row,) = report.skipped
    assert row.role == "text" and "rope_type 'linear'" in row.reason


def test_steps_are_refused(family, model):
    report = saccade.plan(model, {"rules": [{"kernel": "dense", "role": "vision", "steps": [0, 2]}]})
    assert not report.swapped and all("steps" in row.reason for row in report.skipped)


def test_lora(family, model):
    """Before and after the swap; the swap leaves adapters and their keys alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    given = qwen.qwen_inputs(family)
    models.check_lossless(adapted, given, expect=2, double=qwen.twin(adapted, family))
    stock = logits(adapted, given)
    saccade.restore(adapted)
    late = copy.deepcopy(model)
    saccade.accelerate(late)
    torch.manual_seed(5)
    late = peft.get_peft_model(late, config)
    torch.testing.assert_close(logits(late, given), stock, rtol=1e-4, atol=1e-4)
    saccade.restore(late)
    assert torch.equal(logits(late, given), stock)
