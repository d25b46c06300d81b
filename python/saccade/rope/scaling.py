"""Context extension: each function takes a `RopeSpec` and returns one with other frequencies.

`ntk`, `dynamic_ntk` and `yarn` need to know which geometric progression a frequency belongs to. Two layouts are
recognised from the numbers: one progression over all R pairs whatever their axes (Llama, M-RoPE, HoPE; zeros are gaps
in it), or one per axis, starting again (Wan, CogVideoX). d is the width of a progression, two columns per pair, and
b = its base. Frequencies of zero stay zero. `axes` restricts a change to the named position axes.
Dense and learned frequencies are refused. Wrong arguments are ValueErrors or TypeErrors that name them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from saccade._arguments import items, number, whole
from saccade.rope.spec import RopeSpec

__all__ = ["dynamic_ntk", "linear", "llama3", "longrope", "ntk", "proportional", "riflex", "yarn"]

# Change of one frequency: (frequency, its row's axes entry, pair index in the row) -> frequency.
_Edit = Callable[[float, int, int], float]


@dataclass(frozen=True)
class _Progression:
    """b^(-2i / width) for i = 0, 1, ...; `index` gives the i of a pair of the row."""

    width: int
    base: float
    index: dict[int, int]


def _rows(spec: RopeSpec) -> tuple[list[tuple[float, ...]], list[tuple[int, ...]]]:
    """Frequencies and axes per head group."""
    if not isinstance(spec, RopeSpec):
        raise TypeError(f"spec: expected a RopeSpec, got {type(spec).__name__}")
    if spec.learned or spec.axis is None:
        raise ValueError("spec: expected one frequency and axis per pair, got dense or learned frequencies")
    if isinstance(spec.inv_freq[0], tuple):
        return list(spec.inv_freq), list(spec.axis)
    return [spec.inv_freq], [spec.axis]


def _edit(
    spec: RopeSpec, edit: Callable[[tuple[float, ...], tuple[int, ...]], _Edit], axes: Sequence[int] | None
) -> RopeSpec:
    """A copy of `spec` in which `edit(row, axes of the row)` has changed every frequency of the chosen axes."""
    rows, axis = _rows(spec)
    chosen = set(range(spec.axes or 0)) if axes is None else {whole(a, "axes", 0) for a in items(axes, "axes")}
    if not chosen or max(chosen) >= (spec.axes or 0):
        raise ValueError(f"axes: expected position axes from 0 to {(spec.axes or 0) - 1}, got {axes}")
    changed = []
    for row, row_axis in zip(rows, axis, strict=True):
        if not any(row):
            changed.append(row)  # an idle head has no progression to read
            continue
        change = edit(row, row_axis)
        changed.append(
            tuple(change(f, a, i) if a in chosen else f for i, (f, a) in enumerate(zip(row, row_axis, strict=True)))
        )
    nested = isinstance(spec.inv_freq[0], tuple)
    return replace(spec, inv_freq=tuple(changed) if nested else changed[0])


def _fit(row: tuple[float, ...], pairs: list[int]) -> _Progression | None:
    """The progression that starts at 1 with the first of `pairs` and holds all that are not zero, if there is one."""
    known = [(n, row[i]) for n, i in enumerate(pairs) if row[i] != 0.0]
    if len(known) < 2 or known[0] != (0, 1.0) or known[-1][1] <= 0.0:
        return None
    last, value = known[-1]
    slope = math.log(value) / last
    if slope >= 0.0 or any(f <= 0.0 or abs(math.log(f) - slope * n) > 1e-6 for n, f in known):
        return None
    return _Progression(2 * len(pairs), math.exp(-slope * len(pairs)), {i: n for n, i in enumerate(pairs)})


def _progressions(row: tuple[float, ...], axis: tuple[int, ...]) -> dict[int, _Progression]:
    """The progression of each axis: one for all, or one each."""
    whole_row = _fit(row, list(range(len(row))))
    if whole_row is not None:
        return dict.fromkeys(axis, whole_row)
    found = {}
    for a in set(axis):
        pairs = [i for i, n in enumerate(axis) if n == a]
        if any(row[i] for i in pairs):
            fitted = _fit(row, pairs)
            if fitted is None:
                raise ValueError(
                    "spec: expected frequencies base^(-2i/d) over all pairs or over each axis's, at least two of them; "
                    f"axis {a} has neither"
                )
            found[a] = fitted
    return found


def _factor(value: float, name: str = "factor") -> float:
    return float(number(value, name, above=0.0))


def linear(spec: RopeSpec, factor: float, *, axes: Sequence[int] | None = None) -> RopeSpec:
    """Every frequency divided by `factor` (position interpolation, arXiv 2306.15595, eq. 4).

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> linear(vanilla(4, 100.0), 4.0).inv_freq
        (0.25, 0.025)
    """
    scale = _factor(factor)
    return _edit(spec, lambda row, axis: lambda f, a, i: f / scale, axes)


def _rebased(factor_of: float) -> Callable[[tuple[float, ...], tuple[int, ...]], _Edit]:
    """Base times factor_of^(d / (d - 2)): the highest frequency stays, the lowest is divided by factor_of."""

    def edit(row: tuple[float, ...], axis: tuple[int, ...]) -> _Edit:
        found = _progressions(row, axis)

        def change(f: float, a: int, i: int) -> float:
            if f == 0.0:
                return f
            width = found[a].width
            return f * float(factor_of ** (-2.0 * found[a].index[i] / (width - 2)))

        return change

    return edit


def ntk(spec: RopeSpec, factor: float, *, axes: Sequence[int] | None = None) -> RopeSpec:
    """Base b becomes b * factor^(d / (d - 2)) (NTK-aware scaling; YaRN, arXiv 2309.00071, sec. 3.1).

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> ntk(vanilla(4, 100.0), 4.0).inv_freq
        (1.0, 0.025)
    """
    return _edit(spec, _rebased(_factor(factor)), axes)


def dynamic_ntk(
    spec: RopeSpec, factor: float, original_length: int, length: int, *, axes: Sequence[int] | None = None
) -> RopeSpec:
    """`ntk` with factor * L / L0 - (factor - 1) for sequences of L = max(length, L0) tokens, L0 = original_length.

    YaRN, arXiv 2309.00071, sec. 3.3: dynamic NTK.

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> dynamic_ntk(vanilla(4, 100.0), 2.0, 4096, 100) == vanilla(4, 100.0)
        True
    """
    scale, first = _factor(factor), whole(original_length, "original_length", 1)
    longest = max(whole(length, "length", 0), first)
    stretch = scale * longest / first - (scale - 1)
    return _edit(spec, _rebased(stretch), axes)


def yarn(
    spec: RopeSpec,
    factor: float,
    original_length: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    axes: Sequence[int] | None = None,
) -> RopeSpec:
    """Low frequencies divided by `factor`, high ones kept, a ramp between; cos and sin times 0.1 ln(factor) + 1.

    The ramp runs between the pairs that make beta_fast and beta_slow turns in original_length, rounded outwards if
    `truncate`. mscale and mscale_all_dim weigh the logarithm as in DeepSeek. YaRN, arXiv 2309.00071, secs. 3.2 and 3.4.

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> round(yarn(vanilla(128, 1e6), 4.0, 32768).attention_factor, 6)
        1.138629
    """
    scale, length = _factor(factor), whole(original_length, "original_length", 1)
    fast, slow = _factor(beta_fast, "beta_fast"), _factor(beta_slow, "beta_slow")
    if fast <= slow:
        raise ValueError(f"beta_fast: expected more turns than beta_slow ({slow}), got {fast}")
    if not isinstance(truncate, bool):
        raise TypeError(f"truncate: expected True or False, got {truncate!r}")

    def temperature(weight: float) -> float:
        return 1.0 if scale <= 1.0 else 0.1 * weight * math.log(scale) + 1.0

    if attention_factor is not None:
        temper = _factor(attention_factor, "attention_factor")
    elif mscale and mscale_all_dim:
        upper, lower = _factor(mscale, "mscale"), _factor(mscale_all_dim, "mscale_all_dim")
        temper = temperature(upper) / temperature(lower)
    else:
        temper = temperature(1.0)

    def bounds(p: _Progression) -> tuple[float, float]:
        at = [p.width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(p.base)) for turns in (fast, slow)]
        low, high = (math.floor(at[0]), math.ceil(at[1])) if truncate else at
        low, high = max(low, 0), min(high, p.width - 1)
        return low, high if high != low else high + 0.001

    def edit(row: tuple[float, ...], axis: tuple[int, ...]) -> _Edit:
        found = _progressions(row, axis)

        def change(f: float, a: int, i: int) -> float:
            if f == 0.0:
                return f
            low, high = bounds(found[a])
            ramp = min(max((found[a].index[i] - low) / (high - low), 0.0), 1.0)
            return f / scale * ramp + f * (1.0 - ramp)

        return change

    scaled = _edit(spec, edit, axes)
    return replace(scaled, attention_factor=spec.attention_factor * temper)


def longrope(
    spec: RopeSpec,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_length: int,
    *,
    length: int | None = None,
    factor: float | None = None,
    attention_factor: float | None = None,
) -> RopeSpec:
    """Pair i divided by long_factor[i] where `length` exceeds original_length, else by short_factor[i].

    cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original_length)). LongRoPE, arXiv 2402.13753. One of
    `factor` (full length over original length) and `attention_factor` is required.

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> longrope(vanilla(4, 100.0), [1.0, 1.0], [1.0, 2.0], 4096, length=8192, factor=2.0).inv_freq
        (1.0, 0.05)
    """
    rows, _ = _rows(spec)
    first = whole(original_length, "original_length", 2)
    lists = []
    for name, given in (("short_factor", short_factor), ("long_factor", long_factor)):
        lists.append([_factor(x, f"{name}[{i}]") for i, x in enumerate(items(given, name, len(rows[0])))])
    if attention_factor is not None:
        temper = _factor(attention_factor, "attention_factor")
    elif factor is not None:
        scale = _factor(factor)
        temper = 1.0 if scale <= 1.0 else math.sqrt(1 + math.log(scale) / math.log(first))
    else:
        raise ValueError("factor: expected factor or attention_factor, got neither")
    divisors = lists[1] if length is not None and whole(length, "length", 0) > first else lists[0]
    scaled = _edit(spec, lambda row, axis: lambda f, a, i: f / divisors[i], None)
    return replace(scaled, attention_factor=spec.attention_factor * temper)


def llama3(
    spec: RopeSpec,
    factor: float,
    original_length: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    axes: Sequence[int] | None = None,
) -> RopeSpec:
    """Frequencies of fewer than low_freq_factor turns in original_length divided by `factor`, the rest kept or blended.

    Those of more than high_freq_factor turns are kept, between the two lies a linear blend. Llama 3.1, reference code.

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> spec = vanilla(128, 5e5)
        >>> llama3(spec, 8.0, 8192).inv_freq[63] == spec.inv_freq[63] / 8
        True
    """
    scale, length = _factor(factor), whole(original_length, "original_length", 1)
    low, high = _factor(low_freq_factor, "low_freq_factor"), _factor(high_freq_factor, "high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor: expected more than low_freq_factor ({low}), got {high}")

    def change(f: float, a: int, i: int) -> float:
        turns = abs(f) * length / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return (1.0 - blend) * f / scale + blend * f

    return _edit(spec, lambda row, axis: change, axes)


def riflex(spec: RopeSpec, k: int, length: float, *, axis: int = 0) -> RopeSpec:
    """The k-th frequency of `axis`, counted from 1, becomes 0.9 * 2 pi / length, length in units of position.

    RIFLEx, arXiv 2502.15894.

    Example:
        >>> from saccade.rope.presets_diffusion import wan
        >>> round(riflex(wan(128), 6, 81).inv_freq[5], 6)
        0.069813
    """
    which, size = whole(k, "k", 1), number(length, "length", above=0.0)
    rows, row_axes = _rows(spec)
    chosen = whole(axis, "axis", 0)
    changed = []
    for row, row_axis in zip(rows, row_axes, strict=True):
        places = [i for i, a in enumerate(row_axis) if a == chosen]
        if which > len(places):
            raise ValueError(f"k: expected 1 to {len(places)}, the number of pairs of axis {chosen}, got {which}")
        place = places[which - 1]
        changed.append((*row[:place], 0.9 * 2 * math.pi / size, *row[place + 1 :]))
    return replace(spec, inv_freq=tuple(changed) if isinstance(spec.inv_freq[0], tuple) else changed[0])


def proportional(spec: RopeSpec, proportion: float, *, factor: float = 1.0) -> RopeSpec:
    """The first int(proportion * R) pairs divided by `factor`, all others zero.

    Partial rotary without narrowing the progression, as in Gemma.

    Example:
        >>> from saccade.rope.presets import vanilla
        >>> proportional(vanilla(8, 10000.0), 0.5).inv_freq
        (1.0, 0.1, 0.0, 0.0)
    """
    share, scale = float(number(proportion, "proportion")), _factor(factor)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"proportion: expected a number from 0 to 1, got {proportion}")
    turning = int(share * 2 * spec.pairs // 2) if isinstance(spec, RopeSpec) else 0
    return _edit(spec, lambda row, axis: lambda f, a, i: f / scale if i < turning else 0.0, None)
