"""Which tokens are destinations: the tokens that stay, and that others may merge into. All others are sources.

A partition knows its sizes before it sees a tensor, so shapes stay static; its lists are made on the device of the metric. Random choices
come from a counter (seed and step), never from a global generator, so a model's own noise is not disturbed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from saccade._arguments import grid_sizes, items, whole

__all__ = ["Alternate", "Frames", "Grid", "Index", "Partition", "Random", "Strided"]

Device = torch.device


def mix(counter: Any, seed: int, step: int) -> Any:
    """Pseudo-random bits in [0, 2^31) of a counter, an int or [n] int64: two rounds of the 32-bit finaliser of MurmurHash3."""
    key = (seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    h = (counter ^ key) & 0xFFFFFFFF
    for _ in range(2):
        h = h ^ (h >> 16)
        h = (h * 0x45D9F3B) & 0xFFFFFFFF
        h = h ^ (h >> 15)
        h = (h * 0x2C1B3C6D + key) & 0xFFFFFFFF
    return (h ^ (h >> 16)) & 0x7FFFFFFF


@dataclass(frozen=True)
class Partition:
    """Base of all partitions."""

    def check(self, tokens: int) -> None:
        """Raise ValueError where the partition does not fit so many tokens."""

    def destinations(self, tokens: int) -> int:
        """How many destinations `tokens` tokens have."""
        raise NotImplementedError

    def sources(self, tokens: int) -> int:
        """How many sources: the most that can be merged."""
        return tokens - self.destinations(tokens)

    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of sources [1, A] and destinations [1, K], int32."""
        raise NotImplementedError

    def ranges(self, tokens: int, window: Any, device: Device) -> torch.Tensor:
        """[1, A, R, 2] int32: the places of the destination list that each source may choose within `window`."""
        raise ValueError(f"window: {type(self).__name__} has no neighbourhood; use Alternate or Grid")


def complement(dst: torch.Tensor, tokens: int) -> torch.Tensor:
    """The positions [tokens - K] that are not in dst [K], ascending; dst holds each position once."""
    free = torch.ones(tokens, dtype=torch.bool, device=dst.device)
    free[dst.long()] = False
    return free.logical_not().byte().argsort(dim=0, stable=True)[: tokens - dst.shape[0]].int()


@functools.lru_cache(maxsize=256)
def _fixed(partition: Partition, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists of a partition that does not change, made once per device."""
    with torch.inference_mode(False):
        return partition.lists.__wrapped__(partition, tokens, device)  # type: ignore[attr-defined,no-any-return]


def tracing(device: Device) -> bool:
    """Whether a tensor made now is not one to keep: a compiler's, a mode's, or one that a CUDA graph fills when it runs."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _cached(lists: Any) -> Any:
    @functools.wraps(lists)
    def call(self: Partition, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        if tracing(device):
            return lists(self, tokens, device)  # type: ignore[no-any-return]
        return _fixed(self, tokens, device)

    return call


@dataclass(frozen=True)
class Strided(Partition):
    """The last of every `k` consecutive tokens is a destination (ToMe's k-th variant); a tail of fewer than k are sources."""

    k: int = 2

    def __post_init__(self) -> None:
        whole(self.k, "k", 2)

    def destinations(self, tokens: int) -> int:
        """N // k."""
        return tokens // self.k

    @_cached
    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Partition.lists`."""
        place = torch.arange(tokens, dtype=torch.int32, device=device)
        dst = place[self.k - 1 :: self.k]
        body = place[: self.k * dst.shape[0]].view(-1, self.k)[:, : self.k - 1].reshape(-1)
        return torch.cat((body, place[self.k * dst.shape[0] :]))[None], dst.contiguous()[None]

    def ranges(self, tokens: int, window: Any, device: Device) -> torch.Tensor:
        """Destinations whose place in the list differs from that of the source's own group by at most `window`.

        The tail belongs to the last group.
        """
        reach = whole(window, "window", 0)
        src, dst = self.lists(tokens, device)
        own = (src[0] // self.k).clamp(max=max(dst.shape[1] - 1, 0))
        bounds = torch.stack((own - reach, own + reach + 1), -1).clamp(0, dst.shape[1])
        return bounds[None, :, None].int().contiguous()


@dataclass(frozen=True)
class Alternate(Strided):
    """Every second token is a destination: 1, 3, 5, ... (ToMe, arXiv 2210.09461)."""

    def __init__(self) -> None:
        super().__init__(2)


@dataclass(frozen=True)
class Grid(Partition):
    """One destination in every cell of a grid (tomesd, arXiv 2303.17604, in two or three dimensions).

    Tokens outside the cells, where a size is not divisible, are sources.

    Args:
        grid: (T, H, W), or (H, W) for one frame; tokens in t-major order. More than T * H * W tokens are refused.
        cell: (t, h, w), or (h, w) for cells inside a frame.
        seed: None takes the first token of each cell; a number a random one.
        step: counts the calls for which the choice differs (denoising steps); see `at`.
    """

    grid: tuple[int, ...]
    cell: tuple[int, ...] = (2, 2)
    seed: int | None = None
    step: int = 0

    def __post_init__(self) -> None:
        grid, cell = items(self.grid, "grid"), items(self.cell, "cell")
        object.__setattr__(self, "grid", grid_sizes((1, *grid) if len(grid) == 2 else grid, "grid", 1))
        object.__setattr__(self, "cell", grid_sizes((1, *cell) if len(cell) == 2 else cell, "cell", 1))
        for axis, size, edge in zip("THW", self.grid, self.cell, strict=True):
            if edge > size:
                raise ValueError(f"cell: {edge} along {axis} does not fit the grid's {size}")
        if self.seed is not None:
            whole(self.seed, "seed", 0)
        whole(self.step, "step", 0)

    def at(self, step: int) -> Grid:
        """The same partition with the random choice of another step."""
        return replace(self, step=step)

    @property
    def cells(self) -> tuple[int, int, int]:
        """Number of cells along each axis."""
        t, h, w = (n // c for n, c in zip(self.grid, self.cell, strict=True))
        return t, h, w

    def check(self, tokens: int) -> None:
        """See `Partition.check`."""
        if tokens != math.prod(self.grid):
            raise ValueError(f"partition: the grid {self.grid} has {math.prod(self.grid)} tokens, got {tokens}")

    def destinations(self, tokens: int) -> int:
        """One for each cell."""
        return math.prod(self.cells)

    @_cached
    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Partition.lists`; destinations in the order of their cells."""
        (_, rows, columns), (ct, ch, cw) = self.grid, self.cell
        nt, nh, nw = self.cells
        cell = torch.arange(nt * nh * nw, device=device)
        t, h, w = cell // (nh * nw) * ct, cell // nw % nh * ch, cell % nw * cw
        if self.seed is not None:
            pick = mix(cell, self.seed, self.step) % (ct * ch * cw)
            t, h, w = t + pick // (ch * cw), h + pick // cw % ch, w + pick % cw
        dst = ((t * rows + h) * columns + w).int()
        return complement(dst, tokens)[None], dst[None]

    def ranges(self, tokens: int, window: Any, device: Device) -> torch.Tensor:
        """Cells that differ from the source's by at most window = (t, h, w) along each axis: a run for each (t, h)."""
        wt, wh, ww = grid_sizes((0, *window) if len(items(window, "window")) == 2 else window, "window")
        (_, rows, columns), (ct, ch, cw), (nt, nh, nw) = self.grid, self.cell, self.cells
        src = self.lists(tokens, device)[0][0].long()
        t, h, w = src // (rows * columns) // ct, src // columns % rows // ch, src % columns // cw
        dt = torch.arange(-wt, wt + 1, device=device)[:, None]
        dh = torch.arange(-wh, wh + 1, device=device)[None, :]
        # Tokens beyond the last cell belong to it.
        t, h, w = t.clamp(max=nt - 1), h.clamp(max=nh - 1), w.clamp(max=nw - 1)
        at, ah = t[:, None, None] + dt, h[:, None, None] + dh  # [A, 2wt + 1, 1], [A, 1, 2wh + 1]
        inside = (at >= 0) & (at < nt) & (ah >= 0) & (ah < nh)
        # Lines beyond the grid are empty runs, which lie where they keep all runs ascending.
        line = (at * nh + ah.clamp(0, nh)).clamp(0, nt * nh) * nw
        first, last = (w - ww).clamp(min=0)[:, None, None], (w + ww + 1).clamp(max=nw)[:, None, None]
        runs = torch.stack((torch.where(inside, line + first, line), torch.where(inside, line + last, line)), -1)
        return runs.flatten(1, 2)[None].int().contiguous()


@dataclass(frozen=True)
class Frames(Partition):
    """Every `stride`-th frame holds the destinations (VidToMe, arXiv 2312.10656, local merging).

    Args:
        frames: number of frames; tokens are frame by frame.
        stride: distance of the destination frames.
        phase: the first of them; "random" takes it from seed and step.
    """

    frames: int
    stride: int = 4
    phase: int | str = 0
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        whole(self.frames, "frames", 1)
        whole(self.stride, "stride", 1)
        if self.phase != "random" and not 0 <= whole(self.phase, "phase") < min(self.stride, self.frames):
            raise ValueError(f'phase: expected 0 to {min(self.stride, self.frames) - 1} or "random", got {self.phase}')
        whole(self.seed, "seed", 0)
        whole(self.step, "step", 0)

    def at(self, step: int) -> Frames:
        """The same partition with the random phase of another step."""
        return replace(self, step=step)

    @property
    def first(self) -> int:
        """The first destination frame."""
        if self.phase != "random":
            return int(self.phase)
        return int(mix(0, self.seed, self.step) % min(self.stride, self.frames))

    def check(self, tokens: int) -> None:
        """See `Partition.check`."""
        if tokens % self.frames:
            raise ValueError(f"partition: {self.frames} frames do not divide {tokens} tokens")

    def destinations(self, tokens: int) -> int:
        """All tokens of the destination frames."""
        return len(range(self.first, self.frames, self.stride)) * (tokens // self.frames)

    @_cached
    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Partition.lists`."""
        place = torch.arange(tokens, dtype=torch.int32, device=device).view(self.frames, -1)
        kept = list(range(self.first, self.frames, self.stride))
        others = [f for f in range(self.frames) if f not in set(kept)]
        return place[others].reshape(1, -1), place[kept].reshape(1, -1)


@dataclass(frozen=True)
class Random(Partition):
    """`count` destinations at random places (ToMe's random variant).

    Args:
        count: number of destinations.
        seed, step: decide the choice.
    """

    count: int
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        whole(self.count, "count", 1)
        whole(self.seed, "seed", 0)
        whole(self.step, "step", 0)

    def at(self, step: int) -> Random:
        """The same partition with the choice of another step."""
        return replace(self, step=step)

    def check(self, tokens: int) -> None:
        """See `Partition.check`."""
        if self.count > tokens:
            raise ValueError(f"partition: {self.count} destinations are more than {tokens} tokens")

    def destinations(self, tokens: int) -> int:
        """`count`."""
        return self.count

    @_cached
    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Partition.lists`."""
        order = mix(torch.arange(tokens, device=device), self.seed, self.step).argsort(dim=0, stable=True)
        dst = order[: self.count].sort().values.int()
        return complement(dst, tokens)[None], dst[None]


@dataclass(frozen=True, eq=False)
class Index(Partition):
    """Destinations that the caller names.

    Args:
        dst: positions, each once: a list, or an int tensor [K] or [B, K]. Values of a tensor on a GPU are not checked.
        src: positions of the sources likewise, none of them a destination; None takes all others (for a tensor [B, K] they must be given).
    """

    dst: Sequence[int] | torch.Tensor
    src: Sequence[int] | torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("dst", "src"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, torch.Tensor):
                value = torch.tensor(
                    [whole(i, f"{name}[{n}]", 0) for n, i in enumerate(items(value, name))], dtype=torch.int32
                )
            if value.ndim not in (1, 2) or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: expected whole numbers [K] or [B, K], got {value.dtype} {list(value.shape)}")
            object.__setattr__(self, name, value if value.ndim == 2 else value[None])
        if self.src is None and self._dst.shape[0] != 1:
            raise ValueError("src: expected positions [B, A] where dst is [B, K]")

    @property
    def on_host(self) -> bool:
        """Whether the positions can be read without waiting for a device."""
        return all(v.device.type == "cpu" for v in (self.dst, self.src) if isinstance(v, torch.Tensor))

    def check_batch(self, batch: int) -> None:
        """Raise ValueError where the lists are for another batch."""
        for name, value in (("dst", self._dst), ("src", self.src)):
            if isinstance(value, torch.Tensor) and value.shape[0] not in (1, batch):
                wanted = "1" if batch == 1 else f"1 or {batch}"
                raise ValueError(f"{name}: expected positions for a batch of {wanted}, got {list(value.shape)}")

    @property
    def _dst(self) -> torch.Tensor:
        assert isinstance(self.dst, torch.Tensor)
        return self.dst

    def check(self, tokens: int) -> None:
        """See `Partition.check`."""
        for name, value in (("dst", self._dst), ("src", self.src)):
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or torch.compiler.is_compiling():
                continue
            if value.numel() and (int(value.min()) < 0 or int(value.max()) >= tokens):
                raise ValueError(
                    f"{name}: expected positions from 0 to {tokens - 1}, got {int(value.min())} to {int(value.max())}"
                )
            if any(row.unique().numel() != row.numel() for row in value):
                raise ValueError(f"{name}: expected each position once")
        if isinstance(self.src, torch.Tensor) and self.on_host and not torch.compiler.is_compiling():
            for src, dst in (
                itertools.product(self.src, self._dst)
                if 1 in (len(self.src), len(self._dst))
                else zip(self.src, self._dst, strict=False)
            ):
                both = src[torch.isin(src, dst)]
                if both.numel():
                    raise ValueError(
                        f"src: position {int(both[0])} is a destination too, which merges into no other token"
                    )

    def destinations(self, tokens: int) -> int:
        """Length of the list."""
        return self._dst.shape[1]

    def sources(self, tokens: int) -> int:
        """Length of the list, or all others."""
        return self.src.shape[1] if isinstance(self.src, torch.Tensor) else tokens - self._dst.shape[1]

    def lists(self, tokens: int, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Partition.lists`."""
        dst = self._dst.to(device=device, dtype=torch.int32)
        src = complement(dst[0], tokens)[None] if self.src is None else self.src.to(device=device, dtype=torch.int32)  # type: ignore[union-attr]
        return src.contiguous(), dst.contiguous()
