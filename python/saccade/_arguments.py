"""Checks of plain arguments: each returns the value in its exact type, or raises an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def whole(value: Any, name: str, least: int | None = None) -> int:
    """`value` as an int, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number, got {value!r} ({type(value).__name__})")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value}")
    return int(value)


def number(value: Any, name: str, above: float | None = None) -> int | float:
    """`value` as an int where it is whole, else as a float; finite and above `above`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if above is not None and result <= above:
        raise ValueError(f"{name}: expected a number above {above}, got {value}")
    if isinstance(value, Integral):
        return int(value)
    return int(result) if result.is_integer() else result


def items(value: Any, name: str, count: int | None = None) -> tuple[Any, ...]:
    """`value` as a tuple of `count` entries."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name}: expected {count} entries, got {len(value)}")
    return tuple(value)


def grid_sizes(value: Any, name: str, least: int = 0) -> tuple[int, int, int]:
    """`value` as (T, H, W), each at least `least`."""
    sizes = items(value, name)
    if len(sizes) != 3:
        raise ValueError(f"{name}: expected three sizes (T, H, W), got {len(sizes)}")
    t, h, w = (whole(size, f"{name}[{i}]", least) for i, size in enumerate(sizes))
    return t, h, w


def choice(value: Any, name: str, accepted: Sequence[str]) -> str:
    """`value`, which must be one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")
    return str(value)
