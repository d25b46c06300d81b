"""A clip to show when the user brings none: photographs of scikit-image, panned and zoomed, a cut-out that moves, a cut."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["FRAMES_PER_SECOND", "SECONDS", "make_clip"]

SECONDS = 4
FRAMES_PER_SECOND = 24
WIDTH, HEIGHT = 320, 240
_CUT = 0.55  # the hard cut comes after this share of the clip


def _photograph(name: str) -> Image.Image:
    """One of the photographs that lie in scikit-image's wheel; nothing is downloaded."""
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png").convert("RGB")


def _view(photo: Image.Image, x: float, y: float, width: float) -> Image.Image:
    """The part of a photograph around (x, y), `width` wide, all as shares of the largest part with the clip's shape."""
    full = min(photo.width, photo.height * WIDTH / HEIGHT)
    w, h = full * width, full * width * HEIGHT / WIDTH
    left, top = x * (photo.width - w), y * (photo.height - h)
    return photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def _cut_out(photo: Image.Image, size: int) -> tuple[Image.Image, Image.Image]:
    """A round part of a photograph and its mask."""
    x, y, r = 175, 110, 78  # the cat's face
    part = photo.crop((x - r, y - r, x + r, y + r)).resize((size, size), Image.Resampling.LANCZOS)
    mask = Image.new("L", (4 * size, 4 * size), 0)
    ImageDraw.Draw(mask).ellipse((8, 8, 4 * size - 8, 4 * size - 8), fill=255)
    return part, mask.resize((size, size), Image.Resampling.LANCZOS)


def _pictures() -> Iterator[NDArray[np.uint8]]:
    coffee, astronaut, cat = (_photograph(name) for name in ("coffee", "astronaut", "chelsea"))
    face, mask = _cut_out(cat, 84)
    count = SECONDS * FRAMES_PER_SECOND
    for i in range(count):
        share = i / (count - 1)
        if share < _CUT:
            along = share / _CUT
            frame = _view(coffee, 0.15 + 0.7 * along, 0.6 - 0.3 * along, 0.8)
            place = (int(-30 + 290 * along), int(130 - 90 * np.sin(np.pi * along)))
            frame.paste(face, place, mask)
        else:
            along = (share - _CUT) / (1 - _CUT)
            frame = _view(astronaut, 0.42, 0.05, 0.95 - 0.5 * along)
        yield np.asarray(frame)


def make_clip(path: Path) -> Path:
    """Write the clip to `path` (MP4, 4 s, 24 frames per second, 320 x 240) and return it."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        for picture in _pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path
