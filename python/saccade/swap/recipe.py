"""`Recipe`: which kernel goes where, as data that can be saved, shared and compared."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saccade._arguments import choice, whole

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


@dataclass(frozen=True, eq=True)
class Rule:
    """One line of a recipe. The first rule that fits a site, and whose steps hold the current one, decides.

    Args:
        kernel: a name of `KERNELS`: "stock" leaves the site alone; "dense" is exact; then the patterns of
            `saccade.attention.patterns`; "rotary" fuses rotary embeddings (and q/k norms where they lie before it); "merge" merges tokens.
        match: a shell pattern on the module's path ("*.blocks.*.attn1").
        family: a shell pattern on the model's family ("wan", "qwen2_5_vl", "*").
        role: "self", "cross", "joint", "vision", "text", or "*".
        layers: [first, last) of layer numbers; a negative `last` counts from the end, None is the end.
        steps: [first, last) of denoising steps, counted from 0, or None: all.
        params: of the kernel.
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
        if not isinstance(self.params, Mapping):
            raise TypeError(f"params: expected a mapping, got {type(self.params).__name__}")
        unknown = sorted(set(self.params) - KERNELS[self.kernel][1])
        if unknown:
            accepted = ", ".join(sorted(KERNELS[self.kernel][1])) or "none"
            raise ValueError(f"params: {self.kernel} does not take {', '.join(unknown)}; accepted: {accepted}")
        if self.kind != "attention" and self.steps is not None:
            raise ValueError(f"steps: {self.kernel} is the same at every step; only attention changes with the step")
        object.__setattr__(self, "params", dict(self.params))
        for name in ("layers", "steps"):
            object.__setattr__(self, name, _interval(getattr(self, name), name))

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


def _interval(value: Any, name: str) -> tuple[int, int | None] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"{name}: expected [first, last), got {value!r}")
    first, last = whole(value[0], f"{name}[0]", 0), value[1]
    return first, None if last is None else whole(last, f"{name}[1]")


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
        if isinstance(self.rules, (str, Mapping)):
            raise TypeError(f"rules: expected a list of rules, got {type(self.rules).__name__}")
        object.__setattr__(self, "rules", tuple(_rule(rule, i) for i, rule in enumerate(self.rules)))

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
            unknown = sorted(set(value) - {"schema", "name", "note", "rules"})
            if unknown:
                raise ValueError(
                    f"recipe: unknown keys {', '.join(map(str, unknown))}; accepted: schema, name, note, rules"
                )
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
    unknown = sorted(set(value) - set(accepted))
    if unknown or "kernel" not in value:
        what = f"unknown keys {', '.join(map(str, unknown))}" if unknown else "the kernel is missing"
        raise ValueError(f"rules[{index}]: {what}; accepted: {', '.join(accepted)}")
    try:
        return Rule(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rules[{index}].{error}") from error
