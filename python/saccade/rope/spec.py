"""`RopeSpec`: one frozen description of a rotary embedding, for every variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Pairing = Literal["half", "interleaved"]

# round(2^256 / (2 pi)): steps are formed in integers, because inv_freq / (2 pi) in float64 would already be
# 2.4e-7 rad off at position 2^31.
_TURNS_PER_RADIAN_Q256 = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158
_LEARNED_SHIFT = 16  # learned frequencies may reach +-2^15 turns (2e5 rad) per unit of position


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], (list, tuple))


def _freeze(value: Any, scalar: type, name: str) -> Any:
    """Turn lists, arrays and tensors into nested tuples of `scalar`."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item, scalar, name) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}")
    if scalar is int and value != int(value):
        raise ValueError(f"{name}: expected whole numbers, got {value}")
    return scalar(value)


def _shape(value: Any) -> tuple[int, ...]:
    """Shape of a nested tuple; a ragged one gives -1."""
    if not isinstance(value, tuple):
        return ()
    inner = {_shape(item) for item in value}
    return (len(value), *(inner.pop() if len(inner) == 1 else (-1,)))


def _step(inv_freq: float, shift: int) -> int:
    """`inv_freq / (2 pi) / 2^shift` turns, rounded to a multiple of 2^-64 turn, exactly."""
    numerator, denominator = inv_freq.as_integer_ratio()
    scaled = numerator * _TURNS_PER_RADIAN_Q256
    half = denominator << (191 + shift)
    return (scaled + half) // (half << 1)


@dataclass(frozen=True, eq=True)
class RopeSpec:
    """A rotary embedding: which columns form pairs, which position axis turns a pair, and how fast.

    Pair `i` of head group `g` turns by `sum_a positions[a] * frequency[a, g, i]` radians and is multiplied by
    `attention_factor` (RoFormer, arXiv 2104.09864, eq. 15; several axes: Qwen2-VL, arXiv 2409.12191, sec. 2.1).

    Args:
        head_dim: width D of a head, 1 to 512.
        inv_freq: radians per unit of position. [R] for all heads, or [G, R] per head group (head h of H uses group
            h // (H / G)); 0.0 is the identity. With `axis=None`, dense [A, G, R]: every axis turns every pair.
            A `torch.Tensor` that requires grad (Mochi's learned frequencies) is kept as it is and gets its gradient.
        axis: whole numbers of `inv_freq`'s shape, the position axis of each pair (0 = time, 1 = height, 2 = width);
            None for dense `inv_freq`.
        pairing: "half" joins columns (i, i + R), as in GPT-NeoX and Llama; "interleaved" joins (2i, 2i + 1), as in GPT-J.
        rotary_dim: number of leading columns that take part, 2R; the others pass through. Default 2 * len(inv_freq).
        attention_factor: multiplies cos and sin (YaRN, longrope). Pairs of frequency zero are multiplied too; columns
            beyond `rotary_dim` never are.
        axes: number of position axes A, where larger than max(axis) + 1.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> RopeSpec(4, (1.0, 0.0), (0, 0)).rotary_dim
        4
    """

    head_dim: int
    inv_freq: Any
    axis: Any
    pairing: Pairing = "half"
    rotary_dim: int | None = None
    attention_factor: float = 1.0
    axes: int | None = field(default=None, kw_only=True)

    learned: bool = field(init=False, repr=False, compare=False)
    groups: int = field(init=False, repr=False, compare=False)
    """Number G of head groups; it must divide the heads of q and of k."""
    shift: int = field(init=False, repr=False, compare=False)
    """Positions are multiplied by 2^shift, so that every step stays below half a turn."""
    active: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Half-open range of pairs outside which every group is the identity."""
    _device_steps: dict[str, torch.Tensor] = field(init=False, repr=False, compare=False)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen: the constructor alone may

    def __post_init__(self) -> None:
        if isinstance(self.head_dim, bool) or not isinstance(self.head_dim, int) or not 1 <= self.head_dim <= 512:
            raise ValueError(f"head_dim: expected a whole number from 1 to 512, got {self.head_dim!r}")
        if self.pairing not in ("half", "interleaved"):
            raise ValueError(f'pairing: expected "half" or "interleaved", got {self.pairing!r}')
        self._set("_device_steps", {})
        learned = isinstance(self.inv_freq, torch.Tensor) and self.inv_freq.requires_grad
        self._set("learned", learned)
        if learned:
            if not self.inv_freq.is_floating_point():
                raise TypeError(f"inv_freq: expected a floating dtype, got {self.inv_freq.dtype}")
            shape = tuple(self.inv_freq.shape)
        else:
            self._set("inv_freq", _freeze(self.inv_freq, float, "inv_freq"))
            shape = _shape(self.inv_freq)
        wanted = (3,) if self.axis is None else (1, 2)
        if len(shape) not in wanted or any(n < 1 for n in shape):
            form = "[A, G, R] (axis is None)" if self.axis is None else "[R] or [G, R]"
            raise ValueError(f"inv_freq: expected a non-empty {form}, got shape {list(shape)}")
        if not learned:
            flat = self.inv_freq
            while isinstance(flat[0], tuple):
                flat = tuple(x for row in flat for x in row)
            if not all(math.isfinite(x) for x in flat):
                raise ValueError("inv_freq: expected finite numbers, got NaN or infinity")
            largest = max(abs(x) for x in flat)
            if largest > 2.0**20:
                raise ValueError(f"inv_freq: expected at most 2^20 radians per unit of position, got {largest}")
        self._check_axis(shape)
        pairs = shape[-1]
        if self.rotary_dim is None:
            self._set("rotary_dim", 2 * pairs)
        elif self.rotary_dim != 2 * pairs:
            odd = " (odd)" if isinstance(self.rotary_dim, int) and self.rotary_dim % 2 else ""
            raise ValueError(
                f"rotary_dim: expected 2 x {pairs} = {2 * pairs}, two columns per frequency, got {self.rotary_dim}{odd}"
            )
        if 2 * pairs > self.head_dim:
            raise ValueError(f"inv_freq: {pairs} pairs need {2 * pairs} columns, head_dim has {self.head_dim}")
        self._set("attention_factor", float(self.attention_factor))
        if not math.isfinite(self.attention_factor):
            raise ValueError(f"attention_factor: expected a finite number, got {self.attention_factor}")
        self._derive(shape)

    def _check_axis(self, shape: tuple[int, ...]) -> None:
        if self.axis is None:
            count = shape[0]
        else:
            self._set("axis", _freeze(self.axis, int, "axis"))
            if _shape(self.axis) != shape:
                raise ValueError(f"axis: expected the shape of inv_freq, {list(shape)}, got {list(_shape(self.axis))}")
            flat = [a for row in (self.axis if _is_nested(self.axis) else (self.axis,)) for a in row]
            if min(flat) < 0:
                raise ValueError(f"axis: expected numbers from 0 up, got {min(flat)}")
            count = max(flat) + 1
        if self.axes is None:
            self._set("axes", count)
        elif self.axes < count or (self.axis is None and self.axes != count):
            raise ValueError(f"axes: the frequencies use {count} position axes, got {self.axes}")
        if self.axes is not None and self.axes > 8:
            raise ValueError(f"axes: expected at most 8 position axes, got {self.axes}")

    @property
    def pairs(self) -> int:
        """Number R of rotary pairs."""
        assert self.rotary_dim is not None
        return self.rotary_dim // 2

    def _derive(self, shape: tuple[int, ...]) -> None:
        """Set what kernels ask for: groups, shift, active."""
        self._set("groups", 1 if len(shape) == 1 else shape[-2])
        if self.learned:
            self._set("shift", _LEARNED_SHIFT)
            self._set("active", (0, self.pairs))
            return
        rows = [row for plane in self.dense() for row in plane]
        self._set("shift", max(0, math.frexp(max(abs(f) for row in rows for f in row) / math.pi)[1]))
        turning = [i for i in range(self.pairs) if any(row[i] for row in rows)]
        identity_outside = (turning[0], turning[-1] + 1) if turning else (0, 0)
        self._set("active", identity_outside if self.attention_factor == 1.0 else (0, self.pairs))
        steps = [[[_step(f, self.shift) for f in row] for row in plane] for plane in self.dense()]
        self._device_steps["cpu"] = torch.tensor(steps, dtype=torch.int64)

    def dense(self) -> Sequence[Sequence[Sequence[float]]]:
        """Static frequencies as nested tuples [A, G, R], zero where an axis does not turn a pair."""
        if self.learned:
            raise ValueError("inv_freq: learned frequencies have no static form")
        if self.axis is None:
            return self.inv_freq  # type: ignore[no-any-return]
        assert self.axes is not None
        freq = self.inv_freq if _is_nested(self.inv_freq) else (self.inv_freq,)
        axis = self.axis if _is_nested(self.axis) else (self.axis,)
        return tuple(
            tuple(
                tuple(f if a == n else 0.0 for f, a in zip(fs, ax, strict=True))
                for fs, ax in zip(freq, axis, strict=True)
            )
            for n in range(self.axes)
        )

    def dense_tensor(self) -> torch.Tensor:
        """Learned frequencies as a differentiable tensor [A, G, R]."""
        freq: torch.Tensor = self.inv_freq
        if self.axis is None:
            return freq
        axis = torch.tensor(self.axis, device=freq.device)
        planes = torch.stack([torch.where(axis == n, freq, 0.0) for n in range(self.axes or 0)])
        return planes if planes.ndim == 3 else planes[:, None]

    def steps(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Turns per 2^-shift of a position as signed 64-bit fractions of a turn, int64 [A, G, R], cached per device."""
        if self.learned:
            turns = self.dense_tensor().detach().double() * (2.0 ** (64 - _LEARNED_SHIFT) / (2 * math.pi))
            return turns.to(device=device).to(torch.int64)
        key = str(device)
        if key not in self._device_steps:
            self._device_steps[key] = self._device_steps["cpu"].to(device)
        return self._device_steps[key]
