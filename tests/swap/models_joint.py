"""Small models whose attention is joint, with random weights, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import saccade
from saccade.swap.attend import Attend, fixed_layout
from saccade.swap.recipe import Recipe
from saccade.swap.tokens import Tokens
from swap import models
from swap.models import check_lossless, in_double, run, seeded, within

Tensor = torch.Tensor


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(*counts: int, of: int) -> Tensor:
    """Masks [B, of] whose first tokens are valid."""
    return (torch.arange(of) < torch.tensor(counts)[:, None]).long()


# ---- HunyuanVideo -------------------------------------------------------------------------------------------------------
def hunyuan_video(**changes: Any) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 14, 14),
    )  # fmt: skip
    return seeded(lambda: HunyuanVideoTransformer3DModel(**{**config, **changes}))


def hunyuan_video_inputs(model: Any, frames: int = 3) -> dict[str, Tensor]:
    return dict(
        hidden_states=noise(2, model.config.in_channels, frames, 16, 20),
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=noise(2, 12, 16, seed=3),
        encoder_attention_mask=lengths(12, 7, of=12),
        pooled_projections=noise(2, 8, seed=4),
        guidance=torch.tensor([6000.0, 6000.0]),
    )


# ---- HunyuanVideo-1.5 ---------------------------------------------------------------------------------------------------
def hunyuan_video15(**changes: Any) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    config: dict[str, Any] = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8,
        rope_axes_dim=(4, 14, 14),
    )  # fmt: skip
    return seeded(lambda: HunyuanVideo15Transformer3DModel(**{**config, **changes}))


def hunyuan_video15_inputs(model: Any, frames: int = 3, image: bool = False) -> dict[str, Tensor]:
    return dict(
        hidden_states=noise(2, model.config.in_channels, frames, 8, 10),
        timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=noise(2, 9, 16, seed=3),
        encoder_attention_mask=lengths(9, 5, of=9),
        encoder_hidden_states_2=noise(2, 6, 12, seed=4),
        encoder_attention_mask_2=lengths(0, 4, of=6),
        image_embeds=noise(2, 5, 8, seed=5) * image,
    )


# ---- CogVideoX ----------------------------------------------------------------------------------------------------------
def cogvideox(**changes: Any) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    config: dict[str, Any] = dict(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
        num_layers=3, sample_width=24, sample_height=16, sample_frames=9, patch_size=2, max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return seeded(lambda: CogVideoXTransformer3DModel(**{**config, **changes}))


def cogvideox_inputs(model: Any, frames: int = 4) -> dict[str, Any]:
    """With the tables that the pipeline makes."""
    config = model.config
    given: dict[str, Any] = dict(
        hidden_states=noise(2, frames, config.in_channels, 16, 20),
        encoder_hidden_states=noise(2, 7, 16, seed=3),
        timestep=torch.tensor([500, 500]),
    )
    if config.use_rotary_positional_embeddings:
        given["image_rotary_emb"] = cogvideox_tables(model, frames, 16, 20)
    return given


def cogvideox_tables(model: Any, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Of latents of that size, by the pipeline's own method."""
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    pipeline = SimpleNamespace(vae_scale_factor_spatial=8, transformer=model)
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
    )


# ---- Mochi --------------------------------------------------------------------------------------------------------------
def mochi(**changes: Any) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    config: dict[str, Any] = dict(
        patch_size=2, num_attention_heads=2, attention_head_dim=32, num_layers=3, pooled_projection_dim=24, in_channels=4,
        text_embed_dim=32, time_embed_dim=16, max_sequence_length=12,
    )  # fmt: skip
    model = seeded(lambda: MochiTransformer3DModel(**{**config, **changes}))
    with torch.no_grad():  # as quick as those of the published model, which reach a few radians between neighbours
        model.pos_frequencies.copy_(noise(*model.pos_frequencies.shape, seed=6) * 0.05)
    return model


def mochi_inputs(model: Any, frames: int = 3) -> dict[str, Tensor]:
    return dict(
        hidden_states=noise(2, model.config.in_channels, frames, 16, 20),
        encoder_hidden_states=noise(2, 12, 32, seed=3),
        timestep=torch.tensor([500, 500]),
        encoder_attention_mask=lengths(12, 7, of=12).bool(),
    )


# ---- what is asked of each of them --------------------------------------------------------------------------------------
TILES = {"kernel": "sliding_tile", "role": "joint", "params": {"tile": [1, 4, 4], "window": [1, 1, 3]}}


def check_sites(model: nn.Module, texts: set[str]) -> None:
    """Every attention module is in the report, found by a walk of our own; those over text alone stay stock."""
    report = saccade.plan(model, "balanced")
    names = ("Attention", "MochiAttention", "MochiAttentionPool")
    walked = {path for path, module in model.named_modules() if type(module).__name__ in names}
    rows = {row.path: row for row in report.rows if row.kind == "attention"}
    assert set(rows) == walked and texts <= walked
    for path, row in rows.items():
        assert row.role == ("text" if path in texts else "joint")
        assert (row.reason is None) == (path not in texts), row


def check_changed_source(model: nn.Module, adapter: Any, names: tuple[str, ...], monkeypatch: Any) -> None:
    """A source that was not tested is left as it is: an attention's, and for the rotation also its own."""
    joint = len(adapter.ADAPTERS[0].joint(model))
    for name in names:
        with monkeypatch.context() as patch:
            patch.setitem(adapter._TESTED, name, {"another"})
            report = saccade.accelerate(model, "lossless")
            try:
                alone = "Attn" not in name and "Attention" not in name
                assert len(report.skipped) == (1 if alone else len(report.skipped)) > 0
                assert all("untested source" in row.reason for row in report.skipped)
                assert len(report.swapped) == (joint if alone else 0)
            finally:
                saccade.restore(model)


def check_stock_rule(model: nn.Module, given: dict[str, Any]) -> None:
    """A processor of ours whose rule says stock gives stock's bits."""
    stock, _ = run(model, given)
    recipe = {"rules": [{"kernel": "stock", "steps": [0, 5]}, {"kernel": "dense", "role": "joint"}]}
    with saccade.accelerated(model, recipe) as report:
        assert report.swapped
        assert torch.equal(run(model, given)[0], stock)
        report.set_step(9)
        assert not torch.equal(run(model, given)[0], stock)


def check_dense_by_torch(model: nn.Module, given: dict[str, Any], monkeypatch: Any) -> None:
    """Dense attention by torch, which is what runs on a GPU."""
    monkeypatch.setattr(Attend, "_layout", lambda *_: None)
    check_lossless(model, given)


def check_sparse(model: nn.Module, given: dict[str, Any], tokens: Tokens, monkeypatch: Any) -> None:
    """Sliding tiles are stock's attention with the layout's mask over it: text sees all and is seen by all."""
    rule = Recipe.of({"rules": [TILES]}).rules[0]
    mask = fixed_layout(rule, tokens).to_mask()[0, 0]
    video = slice(tokens.prefix, tokens.prefix + tokens.video)
    shown = mask[video, video]
    assert 0.1 < shown.double().mean() < 0.9
    mask_of_text = mask.clone()
    mask_of_text[video, video] = True
    assert mask_of_text.all()
    with saccade.accelerated(model, {"rules": [{"kernel": "rotary"}, TILES]}) as report:
        ours, _ = run(model, given)
        assert not report.notes
    dense, _ = run(model, given)
    attention = F.scaled_dot_product_attention

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if tokens.video <= query.shape[2] == key.shape[2] <= tokens.length:  # Mochi leaves padding out
            own = mask[: query.shape[2], : key.shape[2]]
            attn_mask = own if attn_mask is None else own & attn_mask
        return attention(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    stock, _ = run(model, given)
    want, _ = run(copy.deepcopy(model).double(), in_double(given))
    within(ours, stock, want, 2, "sparse output")
    assert float((dense - want).abs().max()) > 100 * float((ours - want).abs().max())


def check_copies(model: nn.Module, given: dict[str, Any]) -> None:
    """A copy of a swapped model has its own swap."""
    models.check_copies(model, given, {"rules": [{"kernel": "rotary"}, TILES]})


def check_compiled(model: nn.Module, block: nn.Module, given: dict[str, Any]) -> None:
    """One block compiles without a break, with and without gradients, dense and sparse."""
    for recipe in ("lossless", {"rules": [{"kernel": "rotary"}, TILES]}):
        with saccade.accelerated(model, recipe):
            seen: list[Any] = []
            handle = block.register_forward_pre_hook(lambda _, a, k, seen=seen: seen.append((a, k)), with_kwargs=True)
            run(model, given)
            handle.remove()
            args, options = seen[0]
            for grad in (False, True):
                torch._dynamo.reset()
                compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
                with torch.set_grad_enabled(grad):
                    for got, want in zip(compiled(*args, **options), block(*args, **options), strict=True):
                        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                        assert got.requires_grad == grad


def check_checkpointing(model: Any, blocks: int, given: dict[str, Any]) -> None:
    """Gradient checkpointing recomputes each swapped attention, and gives the same gradients."""
    with saccade.accelerated(model, "lossless"):
        _, want = run(model, given, backward=True)
        calls = []
        handles = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for path, module in model.named_modules()
            if path.endswith((".attn", ".attn1")) and "context_embedder" not in path
        ]
        assert len(handles) == blocks
        model.enable_gradient_checkpointing()
        try:
            _, got = run(model, given, backward=True)
        finally:
            model.disable_gradient_checkpointing()
            for handle in handles:
                handle.remove()
    assert len(calls) == 2 * blocks
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def check_lora(model: nn.Module, given: dict[str, Any]) -> None:
    """LoRA that was there before the swap, and LoRA that came after it, count."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    plain, _ = run(model, given)
    torch.manual_seed(1)
    before.add_adapter(config)
    check_lossless(before, given)
    saccade.accelerate(after, "lossless")
    torch.manual_seed(1)
    after.add_adapter(config)
    with saccade.accelerated(before, "lossless"):
        assert torch.equal(run(after, given)[0], run(before, given)[0])
    saccade.restore(after)
    adapted, _ = run(after, given)
    assert torch.equal(adapted, run(before, given)[0])
    assert float((adapted - plain).abs().max()) > 1e-2
