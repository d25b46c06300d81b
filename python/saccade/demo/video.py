"""Frames of a video file, evenly spaced in time, whatever the file: read with PyAV, a few frames in memory at most.

The packets are listed first, without decoding, which gives the true times of all frames (variable frame rates too) at
the price of reading the file once. Then each wanted frame is decoded from the key frame before it.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.demo.errors import DemoError

__all__ = ["Clip", "read_clip"]

_LONGEST_SIDE = 640  # frames are scaled down to this while decoding: 4K needs 25 MB a frame otherwise


@dataclass(frozen=True)
class Clip:
    """Frames of a video: uint8 [n, H, W, 3], n even, each shown `interval` seconds after the one before."""

    path: Path
    frames: NDArray[np.uint8]
    times: tuple[float, ...]
    interval: float
    duration: float
    count: int
    """Frames in the file."""
    size: tuple[int, int]
    """Width and height of the picture as it is shown."""
    notes: tuple[str, ...] = ()


@dataclass
class _Index:
    """Times of all frames in order of display, in units of the stream, and which of them are key frames."""

    places: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    timed: bool = True

    def key_before(self, place: int) -> int | None:
        found = bisect.bisect_right(self.keys, place)
        return self.keys[found - 1] if found else None


def _open(path: Path) -> Any:
    import av

    if not path.exists():
        raise DemoError(f"{path}: there is no such file")
    if path.is_dir():
        raise DemoError(f"{path} is a folder, expected a video file")
    try:
        return av.open(str(path))
    except PermissionError as error:
        raise DemoError(f"{path} may not be read: permission denied") from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DemoError(f"{path} cannot be read as a video ({reason})") from error


def _video_stream(container: Any, path: Path) -> Any:
    from av.stream import Disposition

    # A cover picture of a sound file is a "video stream" of one frame.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if streams:
        return streams[0]
    what = "has sound but no picture" if container.streams.audio else "has no video in it"
    raise DemoError(f"{path} {what}, expected a video file")


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets up to the end, or up to where the file is damaged."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError):
            return
        if packet.size > 0:
            yield packet


def _list_frames(container: Any, stream: Any) -> _Index:
    index = _Index()
    for packet in _packets(container, stream):
        if packet.is_discard:
            continue
        if packet.pts is None:
            index.timed = False
        index.places.append(len(index.places) if packet.pts is None else packet.pts)
        if packet.is_keyframe:
            index.keys.append(index.places[-1])
    if not index.timed:  # a raw stream: count instead, and never seek
        index.places, index.keys = list(range(len(index.places))), []
    index.places = sorted(set(index.places))
    index.keys.sort()
    return index


class _Frames:
    """Decoded frames with their places, in order of display, from the start of the file or from where `seek` went."""

    def __init__(self, container: Any, stream: Any, index: _Index) -> None:
        self.container, self.stream, self.index = container, stream, index
        self.damaged = 0
        self.reached: int | None = None
        self._frames = self._run()

    def seek(self, key: int) -> bool:
        """Go on from a key frame; False where the container cannot."""
        import av

        try:
            self.container.seek(key, stream=self.stream)
        except av.error.FFmpegError:
            return False
        self._frames = self._run()
        return True

    def next(self) -> tuple[int, Any] | None:
        """The next frame, or None at the end."""
        found = next(self._frames, None)
        if found is not None:
            self.reached = found[0]
        return found

    def _run(self) -> Iterator[tuple[int, Any]]:
        import av

        count = 0
        for packet in itertools.chain(_packets(self.container, self.stream), (None,)):  # None: what is still inside
            try:
                decoded = list(self.stream.decode(packet))
            except av.error.FFmpegError:
                self.damaged += 1
                continue
            for frame in decoded:
                yield (frame.pts if self.index.timed and frame.pts is not None else count), frame
                count += 1


def _shown_at(frames: _Frames, wanted: list[int], advance: Callable[[], None]) -> dict[int, Any]:
    """For each of the places, the frame on display there: the last one at or before it."""
    shown: dict[int, Any] = {}
    now = after = None
    for place in sorted(set(wanted)):
        key = frames.index.key_before(place)
        behind = key is not None and key > (frames.index.places[0] if frames.reached is None else frames.reached)
        if behind and frames.seek(key):  # type: ignore[arg-type]
            now = after = None
        while after is None or after[0] <= place:
            now = after or now
            after = frames.next()
            if after is None:
                break
        found = now or after
        if found is not None:
            shown[place] = _upright(found[1], frames.stream.sample_aspect_ratio)
        advance()
    return shown


def _upright(frame: Any, pixel_aspect: Any) -> NDArray[np.uint8]:
    """RGB of a frame as a player shows it: square pixels, turned by the file's rotation, not larger than needed."""
    width, height = frame.width * float(pixel_aspect or 1), float(frame.height)
    shrink = min(1.0, _LONGEST_SIDE / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    picture = frame.to_ndarray(format="rgb24", width=size[0], height=size[1], interpolation="AREA")
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))


def read_clip(
    path: Path, *, rate: float = 2.0, most: int = 8, advance: Callable[[int, int], None] = lambda done, of: None
) -> Clip:
    """Sample a video: `rate` frames per second of its duration, an even number from 2 to `most`.

    Args:
        path: any file that FFmpeg reads.
        rate: frames per second, where the video is short enough.
        most: largest number of frames.
        advance: called as (done, of) after each frame.

    Raises:
        DemoError: the file is missing, broken, without video, or has fewer than two frames.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        index = _list_frames(container, stream)
        places = index.places
        if not places:
            raise DemoError(f"{path} has a video stream, but no frame in it")
        if len(places) == 1:
            raise DemoError(f"{path} has only one frame, a video needs two")
        tick = float(stream.time_base) if index.timed else 1.0 / float(stream.average_rate or 25)
        usual = statistics.median(b - a for a, b in itertools.pairwise(places))
        length = places[-1] - places[0] + usual
        duration = length * tick
        count = 2 * round(duration * rate / 2)
        count = max(2, min(max(count, 4), most, len(places) - len(places) % 2))
        moments = [places[0] + length * i / count for i in range(count)]
        wanted = [places[bisect.bisect_right(places, moment) - 1] for moment in moments]
        done = itertools.count(1)
        with _open(path) as again:  # the listing has read this one to its end
            frames = _Frames(again, _video_stream(again, path), index)
            shown = _shown_at(frames, wanted, lambda: advance(next(done), len(set(wanted))))
    if len(shown) < len(set(wanted)):
        raise DemoError(f"{path} is damaged: {frames.damaged} of its {len(places)} packets cannot be decoded")
    pictures = [shown[place] for place in wanted]
    shape = pictures[0].shape
    pictures = [p for p in pictures if p.shape == shape]
    if len(pictures) < len(wanted):
        raise DemoError(f"{path} changes its frame size on the way, which the demo cannot show")
    notes = (f"{frames.damaged} damaged packets were left out",) if frames.damaged else ()
    return Clip(
        path=path,
        frames=np.stack(pictures),
        times=tuple((moment - places[0]) * tick for moment in moments),
        interval=duration / count,
        duration=duration,
        count=len(places),
        size=(shape[1], shape[0]),
        notes=notes,
    )
