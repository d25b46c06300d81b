"""How many tokens each layer, or each denoising step, merges."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from saccade._arguments import choice, items, number, whole

__all__ = ["MergeSchedule", "block_flops"]

Amount = int | float


def block_flops(before: int, after: int, width: int, mlp_ratio: float = 4.0) -> float:
    """FLOPs of a transformer block that attends over `before` tokens and whose MLP sees `after`.

    2 per multiply-add: q, k, v and the output projection 8 N d^2, scores and values 4 N^2 d, the MLP 4 ratio M d^2. Norms, softmax and
    the matching itself (N^2 C / 2 for alternate tokens, 1/(8 heads) of attention with a head mean) are left out.
    """
    return 8 * before * width**2 + 4 * before**2 * width + 4 * mlp_ratio * after * width**2


@dataclass(frozen=True)
class MergeSchedule:
    """Tokens to merge in each layer (or in each step), made by `constant`, `linear`, `of`, `budget` or `per_step`.

    Args:
        amounts: for each layer or step: an int is the number of tokens r, a float the share of the tokens that are there, 0 to 1.
        axis: "layer": each layer starts with what the one before left. "step": each denoising step starts with all tokens.
        protected: tokens that are never merged (class, register and distillation tokens).

    In any layer no more than half of the tokens that are not protected can be merged: r is cut to (tokens - protected) // 2, as ToMe does,
    without a message. So a constant r may end in layers that merge little or nothing; `tokens` shows it.

    Example:
        >>> from saccade.merge import MergeSchedule
        >>> MergeSchedule.constant(8, layers=24, protected=1).tokens(197)[-1]  # ViT-L/16 at 224; the last layer is cut to 6
        7
    """

    amounts: tuple[Amount, ...]
    axis: Literal["layer", "step"] = "layer"
    protected: int = 0

    def __post_init__(self) -> None:
        given = items(self.amounts, "amounts")
        choice(self.axis, "axis", ("layer", "step"))
        whole(self.protected, "protected", 0)
        if not given:
            raise ValueError("amounts: expected at least one entry")
        checked: list[Amount] = []
        for i, a in enumerate(given):
            if isinstance(a, float):
                if not 0 <= number(a, f"amounts[{i}]") <= 1:
                    raise ValueError(f"amounts[{i}]: expected a share of the tokens from 0 to 1, got {a}")
                checked.append(float(a))
            else:
                checked.append(whole(a, f"amounts[{i}]", 0))
        object.__setattr__(self, "amounts", tuple(checked))

    @classmethod
    def constant(cls, r: Amount, layers: int, *, protected: int = 0) -> MergeSchedule:
        """The same r, or the same share of what is there, in every layer."""
        return cls((r,) * whole(layers, "layers", 1), protected=protected)

    @classmethod
    def linear(cls, r: int, inflect: float, layers: int, *, protected: int = 0) -> MergeSchedule:
        """R changes evenly from int(r (1 - inflect)) in the first layer to 2 r minus that in the last (ToMe's schedule).

        inflect 1 starts at 0, -1 ends at 0, 0 is constant; -1 <= inflect <= 1. Values between are rounded down, in floating point as ToMe
        does it, so that its published token counts come out.
        """
        mean, count = whole(r, "r", 0), whole(layers, "layers", 1)
        if not -1 <= number(inflect, "inflect") <= 1:
            raise ValueError(f"inflect: expected -1 to 1, got {inflect}")
        first = int(mean * (1.0 - inflect))
        step = (2 * mean - first - first) / max(count - 1, 1)
        values = [mean] if count == 1 else [int(first + step * i) for i in range(count)]
        return cls(tuple(values), protected=protected)

    @classmethod
    def of(cls, amounts: Sequence[Amount], layers: int | None = None, *, protected: int = 0) -> MergeSchedule:
        """One entry for each layer; 0 for layers behind the last entry."""
        given = items(amounts, "amounts")
        count = len(given) if layers is None else whole(layers, "layers", 1)
        if len(given) > count:
            raise ValueError(f"amounts: {len(given)} entries for {count} layers")
        return cls(given + (0,) * (count - len(given)), protected=protected)

    @classmethod
    def budget(
        cls,
        fraction: float,
        *,
        tokens: int,
        layers: int,
        width: int,
        mlp_ratio: float = 4.0,
        protected: int = 0,
    ) -> MergeSchedule:
        """The least merging whose `flops_ratio` is at most `fraction`.

        Every layer merges r tokens or r - 1, the larger number in the first layers. Among these schedules, FLOPs fall with their total
        number of tokens, so a binary search over that number finds the smallest one exactly: no rounding, no second guess.

        Raises:
            ValueError: stating the least fraction that can be reached, where `fraction` is below it.
        """
        if not 0 < number(fraction, "fraction") <= 1:
            raise ValueError(f"fraction: expected a share of the FLOPs, 0 < fraction <= 1, got {fraction}")
        count, n = whole(layers, "layers", 1), whole(tokens, "tokens", 1)

        def spread(total: int) -> MergeSchedule:
            low, larger = divmod(total, count)
            return cls((low + 1,) * larger + (low,) * (count - larger), protected=protected)

        def ratio(total: int) -> float:
            return spread(total).flops_ratio(n, width=width, mlp_ratio=mlp_ratio)

        low, high = 0, count * max((n - protected) // 2, 0)
        if ratio(high) > fraction:
            raise ValueError(f"fraction: merging all that can be merged leaves {ratio(high):.4f}, got {fraction}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if ratio(middle) <= fraction else (middle + 1, high)
        return spread(low)

    @classmethod
    def per_step(
        cls, amount: Amount | Sequence[Amount] | Callable[[int], Amount], steps: int, *, protected: int = 0
    ) -> MergeSchedule:
        """For diffusion: r or a share for each step, as one value, a list, or a function of the step."""
        count = whole(steps, "steps", 1)
        if callable(amount):
            values = [amount(i) for i in range(count)]
        elif isinstance(amount, Sequence):
            values = list(items(amount, "amount", count))
        else:
            values = [amount] * count
        return cls(tuple(values), "step", protected)

    def __len__(self) -> int:
        """Layers, or steps."""
        return len(self.amounts)

    def r(self, index: int, tokens: int) -> int:
        """Tokens that layer (or step) `index` merges when `tokens` come in, after the cut described above."""
        if not 0 <= whole(index, "index") < len(self.amounts):
            raise ValueError(f"index: expected 0 to {len(self.amounts) - 1}, got {index}")
        return cut(share(self.amounts[index], tokens), tokens, self.protected)

    def tokens(self, n: int) -> tuple[int, ...]:
        """Tokens after each layer, or in each step, when n come in."""
        left, out = whole(n, "n", 0), []
        for i in range(len(self.amounts)):
            remaining = left - self.r(i, left)
            out.append(remaining)
            left = remaining if self.axis == "layer" else left
        return tuple(out)

    def flops_ratio(self, n: int, *, width: int, mlp_ratio: float = 4.0) -> float:
        """FLOPs of the blocks with merging over those without, by `block_flops`.

        For layers, tokens are merged between attention and MLP (ToMe); for steps, ahead of the whole block, and restored behind it.
        """
        whole(width, "width", 1)
        after = self.tokens(n)
        before = (n, *after[:-1]) if self.axis == "layer" else after
        full = len(after) * block_flops(n, n, width, mlp_ratio)
        merged = sum(block_flops(b, a, width, mlp_ratio) for b, a in zip(before, after, strict=True))
        return merged / full if full else 1.0

    def __str__(self) -> str:
        runs = [(value, len(list(same))) for value, same in itertools.groupby(self.amounts)]
        return f"{self.axis}s: " + ", ".join(f"{value} x {count}" for value, count in runs)


def share(amount: Amount, tokens: int) -> int:
    """R itself, or a share of the tokens rounded down."""
    return int(tokens * amount) if isinstance(amount, float) else amount


def cut(r: int, tokens: int, protected: int) -> int:
    """At most half of the tokens that are not protected, and never less than 0."""
    return max(min(r, (tokens - protected) // 2), 0)
