"""Registered names: known to transformers with their masks, and the same results as its own attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.swap import register_transformers
from swap.models import in_double, run, seeded, within

NAMES = register_transformers()


def test_names_have_masks():
    for name in NAMES:
        assert name in ALL_ATTENTION_FUNCTIONS
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def tiny_text():
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return seeded(lambda: Qwen2ForCausalLM(config))


@pytest.mark.parametrize("padding", (0, 5))
def test_causal_text(padding):
    """GQA, causal, and with a padding mask, which must not be dropped."""
    model = tiny_text()
    ids = torch.randint(0, 64, (2, 80), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    stock, _ = run(model, given)
    import copy

    exact, _ = run(copy.deepcopy(model).double(), in_double(given))
    model.set_attn_implementation("saccade_dense")
    ours, _ = run(model, given)
    real = mask.bool()
    within(ours[real], stock[real], exact[real], 2, "logits")
    if not padding:
        assert not torch.equal(ours, stock)  # our kernel ran


def test_generation():
    """One query against a cache."""
    model = tiny_text()
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        stock = model.generate(ids, **options)
        model.set_attn_implementation("saccade_dense")
        assert torch.equal(model.generate(ids, **options), stock)


def test_bidirectional_tower():
    config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=7
    )
    model = seeded(lambda: SiglipVisionModel(config))
    given = {"pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))}
    stock, _ = run(model, given)
    model.set_attn_implementation("saccade_dense")
    ours, _ = run(model, given)
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=1e-4)


def test_vision_tower_in_one_call(monkeypatch):
    """The name with "flash" takes the tower's packed branch: one call for all windows."""
    from saccade.swap.transformers import names
    from swap.test_visual_tokens import prompt, tiny_qwen

    model, given = tiny_qwen(), prompt()
    stock, _ = run(model, given)
    calls = []
    inner = names.sparse_attention
    monkeypatch.setattr(names, "sparse_attention", lambda q, *a, **k: (calls.append(q.shape), inner(q, *a, **k))[1])
    model.set_attn_implementation({"vision_config": "saccade_flash"})
    ours, _ = run(model, given)
    depth = model.config.vision_config.depth
    assert [shape[2] for shape in calls] == [given["pixel_values_videos"].shape[0]] * depth
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=1e-4)


def test_dropout_is_refused():
    from saccade.swap.transformers.names import flash

    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="dropout: saccade_flash has none"):
        flash(None, q, q, q, None, dropout=0.1, cu_seq_lens_q=torch.tensor([0, 8]))
