"""The rotary swap of Qwen2.5-VL: stock's results, exact restoration, and refusal of code that is not known."""

import copy
import linecache
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.19")

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling  # noqa: E402

from saccade.demo import exact  # noqa: E402
from saccade.rope.multimodal import multimodal_positions  # noqa: E402
from saccade.rope.presets import hope, mrope, qwen_vision, vanilla, videorope  # noqa: E402
from saccade.swap import SwapRefused  # noqa: E402
from saccade.swap.instance import Site, Swap, fingerprint  # noqa: E402
from saccade.swap.qwen2_5_vl import rotary  # noqa: E402
from saccade.testing import check_budget  # noqa: E402

VIDEO, GRID = 257, (2, 8, 12)
SEGMENTS = (5, (2, 4, 6), 7)


def make(seed=0, **text):
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": 256,
            "intermediate_size": 320,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            **text,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 160,
            "intermediate_size": 192,
            "num_heads": 2,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "tokens_per_second": 2,
            "initializer_range": 0.08,
        },
        image_token_id=256,
        video_token_id=VIDEO,
        vision_start_token_id=258,
        vision_end_token_id=259,
    )
    torch.manual_seed(seed)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture
def model():
    return make()


def sample(seed=3):
    generator = torch.Generator().manual_seed(seed)
    before, (t, h, w), after = SEGMENTS
    ids = torch.randint(0, 256, (1, before + t * h * w + after), generator=generator)
    ids[:, before : before + t * h * w] = VIDEO
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": torch.randn(GRID[0] * GRID[1] * GRID[2], 1176, generator=generator),
        "video_grid_thw": torch.tensor([GRID]),
        "second_per_grid_ts": torch.tensor([1.0]),
    }


def logits(model, **more):
    return model(**{**sample(), **more}, use_cache=False).logits


def run(model, **more):
    model.zero_grad(set_to_none=True)
    out = logits(model, **more)
    out.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


def runs(model):
    """Three inputs: the largest error of one small tensor on one input says little about either side's."""
    outs, grads = zip(*(run(model, **sample(seed)) for seed in (3, 4, 5)), strict=True)
    return torch.stack(outs), {name: torch.stack([g[name] for g in grads]) for name in grads[0]}


def attributes(model):
    # rope_deltas is transformers' own cache, written by every forward.
    return [
        (name, id(m), [(k, id(v)) for k, v in vars(m).items() if k != "rope_deltas"])
        for name, m in model.named_modules()
    ]


def compare(ours, stock, true):
    check_budget("logits", ours[0], stock[0], true[0])
    assert ours[1].keys() == stock[1].keys() == true[1].keys() and len(true[1]) > 30
    for name in true[1]:
        check_budget(name, ours[1][name], stock[1][name], true[1][name], factor=3.0)


def test_logits_and_gradients_keep_the_contract(model):
    stock = runs(model)
    with rotary(model):
        ours = runs(model)
    twin = exact.double(model)
    with exact.plain(twin):
        compare(ours, stock, runs(twin))
    assert not torch.equal(ours[0], stock[0]), "the swap changed nothing at all"


def test_the_float64_twin_is_float64_where_a_double_model_is_not(model):
    twin = exact.double(model)
    with torch.no_grad():
        with exact.plain(twin):
            true = logits(twin)
        with rotary(twin, impl="reference"):
            ours = logits(twin)
        naive = logits(copy.deepcopy(model).double())
    fp32_tables = float((naive - true).abs().max())
    assert fp32_tables > 1e-8, "transformers has become exact in float64: the twin is not needed any more"
    assert 1000 * float((ours - true).abs().max()) < fp32_tables


def test_a_wrong_rotation_does_not_pass(model):
    stock = logits(model).detach()
    twin = exact.double(model)
    with exact.plain(twin), torch.no_grad():
        true = logits(twin)
    for wrong in ({"text_spec": mrope(128, 1e6, (24, 24, 16))}, {"vision_spec": qwen_vision(80, 9000.0)}):
        with rotary(model, **wrong), torch.no_grad():
            out = logits(model)
        with pytest.raises(AssertionError, match="allowed"):
            check_budget("logits", out, stock, true)


def test_bf16_and_in_place(model):
    small = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        stock = logits(small)
        with rotary(small):
            ours = logits(small)
        with rotary(small, inplace=True):
            assert torch.equal(logits(small), ours)
        pixels = sample()["pixel_values_videos"].bfloat16().double()
        twin = exact.double(small)
        with exact.plain(twin):
            check_budget("logits", ours, stock, logits(twin, pixel_values_videos=pixels))


def test_in_place_leaves_gradients_alone(model):
    with rotary(model):
        expected = run(model)
    with rotary(model, inplace=True):
        out, grads = run(model)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(grads[name], grad) for name, grad in expected[1].items())


def test_restore_is_exact(model):
    stock = logits(model)
    before, keys = attributes(model), list(model.state_dict())
    functions = {name: getattr(modeling, name) for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")}
    swap = rotary(model)
    with swap:
        assert swap.active and attributes(model) != before
        assert list(model.state_dict()) == keys
        assert all(getattr(modeling, name) is function for name, function in functions.items())
        logits(model)
    assert attributes(model) == before
    assert torch.equal(logits(model), stock)
    swap.restore()
    assert attributes(model) == before and not swap.active


def test_an_exception_inside_restores(model):
    before = attributes(model)
    with pytest.raises(RuntimeError, match="inside"), rotary(model):
        raise RuntimeError("inside")
    with pytest.raises(Exception), rotary(model):  # noqa: B017
        logits(model, pixel_values_videos=torch.zeros(3, 5))
    assert attributes(model) == before


def test_an_exception_while_applying_restores():
    class Stubborn(torch.nn.Module):
        def __setattr__(self, name, value):
            if name == "forward":
                raise RuntimeError("stubborn")
            super().__setattr__(name, value)

    first, second = torch.nn.Identity(), Stubborn()
    swap = Swap([Site("a", first, "x", lambda self, x: x), Site("b", second, "x", lambda self, x: x)])
    with pytest.raises(RuntimeError, match="stubborn"):
        swap.apply()
    assert "forward" not in vars(first) and not swap.active


def altered(function, old, new):
    """The function with a changed source that `inspect` can read."""
    import inspect
    import textwrap

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
def test_altered_code_is_refused_whole(model, monkeypatch, owner, name, old, new):
    place = modeling if owner is None else getattr(modeling, owner)
    monkeypatch.setattr(place, name, altered(getattr(place, name), old, new))
    before = attributes(model)
    swap = rotary(model)
    assert swap.refused
    with pytest.raises(SwapRefused, match=f"(?s)nothing was swapped.*{name} has an untested source"):
        swap.apply()
    assert attributes(model) == before


def test_layout_and_annotations_do_not_count(model, monkeypatch):
    forward = altered(
        modeling.Qwen2_5_VLAttention.forward,
        "bsz, q_len, _ = hidden_states.size()",
        '"""Another docstring."""\n    bsz: int\n    (bsz,   q_len, _) = hidden_states.size()  # and a comment',
    )
    assert fingerprint(forward) != fingerprint(modeling.Qwen2_5_VLAttention.forward)  # `bsz: int` is a statement
    forward = altered(modeling.Qwen2_5_VLAttention.forward, "-> tuple[", "-> list[")
    assert fingerprint(forward) == fingerprint(modeling.Qwen2_5_VLAttention.forward)


def test_a_module_that_someone_else_patched(model):
    layer = model.model.language_model.layers[1].self_attn
    layer.forward = types.MethodType(type(layer).forward, layer)
    before = attributes(model)
    with pytest.raises(SwapRefused, match=r"layers\.1\.self_attn .*someone else"):
        rotary(model).apply()
    assert attributes(model) == before
    del layer.forward
    swap = rotary(model).apply()
    with pytest.raises(SwapRefused, match="already applied"):
        swap.apply()
    with pytest.raises(SwapRefused, match="someone else"):
        rotary(model).apply()
    ours = layer.forward
    layer.forward = lambda *a, **k: ours(*a, **k)
    with pytest.raises(RuntimeError, match="undo that first"):
        swap.restore()
    assert swap.active
    layer.forward = ours
    swap.restore()
    assert not any("forward" in vars(m) for m in model.modules())


def test_two_models_two_specs(model):
    other = make(seed=1)
    with torch.no_grad():
        stock = logits(other)
        with rotary(other):
            alone = logits(other)
        with rotary(model, text_spec=videorope(128, 1e6)):
            assert torch.equal(logits(other), stock)
            with rotary(other):
                assert torch.equal(logits(other), alone)
        assert torch.equal(logits(other), stock)
        assert not torch.equal(alone, stock)


def test_hope_at_fractional_positions(model):
    place, _ = multimodal_positions(SEGMENTS, rule="hope", gamma=0.75)
    assert place.dtype == torch.float64
    positions = {"position_ids": place[:, None]}
    with exact.plain(model, exact.hope_turn(1e6)):
        peer = run(model, **positions)
    with rotary(model, text_spec=hope(128, 1e6)):
        ours = run(model, **positions)
    twin = exact.double(model)
    with exact.plain(twin, exact.hope_turn(1e6)):
        compare(ours, peer, run(twin, **positions))


def test_generation_with_a_cache(model):
    def write():
        return model.generate(**sample(), max_new_tokens=5, do_sample=False, pad_token_id=0)

    stock = write()
    with rotary(model, inplace=True):
        assert torch.equal(write(), stock)


def test_gradient_checkpointing(model):
    with rotary(model):
        out, expected = run(model)
        model.gradient_checkpointing_enable()
        model.train()
        again, grads = run(model)
    assert torch.equal(again, out)
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())


def test_compile_without_graph_breaks(model):
    with rotary(model), torch.no_grad():
        text = model.model.language_model
        place, _ = multimodal_positions([9], rule="mrope")
        x = torch.randn(1, 9, 256)
        embeddings = text.rotary_emb(x, place[:, None])
        attention = text.layers[0].self_attn
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        expected = attention(x, position_embeddings=embeddings)[0]
        for _ in range(2):
            assert torch.equal(compiled(x, position_embeddings=embeddings)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"text_spec": mrope(64, 1e6, (8, 12, 12))},
            ValueError,
            "text_spec: expected head_dim 128 and 3 position axes",
        ),
        ({"text_spec": vanilla(128, 1e6)}, ValueError, "text_spec: .* got head_dim 128 and 1"),
        ({"vision_spec": qwen_vision(64)}, ValueError, "vision_spec: expected head_dim 80"),
        ({"vision_spec": "qwen"}, TypeError, "vision_spec: expected a RopeSpec, got str"),
    ],
)
def test_bad_specs(model, arguments, error, match):
    with pytest.raises(error, match=match):
        rotary(model, **arguments)


def test_frequencies_that_the_config_does_not_tell(model):
    scaled = make(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    )
    with pytest.raises(ValueError, match="text_spec: rope_type 'linear'"):
        rotary(scaled)
    model.model.language_model.rotary_emb.inv_freq /= 4
    with pytest.raises(ValueError, match="text_spec: inv_freq of the model"):
        rotary(model)
    assert not rotary(model, text_spec=mrope(128, 1e6, (16, 24, 24))).refused


def test_nothing_to_swap():
    with pytest.raises(SwapRefused, match="no site was found"):
        rotary(torch.nn.Linear(2, 2)).apply()


def test_the_list_of_sites(model):
    swap = rotary(model)
    assert [site.path for site in swap][:2] == ["model.visual.rotary_pos_emb", "model.visual.blocks.0.attn"]
    assert len(swap.sites) == 2 + 2 + 2
    assert "model.language_model.layers.1.self_attn (Qwen2_5_VLAttention, attention): swapped" in str(swap)
