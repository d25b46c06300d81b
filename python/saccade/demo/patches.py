"""Frames as the patches that Qwen2.5-VL's vision tower takes; equal to transformers' own video processor, without torchvision."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.demo.errors import DemoError

__all__ = ["fit", "patchify", "resize"]

# Mean and standard deviation of the pixels that CLIP was trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def fit(height: int, width: int, *, unit: int = 28, least: int = 56 * 56, most: int) -> tuple[int, int]:
    """Height and width near those of the frame, multiples of `unit`, between `least` and `most` pixels in all."""
    if max(height, width) > 200 * min(height, width):
        raise DemoError(f"frames of {width} x {height} are too elongated, the model takes sides up to 200 : 1")
    tall, wide = (round(side / unit) * unit for side in (height, width))
    if tall * wide > most:
        scale = math.sqrt(height * width / most)
        tall, wide = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
    elif tall * wide < least:
        scale = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * scale / unit) * unit for side in (height, width))
    return tall, wide


def resize(frames: NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """Frames uint8 [n, H, W, 3] as uint8 [n, 3, height, width] (bicubic, antialiased)."""
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False)


def patchify(
    frames: torch.Tensor, *, patch: int = 14, merge: int = 2, temporal: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised patches of frames uint8 [n, 3, H, W], and the grid.

    Returns:
        fp32 [T * h * w, 3 * temporal * patch * patch], merge x merge blocks of patches together, and int64 [1, 3]: (T, h, w).
    """
    count, channels, height, width = frames.shape
    if count % temporal:
        frames = torch.cat((frames, frames[-1:].expand(temporal - count % temporal, -1, -1, -1)))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (_MEAN, _STD))
    pixels = (frames.float() - mean) / std
    t, h, w = frames.shape[0] // temporal, height // patch, width // patch
    blocks = pixels.view(t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # t, block row, block column, row, column, channel, frame, y, x
    return rows.reshape(t * h * w, -1), torch.tensor([[t, h, w]])
