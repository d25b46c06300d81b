"""Small LTX-Video and LTX-2 models, Wan's variants, their inputs, and twins of LTX in float64 throughout."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import torch
from torch import nn

from swap.models import seeded

Tensor = torch.Tensor
GRID = (3, 6, 8)


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ltx(**changes: Any) -> Any:
    """Rows of 2 x 40 = 80 columns: one pair of them does not turn."""
    from diffusers import LTXVideoTransformer3DModel

    config: dict[str, Any] = dict(
        in_channels=6, out_channels=6, num_attention_heads=2, attention_head_dim=40, cross_attention_dim=80,
        num_layers=3, caption_channels=16,
    )  # fmt: skip
    return seeded(lambda: LTXVideoTransformer3DModel(**{**config, **changes}))


def ltx_inputs(grid: tuple[int, int, int] = GRID, extra: int = 0) -> dict[str, Any]:
    """As LTXPipeline gives them; `extra` tokens beyond the grid."""
    t, h, w = grid
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return dict(
        hidden_states=_noise(2, 2, t * h * w + extra, 6),
        encoder_hidden_states=_noise(3, 2, 7, 16),
        timestep=torch.tensor([500, 500]),
        encoder_attention_mask=mask,
        num_frames=t,
        height=h,
        width=w,
        rope_interpolation_scale=(8 / 25, 32, 32),
    )


def ltx2(**changes: Any) -> Any:
    from diffusers import LTX2VideoTransformer3DModel

    config: dict[str, Any] = dict(
        in_channels=6, out_channels=6, num_attention_heads=2, attention_head_dim=40, cross_attention_dim=80,
        audio_in_channels=5, audio_out_channels=5, audio_num_attention_heads=2, audio_attention_head_dim=16,
        audio_cross_attention_dim=32, num_layers=2, caption_channels=16,
    )  # fmt: skip
    return seeded(lambda: LTX2VideoTransformer3DModel(**{**config, **changes}))


def ltx2_inputs(grid: tuple[int, int, int] = GRID) -> dict[str, Any]:
    t, h, w = grid
    return dict(
        hidden_states=_noise(2, 2, t * h * w, 6),
        audio_hidden_states=_noise(3, 2, 10, 5),
        encoder_hidden_states=_noise(4, 2, 7, 16),
        audio_encoder_hidden_states=_noise(5, 2, 7, 16),
        timestep=torch.tensor([500.0, 500.0]),
        sigma=torch.tensor([0.5, 0.5]),
        num_frames=t,
        height=h,
        width=w,
        audio_num_frames=10,
    )


def _tables(places: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, dim] of places [B, S, A] in [0, 1]: pair j * A + a, after the idle ones, turns by
    pi / 2 * theta^(j / (J - 1)) * (2 * place_a - 1)."""
    axes = places.shape[-1]
    steps = dim // (2 * axes)
    ladder = theta ** (torch.arange(steps, dtype=torch.float64) / (steps - 1)) * math.pi / 2
    angles = ((2 * places - 1)[:, :, None] * ladder[:, None]).flatten(2)  # [B, S, steps * A]
    angles = nn.functional.pad(angles, (dim // 2 - steps * axes, 0))
    return angles.cos(), angles.sin()


def ltx_double(model: Any) -> Any:
    """The model in float64, its tables too: the library computes those in float32 whatever the model's dtype."""

    def forward(self, hidden_states, num_frames, height, width, scale=None, video_coords=None):
        sizes = (num_frames, height, width)
        bases = (self.base_num_frames, self.base_height, self.base_width)
        if video_coords is None:
            places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sizes))[None]
            if scale is not None:
                patch = (self.patch_size_t, self.patch_size, self.patch_size)
                places = places * torch.tensor(
                    [float(s) * p / b for s, p, b in zip(scale, patch, bases, strict=True)], dtype=torch.float64
                )
        else:
            places = (video_coords.double() / torch.tensor(bases, dtype=torch.float64)[:, None]).transpose(1, 2)
        cos, sin = _tables(places, self.dim, self.theta)
        batch = hidden_states.shape[0]
        return tuple(x.repeat_interleave(2, -1).expand(batch, -1, -1) for x in (cos, sin))

    twin = copy.deepcopy(model).double()
    twin.rope.forward = types.MethodType(forward, twin.rope)
    for block in twin.transformer_blocks:
        _in_double(block.attn1, "apply_rotary_emb")
    return twin


def ltx2_double(model: Any) -> Any:
    """The same of LTX-2, for all four of its tables."""

    def forward(self, coords, device=None):
        places = coords.double().mean(-1)
        bases = (self.base_num_frames, getattr(self, "base_height", 0), getattr(self, "base_width", 0))
        places = (places / torch.tensor(bases[: coords.shape[1]], dtype=torch.float64)[:, None]).transpose(1, 2)
        cos, sin = _tables(places, self.dim, self.theta)
        if self.rope_type == "interleaved":
            return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return tuple(x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for x in (cos, sin))

    twin = copy.deepcopy(model).double()
    for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"):
        rope = getattr(twin, name)
        rope.forward = types.MethodType(forward, rope)
    for block in twin.transformer_blocks:
        for name in ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn"):
            _in_double(getattr(block, name), "apply_interleaved_rotary_emb", "apply_split_rotary_emb")
    return twin


def _interleaved(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin


def _split(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables  # [B, H, S, D / 2]
    heads = x.unflatten(-1, (cos.shape[1], 2, -1)).permute(3, 0, 2, 1, 4)  # [2, B, H, S, D / 2]
    out = torch.stack((heads[0] * cos - heads[1] * sin, heads[1] * cos + heads[0] * sin))
    return out.permute(1, 3, 2, 0, 4).flatten(2)


def _in_double(attn: Any, *names: str) -> None:
    """The rotation of this module's processor without a detour through float32."""
    call = type(attn.processor).__call__
    ours = {
        "apply_rotary_emb": _interleaved,
        "apply_interleaved_rotary_emb": _interleaved,
        "apply_split_rotary_emb": _split,
    }
    scope = {**call.__globals__, **{name: ours[name] for name in names}}
    function = types.FunctionType(call.__code__, scope, call.__name__, call.__defaults__, call.__closure__)
    attn.processor = type("Double", (type(attn.processor),), {"__call__": function})()


def wan_vace() -> Any:
    from diffusers import WanVACETransformer3DModel

    config: dict[str, Any] = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=3, cross_attn_norm=True, rope_max_seq_len=64, vace_layers=[0, 2],
        vace_in_channels=6,
    )  # fmt: skip
    return seeded(lambda: WanVACETransformer3DModel(**config))


def wan_vace_inputs() -> dict[str, Tensor]:
    return dict(
        hidden_states=_noise(2, 2, 4, 3, 8, 12),
        timestep=torch.tensor([500, 500]),
        encoder_hidden_states=_noise(3, 2, 12, 16),
        control_hidden_states=_noise(4, 2, 6, 3, 8, 12),
        control_hidden_states_scale=torch.tensor([1.0, 0.5]),
    )


def wan_animate() -> Any:
    from diffusers import WanAnimateTransformer3DModel

    config: dict[str, Any] = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=12, latent_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True, image_dim=8,
        added_kv_proj_dim=48, rope_max_seq_len=64, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return seeded(lambda: WanAnimateTransformer3DModel(**config))


def wan_animate_inputs() -> dict[str, Tensor]:
    return dict(
        hidden_states=_noise(2, 1, 12, 4, 8, 12),
        timestep=torch.tensor([500]),
        encoder_hidden_states=_noise(3, 1, 512, 16),
        encoder_hidden_states_image=_noise(4, 1, 5, 8),
        pose_hidden_states=_noise(5, 1, 4, 3, 8, 12),
        face_pixel_values=_noise(6, 1, 3, 9, 16, 16),
    )


# ---- what is asked of every family here ----------------------------------------------------------------------------------
ONE_TILE = {
    "rules": [
        {"kernel": "rotary"},
        {"kernel": "sliding_tile", "role": "self", "params": {"tile": [1, 3, 4], "window": [1, 1, 1]}},
    ]
}


def one_tile_mask(grid: tuple[int, int, int] = GRID) -> Tensor:
    """What ONE_TILE shows, bool [S, S]: each token its own tile of 1 x 3 x 4."""
    t, h, w = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    tile = ((t * 100 + h // 3) * 100 + w // 4).flatten()
    return tile[:, None] == tile[None]


def masked(model: Any, mask: Tensor, shape: str) -> Any:
    """A copy whose video self-attention gets a mask as its own argument, in the form that its family takes."""
    twin = copy.deepcopy(model)
    hidden = {"rows": mask[None], "heads": mask[None, None]}[shape]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = torch.zeros(hidden.shape).masked_fill(~hidden, float("-inf"))
        bias = bias.to(kwargs["hidden_states"] if kwargs else args[0])
        if kwargs:
            batch = len(kwargs["hidden_states"])
            return args, {**kwargs, "attention_mask": bias.expand(batch, -1, -1)}
        return (*args[:2], bias, *args[3:]), kwargs

    for name, module in twin.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_pre_hook(hook, with_kwargs=True)
    return twin


def attention_paths(model: nn.Module) -> set[str]:
    """Every module that has a processor, by a walk of its own."""
    return {name for name, module in model.named_modules() if "processor" in vars(module)}


def check_compiled(model: Any, block: Any, given: dict[str, Any], recipe: Any) -> None:
    """One block compiled without a graph break gives what it gives uncompiled."""
    import saccade
    from swap.models import run

    torch._dynamo.reset()
    with saccade.accelerated(model, recipe) as report:
        assert report.swapped
        plain, _ = run(model, given)
        block.compile(fullgraph=True, backend="aot_eager")
        try:
            compiled, _ = run(model, given)
        finally:
            block._compiled_call_impl = None
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def check_checkpointing(model: Any, block: Any, given: dict[str, Any], recipe: Any) -> None:
    """With gradient checkpointing the block runs twice, and the gradients are those of one run."""
    import saccade
    from swap.models import run

    calls = []
    handle = block.attn1.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with saccade.accelerated(model, recipe):
            _, plain = run(model, given, backward=True)
            once = len(calls)
            model.enable_gradient_checkpointing()
            _, again = run(model, given, backward=True)
            assert (once, len(calls)) == (1, 3)
    finally:
        handle.remove()
        model.disable_gradient_checkpointing()
    assert set(plain) == set(again) and all(torch.equal(plain[name], again[name]) for name in plain)
