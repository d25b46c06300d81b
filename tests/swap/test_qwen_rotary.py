"""Fused rotation of the Qwen-VL families: judged by a float64 model, refused where one line of the source is another."""

from __future__ import annotations

import inspect
import linecache
import textwrap

import pytest
import torch

pytest.importorskip("transformers", minversion="5.19")
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

import saccade
from saccade.rope import mrope, multimodal_positions, qwen_vision
from saccade.swap import SwapRefused
from saccade.swap.source import fingerprint
from saccade.swap.transformers import qwen_rotary
from swap import models
from swap import models_qwen as qwen

FAMILY = "qwen2_5_vl"
ROTARY = {"rules": [{"kernel": "rotary"}]}


@pytest.fixture
def model():
    return qwen.qwen(FAMILY)


def logits(model, given=None) -> torch.Tensor:
    return models.run(model, qwen.qwen_inputs(FAMILY) if given is None else given)[0]


def test_the_float64_twin_is_float64_where_a_double_model_is_not(model):
    """In float64 the kernel and the twin's formula share no code and agree far below what they judge."""
    given = models.in_double(qwen.qwen_inputs(FAMILY))
    twin = qwen.twin(model, FAMILY)
    true = logits(twin, given)
    norms_alone = qwen.exact.double(model)
    naive = logits(norms_alone, given)
    with saccade.accelerated(norms_alone, ROTARY) as report:
        assert len(report.swapped) == 2
        ours = logits(norms_alone, given)
    fp32_tables = float((naive - true).abs().max())
    assert fp32_tables > 1e-9, "transformers has become exact in float64: the twin is not needed any more"
    assert 100 * float((ours - true).abs().max()) < fp32_tables


@pytest.mark.parametrize(
    ("name", "wrong"), [("text_spec", mrope(32, 1e4, (5, 6, 5))), ("vision_spec", qwen_vision(32, 9000.0))]
)
def test_a_wrong_rotation_does_not_pass(model, monkeypatch, name, wrong):
    given = qwen.qwen_inputs(FAMILY)
    want, stock = logits(qwen.twin(model, FAMILY), models.in_double(given)), logits(model)
    monkeypatch.setattr(qwen_rotary, name, lambda *a, **k: wrong)
    monkeypatch.setattr(qwen_rotary, "frequencies_reason", lambda *a: None)
    with saccade.accelerated(model, ROTARY):
        ours = logits(model)
    with pytest.raises(AssertionError, match="error"):
        models.within(ours, stock, want, 2, "logits")


def altered(function, old, new):
    """The function with a changed source that `inspect` can read."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    source = source[source.index("def ") :]
    assert old in source
    name = f"<altered {function.__name__} {hash((old, new))}>"
    source = source.replace(old, new, 1)
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope = dict(vars(modeling))
    exec(compile(source, name, "exec"), scope)
    return scope[function.__name__]


@pytest.mark.parametrize(
    ("owner", "name", "old", "new"),
    [
        ("Qwen2_5_VLAttention", "forward", "self.q_proj(hidden_states)", "2 * self.q_proj(hidden_states)"),
        ("Qwen2_5_VLVisionAttention", "forward", "apply_rotary_pos_emb_vision(", "renamed("),
        ("Qwen2_5_VLRotaryEmbedding", "forward", "freqs.cos()", "freqs.cos().abs()"),
        ("Qwen2_5_VLVisionRotaryEmbedding", "recomposition_frequencies", "freq_h, freq_w]", "freq_w, freq_h]"),
        ("Qwen2_5_VLTextModel", "forward", "position_ids = position_ids[1:]", "position_ids = position_ids[1:] + 1"),
        (None, "apply_rotary_pos_emb_vision", "(q * cos)", "(q * cos * 2)"),
        (None, "rotate_half", "-x2", "x2"),
    ],
)
def test_altered_code_is_refused(model, monkeypatch, owner, name, old, new):
    place = modeling if owner is None else getattr(modeling, owner)
    monkeypatch.setattr(place, name, altered(getattr(place, name), old, new))
    with models.unchanged(model):
        report = saccade.plan(model, ROTARY)
        assert report.skipped and all(f"{name} has an untested source" in row.reason for row in report.skipped)
        with pytest.raises(SwapRefused, match=f"(?s)nothing was swapped.*{name} has an untested source"):
            saccade.accelerate(model, ROTARY, strict=True)


def test_layout_and_annotations_do_not_count():
    own = modeling.Qwen2_5_VLAttention.forward
    changed = altered(
        own, "bsz, q_len, _ = hidden_states.size()", "bsz: int\n    (bsz, q_len, _) = hidden_states.size()"
    )
    assert fingerprint(changed) != fingerprint(own)  # `bsz: int` is a statement
    assert fingerprint(altered(own, "-> tuple[", "-> list[")) == fingerprint(own)


@pytest.mark.parametrize("family", qwen.FAMILIES)
def test_generation_with_a_cache(family):
    model = qwen.qwen(family)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        stock = model.generate(**qwen.qwen_inputs(family), **options)
        with saccade.accelerated(model):
            assert torch.equal(model.generate(**qwen.qwen_inputs(family), **options), stock)


def test_compile_text_attention_without_breaks(model):
    torch.compiler.reset()
    with saccade.accelerated(model, ROTARY), torch.no_grad():
        text = model.model.language_model
        place, _ = multimodal_positions([9], rule="mrope")
        x = torch.randn(1, 9, 64)
        embeddings = text.rotary_emb(x, place[:, None])
        attention = text.layers[0].self_attn
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        expected = attention(x, position_embeddings=embeddings)[0]
        for _ in range(2):
            assert torch.equal(compiled(x, position_embeddings=embeddings)[0], expected)


def test_a_patch_on_top_must_go_first(model):
    saccade.accelerate(model, ROTARY)
    layer = model.model.language_model.layers[1].self_attn
    ours = layer.forward
    layer.forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(RuntimeError, match="undo that first"):
        saccade.restore(model)
    layer.forward = ours
    saccade.restore(model)
    assert not any("forward" in vars(m) for m in model.modules())
