"""A library that changes under a swap: an edited copy of its own file beside it. The site is skipped and said, never half-patched."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import saccade
from saccade.swap import SwapRefused
from swap.models import run, unchanged


def edited(name: str, tmp_path: Path, *edits: tuple[str, str]) -> ModuleType:
    """The module `name` from a copy of its file in which each (old, new) was replaced once."""
    original = importlib.import_module(name)
    text = Path(original.__file__).read_text()
    for old, new in edits:
        assert text.count(old) >= 1, f"{old!r} is not in {name}"
        text = text.replace(old, new)
    path = tmp_path / f"{name.rpartition('.')[2]}.py"
    path.write_text(text)
    alias = f"{name}_edited_{tmp_path.name.replace('-', '_')}"  # in the same package, so that relative imports work
    spec = importlib.util.spec_from_file_location(alias, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def skipped_and_stock(model: torch.nn.Module, given: dict, expected: str, paths: set[str]) -> None:
    """Exactly `paths` are skipped for the reason `expected`; strict refuses; what is left to swap keeps the output."""
    stock, _ = run(model, given)
    report = saccade.plan(model, "lossless")
    found = {row.path: row.reason for row in report.skipped}
    assert paths <= set(found), f"{paths - set(found)} would be swapped"
    assert all(expected in found[path] for path in paths), found
    with unchanged(model), pytest.raises(SwapRefused, match="nothing was swapped"):
        saccade.accelerate(model, "lossless", strict=True)
    with saccade.accelerated(model, "lossless"):
        torch.testing.assert_close(run(model, given)[0], stock, atol=1e-4, rtol=1e-4)
    assert torch.equal(run(model, given)[0], stock)


@pytest.fixture
def wan_of(tmp_path):
    pytest.importorskip("diffusers")
    from swap import models

    def make(*edits):
        module = edited("diffusers.models.transformers.transformer_wan", tmp_path, *edits)
        stock = models.wan()
        torch.manual_seed(0)
        model = module.WanTransformer3DModel(**{k: v for k, v in stock.config.items() if not k.startswith("_")}).eval()
        model.load_state_dict(stock.state_dict())
        return model, models.wan_inputs(stock)

    return make


def test_the_copy_itself_is_known(wan_of):
    """Without an edit that means something, the same sites are swapped: what follows is due to the edits."""
    model, _ = wan_of(("# I2V task", "# another comment"))
    report = saccade.plan(model, "lossless")
    assert len(report.swapped) == 1 + len(model.blocks) and not report.skipped


def test_processor_changed(wan_of):
    model, given = wan_of(("query = attn.norm_q(query)", "query = attn.norm_q(query) * 1.0"))
    skipped_and_stock(
        model, given, "WanAttnProcessor.__call__ has an untested source", {"rope", "blocks.0.attn1", "blocks.2.attn1"}
    )


def test_rotation_changed(wan_of):
    """Attention is still known, so it is swapped; the tables' new meaning is kept."""
    model, given = wan_of(("return freqs_cos, freqs_sin\n", "return freqs_cos * 1.0, freqs_sin\n"))
    skipped_and_stock(model, given, "WanRotaryPosEmbed.forward has an untested source", {"rope"})
    assert {row.path for row in saccade.plan(model, "lossless").swapped} == {f"blocks.{i}.attn1" for i in range(3)}


def test_processor_renamed(wan_of):
    model, given = wan_of(("WanAttnProcessor", "WanAttentionCall"))
    skipped_and_stock(model, given, "WanAttentionCall.__call__ has an untested source", {"rope", "blocks.0.attn1"})


def test_forward_replaced_by_someone(wan_of):
    model, given = wan_of()
    attention = model.blocks[1].attn1
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    skipped_and_stock(model, given, "replaced by someone else", {"blocks.1.attn1"})


def test_qwen_attention_changed(tmp_path):
    pytest.importorskip("transformers")
    from swap.test_visual_tokens import prompt, tiny_qwen

    name = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    module = edited(
        name, tmp_path, ("attn_output = self.proj(attn_output)", "attn_output = self.proj(attn_output * 1.0)")
    )
    stock = tiny_qwen()
    model = module.Qwen2_5_VLForConditionalGeneration(stock.config).eval()
    model.load_state_dict(stock.state_dict())
    report = saccade.plan(model, "lossless")
    wrong = [row.path for row in report.rows if ".visual.blocks." in row.path and row.kernel != "stock"]
    assert not wrong, f"{wrong} would be swapped although their attention changed"
    assert any("untested source" in (row.reason or "") for row in report.rows)
    given = prompt()
    before, _ = run(model, given)
    with saccade.accelerated(model, "lossless"):
        torch.testing.assert_close(run(model, given)[0], before, atol=1e-4, rtol=1e-4)


def test_siglip_attention_changed(tmp_path):
    pytest.importorskip("transformers")
    from transformers import SiglipVisionConfig

    name = "transformers.models.siglip.modeling_siglip"
    module = edited(
        name, tmp_path, ("attn_output = self.out_proj(attn_output)", "attn_output = self.out_proj(attn_output * 1.0)")
    )
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=7
    )
    torch.manual_seed(0)
    model = module.SiglipVisionModel(config).eval()
    given = {"pixel_values": torch.randn(1, 3, 56, 56)}
    stock, _ = run(model, given)
    for recipe in ("lossless", "aggressive"):
        report = saccade.accelerate(model, recipe)
        assert not report.swapped and report.skipped
        assert any("SiglipAttention.forward has an untested source" in row.reason for row in report.skipped)
        assert torch.equal(run(model, given)[0], stock)
