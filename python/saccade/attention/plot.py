"""Pictures of a layout: the blocks that each head computes, and what one query sees in the frames of the video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from saccade._arguments import grid_sizes, items, whole
from saccade.attention._mask import unpack_bits
from saccade.attention.combine import shown_bits
from saccade.attention.layout import BlockLayout

__all__ = ["plot", "query_row"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; the legend says the same in words.
FULL, PARTIAL, NONE, QUERY = "#0072B2", "#E69F00", "#ECECEC", "#D55E00"
INK, SOFT = "#1a1a1a", "#5a5a5a"
COLUMNS = 4  # heads side by side
FRAMES = 12  # frames shown at most


def query_row(layout: BlockLayout, token: int, *, sample: int = 0, head: int = 0) -> torch.Tensor:
    """bool [Sk]: the keys that one query token sees, by token.

    Example:
        >>> from saccade.attention import patterns
        >>> query_row(patterns.causal(5), 2).int().tolist()
        [1, 1, 1, 0, 0]
    """
    if not 0 <= whole(token, "token", 0) < layout.q_len:
        raise ValueError(f"token: expected 0 to {layout.q_len - 1}, got {token}")
    place = (
        token
        if layout.q_order is None
        else int((_own(layout.q_order, sample, head, layout.heads) == token).nonzero()[0])
    )
    columns = torch.arange(layout.k_blocks, device=layout.device)
    row = torch.full_like(columns, place // layout.q_block)
    lead = torch.full_like(columns, sample), torch.full_like(columns, head)
    bits = shown_bits(layout, (*lead, row, columns), layout.heads)[:, place % layout.q_block]
    seen = unpack_bits(bits[:, None])[:, 0].flatten()
    if layout.k_order is None:
        return seen[: layout.k_len]
    tokens = _own(layout.k_order, sample, head, layout.heads).long()
    out = torch.zeros(layout.k_len, dtype=torch.bool, device=layout.device)
    out[tokens[tokens >= 0]] = seen[tokens >= 0]
    return out


def _own(order: torch.Tensor, sample: int, head: int, heads: int) -> torch.Tensor:
    """The order [P] of a query head, which may share that of a key head."""
    group = max(heads // order.shape[1], 1)
    return order[sample if order.shape[0] > 1 else 0, head // group if order.shape[1] > 1 else 0]


def plot(
    layout: BlockLayout,
    *,
    grid: Sequence[int] | None = None,
    prefix: int = 0,
    query: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    sample: int = 0,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A matplotlib figure: for every head its map of blocks, and with a `grid` the frames of the video as one query sees them.

    Args:
        layout: any layout; rows and columns of a map are blocks of positions, in the layout's order of tokens.
        grid: (T, H, W) of the keys that begin at token `prefix`; the frames are drawn for the first of `heads`.
        query: the query token, or its (t, h, w); the middle of the video where None.
        heads: which ones; the first eight where None.
        sample: of a layout that tells samples apart.
        title: of the figure.
        path: where to write it (png, svg, pdf), or None.

    Example:
        >>> from saccade.attention import patterns
        >>> figure = patterns.sliding_tile((4, 16, 16), (2, 8, 8), (1, 3, 1)).plot(grid=(4, 16, 16))
        >>> len(figure.axes)
        5
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
    shown = (
        list(range(min(layout.heads, 8)))
        if heads is None
        else [whole(h, f"heads[{n}]", 0) for n, h in enumerate(items(heads, "heads"))]
    )
    if not shown or max(shown) >= layout.heads:
        raise ValueError(f"heads: expected some of 0 to {layout.heads - 1}, got {shown}")
    if not 0 <= whole(sample, "sample", 0) < layout.batch:
        raise ValueError(f"sample: expected 0 to {layout.batch - 1}, got {sample}")
    video = None if grid is None else _video(layout, grid, prefix, query)
    columns = min(len(shown), COLUMNS)
    rows = -(-len(shown) // columns)
    frames = [] if video is None else _frames(*video[:2])
    across = min(len(frames), 6)
    strips = -(-len(frames) // across) if frames else 0
    width = max(4.2 * columns + 0.6, 1.75 * across + 0.6, 6.4)
    tall = 1.0 if video is None else min(max(video[0][1] / video[0][2], 0.3), 2.0)
    maps_height, frames_height = 4.5 * rows, (1.6 * tall + 0.45) * strips + (0.6 if strips else 0)
    height = 1.1 + maps_height + frames_height
    figure = Figure(
        figsize=(width, height), dpi=110, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title or _title(layout), fontsize=16, fontweight="bold", color=INK)
    parts = figure.subfigures(
        2 if strips else 1, 1, height_ratios=[maps_height + 0.5, frames_height][: 2 if strips else 1], squeeze=False
    )
    _draw_maps(parts[0, 0], layout, shown, sample, rows, columns)
    if video is not None and strips:
        _draw_frames(parts[1, 0], layout, video, frames, shown[0], sample, strips, across)
    if path is not None:
        figure.savefig(path)
    return figure


def _title(layout: BlockLayout) -> str:
    pairs = f"{layout.q_len:,} queries x {layout.k_len:,} keys"
    return f"{pairs}: {100 * float(layout.density):.1f} % of the blocks computed"


def _rgb(colour: str) -> torch.Tensor:
    return torch.tensor([int(colour[n : n + 2], 16) for n in (1, 3, 5)], dtype=torch.uint8)


def _ratio(classes: torch.Tensor) -> float:
    """How many times longer one side of the maps [.., nQ, nK] is than the other."""
    rows, columns = (max(n, 1) for n in classes.shape[-2:])
    return max(rows / columns, columns / rows)


def _draw_maps(part: Any, layout: BlockLayout, heads: list[int], sample: int, rows: int, columns: int) -> None:
    from matplotlib.patches import Patch

    classes = layout.block_map().cpu()[sample]
    colours = torch.stack([_rgb(c) for c in (NONE, PARTIAL, FULL)])
    aspect = "equal" if _ratio(classes) < 2 else "auto"
    axes = part.subplots(rows, columns, squeeze=False)
    for n, ax in enumerate(axes.flat):
        if n >= len(heads):
            ax.axis("off")
            continue
        own = classes[heads[n]].long()
        # Colours are averaged where several blocks fall on one pixel: thin lines stay visible.
        ax.imshow(colours[own].numpy(), interpolation="auto", interpolation_stage="rgba", aspect=aspect)
        share = (own > 0).float().mean() if own.numel() else torch.zeros(())
        whole_share = (own == 2).float().mean() if own.numel() else torch.zeros(())
        name = f"head {heads[n]}: " if layout.heads > 1 else ""
        ax.set_title(
            f"{name}{100 * float(share):.1f} % computed, {100 * float(whole_share):.1f} % whole", fontsize=11, color=INK
        )
        ax.set_xlabel(f"key blocks of {layout.k_block}", fontsize=10, color=SOFT)
        if n % columns == 0:
            ax.set_ylabel(f"query blocks of {layout.q_block}", fontsize=10, color=SOFT)
        ax.tick_params(labelsize=9, colors=SOFT, length=3)
    words = ((FULL, "seen whole"), (PARTIAL, "seen in part"), (NONE, "not seen, not computed"))
    handles = [Patch(facecolor=c, edgecolor=SOFT, linewidth=0.5, label=w) for c, w in words]
    part.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=11)


Video = tuple[tuple[int, int, int], int, int]  # grid, query token, first video token


def _video(layout: BlockLayout, grid: Any, prefix: Any, query: Any) -> Video:
    sizes, first = grid_sizes(grid, "grid", 1), whole(prefix, "prefix", 0)
    t, h, w = sizes
    if first + t * h * w > layout.k_len:
        raise ValueError(f"grid: {first} + {t} x {h} x {w} tokens, expected at most the layout's {layout.k_len} keys")
    if query is None:
        query = (t // 2, h // 2, w // 2)
    if isinstance(query, Sequence):
        place = grid_sizes(query, "query")
        if any(p >= s for p, s in zip(place, sizes, strict=True)):
            raise ValueError(f"query: expected a place inside the grid {sizes}, got {place}")
        token = first + (place[0] * h + place[1]) * w + place[2]
    else:
        token = whole(query, "query", 0)
    if token >= layout.q_len:
        raise ValueError(f"query: expected a token below {layout.q_len}, got {token}")
    return sizes, token, first


def _frames(grid: tuple[int, int, int], token: int) -> list[int]:
    """Frames to show: all, or some evenly apart."""
    return (
        sorted({round(n * (grid[0] - 1) / (FRAMES - 1)) for n in range(FRAMES)})
        if grid[0] > FRAMES
        else list(range(grid[0]))
    )


def _draw_frames(
    part: Any, layout: BlockLayout, video: Video, frames: list[int], head: int, sample: int, strips: int, across: int
) -> None:
    from matplotlib.patches import Rectangle

    (t, h, w), token, first = video
    seen = query_row(layout, token, sample=sample, head=head).cpu()
    inside = first <= token < first + t * h * w
    at = divmod(token - first, h * w)
    if inside and at[0] not in frames:
        frames = sorted(
            [
                *min(
                    ([f for f in frames if f != x] for x in frames), key=lambda rest: sum(abs(f - at[0]) for f in rest)
                ),
                at[0],
            ]
        )
    body = seen[first : first + t * h * w].reshape(t, h, w)
    colours = torch.stack([_rgb(NONE), _rgb(FULL)])
    axes = part.subplots(strips, across, squeeze=False)
    for n, ax in enumerate(axes.flat):
        if n >= len(frames):
            ax.axis("off")
            continue
        ax.imshow(colours[body[frames[n]].long()].numpy(), interpolation="nearest")
        here = inside and frames[n] == at[0]
        ax.set_title(
            f"frame {frames[n]}" + (" (the query's)" if here else ""), fontsize=10, color=QUERY if here else SOFT
        )
        if here:
            y, x = divmod(at[1], w)
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2.5))
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_color("#c0c0c0")
    text = torch.cat((seen[:first], seen[first + t * h * w :]))
    who = f"query (t, h, w) = ({at[0]}, {at[1] // w}, {at[1] % w})" if inside else f"query token {token}"
    name = f"head {head}, " if layout.heads > 1 else ""
    others = f", {int(text.sum())} of {len(text)} text tokens" if len(text) else ""
    part.suptitle(
        f"{name}{who} sees (blue) {int(body.sum()):,} of {body.numel():,} video tokens{others}", fontsize=13, color=INK
    )
