"""Vision towers of transformers: lossless equals stock, stock runs where only stock can, every attention is in the report."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import saccade
from saccade.swap import SwapRefused
from saccade.swap.families import looks_like_attention
from saccade.swap.transformers import towers
from swap import models, models_towers

TOWERS = ("siglip", "clip", "internvl_tower", "videomae", "vivit")
CAPTIONERS = ("llava_onevision", "llava_next_video", "video_llava", "internvl")
DENSE = {"rules": [{"kernel": "dense", "role": "vision"}]}


@pytest.fixture(scope="module", params=TOWERS)
def model(request):
    return getattr(models_towers, request.param)()


@pytest.fixture(scope="module", params=CAPTIONERS)
def captioner(request):
    return getattr(models_towers, request.param)()


def attention_of(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if looks_like_attention(module)}


# ---- towers ----------------------------------------------------------------------------------------------------------------
def test_lossless(model):
    report = models.check_lossless(model, models_towers.pixels(model), expect=4)
    assert {row.kernel for row in report.swapped} == {"dense"}


def test_lossless_where_stock_is_eager(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    models.check_lossless(eager, models_towers.pixels(model), expect=4)


def test_lossless_bf16():
    model = models_towers.siglip()
    given = models_towers.pixels(model)
    half = copy.deepcopy(model).bfloat16()
    # the float64 twin has the rounded weights, and sees the rounded images
    given = {"pixel_values": given["pixel_values"].bfloat16()}
    models.check_lossless(half, given, double=copy.deepcopy(half).double())


def test_restore(model):
    models.check_restore(model, models_towers.pixels(model), "lossless")


def test_every_attention_is_reported(model):
    report = saccade.plan(model, "balanced")
    rows = {row.path: row for row in report.rows if row.kind == "attention"}
    assert rows.keys() == attention_of(model).keys()
    assert all(row.family for row in rows.values())
    assert sum(row.role == "vision" for row in rows.values()) == 4


def test_decoder_of_pretraining():
    model = models_towers.videomae_pretraining()
    report = saccade.plan(model, "lossless")
    assert {row.path for row in report.swapped} == attention_of(model).keys()
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[:, ::2] = True
    given = {**models_towers.pixels(model), "bool_masked_pos": mask}
    models.check_lossless(model, given, expect=6)


@pytest.mark.parametrize("name", ["siglip_pair", "clip_pair"])
def test_text_tower_is_listed_and_left(name):
    model = getattr(models_towers, name)()
    report = saccade.plan(model, {"rules": [{"kernel": "dense"}]})
    rows = {row.path: row for row in report.rows if row.kind == "attention"}
    assert rows.keys() == attention_of(model).keys()
    text = [row for path, row in rows.items() if path.startswith("text_model")]
    assert len(text) == 2 and all(row.role == "text" and row.kernel == "stock" for row in text)
    ids = torch.tensor([[1, 2, 3, 63]])
    given = {"input_ids": ids, "pixel_values": models_towers.pixels(model.vision_model)["pixel_values"]}
    with torch.no_grad():
        stock = model(**given).logits_per_image
        with saccade.accelerated(model):
            torch.testing.assert_close(model(**given).logits_per_image, stock, rtol=1e-4, atol=1e-4)


def test_changed_source(model, monkeypatch):
    name = f"{type(next(iter(_layer_attention(model)))).__name__}.forward"
    monkeypatch.setitem(towers._TESTED, name, {"another"})
    report = saccade.accelerate(model, DENSE)
    assert not report.applied and len(report.skipped) == 4
    assert all(f"{name} has an untested source" in row.reason for row in report.skipped)
    with pytest.raises(SwapRefused, match="untested source"):
        saccade.accelerate(model, DENSE, strict=True)


def _layer_attention(model):
    return [module for name, module in attention_of(model).items() if "layer" in name]


def test_replaced_forward_stays(model):
    own = copy.deepcopy(model)
    attention = _layer_attention(own)[1]
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    report = saccade.accelerate(own, DENSE)
    (row,) = report.skipped
    assert "replaced by someone else" in row.reason and len(report.swapped) == 3
    saccade.restore(own)
    assert "forward" in vars(attention)


def test_hooks_of_accelerate(model):
    """While they lie around a forward it stays as it is; what they leave behind does not matter, and `restore` gives it back."""
    hooks = pytest.importorskip("accelerate.hooks")
    own = copy.deepcopy(model)
    attention = _layer_attention(own)[1]
    hooks.add_hook_to_module(attention, hooks.ModelHook())
    (row,) = saccade.plan(own, DENSE).skipped
    assert "accelerate's hooks lie around its forward" in row.reason
    hooks.remove_hook_from_module(attention)
    left = vars(attention)["forward"]
    report = saccade.accelerate(own, DENSE)
    assert not report.skipped and len(report.swapped) == 4
    saccade.restore(own)
    assert vars(attention)["forward"] is left


def test_older_layout(model):
    """A tower whose layers lie one module deeper, as in earlier releases: every attention is listed, with the reason."""

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)

    cls = type(type(model).__name__, (torch.nn.Module,), {"forward": forward, "__module__": type(model).__module__})
    old = cls()
    old.vision_model, old.config = torch.nn.Module(), model.config
    old.vision_model.inner = torch.nn.ModuleList(_layer_attention(model))
    rows = saccade.plan(old, "balanced").rows
    assert {row.path for row in rows} == attention_of(old).keys() and len(rows) == 4
    assert all("no layers where they are in the tested" in row.reason for row in rows)


def test_a_class_of_the_same_name():
    """Of another package: it is of no known family."""

    class SelfAttention(torch.nn.Module):
        pass

    names = (
        "SiglipVisionModel",
        "Qwen2VLTextModel",
        "Qwen3VLVisionModel",
        "Qwen2VLModel",
        "InternVLModel",
        "TimesformerModel",
    )
    for name in names:
        other = type(name, (torch.nn.Module,), {})()
        other.attention = SelfAttention()
        (row,) = saccade.plan(other, "balanced").rows
        assert row.path == "attention" and row.reason == "SelfAttention is of no known family"


ERROR = {"rules": [{"kernel": "dense", "role": "vision", "on_unsupported": "error"}]}


def check_declined(model, given, reason):
    """Stock runs with one note and one warning; or there is an error, where the rule says so."""
    with torch.no_grad():
        with saccade.accelerated(model, DENSE) as report:
            with pytest.warns(UserWarning, match=reason):
                model(**given)
            model(**given)
            assert report.notes == (f"dense: {reason}; stock attention ran",)
        with saccade.accelerated(model, ERROR), pytest.raises(ValueError, match=reason):
            model(**given)


def test_what_cannot_be_served_is_said(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    given = models_towers.pixels(model)
    check_declined(eager, {**given, "output_attentions": True}, "attention maps were asked for")
    if "Vivit" in type(model).__name__:
        mask = {"attention_mask": torch.ones(2, 33, dtype=torch.long).tril()}
        check_declined(model, {**given, **mask}, "the model gave a mask")


def test_dropout_is_said():
    model = models_towers.siglip(attention_dropout=0.5).train()
    check_declined(model, models_towers.pixels(model), "attention dropout of 0.5 in training")


def test_attention_maps_are_those_of_stock(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    given = {**models_towers.pixels(model), "output_attentions": True}
    with torch.no_grad():
        stock = eager(**given)
        with saccade.accelerated(eager):
            ours = eager(**given)
            given["output_attentions"] = False
            assert eager(**given).get("attentions") is None
    assert len(stock.attentions) == len(ours.attentions) == 4
    assert torch.equal(stock.last_hidden_state, ours.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(stock.attentions, ours.attentions, strict=True))


def test_dropout_in_training_is_that_of_stock():
    model = models_towers.siglip(attention_dropout=0.5).train()
    given = models_towers.pixels(model)
    torch.manual_seed(0)
    stock, _ = models.run(model, given)
    with saccade.accelerated(model):
        torch.manual_seed(0)
        assert torch.equal(models.run(model, given)[0], stock)


def test_mask_is_that_of_stock():
    model = models_towers.vivit()
    given = models_towers.pixels(model)
    given["attention_mask"] = torch.ones(2, 33, dtype=torch.long)
    given["attention_mask"][:, 20:] = 0
    stock, _ = models.run(model, given)
    with saccade.accelerated(model):
        assert torch.equal(models.run(model, given)[0], stock)
        del given["attention_mask"]
        assert not torch.equal(models.run(model, given)[0], stock)


def test_copies_have_their_own(model):
    given = models_towers.pixels(model)
    original = copy.deepcopy(model)
    stock, _ = models.run(original, given)
    saccade.accelerate(original, DENSE)
    other = copy.deepcopy(original)
    here, there = (_layer_attention(one)[0] for one in (original, other))
    assert vars(here)["_saccade_attention"] is not vars(there)["_saccade_attention"]
    assert vars(there)["forward"].__self__ is there
    swapped, _ = models.run(other, given)
    saccade.restore(original)
    assert torch.equal(models.run(original, given)[0], stock)
    assert torch.equal(models.run(other, given)[0], swapped)
    saccade.restore(other)
    assert torch.equal(models.run(other, given)[0], stock)


def test_after_inference_mode_it_trains():
    model = models_towers.siglip(image_size=40)
    given = models_towers.pixels(model)
    with saccade.accelerated(model):
        with torch.inference_mode():
            model(**given)
        _, grads = models.run(model, given, backward=True)
    assert grads and all(g.isfinite().all() for g in grads.values())


def test_compiled_block(model):
    block = _block(copy.deepcopy(model))
    x = torch.randn(2, 20, 48)
    extra = (None,) if "Siglip" in type(block).__name__ or "CLIP" in type(block).__name__ else ()
    holder = copy.deepcopy(model)
    with saccade.accelerated(holder, DENSE), torch.no_grad():
        block = _block(holder)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, *extra), block(x, *extra), rtol=1e-5, atol=1e-5)


def _block(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Layer"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    own = copy.deepcopy(model).train()
    given = models_towers.pixels(own)
    given["pixel_values"].requires_grad_(True)
    with saccade.accelerated(own, DENSE):
        out, grads = models.run(own, given, backward=True)
        own.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, checkpointed = models.run(own, given, backward=True)
    assert torch.equal(out, again) and grads.keys() == checkpointed.keys()
    assert all(torch.equal(grads[name], checkpointed[name]) for name in grads)


def test_lora():
    """Put in before or after the swap, it works, trains and does not matter to `restore`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    given = models_towers.pixels(models_towers.siglip())

    def adapted(first: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = models_towers.siglip()
        torch.manual_seed(1)
        if first == "swap":
            saccade.accelerate(model, DENSE)
        wrapped = peft.get_peft_model(model, config)
        if first == "lora":
            assert len(saccade.accelerate(wrapped, DENSE).swapped) == 4
        _, grads = models.run(wrapped, given, backward=True)
        assert grads and all("lora" in name for name in grads)
        ours, _ = models.run(wrapped, given)
        saccade.restore(wrapped)
        return ours, models.run(wrapped, given)[0]

    for first in ("swap", "lora"):
        ours, stock = adapted(first)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


# ---- captioners ------------------------------------------------------------------------------------------------------------
def test_captioner_is_lossless(captioner):
    model, given = captioner
    models.check_lossless(model, given, DENSE, expect=4)


def test_captioner_reports_every_attention(captioner):
    model, _ = captioner
    report = saccade.plan(model, DENSE)
    rows = {row.path: row for row in report.rows if row.kind == "attention"}
    assert rows.keys() == attention_of(model).keys()
    text = {path: row for path, row in rows.items() if "language_model" in path}
    assert len(text) == 2 and all(row.role == "text" and row.kernel == "stock" for row in text.values())
    assert all(row.kernel == "dense" for path, row in rows.items() if path not in text)
    models.check_restore(*captioner, DENSE)
