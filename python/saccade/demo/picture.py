"""The picture: the sampled frames, and how position and rotary phase run over time and space in three methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saccade.demo.captioner import Inputs
from saccade.demo.video import Clip
from saccade.rope.multimodal import multimodal_positions
from saccade.rope.presets import hope, videorope
from saccade.rope.spec import RopeSpec
from saccade.swap.transformers.qwen_rotary import text_spec

__all__ = ["draw"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; line styles and labels say the same again.
_TIME, _HEIGHT, _WIDTH, _NONE = "#D55E00", "#0072B2", "#009E73", "#8A8A8A"
_AXES = (("time t", _TIME), ("height h", _HEIGHT), ("width w", _WIDTH))
_INK, _SOFT = "#1a1a1a", "#5a5a5a"
_FAST = 9  # a pair that M-RoPE gives to time, VideoRoPE and HoPE to width
_LEFT = 0.045
_COS: dict[str, Any] = {"cmap": "YlGnBu_r", "vmin": -1, "vmax": 1}

# Top of the heading, bottom and height of the panels, heading, text.
_TEXTS = (
    (
        0.826,
        0.668,
        0.103,
        "1  Which pair turns with which axis",
        "The columns of a head form pairs, and a token's position turns each of them; a bar says after how many positions its "
        "pair has gone once around.\nM-RoPE gives time the fastest pairs, VideoRoPE the slowest. HoPE leaves those slowest "
        "pairs still: what they hold matches at any distance.",
    ),
    (
        0.635,
        0.475,
        0.105,
        "2  Where the tokens stand",
        "Position of every token along time, height and width. In M-RoPE height and width start afresh at each step and time "
        "climbs alone.\nIn VideoRoPE and HoPE the whole frame moves along with time, centred on it, and text goes on where "
        "time has arrived.",
    ),
    (
        0.439,
        0.263,
        0.118,
        "3  What a fast pair sees over time and space",
        "cos of the angle between the token in the ring and all columns of later steps; bright: turned alike, dark: turned "
        "against each other.\nM-RoPE's fast pairs see time alone, and repeat. In VideoRoPE and HoPE a step in time counts "
        "like 2 or γ columns to the right: hence the slant.",  # noqa: RUF001
    ),
    (
        0.227,
        0.045,
        0.124,
        "4  What every pair sees over long times",
        "The same for all pairs, at one place of the frame, averaged over each interval of distances; the middle tone "
        "means that the pair has turned too often to tell.\nM-RoPE: three quarters of the pairs do not see time. VideoRoPE: "
        "even the slowest pair turns away in the end. HoPE: the last quarter stays bright for ever.",
    ),
)


@dataclass(frozen=True)
class _Method:
    name: str
    about: str
    spec: RopeSpec
    rule: dict[str, Any]

    def positions(self, segments: Any) -> NDArray[np.float64]:
        """[3, S]"""
        place, _ = multimodal_positions(segments, **self.rule)
        return place.double().numpy()

    @property
    def frequencies(self) -> NDArray[np.float64]:
        return np.array(self.spec.inv_freq)

    @property
    def axis(self) -> NDArray[np.int64]:
        return np.array(self.spec.axis)


def _methods(config: Any, seconds: float, gamma: float) -> list[_Method]:
    """The three, with the widths and frequencies of the model."""
    own = text_spec(config.text_config)
    base = config.text_config.rope_parameters["rope_theta"]
    rate = config.vision_config.tokens_per_second
    strides = "each frame carried along, {} positions per step"
    stock = {"rule": "mrope_time", "tokens_per_second": rate, "second_per_grid": seconds, "after_vision": "hw"}
    return [
        _Method("M-RoPE", f"as in Qwen2.5-VL: axes apart, {rate * seconds:.3g} positions per step", own, stock),
        _Method("VideoRoPE", strides.format(2), videorope(own.head_dim, base), {"rule": "videorope"}),
        _Method("HoPE", strides.format(f"γ = {gamma:g}"), hope(own.head_dim, base), {"rule": "hope", "gamma": gamma}),  # noqa: RUF001
    ]


def _heading(figure: Any, top: float, title: str, text: str) -> None:
    figure.text(_LEFT, top, title, fontsize=14.5, fontweight="bold", color=_INK, va="top")
    figure.text(_LEFT, top - 0.0135, text, fontsize=10.8, color=_SOFT, va="top", linespacing=1.4)


def _frames(figure: Any, bottom: float, top: float, clip: Clip) -> None:
    count, gap = len(clip.frames), 0.006
    width = min((0.92 - gap * (count - 1)) / count, 0.16)
    for n, (frame, time) in enumerate(zip(clip.frames, clip.times, strict=True)):
        axes = figure.add_axes((_LEFT + n * (width + gap), bottom, width, top - bottom))
        axes.imshow(frame)
        axes.set_title(f"{time:.{1 if clip.interval >= 0.1 else 2}f} s", fontsize=9, color=_SOFT, pad=3)
        axes.set_anchor("S")
        axes.axis("off")


def _allocation(axes: Any, method: _Method) -> None:
    """Positions per turn of every pair, in the colour of the axis that turns it."""
    frequency, owner = method.frequencies, method.axis
    pairs = np.arange(len(frequency))
    turning = frequency > 0
    wave = 2 * np.pi / np.where(turning, frequency, 1.0)
    for a, (_, colour) in enumerate(_AXES):
        mine = turning & (owner == a)
        axes.bar(pairs[mine], wave[mine] - 1, bottom=1, width=0.78, color=colour)
    still = pairs[~turning]
    if len(still):
        axes.axvspan(still[0] - 0.5, still[-1] + 0.5, color=_NONE, alpha=0.3, lw=0)
        axes.text(still.mean(), 10**3.5, "never\nturn", ha="center", va="center", fontsize=11, color=_INK)
    axes.set_yscale("log")
    axes.set_ylim(1, 1e7)
    axes.set_yticks([1, 1e2, 1e4, 1e6])
    axes.set_xlim(-0.8, len(pairs) - 0.2)
    axes.set_xticks(_quarters(len(pairs)))
    axes.set_xlabel("rotary pair, fast to slow", fontsize=9.5)


def _quarters(pairs: int) -> list[int]:
    return [0, pairs // 4, pairs // 2, 3 * pairs // 4, pairs - 1]


def _sequence(axes: Any, place: NDArray[np.float64], segments: Any) -> None:
    """Position along each axis over the tokens around the video."""
    before, (t, h, w), after = segments
    start, stop = before, before + t * h * w
    tokens = np.arange(place.shape[1])
    shown = slice(start - min(before, 12), stop + min(after, 12))
    for n in range(t):
        axes.axvspan(start + n * h * w, start + (n + 1) * h * w - 1, color="#000000", alpha=0.05, lw=0)
    for a, line in ((2, 0.7), (1, 1.4), (0, 2.6)):  # width swings the fastest and lies at the back
        axes.plot(tokens[start:stop], place[a, start:stop], color=_AXES[a][1], lw=line)
    for part in (slice(shown.start, start), slice(stop, shown.stop)):
        axes.plot(tokens[part], place[0, part], color=_INK, lw=2.6)
    axes.set_xlim(shown.start, shown.stop - 1)
    axes.set_xticks([start + n * h * w for n in range(t)], [f"step {n}" for n in range(t)], ha="left")
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("text (black), the video's tokens step by step, text (black)", fontsize=9.5)


def _phase_map(axes: Any, method: _Method) -> Any:
    """cos of the phase between the middle of the first frame and every column of the middle row of each frame."""
    steps, columns = 48, 41
    middle = columns // 2
    place = method.positions([(steps, 1, columns)]).reshape(3, steps, columns)
    moved = place - place[:, :1, middle : middle + 1]
    angle = moved[method.axis[_FAST]] * method.frequencies[_FAST]
    edge = middle + 0.5
    image = axes.imshow(
        np.cos(angle).T,
        **_COS,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, steps - 0.5, -edge, edge),
    )
    axes.plot(0, 0, marker="o", ms=8, mfc="none", mec=_INK, mew=1.8, clip_on=False, zorder=5)
    name, colour = _AXES[method.axis[_FAST]]
    axes.set_title(f"here pair {_FAST} turns with {name}", fontsize=10.5, color=colour, pad=4, fontweight="bold")
    axes.set_xlabel("steps later", fontsize=9.5)
    return image


def _decay_map(axes: Any, method: _Method) -> Any:
    """cos of the phase of every pair between two tokens at the same place of frames that lie far apart."""
    edges = np.logspace(0, 6, 301)
    place = method.positions([(101, 1, 1)])  # M-RoPE rounds single steps
    turn = ((place[:, 100] - place[:, 0])[method.axis] / 100 * method.frequencies)[:, None]
    near, far = edges[None, :-1], edges[None, 1:]
    # The mean over each interval, exactly: single distances would show patterns of the sampling.
    mean = (np.sin(turn * far) - np.sin(turn * near)) / np.where(turn == 0, 1.0, turn * (far - near))
    mean = np.where(turn == 0, 1.0, mean)
    pairs = np.arange(len(mean) + 1) - 0.5
    image = axes.pcolormesh(edges, pairs, mean, **_COS, rasterized=True)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_yticks(_quarters(len(mean)))
    axes.set_xlabel("steps apart", fontsize=9.5)
    return image


def _bar(figure: Any, image: Any, bottom: float, height: float) -> None:
    axes = figure.add_axes((0.958, bottom, 0.007, height))
    bar = figure.colorbar(image, cax=axes, ticks=[-1, 0, 1])
    bar.ax.tick_params(labelsize=8.5, length=2)
    bar.outline.set_linewidth(0.5)
    bar.ax.set_title("cos", fontsize=9, color=_SOFT, pad=5)


def _legend(figure: Any, y: float) -> None:
    from matplotlib.patches import Rectangle

    x = 0.61
    for name, colour in (*_AXES, ("no axis", _NONE)):
        figure.add_artist(Rectangle((x, y), 0.011, 0.0068, color=colour, transform=figure.transFigure))
        figure.text(x + 0.015, y + 0.0034, name, fontsize=11, color=_INK, va="center")
        x += 0.085


def _head(figure: Any, clip: Clip, segments: Any) -> None:
    _, (t, h, w), _ = segments
    title = "How a video model knows where and when"
    figure.text(_LEFT, 0.985, title, fontsize=23, fontweight="bold", color=_INK, va="top")
    text = (
        f"{clip.path.name}: {clip.duration:.1f} s, {clip.count} frames. The model sees these {len(clip.frames)}, two to a step: "
        f"{t} step{'s' * (t > 1)} of {h} x {w} tokens between two pieces of text."
    )
    figure.text(_LEFT, 0.9665, text, fontsize=12, color=_SOFT, va="top")
    _frames(figure, 0.877, 0.94, clip)


def draw(path: Path, model: Any, clip: Clip, inputs: Inputs, gamma: float) -> Path:
    """Draw the picture of a clip and its token sequence to `path` (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = _methods(model.config, inputs.seconds_per_step, gamma)
    figure = Figure(figsize=(15, 20), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    _head(figure, clip, inputs.segments)
    _legend(figure, 0.8165)
    span, gap = 0.268, 0.034
    lefts = [0.078 + n * (span + gap) for n in range(3)]
    for left, method in zip(lefts, methods, strict=True):
        middle = left + span / 2
        figure.text(middle, 0.856, method.name, fontsize=18, fontweight="bold", ha="center", color=_INK)
        figure.text(middle, 0.853, method.about, fontsize=11, ha="center", va="top", color=_SOFT)
    rows = zip(_TEXTS, ("positions per turn", "position", "columns to the right", "rotary pair"), strict=True)
    panels: list[list[Any]] = []
    for (top, bottom, height, title, text), label in rows:
        _heading(figure, top, title, text)
        panels.append([figure.add_axes((left, bottom, span, height)) for left in lefts])
        panels[-1][0].set_ylabel(label, fontsize=9.5)
        for axes in panels[-1]:
            axes.tick_params(labelsize=8.8, length=3, colors=_SOFT)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    for n, method in enumerate(methods):
        _allocation(panels[0][n], method)
        _sequence(panels[1][n], method.positions(inputs.segments), inputs.segments)
        near = _phase_map(panels[2][n], method)
        far = _decay_map(panels[3][n], method)
    limits = [axes.get_ylim() for axes in panels[1]]
    for axes in panels[1]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    for image, (_, bottom, height, _, _) in ((near, _TEXTS[2]), (far, _TEXTS[3])):
        _bar(figure, image, bottom, height)
    figure.savefig(path)
    return path
