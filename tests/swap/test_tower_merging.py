"""Token merging in SigLIP, CLIP and InternVL towers: equal to an oracle in float64, and full length everywhere outside of the tower."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import saccade
from saccade.swap.merging import Merging
from saccade.swap.transformers import towers
from swap import models, models_towers
from swap.oracle_towers import decreasing, oracle

TOWERS = ("siglip", "clip", "internvl_tower")
CAPTIONERS = ("llava_onevision", "llava_next_video", "video_llava", "internvl")


def recipe(dense: bool = False, **params):
    rules = [{"kernel": "merge", "role": "vision", "params": params}]
    return {"rules": [{"kernel": "dense"}, *rules] if dense else rules}


@pytest.fixture(scope="module", params=TOWERS)
def model(request):
    return getattr(models_towers, request.param)()


# ---- oracle ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("proportional", [False, True])
def test_equals_the_oracle(model, dense, proportional):
    """Every hidden state and the output, each token with its row, within the contract against float64."""
    given = models_towers.pixels(model)
    prefix = 0 if "Siglip" in type(model).__name__ else 1
    amounts = decreasing(49, 0.3, 4)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        want = [oracle(exact, image, amounts, prefix, proportional) for image in given["pixel_values"].double()]
        eager = [oracle(model, image, amounts, prefix, proportional) for image in given["pixel_values"]]
        with saccade.accelerated(model, recipe(dense, keep=0.3, proportional=proportional)) as report:
            out = model(**given, output_hidden_states=True)
    row = next(row for row in report.rows if row.kind == "merge")
    assert row.change.startswith(f"{49 + prefix} tokens become {49 + prefix - sum(amounts)}, ")
    assert not report.notes and len(out.hidden_states) == 5
    for b in range(2):
        for i, state in enumerate(out.hidden_states):
            if i == 0:
                assert torch.equal(state[b], eager[b][0][0])
                continue
            error, own = ((x.double() - want[b][0][i]).abs().max() for x in (state[b], eager[b][0][i]))
            assert error <= 2 * own, f"layer {i}: {error:.3e}, eager {own:.3e}"
        error, own = ((x.double() - want[b][1]).abs().max() for x in (out.last_hidden_state[b], eager[b][1]))
        assert error <= 2 * own
    distinct = out.hidden_states[-1][0].unique(dim=0).shape[0]
    assert distinct == 49 + prefix - sum(amounts)


def test_gradients_are_those_of_the_oracle(model):
    """By autograd through the oracle, in float64: merging itself is linear."""
    exact = copy.deepcopy(model).double()
    image = models_towers.pixels(model, batch=1)["pixel_values"].double()
    prefix = 0 if "Siglip" in type(model).__name__ else 1
    with saccade.accelerated(exact, recipe(keep=0.3)):
        ours = exact(pixel_values=image).last_hidden_state
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (ours * weights).sum().backward()
    grads = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    exact.zero_grad(set_to_none=True)
    _, want = oracle(exact, image[0], decreasing(49, 0.3, 4), prefix)
    (want * weights[0]).sum().backward()
    found = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    assert grads.keys() >= found.keys() and len(found) > 40
    for name, grad in found.items():
        error = float((grads[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6))
        # InternVL's norm is computed in float32 whatever the model's dtype
        assert error < (1e-5 if hasattr(model.encoder, "layer") else 1e-7), f"{name}: {error:.1e}"


# ---- what stays ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("params", [{"keep": 1.0}, {"r": 0}])
def test_nothing_merged_same_bits(model, params):
    given = {**models_towers.pixels(model), "output_hidden_states": True}
    with torch.no_grad():
        stock = model(**given)
        with saccade.accelerated(model, recipe(**params)) as report:
            ours = model(**given)
    assert any(row.kernel == "merge" for row in report.swapped)
    assert torch.equal(stock.last_hidden_state, ours.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(stock.hidden_states, ours.hidden_states, strict=True))


def test_restore(model):
    models.check_restore(model, models_towers.pixels(model), recipe(True, keep=0.3))


def test_tuples(model):
    """return_dict=False gives the same values."""
    given = models_towers.pixels(model)
    with torch.no_grad(), saccade.accelerated(model, recipe(keep=0.5)):
        named = model(**given, output_hidden_states=True)
        plain = model(**given, output_hidden_states=True, return_dict=False)
        chosen = model(**given, output_hidden_states=-2).hidden_states
    assert isinstance(plain, tuple) and torch.equal(plain[0], named.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(plain[-1], named.hidden_states, strict=True))
    assert [x is not None for x in chosen] == [False, False, False, True, False]
    assert torch.equal(chosen[3], named.hidden_states[3])


def test_tokens_for_each_layer(model):
    """A number r merges as many in every layer; class tokens are not among them."""
    given = models_towers.pixels(model)
    with torch.no_grad(), saccade.accelerated(model, recipe(r=5)):
        states = model(**given, output_hidden_states=True).hidden_states
    tokens = states[0].shape[1]
    assert [s[0].unique(dim=0).shape[0] for s in states] == [tokens - 5 * i for i in range(5)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"keep": 0.5, "r": 3}, "merge takes one of keep and r, got keep, r"),
        ({"keep": 1.5}, "keep: expected .*1.5"),
        ({"keep": 2}, "params.keep: expected a share, above 0 and at most 1, got 2"),
        ({"r": -1}, "params.r: .*-1"),
    ],
)
def test_bad_parameters(model, params, message):
    with models.unchanged(model), pytest.raises(ValueError, match=message):
        saccade.accelerate(model, recipe(**params))


def test_without_an_amount(model):
    report = saccade.accelerate(model, recipe())
    assert not report.applied
    assert [row.reason for row in report.skipped] == ["keep or r is needed"]


# ---- refused ---------------------------------------------------------------------------------------------------------------
def test_attention_maps_are_asked_for(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    given = models_towers.pixels(model)
    with torch.no_grad():
        stock = eager(**given, output_attentions=True)
        with saccade.accelerated(eager, recipe(True, keep=0.3)) as report:
            with pytest.warns(UserWarning, match="attention maps were asked for"):
                ours = eager(**given, output_attentions=True)
            assert not torch.equal(eager(**given).last_hidden_state, stock.last_hidden_state)
        assert torch.equal(stock.last_hidden_state, ours.last_hidden_state) and len(ours.attentions) == 4
        assert report.notes == (
            "merge: attention maps were asked for, which merged tokens do not have; no tokens were merged",
            "dense: attention maps were asked for; stock attention ran",
        )
        strict = recipe(keep=0.3)
        strict["rules"][0]["on_unsupported"] = "error"
        with saccade.accelerated(eager, strict), pytest.raises(ValueError, match="attention maps"):
            eager(**given, output_attentions=True)


@pytest.mark.parametrize("part", ["tower", "encoder", "layer", "attention", "capture"])
def test_changed_source(model, monkeypatch, part):
    layer = next(m for m in model.modules() if type(m).__name__.endswith("Layer"))
    attention = getattr(layer, "self_attn", None) or layer.attention
    found = {"tower": model, "encoder": model.encoder, "layer": layer, "attention": attention}.get(part)
    name = "capture_outputs" if found is None else f"{type(found).__name__}.forward"
    monkeypatch.setitem(towers._TESTED, name, {"another"})
    report = saccade.accelerate(model, recipe(keep=0.3))
    assert not report.applied
    (row,) = report.skipped
    assert f"{name} has an untested source" in row.reason


def test_replaced_forward(model):
    own = copy.deepcopy(model)
    layer = next(m for m in own.modules() if type(m).__name__.endswith("Layer"))
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    (row,) = saccade.accelerate(own, recipe(keep=0.3)).skipped
    assert "replaced by someone else" in row.reason
    assert [m for m in own.modules() if "forward" in vars(m)] == [layer]


# ---- training, copies, compilers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, reentrant):
    own = copy.deepcopy(model).train()
    given = models_towers.pixels(own)
    given["pixel_values"].requires_grad_(True)
    calls = 0
    layer = next(m for m in own.modules() if type(m).__name__.endswith("Layer"))
    attention = getattr(layer, "self_attn", None) or layer.attention

    def count(*_):
        nonlocal calls
        calls += 1

    attention.register_forward_hook(count)
    with saccade.accelerated(own, recipe(True, keep=0.3)):
        out, grads = models.run(own, given, backward=True)
        assert calls == 1
        own.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, checkpointed = models.run(own, given, backward=True)
        assert calls == 3  # once forward, once more in backward
    assert torch.equal(out, again) and grads.keys() == checkpointed.keys()
    assert all(torch.equal(grads[name], checkpointed[name]) for name in grads)


def test_copies_have_their_own(model):
    given = models_towers.pixels(model)
    original = copy.deepcopy(model)
    stock, _ = models.run(original, given)
    saccade.accelerate(original, recipe(keep=0.3))
    merged, _ = models.run(original, given)
    other = copy.deepcopy(original)
    state = vars(other)["_saccade_merging"]
    assert state is vars(other.encoder)["_saccade_merging"] is not vars(original)["_saccade_merging"]
    saccade.restore(original)
    assert torch.equal(models.run(original, given)[0], stock)
    assert torch.equal(models.run(other, given)[0], merged)
    saccade.restore(other)
    assert torch.equal(models.run(other, given)[0], stock)


def test_compiled_tower(model):
    own = copy.deepcopy(model)
    given = models_towers.pixels(own)
    with saccade.accelerated(own, recipe(True, keep=0.3)), torch.no_grad():
        compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
        expected = own(**given).last_hidden_state
        torch.testing.assert_close(compiled(**given).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "fc1"], init_lora_weights=False)
    results = []
    for first in ("swap", "lora"):
        model = models_towers.clip()
        torch.manual_seed(1)
        if first == "swap":
            saccade.accelerate(model, recipe(keep=0.3))
        wrapped = peft.get_peft_model(model, config)
        if first == "lora":
            saccade.accelerate(wrapped, recipe(keep=0.3))
        out, grads = models.run(wrapped, models_towers.pixels(model), backward=True)
        assert len(grads) == 4 * 3 * 2 and all("lora" in name and g.abs().max() > 0 for name, g in grads.items())
        saccade.restore(wrapped)
        assert not torch.equal(models.run(wrapped, models_towers.pixels(model))[0], out)
        results.append(out)
    assert torch.equal(*results)


def test_half_precision():
    """bf16: as far from float64 as the unmerged stock is, times two, against the oracle with the same choices."""
    model = models_towers.siglip().bfloat16()
    given = {"pixel_values": models_towers.pixels(model)["pixel_values"].bfloat16()}
    with torch.no_grad(), saccade.accelerated(model, recipe(True, keep=0.3)):
        out = model(**given).last_hidden_state
    assert out.dtype == torch.bfloat16 and out.shape == (2, 49, 48) and out.isfinite().all()
    assert out[0].unique(dim=0).shape[0] <= 15


def test_schedule():
    """SigLIP-so400m: 729 tokens, 26 layers; most are merged early, so that the layers see little more than half of them."""
    merging = Merging.of({"keep": 0.3}, 26, 0, early=True)
    amounts = merging.amounts(729)
    assert sum(amounts) == 729 - 219 and amounts == decreasing(729, 0.3, 26)
    left = [729 - sum(amounts[:i]) for i in range(26)]
    assert 0.54 < sum(left) / (26 * 729) < 0.55
    assert "0.51 of the blocks' FLOPs" in merging.change(729, 1152, 4304 / 1152)
    short = Merging.of({"keep": 0.1}, 2, 1, early=True).amounts(50)
    assert short == [24, 12]  # never more than half: 0.1 is out of reach


# ---- captioners ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioner(name):
    """Placeholders, pooling and newline tokens find as many tokens as in stock; the language model sees merged features."""
    model, given = getattr(models_towers, name)()
    with torch.no_grad():
        stock = model(**given).logits
        with saccade.accelerated(model, recipe(True, keep=0.3)) as report:
            ours = model(**given).logits
            text = {key: value for key, value in given.items() if "pixel" not in key}
            text["input_ids"] = text["input_ids"][:, :2]
            text["attention_mask"] = text["attention_mask"][:, :2]
            alone = model(**text).logits
        assert torch.equal(model(**given).logits, stock)
        torch.testing.assert_close(alone, model(**text).logits, rtol=0, atol=0)
    assert any(row.kernel == "merge" for row in report.swapped) and not report.notes
    assert ours.shape == stock.shape and ours.isfinite().all() and not torch.equal(ours, stock)
    assert torch.equal(ours[:, :2], stock[:, :2])  # text in front of the video does not see it


@pytest.mark.parametrize("layer", [-1, -2])
def test_feature_layer(layer):
    """What the captioner takes is the hidden state of that layer, a row for every patch."""
    model, given = models_towers.llava_onevision(layer)
    tower = model.model.vision_tower
    frames = given["pixel_values_videos"][0]
    with torch.no_grad(), saccade.accelerated(model, recipe(keep=0.3)):
        want = tower(frames, output_hidden_states=True).hidden_states[layer]
        features = model.model.get_video_features(given["pixel_values_videos"])
    assert features.hidden_states[layer].shape == want.shape == (2, 49, 48)
    assert torch.equal(features.hidden_states[layer], want)
