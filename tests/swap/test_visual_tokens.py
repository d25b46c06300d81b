"""Merged visual tokens in captioners: what the language model sees, later steps of generation, and lengths that stay stock's."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import saccade
from saccade.swap.transformers.visual_tokens import plan_visual
from swap.models import run, seeded, unchanged

IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
TEXT = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip

SPECIAL = [90, 91, 92, 93]  # random weights would write placeholders


def rule(keep: float, **more) -> dict:
    return {"rules": [{"kernel": "merge", "role": "text", "params": {"keep": keep}, **more}]}


def tiny_qwen():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
        window_size=56,
    )
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **IDS)
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen()


def prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    t, h, w = 2, 8, 8  # 32 tokens of video
    ids = torch.cat(
        [
            torch.randint(1, 80, (batch, 5), generator=g),
            torch.tensor([[92] + [91] * 32 + [93]] * batch),
            torch.randint(1, 80, (batch, 7), generator=g),
        ],
        1,
    )
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 91).int() * 2,
        pixel_values_videos=torch.randn(batch * t * h * w, 3 * 2 * 14 * 14, generator=g),
        video_grid_thw=torch.tensor([[t, h, w]] * batch),
        second_per_grid_ts=torch.ones(batch),
    )  # fmt: skip


@pytest.mark.parametrize("keep", (0.75, 0.3))
def test_rows_that_are_left(keep):
    x = torch.randn(2, 50, 16)
    visual = torch.zeros(2, 50, dtype=torch.bool)
    visual[0, 3:43] = visual[1, 7:47] = True
    plan = plan_visual(x, visual, keep)
    assert plan.rows == 50 - 40 + round(keep * 40)
    sizes = plan.ptr.diff(dim=1)
    for sample in range(2):  # text is alone, in its place
        rows = plan.inverse[sample][~visual[sample]]
        assert bool((sizes[sample][rows] == 1).all()) and bool((rows.diff() > 0).all())


def test_keep_one_is_stock(qwen):
    given = prompt()
    stock, _ = run(qwen, given)
    with saccade.accelerated(qwen, rule(1.0)) as report:
        assert report.swapped
        assert torch.equal(run(qwen, given)[0], stock)


def test_language_model_sees_fewer(qwen):
    """The decoder runs over text and half of the video; logits keep their length; text before the video does not change."""
    given, seen = prompt(), []
    stock, _ = run(qwen, given)
    hook = qwen.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, args, kw: seen.append(args[0].shape[1]), with_kwargs=True
    )
    with saccade.accelerated(qwen, rule(0.5)):
        ours, _ = run(qwen, given)
    hook.remove()
    assert seen == [given["input_ids"].shape[1] - 16]
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours[:, :6], stock[:, :6])
    assert not torch.allclose(ours[:, -1], stock[:, -1], atol=1e-4)


def test_equals_a_merged_prompt(qwen):
    """The same rows, positions and mask, given to the stock language model by hand."""
    from saccade.merge import merge, merge_positions

    given = prompt()
    with torch.no_grad():
        caught = {}
        hook = qwen.model.language_model.register_forward_pre_hook(
            lambda m, args, kw: caught.update(kw), with_kwargs=True
        )
        qwen(**given)
        hook.remove()
        embeds, place = caught["inputs_embeds"], caught["position_ids"]
        plan = plan_visual(embeds, given["input_ids"] == 91, 0.5)
        hidden = qwen.model.language_model(
            inputs_embeds=merge(embeds, plan)[0], position_ids=merge_positions(plan, place), use_cache=False
        )
        by_hand = qwen.lm_head(hidden.last_hidden_state)
        with saccade.accelerated(qwen, rule(0.5)):
            ours = qwen(**given).logits
    torch.testing.assert_close(ours, by_hand.gather(1, plan.inverse.long()[..., None].expand(-1, -1, by_hand.shape[2])))


def test_generation_goes_on(qwen):
    """Steps with a cache give what one call over the whole sequence gives."""
    given = prompt()
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        out = qwen.generate(
            **given,
            max_new_tokens=5,
            do_sample=False,
            suppress_tokens=SPECIAL,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert out.sequences.shape[1] == given["input_ids"].shape[1] + 5
        again = dict(given, input_ids=out.sequences[:, :-1])
        again["attention_mask"] = torch.ones_like(again["input_ids"])
        again["mm_token_type_ids"] = (again["input_ids"] == 91).int() * 2
        whole = qwen(**again).logits[:, -5:]
    for i, step in enumerate(out.logits):
        torch.testing.assert_close(step, whole[:, i], atol=2e-5, rtol=1e-4)


def cached(out) -> dict:
    """The cache of an output, under the name that this transformers gives it."""
    name = "past_key_values" if getattr(out, "cache", None) is None else "cache"
    return {name: out[name]}


def decode(model, ids, cache, prompt_mask: torch.Tensor | None = None):
    """Logits of one more token each; with a mask and the positions that follow, or with neither."""
    if prompt_mask is None:
        return model(input_ids=ids, **cache).logits[:, -1]
    mask = torch.cat([prompt_mask, torch.ones_like(ids)], 1)
    place = (mask.sum(1, keepdim=True) - 1)[None].expand(3, -1, -1) + model.model.rope_deltas[: len(ids)]
    return model(input_ids=ids, attention_mask=mask, position_ids=place, **cache).logits[:, -1]


def continued(model, given, ids):
    """The same logits by one call over prompt and token."""
    again = dict(given, input_ids=torch.cat([given["input_ids"], ids], 1))
    again["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(ids)], 1)
    again["mm_token_type_ids"] = (again["input_ids"] == 91).int() * 2
    return model(**again).logits[:, -1]


def other_prompt():
    given = prompt()
    given["pixel_values_videos"] = given["pixel_values_videos"].flip(0)
    given["input_ids"][:, -3:] = 7
    return given


@pytest.mark.parametrize("masked", [False, True])
def test_two_prompts_in_turn(qwen, masked):
    """Prompt A, prompt B, then a token behind A, and one behind a copy of B; with padding behind the video, or without a mask."""
    a, b, ids = prompt(), other_prompt(), torch.tensor([[3], [4]])
    for one in (a, b) if masked else ():
        one["attention_mask"][1, -3:] = 0
    mask = a["attention_mask"] if masked else None
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        want = continued(qwen, a, ids), continued(qwen, b, ids)
        first, second = cached(qwen(**a)), cached(qwen(**b))
        copied = copy.deepcopy(second)
        got = decode(qwen, ids, first, mask), decode(qwen, ids, copied, mask)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(*want, atol=1e-3)


def test_decoding_by_hand(qwen):
    """Without a mask and positions the captioner counts them by the cache, which holds fewer rows than the prompt."""
    given, ids = prompt(), torch.tensor([[3], [4]])
    with saccade.accelerated(qwen, rule(0.3)), torch.no_grad():
        seen = []
        hook = qwen.model.language_model.layers[0].self_attn.register_forward_pre_hook(
            lambda m, args, kw: seen.append(kw["position_embeddings"][0][..., -1, :]), with_kwargs=True
        )
        want = continued(qwen, given, ids)
        cache = cached(qwen(**given))
        steps = [decode(qwen, ids, cache), decode(qwen, ids, cache)]
        hook.remove()
    torch.testing.assert_close(steps[0], want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(seen[2], seen[0])  # of the token behind the prompt: rotated as in the call over all
    assert not torch.allclose(seen[3], seen[2], atol=1e-2)


def test_caches_that_do_not_fit(qwen):
    given, ids = prompt(), torch.tensor([[3], [4]])
    mask = given["attention_mask"]
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        cache = cached(qwen(**given))
        with pytest.raises(ValueError, match="attention_mask: expected 2 samples or a multiple, .* got 1"):
            decode(qwen, ids[:1], copy.deepcopy(cache), mask[:1])
        cut = copy.deepcopy(cache)
        for one in cut.values():
            one.crop(-10)
        with pytest.raises(ValueError, match="cache: 20 rows are left of a merged prompt of 30"):
            decode(qwen, ids, cut)
        ((name, merged),) = cache.items()
        rebuilt = type(merged)()
        for i, layer in enumerate(merged.layers):
            rebuilt.update(layer.keys, layer.values, i)
        with pytest.raises(ValueError, match="does not know that its prompt was merged"):
            decode(qwen, ids, {name: rebuilt}, mask)


def test_a_cache_that_is_filled_anew(qwen):
    """What a merged prompt left on a cache does not outlive its rows."""
    given, ids = prompt(), torch.tensor([[3], [4]])
    plain = {"input_ids": given["input_ids"][:, :5]}
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        cache = cached(qwen(**given))
        (merged,) = cache.values()
        merged.layers = [type(layer)() for layer in merged.layers]
        qwen.model.rope_deltas = None
        qwen(**plain, **cache)
        got = qwen(input_ids=ids, **cache).logits[:, -1]
        want = qwen(input_ids=torch.cat([plain["input_ids"], ids], 1)).logits[:, -1]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_hidden_states_keep_their_length(qwen):
    given = prompt()
    length = given["input_ids"].shape[1]
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        out = qwen(**given, output_hidden_states=True)
        last = qwen.model(**given).last_hidden_state
    assert [x.shape[1] for x in out.hidden_states] == [length] * 3
    assert torch.equal(out.hidden_states[-1], last)
    assert out.hidden_states[1][0].unique(dim=0).shape[0] == length - 16
    embeds = qwen.model.language_model.embed_tokens(given["input_ids"])
    assert torch.equal(out.hidden_states[0][:, :5], embeds[:, :5])


ERROR = {"on_unsupported": "error"}


def check_unserved(model, call, reason):
    """Stock ran, with one note and one warning; or there is an error, where the rule says so."""
    with torch.no_grad():
        stock = call(model)
        with saccade.accelerated(model, rule(0.5)) as report:
            with pytest.warns(UserWarning, match=reason):
                assert torch.equal(call(model), stock)
            call(model)
        assert len(report.notes) == 1 and report.notes[0].endswith("; nothing was merged")
        with saccade.accelerated(model, rule(0.5, **ERROR)), pytest.raises(ValueError, match=reason):
            call(model)


def test_embeddings_without_ids(qwen):
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    qwen.model.rope_deltas = None
    check_unserved(qwen, lambda m: m(inputs_embeds=embeds).logits, "embeddings came without input_ids")


def test_attention_maps(qwen):
    eager = copy.deepcopy(qwen)
    eager.set_attn_implementation("eager")
    check_unserved(eager, lambda m: m(**prompt(), output_attentions=True).logits, "attention maps were asked for")


def test_other_shapes(qwen):
    """Something on the way to the language model changed the number of embeddings."""

    def cut(module, args, kwargs):
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, :-1]
        kwargs["attention_mask"], kwargs["position_ids"] = (
            kwargs[k][..., :-1] for k in ("attention_mask", "position_ids")
        )
        return args, kwargs

    hook = qwen.model.language_model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        check_unserved(
            qwen, lambda m: m(**prompt()).logits, r"expected embeddings for input_ids \[2, 46\], got \[2, 45\]"
        )
    finally:
        hook.remove()


def test_text_alone_is_not_said(qwen):
    """Where there is nothing to merge, what could not be merged does not matter."""
    eager = copy.deepcopy(qwen)
    eager.set_attn_implementation("eager")
    with saccade.accelerated(eager, rule(0.5, **ERROR)) as report, torch.no_grad():
        eager(input_ids=torch.tensor([[1, 2, 3]]), output_attentions=True)
    assert not report.notes


def test_language_model_by_itself(qwen):
    """A call that does not come through the captioner is not taken for the prompt before it."""
    embeds = torch.randn(2, 46, 32, generator=torch.Generator().manual_seed(0))
    text = qwen.model.language_model
    with torch.no_grad():
        stock = text(inputs_embeds=embeds).last_hidden_state
        with saccade.accelerated(qwen, rule(0.5)) as report:
            qwen(**prompt())
            assert torch.equal(text(inputs_embeds=embeds).last_hidden_state, stock) and not report.notes


def test_a_video_behind_a_filled_cache(qwen):
    given = prompt()
    first = {"input_ids": given["input_ids"][:, :4]}
    with saccade.accelerated(qwen, rule(0.5)) as report, torch.no_grad():
        cache = cached(qwen(**first, use_cache=True))
        rest = {**given, "input_ids": given["input_ids"][:, 4:], "mm_token_type_ids": given["mm_token_type_ids"][:, 4:]}
        del rest["attention_mask"]
        place = torch.arange(4, 46).expand(3, 2, -1)
        with pytest.warns(UserWarning, match="images and videos that join a filled cache"):
            qwen(**rest, **cache, position_ids=place)
    assert report.notes


def test_without_an_amount(qwen):
    report = saccade.accelerate(qwen, {"rules": [{"kernel": "merge", "role": "text"}]})
    (row,) = report.skipped
    assert not report.applied and row.reason.startswith("keep or r is needed")


def test_left_padding(qwen):
    """A padded sample is generated as without padding."""
    given = prompt(1)
    padded = dict(given)
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        padded[name] = torch.nn.functional.pad(given[name], (3, 0), value=value)
    with saccade.accelerated(qwen, rule(0.5)), torch.no_grad():
        a = qwen.generate(**given, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)[:, -4:]
        b = qwen.generate(**padded, max_new_tokens=4, do_sample=False, suppress_tokens=SPECIAL)[:, -4:]
    assert torch.equal(a, b)


def test_trains(qwen):
    given = prompt()
    labels = given["input_ids"].clone()
    labels[labels >= 90] = -100
    model = copy.deepcopy(qwen)
    saccade.accelerate(model, rule(0.5))
    loss = model(**given, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert float(model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max()) > 0


def test_different_numbers_are_refused(qwen):
    given = prompt()
    given["input_ids"][1, 6] = 5  # one placeholder fewer in the second sample: the tower's features no longer fit
    visual = given["input_ids"] == 91
    with pytest.raises(ValueError, match="different numbers of visual tokens"):
        plan_visual(torch.randn(2, visual.shape[1], 8), visual, 0.5)


def test_restore(qwen):
    given = prompt()
    stock, _ = run(qwen, given)
    deltas = qwen.model.rope_deltas  # the model's own memory of the last prompt
    with unchanged(qwen):
        with saccade.accelerated(qwen, rule(0.5)):
            run(qwen, given)
        qwen.model.rope_deltas = deltas
    assert torch.equal(run(qwen, given)[0], stock)


@pytest.mark.parametrize("more", ({"r": 4}, {"proportional": True}))
def test_params_of_towers_are_refused(qwen, more):
    report = saccade.plan(qwen, {"rules": [{"kernel": "merge", "role": "text", "params": more}]})
    assert [row.reason for row in report.skipped] == ["merge between tower and language model takes keep alone"]


def test_llava():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=90, video_token_id=91, vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 28]],
    )  # fmt: skip
    model = seeded(lambda: LlavaOnevisionForConditionalGeneration(config))
    g = torch.Generator().manual_seed(4)
    count = 3 * 4 + 1  # three frames of 2 x 2 after pooling, and a newline
    ids = torch.cat(
        [
            torch.randint(1, 80, (2, 4), generator=g),
            torch.full((2, count), 91),
            torch.randint(1, 80, (2, 4), generator=g),
        ],
        1,
    )
    given = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=torch.randn(2, 3, 3, 28, 28, generator=g),
    )
    stock, _ = run(model, given)
    with saccade.accelerated(model, rule(0.5)) as report, torch.no_grad():
        assert any(row.family == "llava" for row in report.swapped)
        ours = model(**given).logits
        out = model.generate(
            **given,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=SPECIAL,
            return_dict_in_generate=True,
            output_logits=True,
        )
        again = dict(given, input_ids=out.sequences[:, :-1], attention_mask=torch.ones_like(out.sequences[:, :-1]))
        whole = model(**again).logits[:, -4:]
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours[:, :4], stock[:, :4])
    for i, step in enumerate(out.logits):
        torch.testing.assert_close(step, whole[:, i], atol=2e-5, rtol=1e-4)
