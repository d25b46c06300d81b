"""diffusers' Wan text-to-video transformer on a clip: a small model, latents made of the frames, a forward, and its float64 twin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from saccade.demo.patches import fit, resize
from saccade.demo.video import Clip

__all__ = ["Sample", "exact_forward", "forward", "load", "sample_of"]

FRAMES = 8  # of latents
_PIXELS = 8  # sides of the block of pixels that is one latent, as in Wan's VAE
_TOKEN = 2 * _PIXELS
_UNIT = 4 * _TOKEN
_LEAST, _MOST = 192 * 256, 256 * 384  # pixels of a frame
_CHANNELS, _TEXT, _TEXT_WIDTH = 16, 32, 128
_LEVEL = 0.5  # of noise
_THETA = 10000.0


@dataclass(frozen=True)
class Sample:
    """What the transformer takes in the middle of denoising the clip."""

    latents: torch.Tensor
    """fp32 [1, 16, T, 2 h, 2 w], half of it noise."""
    text: torch.Tensor
    """fp32 [1, 32, 128]: seeded noise in place of a prompt."""
    timestep: torch.Tensor
    """[1]"""
    frames: tuple[int, ...]
    """For each of the T latent frames, the frame of the clip that it is made of."""
    grid: tuple[int, int, int]
    """(T, h, w) tokens."""


def load(layers: int = 4) -> Any:
    """A Wan with seeded random weights, fp32: 4 heads of 64, over 16 channels."""
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=_CHANNELS,
            out_channels=_CHANNELS,
            text_dim=_TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=1024,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=256,
        ).eval()
    # Larger than at the start of training, so that scores have a spread of about 2 and attention is not a plain mean.
    for block in model.blocks:
        torch.nn.init.constant_(block.attn1.norm_q.weight, 2.0)
    return model


def _latents(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Frames uint8 [T, 3, H, W] -> fp32 [1, 16, T, H / 8, W / 8]: a fixed linear map of blocks of pixels, in place of a VAE."""
    blocks = torch.nn.functional.pixel_unshuffle(frames.float() / 255, _PIXELS)  # [T, 192, H / 8, W / 8]
    directions, _ = torch.linalg.qr(torch.randn(blocks.shape[1], _CHANNELS, generator=generator))
    x = torch.einsum("tphw,pc->cthw", blocks, directions)
    x = x - x.mean((1, 2, 3), keepdim=True)
    return (x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-3))[None]


def sample_of(clip: Clip) -> Sample:
    """The clip as latents with as much noise as signal, a timestep and a text."""
    count, height, width = clip.frames.shape[:3]
    chosen = tuple(n * count // FRAMES for n in range(FRAMES))
    size = fit(height, width, unit=_UNIT, least=_LEAST, most=_MOST)
    frames = resize(clip.frames, size)[list(chosen)]
    generator = torch.Generator().manual_seed(1)
    clean = _latents(frames, generator)
    noise = torch.randn(clean.shape, generator=generator)
    return Sample(
        latents=(1 - _LEVEL) * clean + _LEVEL * noise,
        text=torch.randn(1, _TEXT, _TEXT_WIDTH, generator=generator),
        timestep=torch.tensor([round(1000 * _LEVEL)]),
        frames=chosen,
        grid=(FRAMES, size[0] // _TOKEN, size[1] // _TOKEN),
    )


def forward(model: Any, sample: Sample) -> torch.Tensor:
    """The velocity [16, T, 2 h, 2 w] in the model's dtype."""
    out = model(
        hidden_states=sample.latents.to(model.dtype),
        timestep=sample.timestep,
        encoder_hidden_states=sample.text.to(model.dtype),
        return_dict=False,
    )
    velocity: torch.Tensor = out[0][0]
    return velocity


class _KeepDouble(TorchFunctionMode):
    """Inside, `x.float()` leaves float64 as it is: Wan's blocks go through fp32 around every norm and residual."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _angles(rope: Any) -> torch.Tensor:
    """float64 [positions, head_dim]: the angle of every channel, each twice, from its formula."""
    place = torch.arange(rope.max_seq_len, dtype=torch.float64)
    widths = [torch.arange(0, dim, 2, dtype=torch.float64) / dim for dim in (rope.t_dim, rope.h_dim, rope.w_dim)]
    return torch.cat([torch.outer(place, _THETA**-width) for width in widths], 1).repeat_interleave(2, 1)


@torch.no_grad()
def exact_forward(model: Any, sample: Sample) -> torch.Tensor:
    """The velocity in float64 throughout, tables of cos and sin too: what errors are measured against."""
    twin = copy.deepcopy(model).double()
    angles = _angles(twin.rope)
    twin.rope.freqs_cos, twin.rope.freqs_sin = angles.cos(), angles.sin()
    with _KeepDouble():
        return forward(twin, sample)
