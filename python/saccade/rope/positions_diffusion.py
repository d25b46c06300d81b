"""Positions that video and image generators derive from a grid: crops, seconds, pixels, centred or normalised.

Rows t, h, w unless stated, tokens in t-major order, int64 where whole and float64 otherwise. Wan and HunyuanVideo count
tokens: `grid_positions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saccade._arguments import grid_sizes, items, number, whole
from saccade.rope.grids import finish, grid_positions, indices, mesh, normalise_positions, numbers

__all__ = [
    "cogvideox_crop",
    "cogvideox_positions",
    "cosmos_positions",
    "flux_positions",
    "ltx2_audio_positions",
    "ltx2_positions",
    "ltx_positions",
    "mochi_positions",
    "seedance_positions",
]


def cogvideox_crop(size: Sequence[int], base_size: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners ((top, left), (bottom, right)) of a grid (H, W) fitted into the grid (H, W) of the training size.

    Example:
        >>> cogvideox_crop((30, 30), (30, 45))
        ((0, 8), (30, 38))
    """
    h, w = (whole(x, f"size[{i}]", 1) for i, x in enumerate(items(size, "size", 2)))
    base_h, base_w = (whole(x, f"base_size[{i}]", 1) for i, x in enumerate(items(base_size, "base_size", 2)))
    if h / w > base_h / base_w:
        height, width = base_h, round(base_h / h * w)
    else:
        height, width = round(base_w / w * h), base_w
    top, left = round((base_h - height) / 2.0), round((base_w - width) / 2.0)
    return (top, left), (top + height, left + width)


def cogvideox_positions(
    grid: Sequence[int],
    *,
    crop: Sequence[Sequence[float]] | None = None,
    prefix: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions [3, prefix + T*H*W]: h and w divide crop ((top, left), (bottom, right)) evenly; None counts from 0.

    CogVideoX 1.5.

    Example:
        >>> cogvideox_positions((1, 1, 2), crop=((0, 0), (1, 4)))[2]
        tensor([0, 2])
    """
    sizes = grid_sizes(grid, "grid")
    if crop is None:
        return grid_positions(sizes, prefix=prefix, device=device)
    corners = items(crop, "crop", 2)
    start, stop = (numbers(corner, f"crop[{i}]", 2) for i, corner in enumerate(corners))
    strides, origins = [1.0], [0.0]
    for first, last, size in zip(start, stop, sizes[1:], strict=True):
        end = last * (size - 1) / size if size else first
        strides.append((end - first) / (size - 1) if size > 1 else 0.0)
        origins.append(first)
    return grid_positions(sizes, stride=strides, origin=origins, prefix=prefix, device=device)


def cosmos_positions(
    grid: Sequence[int], *, fps: float | None = None, base_fps: float = 24.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions [3, T*H*W] with frame index * base_fps / fps; fps=None (an image) counts frames.

    Example:
        >>> cosmos_positions((3, 1, 1), fps=12)[0]
        tensor([0, 2, 4])
    """
    rate = 1.0 if fps is None else float(number(base_fps, "base_fps", 0.0)) / float(number(fps, "fps", 0.0))
    return grid_positions(grid, stride=(rate, 1, 1), device=device)


def mochi_positions(
    grid: Sequence[int], *, area: float = 192 * 192, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions [3, T*H*W]: frames counted, h and w centred and scaled by sqrt(area / (H * W)).

    Example:
        >>> mochi_positions((1, 2, 2), area=4)[1]
        tensor([-0.5000, -0.5000,  0.5000,  0.5000], dtype=torch.float64)
    """
    sizes = grid_sizes(grid, "grid")
    scale = (float(number(area, "area", 0.0)) / max(sizes[1] * sizes[2], 1)) ** 0.5
    return grid_positions(sizes, stride=(1, scale, scale), centered=(False, True, True), device=device)


def flux_positions(
    text: int, size: Sequence[int], *, axes: int = 3, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions [axes, text + H*W]: text tokens at 0, then (0, h, w, 0, ...) of an image grid (H, W).

    Example:
        >>> flux_positions(1, (1, 2))
        tensor([[0, 0, 0],
                [0, 0, 0],
                [0, 0, 1]])
    """
    h, w = items(size, "size", 2)
    ids = grid_positions((1, h, w), prefix=whole(text, "text", 0), device=device)
    count = whole(axes, "axes", 3)
    return torch.cat((ids, ids.new_zeros(count - 3, ids.shape[1])))


def ltx_positions(
    grid: Sequence[int],
    *,
    scale: Sequence[float],
    patch: Sequence[int] = (1, 1, 1),
    base: Sequence[float] = (20, 2048, 2048),
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions [3, T*H*W] = 2 * index * scale * patch / base - 1 (LTX-Video).

    scale is (temporal compression / frame rate, spatial compression, spatial compression), base the size at which 1 is
    reached, in seconds and pixels.

    Example:
        >>> ltx_positions((2, 1, 1), scale=(10, 32, 32))[0]
        tensor([-1,  0])
    """
    sizes = grid_sizes(grid, "grid")
    scales, bases = numbers(scale, "scale", 3), numbers(base, "base", 3, 0.0)
    patches = [whole(p, f"patch[{i}]", 1) for i, p in enumerate(items(patch, "patch", 3))]
    stride = [2 * s * p / b for s, p, b in zip(scales, patches, bases, strict=True)]
    return grid_positions(sizes, stride=stride, origin=(-1, -1, -1), device=device)


def _causal_middles(count: int, patch: int, compression: int, offset: int, shift: int = 0) -> torch.Tensor:
    """Middle of each step in input frames: the first latent covers one frame, so bounds are shifted and kept from 0."""
    bounds = (indices(count + 1) * patch + shift) * compression
    bounds = (bounds + offset - compression).clamp(min=0)
    return (bounds[:-1] + bounds[1:]) / 2


def ltx2_positions(
    grid: Sequence[int],
    *,
    fps: float = 24.0,
    compression: Sequence[int] = (8, 32, 32),
    patch: Sequence[int] = (1, 1, 1),
    base: Sequence[float] = (20, 2048, 2048),
    causal_offset: int = 1,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions [3, T*H*W]: middles of the patches in seconds and pixels, normalised by `base` to [-1, 1] (LTX-2).

    Example:
        >>> ltx2_positions((2, 1, 1), fps=1)[0]
        tensor([-0.9500, -0.5000], dtype=torch.float64)
    """
    sizes = grid_sizes(grid, "grid")
    rate, bases = float(number(fps, "fps", 0.0)), numbers(base, "base", 3, 0.0)
    factors = [whole(c, f"compression[{i}]", 1) for i, c in enumerate(items(compression, "compression", 3))]
    patches = [whole(p, f"patch[{i}]", 1) for i, p in enumerate(items(patch, "patch", 3))]
    offset = whole(causal_offset, "causal_offset", 0)
    t = _causal_middles(sizes[0], patches[0], factors[0], offset) / rate
    h, w = ((indices(sizes[a]) + 0.5) * patches[a] * factors[a] for a in (1, 2))
    return finish(normalise_positions(mesh(t, h, w), bases), device, None)


def ltx2_audio_positions(
    length: int,
    *,
    shift: int = 0,
    patch: int = 1,
    compression: int = 4,
    hop_length: int = 160,
    sampling_rate: int = 16000,
    base: float = 20,
    causal_offset: int = 1,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions [1, length]: middles of audio latents in seconds, normalised by `base` seconds to [-1, 1] (LTX-2).

    shift is the index of the first latent; hop_length / sampling_rate seconds make a spectrogram step, `compression` of
    them a latent.

    Example:
        >>> ltx2_audio_positions(2, hop_length=16000, compression=1)
        tensor([[-0.9500, -0.8500]], dtype=torch.float64)
    """
    count, step, factor = whole(length, "length", 0), whole(patch, "patch", 1), whole(compression, "compression", 1)
    rate, offset = whole(sampling_rate, "sampling_rate", 1), whole(causal_offset, "causal_offset", 0)
    mel = _causal_middles(count, step, factor, offset, whole(shift, "shift", 0))
    seconds = mel * whole(hop_length, "hop_length", 1) / rate
    return finish(normalise_positions(seconds[None], (float(number(base, "base", 0.0)),)), device, None)


def seedance_positions(
    segments: Sequence[int | Sequence[int]], *, device: torch.device | str | None = None
) -> torch.Tensor:
    """Positions [4, S], rows t, h, w, text, of shots in temporal order: text token counts and (T, H, W) grids in turn.

    Frames are counted on from shot to shot, so are text tokens; visual tokens stand at 0 of the text axis and text
    tokens at 0 of the other three. Seedance 1.0 (arXiv 2506.09113) publishes the idea but no numbers: this counting is
    ours.

    Example:
        >>> seedance_positions([(1, 1, 2), 2, (1, 1, 1)])
        tensor([[0, 0, 0, 0, 1],
                [0, 0, 0, 0, 0],
                [0, 1, 0, 0, 0],
                [0, 0, 0, 1, 0]])
    """
    parts = [torch.zeros(4, 0, dtype=torch.int64)]
    frames = words = 0
    for n, segment in enumerate(items(segments, "segments")):
        if isinstance(segment, Sequence):
            sizes = grid_sizes(segment, f"segments[{n}]", 1)
            place = grid_positions(sizes, origin=(frames, 0, 0))
            parts.append(torch.cat((place, place.new_zeros(1, place.shape[1]))))
            frames += sizes[0]
        else:
            count = whole(segment, f"segments[{n}]", 0)
            line = torch.arange(words, words + count)
            parts.append(torch.cat((line.new_zeros(3, count), line[None])))
            words += count
    return torch.cat(parts, 1).to(device)
