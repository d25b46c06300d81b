"""`Recipe`: which kernel goes where, as data that can be saved, shared and compared."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saccade._arguments import choice, grid_sizes, items, number, whole

__all__ = ["ATTENTION", "KERNELS", "Recipe", "Rule"]

SCHEMA = 1
ON_UNSUPPORTED = ("skip", "error")

# kernel -> (the kind of site that it serves, the parameters that it takes)
KERNELS: dict[str, tuple[str, frozenset[str]]] = {
    "stock": ("attention", frozenset()),
    "dense": ("attention", frozenset()),
    "sliding_tile": ("attention", frozenset({"tile", "window", "density", "block"})),
    "neighborhood": ("attention", frozenset({"window", "density", "stride", "dilation", "block"})),
    "spatial": ("attention", frozenset({"width", "sink", "block"})),
    "temporal": ("attention", frozenset({"width", "sink", "block"})),
    "radial": ("attention", frozenset({"decay", "sink", "block"})),
    "frame_causal": ("attention", frozenset({"window", "sink", "block"})),
    "svg": ("attention", frozenset({"width", "sink", "block"})),
    "top_k": ("attention", frozenset({"keep", "tile", "every", "recall", "block"})),
    "top_p": ("attention", frozenset({"p", "tile", "every", "recall", "block"})),
    "rotary": ("rotary", frozenset({"positions", "gamma"})),
    "merge": ("merge", frozenset({"keep", "r", "proportional"})),
}
ATTENTION = frozenset(name for name, (kind, _) in KERNELS.items() if kind == "attention")


def _share(value: Any, name: str) -> None:
    if number(value, name, 0) > 1:
        raise ValueError(f"{name}: expected a share, above 0 and at most 1, got {value}")


def _amount(value: Any, name: str) -> None:
    """A share as a float, or a number of things as an int; 1 is either."""
    kind = "share, above 0 and at most 1, or a whole number of at least 1"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a {kind}, got {value!r}")
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"{name}: expected a {kind}, got {value}")


def _flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _or_none(check: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, name: None if value is None else check(value, name)


# What a parameter may be, where that does not depend on the model; the rest is checked where the kernel meets one.
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "tile": lambda value, name: grid_sizes(value, name, 1),
    "density": _share,
    "p": _share,
    "keep": _amount,
    "recall": _or_none(_share),
    "every": _or_none(lambda value, name: whole(value, name, 1)),
    "width": lambda value, name: number(value, name, 0),
    "decay": lambda value, name: number(value, name, 0),
    "sink": _flag,
    "proportional": _flag,
}


@dataclass(frozen=True, eq=True)
class Rule:
    """One line of a recipe. The first rule that fits a site, and whose steps hold the current one, decides.

    Args:
        kernel: a name of `KERNELS`: "stock" leaves the site alone; "dense" is exact; then the patterns of
            `saccade.attention.patterns`; "rotary" fuses rotary embeddings (and q/k norms where they lie before it); "merge" merges tokens.
        match: a shell pattern on the module's path ("*.blocks.*.attn1").
        family: a shell pattern on the model's family ("wan", "qwen2_5_vl", "*").
        role: "self", "cross", "joint", "vision", "text", "audio", or "*".
        layers: [first, last) of layer numbers; a negative `last` counts from the end, None is the end.
        steps: [first, last) of denoising steps, counted from 0, or None: all. None as `last` is the end.
        params: of the kernel: numbers, text, flags and lists, so that they can be saved.
        on_unsupported: what happens where the kernel cannot serve a call that it was chosen for, as when the tokens are not
            those of the grid: "skip" runs stock attention and says so once, "error" raises.
    """

    kernel: str
    match: str = "*"
    family: str = "*"
    role: str = "*"
    layers: tuple[int, int | None] | None = None
    steps: tuple[int, int | None] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    on_unsupported: str = "skip"

    def __post_init__(self) -> None:
        choice(self.kernel, "kernel", tuple(KERNELS))
        choice(self.on_unsupported, "on_unsupported", ON_UNSUPPORTED)
        for name in ("match", "family", "role"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        object.__setattr__(self, "params", _params(self.kernel, self.params))
        if self.kind != "attention" and self.steps is not None:
            raise ValueError(f"steps: {self.kernel} is the same at every step; only attention changes with the step")
        if self.kind == "rotary" and self.layers is not None:
            raise ValueError("layers: rotary is for a whole model")
        object.__setattr__(self, "layers", _interval(self.layers, "layers", None))
        object.__setattr__(self, "steps", _interval(self.steps, "steps", 0))  # how many there will be is not known

    @property
    def kind(self) -> str:
        """The kind of site that the kernel serves: "attention", "rotary" or "merge"."""
        return KERNELS[self.kernel][0]

    def fits(self, path: str, kind: str, family: str, role: str, layer: int | None, depth: int) -> bool:
        """Whether the rule speaks of a site."""
        if kind != self.kind or not fnmatchcase(path, self.match):
            return False
        if not fnmatchcase(family, self.family) or not fnmatchcase(role, self.role):
            return False
        if self.layers is None:
            return True
        first, last = self.layers
        last = depth if last is None else last + depth if last < 0 else last
        return layer is not None and first <= layer < last


def _params(kernel: str, given: Any) -> dict[str, Any]:
    """Parameters as plain data, each one that the kernel takes."""
    if not isinstance(given, Mapping):
        raise TypeError(f"params: expected a mapping, got {type(given).__name__}")
    taken = KERNELS[kernel][1]
    unknown = sorted(map(str, set(given) - taken))
    if unknown:
        accepted = ", ".join(sorted(taken)) or "none"
        raise ValueError(f"params: {kernel} does not take {', '.join(unknown)}; accepted: {accepted}")
    if {"window", "density"} <= set(given):
        raise ValueError(f"params: {kernel} takes one of window and density, got both")
    params = {name: _plain(value, f"params.{name}") for name, value in given.items()}
    for name, value in params.items():
        check = _share if (kernel, name) == ("merge", "keep") else _CHECKS.get(name)
        if check is not None:
            check(value, f"params.{name}")
    return params


def _plain(value: Any, name: str) -> Any:
    """`value` as JSON gives it back: lists in place of tuples."""
    if isinstance(value, (list, tuple)):
        return [_plain(one, f"{name}[{i}]") for i, one in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"{name}: expected finite numbers, text, True, False, None or lists of them, got {value!r}")


def _interval(value: Any, name: str, least: int | None) -> tuple[int, int | None] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{name}: expected [first, last), got {value!r}")
    first, last = whole(value[0], f"{name}[0]", 0), value[1]
    last = None if last is None else whole(last, f"{name}[1]", least)
    if last is not None and 0 <= last <= first:
        raise ValueError(f"{name}: expected [first, last) with first below last, got {value!r}")
    return first, last


@dataclass(frozen=True)
class Recipe:
    """Rules, in order: the first that fits decides; a site that none fits stays stock.

    Args:
        rules: `Rule`s, or mappings with their fields.
        name: shown in reports.
        note: what it is for, what was measured.

    Example:
        >>> from saccade.swap.recipe import Recipe
        >>> recipe = Recipe([
        ...     {"kernel": "dense", "family": "wan", "role": "self", "steps": [0, 10]},
        ...     {"kernel": "sliding_tile", "family": "wan", "role": "self", "params": {"density": 0.25}},
        ... ])
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    rules: tuple[Rule, ...]
    name: str = "own"
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "note"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        object.__setattr__(self, "rules", tuple(_rule(rule, i) for i, rule in enumerate(items(self.rules, "rules"))))

    def to_json(self) -> str:
        """The recipe as text."""
        fields = {f.name: f.default for f in dataclasses.fields(Rule)}
        rules = [
            {name: value for name in fields if (value := getattr(rule, name)) != fields[name] and value != {}}
            for rule in self.rules
        ]
        return json.dumps({"schema": SCHEMA, "name": self.name, "note": self.note, "rules": rules}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """A recipe of `to_json`'s text; ValueError where it is not one, or of a newer schema."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"recipe: expected JSON, {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"recipe: expected a JSON object with schema and rules, got {text.strip()[:40]}")
        return cls.of(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a file of `save`."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    @classmethod
    def of(cls, value: Any) -> Recipe:
        """A recipe from what a user may give: a Recipe, the name of a preset, the path of a JSON file, or a mapping."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            unknown = sorted(map(str, set(value) - {"schema", "name", "note", "rules"}))
            if unknown:
                raise ValueError(f"recipe: unknown keys {', '.join(unknown)}; accepted: schema, name, note, rules")
            if value.get("schema", SCHEMA) != SCHEMA:
                raise ValueError(f"recipe: schema {value['schema']!r}, but this Saccade reads schema {SCHEMA}")
            if "rules" not in value:
                raise ValueError("recipe: rules are missing")
            return cls(value["rules"], name=value.get("name", "own"), note=value.get("note", ""))
        if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".json")):
            return cls.load(value)
        if isinstance(value, str):
            from saccade.swap.presets import preset

            return preset(value)
        raise TypeError(
            f"recipe: expected a Recipe, a preset's name, the path of a JSON file or a mapping, got {type(value).__name__}"
        )


def _rule(value: Any, index: int) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"rules[{index}]: expected a Rule or a mapping, got {type(value).__name__}")
    accepted = [f.name for f in dataclasses.fields(Rule)]
    unknown = sorted(map(str, set(value) - set(accepted)))
    if unknown or "kernel" not in value:
        what = f"unknown keys {', '.join(unknown)}" if unknown else "the kernel is missing"
        raise ValueError(f"rules[{index}]: {what}; accepted: {', '.join(accepted)}")
    try:
        return Rule(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rules[{index}].{error}") from error
