"""Recipes by name: four levels for every family."""

from __future__ import annotations

from typing import Any

from saccade.swap.recipe import Recipe, Rule

__all__ = ["FAMILIES", "KEPT", "LEVELS", "SPARSE", "preset", "presets"]

LEVELS = {
    "lossless": "exact: fused rotary embeddings and norms, packed attention; same results within the numerics contract",
    "conservative": "half of the pairs or 70 % of the tokens, first layers and steps dense",
    "balanced": "30 % of the pairs or half of the tokens, first layer and steps dense",
    "aggressive": "15 % of the pairs or 30 % of the tokens",
}
GENERATORS = ("wan", "hunyuan_video", "hunyuan_video15", "cogvideox", "ltx", "ltx2", "mochi")
CAPTIONERS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "siglip", "clip", "internvl", "videomae", "vivit", "timesformer", "timm", "open_clip",
)  # fmt: skip
FAMILIES = (*GENERATORS, *CAPTIONERS)

# level -> (dense steps, dense layers, density) of generators
SPARSE = {"conservative": (12, 2, 0.5), "balanced": (8, 1, 0.3), "aggressive": (4, 0, 0.15)}
# level -> kept ratio of the tokens of vision towers
KEPT = {"conservative": 0.7, "balanced": 0.5, "aggressive": 0.3}


_STOCK = ("open_clip",)  # nothing exact can be swapped there


def _exact(family: str) -> list[Rule]:
    if family in _STOCK:
        return [Rule("stock", family=family)]
    return [Rule("rotary", family=family), Rule("dense", family=family, role="[sjv]*")]  # self, joint, vision


def _generator(family: str, level: str) -> list[Rule]:
    steps, layers, density = SPARSE[level]
    own: dict[str, Any] = {"family": family, "role": "[sj]*"}
    rules = [Rule("rotary", family=family), Rule("dense", steps=(0, steps), **own)]
    if layers:
        rules.append(Rule("dense", layers=(0, layers), **own))
    return [*rules, Rule("sliding_tile", params={"tile": [4, 8, 8], "density": density}, **own), *_exact(family)[1:]]


def _captioner(family: str, level: str) -> list[Rule]:
    where = "text" if family.startswith("qwen") else "vision"  # before the language model, or in the tower
    return [*_exact(family), Rule("merge", family=family, role=where, params={"keep": KEPT[level]})]


def _rules(family: str, level: str) -> list[Rule]:
    if level == "lossless":
        return _exact(family)
    return _generator(family, level) if family in GENERATORS else _captioner(family, level)


def preset(name: str) -> Recipe:
    """The recipe of a level ("balanced", for any family) or of a family's level ("wan-balanced").

    Raises:
        ValueError: with the names that there are.
    """
    family, _, level = name.rpartition("-")
    level = name if not family else level
    if level not in LEVELS or (family and family not in FAMILIES):
        raise ValueError(
            f"recipe: there is no preset {name!r}; levels: {', '.join(LEVELS)}; for one family as in wan-balanced: "
            + ", ".join(FAMILIES)
        )
    rules = [rule for one in ([family] if family else FAMILIES) for rule in _rules(one, level)]
    return Recipe(tuple(rules), name=name, note=LEVELS[level])


def presets() -> list[Recipe]:
    """All of them: the levels, then each family's."""
    return [preset(level) for level in LEVELS] + [
        preset(f"{family}-{level}") for family in FAMILIES for level in LEVELS
    ]
