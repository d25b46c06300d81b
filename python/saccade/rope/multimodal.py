"""Positions of text and video in one sequence, for prompts, for decoding after them, and for padded batches.

A sequence is a list of segments: an int is that many text tokens, (T, H, W) the tokens of an image or a video after
spatial merging, t-major. Text runs with all three rows equal; a grid starts at the position s that the next text token
would have had. For frame i, row j and column k of a grid, and the next text token after it:

    rule        t               h                      w                      next
    mrope       s + i           s + j                  s + k                  largest + 1 (or s + max(H, W))
    mrope_time  s + floor(i c)  s + j                  s + k                  the same
    videorope   s + gamma i     t + j - (H - 1) // 2   t + k - (W - 1) // 2   s + gamma (T - 1) + 1
      "paper"   s + gamma i     t + j - H / 2          t + k - W / 2          s + gamma T
    hope        as videorope, gamma chosen per video
    tad         s + n + gamma i on all rows                                    s + T H W + gamma T
    v2pe        s - 1 + gamma (n + 1) on all rows                              ceil(s - 1 + gamma T H W) + 1

c = tokens_per_second * second_per_grid, n = index of the token in the grid; text advances by 1, under tad by 1 + gamma.

mrope: Qwen2-VL, arXiv 2409.12191, sec. 2.1. mrope_time: Qwen2.5-VL, arXiv 2502.13923. videorope: arXiv 2502.05173, as
its published code has it, and eq. 7 as form="paper". hope: arXiv 2505.20444, sec. 4.2. tad: TC-LLaVA, arXiv 2409.03206,
as the code of HoPE has it. v2pe: arXiv 2412.09616.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import choice, grid_sizes, items, number, whole

__all__ = ["batch_positions", "multimodal_positions"]

_RULES = ("hope", "videorope", "mrope", "mrope_time", "tad", "v2pe")
_Number = int | float


def _line(count: int, step: _Number, offset: _Number) -> torch.Tensor:
    """offset + step * (0, 1, ..., count - 1): int64 where both are whole, else float64 (torch would take float32)."""
    exact = isinstance(step, int) and isinstance(offset, int)
    return torch.arange(count, dtype=torch.int64 if exact else torch.float64) * step + offset


def _exact(value: _Number) -> _Number:
    return int(value) if float(value).is_integer() else float(value)


def _mesh(t: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[3, T*H*W] from t [T], h [T|1, H] and w [T|1, W]."""
    size = (t.shape[0], h.shape[-1], w.shape[-1])
    rows = [t[:, None, None], h[:, :, None], w[:, None, :]]
    kind = torch.float64 if any(row.is_floating_point() for row in rows) else torch.int64
    return torch.stack([row.to(kind).expand(size) for row in rows]).reshape(3, -1)


def _same(line: torch.Tensor) -> torch.Tensor:
    return line.expand(3, -1)


class _Rule:
    """One rule with its options: places a segment at `start` and says where the next text token stands."""

    def __init__(self, rule: str, form: str, after_vision: str) -> None:
        self.rule, self.form, self.after_vision = rule, form, after_vision

    def text(self, count: int, start: _Number, gamma: _Number) -> tuple[torch.Tensor, _Number]:
        step = 1 + gamma if self.rule == "tad" else 1
        return _same(_line(count, step, start)), _exact(start + count * step)

    def grid(self, sizes: tuple[int, int, int], start: _Number, gamma: Any) -> tuple[torch.Tensor, _Number]:
        t, h, w = sizes
        if self.rule in ("mrope", "mrope_time"):
            # torch's own product and truncation: transformers gets float32 here, and the floor depends on it.
            frames = torch.arange(t) if self.rule == "mrope" else (torch.arange(t) * gamma).long()
            rows = (_line(h, 1, start)[None], _line(w, 1, start)[None])
            largest = start + max(int(frames[-1]), h - 1, w - 1) + 1
            time = frames + start if isinstance(start, int) else frames.double() + start
            return _mesh(time, *rows), _exact(largest if self.after_vision == "max" else start + max(h, w))
        if self.rule == "tad":
            place = _line(t * h * w, 1, start) + _line(t, gamma, 0).repeat_interleave(h * w)
            return _same(place), _exact(start + t * h * w + gamma * t)
        if self.rule == "v2pe":
            count = t * h * w
            place = _line(count, gamma, start - 1 + gamma)
            return _same(place), math.ceil(start - 1 + gamma * count) + 1
        time = _line(t, gamma, start)
        paper = self.form == "paper"
        middles = [_exact(n / 2) if paper else (n - 1) // 2 for n in (h, w)]
        rows_h, rows_w = (time[:, None] + _line(n, 1, -m) for n, m in zip((h, w), middles, strict=True))
        return _mesh(time, rows_h, rows_w), _exact(start + gamma * (t if paper else t - 1) + (0 if paper else 1))


def _per_grid(value: Any, name: str, grids: int, above: float | None = None) -> list[Any]:
    """One number per grid from a number or a list of them."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        entries = items(value, name)
        if len(entries) != grids:
            raise ValueError(f"{name}: expected a number or one per grid ({grids}), got {len(entries)}")
        return [number(x, f"{name}[{i}]", above) for i, x in enumerate(entries)]
    return [number(value, name, above)] * grids


def _gammas(rule: str, gamma: Any, grids: int) -> list[Any]:
    """Temporal stride of each grid, or a clear refusal."""
    if rule in ("mrope", "mrope_time"):
        if gamma is not None:
            raise ValueError(f"gamma: rule {rule!r} has no temporal stride, got {gamma!r}")
        return [1] * grids
    if gamma is None:
        if rule in ("hope", "v2pe") and grids:
            what = "paper: 0.75 for retrieval, 1.5 for understanding" if rule == "hope" else "paper: 1/256 to 1"
            raise ValueError(f"gamma: rule {rule!r} needs a number, or one per grid ({what}), got None")
        return [2 if rule == "videorope" else 1] * grids
    if rule == "tad" and isinstance(gamma, Sequence):
        raise TypeError("gamma: rule 'tad' takes one number, because text advances by it too")
    return _per_grid(gamma, "gamma", grids, 0.0)


def _intervals(rule: str, tokens_per_second: Any, second_per_grid: Any, grids: int) -> list[Any]:
    """Units of position per frame of each grid under mrope_time, exactly as transformers multiplies them."""
    given = {"tokens_per_second": tokens_per_second, "second_per_grid": second_per_grid}
    for name, value in given.items():
        if rule != "mrope_time" and value is not None:
            raise ValueError(f"{name}: only rule 'mrope_time' uses it, got {value!r} with rule {rule!r}")
        if rule == "mrope_time" and grids and value is None:
            raise ValueError(f"{name}: rule 'mrope_time' needs it, got None")
    if rule != "mrope_time" or not grids:
        return [1] * grids
    rate = number(tokens_per_second, "tokens_per_second", 0.0)
    if isinstance(second_per_grid, torch.Tensor):
        if second_per_grid.shape != (grids,):
            raise ValueError(f"second_per_grid: expected shape [{grids}], got {list(second_per_grid.shape)}")
        if not bool((second_per_grid > 0).all() and torch.isfinite(second_per_grid).all()):
            raise ValueError("second_per_grid: expected finite numbers above 0")
        return [rate * x for x in second_per_grid.cpu()]
    return [rate * x for x in _per_grid(second_per_grid, "second_per_grid", grids, 0.0)]


def multimodal_positions(
    segments: Sequence[int | Sequence[int]],
    *,
    rule: str,
    gamma: float | Sequence[float] | None = None,
    start: float = 0,
    after_vision: str = "max",
    tokens_per_second: float | None = None,
    second_per_grid: float | Sequence[float] | torch.Tensor | None = None,
    form: str = "code",
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, int | float]:
    """Positions [3, S] (rows t, h, w) of text and video tokens, and the position of the next text token.

    Args:
        segments: text token counts and (T, H, W) grids, in order; several videos may alternate with text.
        rule: "hope", "videorope", "mrope", "mrope_time", "tad" or "v2pe"; formulas at the head of this module.
        gamma: temporal stride, one number or one per grid (also for images, where it has no effect). hope and v2pe
            (increment per visual token) need it; videorope takes 2 and tad 1 by default; the others refuse it.
        start: position of the first token. To go on after a prompt, pass its next position: decoding one token is
            `multimodal_positions([1], rule=rule, start=next_position)`.
        after_vision: "max" lets text go on after the largest position of a video (the papers, transformers up to 5.2);
            "hw" after start + max(H, W) (transformers 5.3 to 5.23, mrope and mrope_time only). Those versions decode
            from positions.max() + 1 all the same.
        tokens_per_second, second_per_grid: for mrope_time; seconds per frame step, one number or one per grid.
        form: "code" or "paper" (videorope only, eq. 7).
        device: of the result.

    Returns:
        int64 where every position is whole, float64 otherwise; and an int or float in the same way.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> multimodal_positions([2, (2, 1, 2), 1], rule="hope", gamma=1.5)
        (tensor([[0.0000, 1.0000, 2.0000, 2.0000, 3.5000, 3.5000, 4.5000],
                [0.0000, 1.0000, 2.0000, 2.0000, 3.5000, 3.5000, 4.5000],
                [0.0000, 1.0000, 2.0000, 3.0000, 3.5000, 4.5000, 4.5000]],
               dtype=torch.float64), 5.5)
    """
    choice(rule, "rule", _RULES)
    choice(after_vision, "after_vision", ("max", "hw"))
    choice(form, "form", ("code", "paper"))
    if after_vision == "hw" and rule not in ("mrope", "mrope_time"):
        raise ValueError(f"after_vision: 'hw' applies to the rules 'mrope' and 'mrope_time', got rule {rule!r}")
    if form == "paper" and rule != "videorope":
        raise ValueError(f"form: 'paper' applies to the rule 'videorope', got rule {rule!r}")
    parts = []
    for n, segment in enumerate(items(segments, "segments")):
        name = f"segments[{n}]"
        parts.append(grid_sizes(segment, name, 1) if isinstance(segment, Sequence) else whole(segment, name, 0))
    grids = sum(isinstance(part, tuple) for part in parts)
    strides = _gammas(rule, gamma, grids)
    intervals = _intervals(rule, tokens_per_second, second_per_grid, grids)
    text_gamma = 1 if gamma is None or rule != "tad" else number(gamma, "gamma", 0.0)
    place = _Rule(rule, form, after_vision)
    here = number(start, "start")
    pieces = [torch.zeros(3, 0, dtype=torch.int64)]
    seen = 0
    for part in parts:
        if isinstance(part, tuple):
            piece, here = place.grid(part, here, intervals[seen] if rule == "mrope_time" else strides[seen])
            seen += 1
        else:
            piece, here = place.text(part, here, text_gamma)
        pieces.append(piece)
    positions = torch.cat(pieces, 1)
    if positions.is_floating_point() and bool((positions == positions.floor()).all()):
        positions = positions.to(torch.int64)
    return positions.to(device), here


def _per_sample(value: Any, count: int, name: str) -> list[Any]:
    """One value per sample: None and numbers are shared."""
    if isinstance(value, torch.Tensor) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise ValueError(f"{name}: expected one value, or one per sample ({count}), got {len(value)}")
        return list(value)
    return [value] * count


def batch_positions(
    batch: Sequence[Sequence[int | Sequence[int]]],
    *,
    rule: str,
    padding: str = "left",
    fill: int = 0,
    gamma: Any = None,
    start: Any = 0,
    second_per_grid: Any = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions [3, B, S] of padded sequences, a mask bool [B, S] of real tokens, and the next positions [B].

    Args:
        batch: one list of segments per sample, see `multimodal_positions`.
        padding: "left" or "right"; padding tokens stand at `fill`.
        gamma, start, second_per_grid: one value for all or one entry per sample; `start` may be the tensor [B] that an
            earlier call returned.
        options: the other arguments of `multimodal_positions`.

    Example:
        >>> positions, mask, following = batch_positions([[3], [1]], rule="mrope")
        >>> positions[0], following
        (tensor([[0, 1, 2],
                [0, 0, 0]]), tensor([3, 1]))
    """
    left = choice(padding, "padding", ("left", "right")) == "left"
    samples = items(batch, "batch")
    filler = whole(fill, "fill")
    count = len(samples)
    shared = {"gamma": gamma, "start": start, "second_per_grid": second_per_grid}
    per_sample = [_per_sample(value, count, name) for name, value in shared.items()]
    results = [
        multimodal_positions(segments, rule=rule, gamma=g, start=s, second_per_grid=seconds, **options)
        for segments, g, s, seconds in zip(samples, *per_sample, strict=True)
    ]
    longest = max((p.shape[1] for p, _ in results), default=0)
    kind = torch.float64 if any(p.is_floating_point() for p, _ in results) else torch.int64
    positions = torch.full((3, count, longest), filler, dtype=kind)
    mask = torch.zeros(count, longest, dtype=torch.bool)
    for n, (place, _) in enumerate(results):
        size = place.shape[1]
        columns = slice(longest - size, longest) if left else slice(0, size)
        positions[:, n, columns] = place.to(kind)
        mask[n, columns] = True
    following = [here for _, here in results]
    whole_next = all(isinstance(here, int) for here in following)
    ends = torch.tensor(following, dtype=torch.int64 if whole_next else torch.float64)
    return positions.to(device), mask.to(device), ends.to(device)
