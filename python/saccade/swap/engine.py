"""`plan`, `accelerate`, `restore`, `accelerated`: recipes carried out on models."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import weakref
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from saccade._arguments import grid_sizes, whole
from saccade.swap import families
from saccade.swap.costs import estimate
from saccade.swap.edit import Edit, apply_all, undo_all
from saccade.swap.recipe import Recipe
from saccade.swap.report import STATE, Report, Row
from saccade.swap.site import Adapter, Choice, Extra, Site
from saccade.swap.source import SwapRefused
from saccade.swap.tokens import Tokens

__all__ = ["accelerate", "accelerated", "plan", "put_in_place", "restore"]


def _parts(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a model, or of a pipeline's components."""
    if isinstance(model, nn.Module):
        return [("", model)]
    components = getattr(model, "components", None)
    if isinstance(components, dict):
        parts = [(name, part) for name, part in components.items() if isinstance(part, nn.Module)]
        if parts:
            return parts
    raise TypeError(f"model: expected an nn.Module, or a diffusers pipeline, got {type(model).__name__}")


def _roots(model: Any) -> Iterator[tuple[str, nn.Module, Adapter]]:
    for name, part in _parts(model):
        for path, module in part.named_modules():
            adapter = families.adapter_of(module)
            if adapter is not None:
                yield ".".join(filter(None, (name, path))), module, adapter


def _strangers(model: Any, known: set[int]) -> Iterator[Site]:
    """Attention modules that no adapter spoke of."""
    for name, part in _parts(model):
        for path, module in part.named_modules():
            if id(module) not in known and families.looks_like_attention(module):
                full = ".".join(filter(None, (name, path)))
                yield Site(full, module, "attention", "", reason=f"{type(module).__name__} is of no known family")


def _sites(path: str, root: nn.Module, adapter: Adapter, tokens: Tokens) -> list[Site]:
    """The adapter's; of a model that is not built as the adapter knows it, its attention modules with the reason."""
    try:
        return adapter.sites(path, root, tokens)
    except AttributeError as error:
        reason = f"{type(root).__name__} is not built as the tested one: {error}"
        inner = [(name, m) for name, m in root.named_modules() if families.looks_like_attention(m)]
        return [Site(".".join(filter(None, (path, name))), m, "attention", "", reason=reason) for name, m in inner]


def _choose(recipe: Recipe, site: Site, adapter: Adapter) -> Choice:
    family, fitting = adapter.family, []
    for rule in recipe.rules:
        if rule.fits(site.path, site.kind, family, site.role, site.layer, site.depth):
            fitting.append(rule)
            if rule.steps is None:
                break
    choice = Choice(site, family, tuple(fitting), site.reason)
    if all(rule.kernel == "stock" for rule in fitting):
        choice.rules = ()
        choice.reason = site.reason or ("the recipe says stock" if fitting else "no rule of the recipe")
    elif site.reason is None:
        cannot = [rule.kernel for rule in fitting if rule.kernel != "stock" and rule.kernel not in site.kernels]
        if cannot:
            accepted = ", ".join(sorted(site.kernels)) or "none"
            choice.reason = f"{cannot[0]} cannot go here; kernels that can: {accepted}"
        elif not adapter.denoises and any(rule.steps is not None for rule in fitting):
            choice.reason = "steps: this model has no denoising steps"
    return choice


Made = list[tuple[nn.Module, list[Edit]]]
"""The edits below each root."""


def put_in_place(made: Made, report: Report) -> None:
    """Apply all edits or none, and remember them in their roots for `restore`."""
    apply_all([edit for _, edits in made for edit in edits])
    for root, edits in made:
        vars(root)[STATE] = _Applied(edits, report)
    report.holders = tuple(weakref.ref(root) for root, _ in made)


@dataclasses.dataclass(eq=False)
class _Applied:
    """Lies in the `__dict__` of a root, so that a copied model has its own, and a part of a pipeline can be restored alone."""

    edits: list[Edit]
    report: Report

    def __deepcopy__(self, memo: dict[int, Any]) -> _Applied:
        made = _Applied(copy.deepcopy(self.edits, memo), copy.deepcopy(self.report, memo))
        memo[id(self)] = made
        return made

    def __reduce__(self) -> Any:
        raise TypeError(
            "an accelerated model cannot be pickled: restore it first, or save its state_dict() and the recipe"
        )


def _prepare(model: Any, recipe: Any, grid: Any, text: Any) -> tuple[Report, Made]:
    recipe = Recipe.of(recipe)
    grid = None if grid is None else grid_sizes(grid, "grid", 1)
    text = None if text is None else whole(text, "text", 0)
    rows: list[Choice] = []
    made: Made = []
    known: set[int] = set()
    sizes: dict[str, str] = {}
    extra = Extra(None if isinstance(model, nn.Module) else model, model=model)
    disabled = os.environ.get("SACCADE_DISABLE", "0") not in ("", "0")
    for path, root, adapter in _roots(model):
        tokens = adapter.tokens(grid, text)
        choices = [_choose(recipe, site, adapter) for site in _sites(path, root, adapter, tokens)]
        if disabled:
            for choice in choices:
                choice.reason = "SACCADE_DISABLE is set"
        edits = adapter.edits(path, root, [choice for choice in choices if choice.swapped], extra)
        if edits:
            made.append((root, edits))
        for choice in choices:
            costs = estimate(choice.site, choice.rules if choice.swapped else (), tokens)
            if costs is not None:
                choice.before, choice.after = costs
        known |= {id(choice.site.module) for choice in choices}
        if any(choice.before is not None for choice in choices):
            said = sizes.setdefault(adapter.family, str(tokens))
            if str(tokens) not in said.split("; "):  # a vision tower and a language model of one family
                sizes[adapter.family] = f"{said}; {tokens}"
        rows += choices
    rows += [Choice(site, "", (), site.reason) for site in _strangers(model, known)]
    report = Report(
        recipe, tuple(Row.of(row) for row in rows), sizes, tuple(extra.contexts), unused=_unused(recipe, rows)
    )
    return report, made


def _unused(recipe: Recipe, rows: list[Choice]) -> tuple[str, ...]:
    """Rules that would save work in one of the model's families, and found no site there."""
    found: dict[str, None] = {}
    for rule in recipe.rules:
        of = [row for row in rows if row.family and fnmatchcase(row.family, rule.family)]
        if of and rule.kernel not in ("stock", "dense", "rotary") and not any(rule in row.rules for row in of):
            found[f"{rule.kernel} in {', '.join(dict.fromkeys(row.family for row in of))}"] = None
    return tuple(found)


def _applied(model: Any) -> list[tuple[nn.Module, _Applied]]:
    found = []
    for _, part in _parts(model):
        found += [(module, vars(module)[STATE]) for module in part.modules() if STATE in vars(module)]
    return found


def plan(
    model: Any, recipe: Any = "lossless", *, grid: tuple[int, int, int] | None = None, text: int | None = None
) -> Report:
    """What `accelerate` would do. Nothing is changed; what an accelerated model holds is taken out and put back.

    Args:
        model: an nn.Module, a PEFT wrapper of one, or a diffusers pipeline.
        recipe: a `Recipe`, the name of a preset ("balanced", "wan-balanced"; `saccade presets` lists them), the path of a JSON file, or a
            mapping.
        grid: (T, H, W) tokens of the video that the estimates assume; the family's usual one where None.
        text: text tokens that they assume.

    Returns:
        A `Report`: every attention site of the model is in it.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
        RuntimeError: where another patch lies on top of a swap.

    Example:
        >>> import saccade
        >>> from torch import nn
        >>> report = saccade.plan(nn.Linear(4, 4), "lossless")
        >>> len(report.rows)
        0
    """
    edits = [edit for _, state in _applied(model) for edit in state.edits]
    undo_all(edits)
    try:
        return _prepare(model, recipe, grid, text)[0]
    finally:
        apply_all(edits)


def accelerate(
    model: Any,
    recipe: Any = "lossless",
    *,
    strict: bool = False,
    grid: tuple[int, int, int] | None = None,
    text: int | None = None,
) -> Report:
    """Put Saccade's kernels into a model, as a recipe says; `restore` takes them out again.

    Only instances are changed: no class, no module's globals, no parameter, no state_dict key. Sites whose source is not one that was
    tested are left as they are, with the reason in the report. A model that is accelerated already gets the new recipe in place of the old.

    Args:
        model, recipe, grid, text: as in `plan`.
        strict: raise where a site that the recipe speaks of cannot be swapped, or where it speaks of none.

    Returns:
        A `Report`.

    Raises:
        SwapRefused: with strict=True; nothing is changed.
        ValueError, TypeError: naming the argument, what came and what is accepted; nothing is changed.
        RuntimeError: where another patch lies on top of an earlier swap; nothing is changed.
    """
    before = _applied(model)
    restore(model)
    try:
        report, made = _prepare(model, recipe, grid, text)
        if strict and (report.skipped or not report.swapped):
            lines = [f"{row.path} ({row.cls}): {row.reason}" for row in report.skipped] or ["no rule fits a site"]
            raise SwapRefused("nothing was swapped:\n  " + "\n  ".join(lines))
        put_in_place(made, report)
    except BaseException:
        for root, state in before:
            put_in_place([(root, state.edits)], state.report)
            state.report.holders = tuple(weakref.ref(holder) for holder, _ in before)
        raise
    return report


def restore(model: Any) -> None:
    """Take Saccade's kernels out again: the same objects and the same bits as before. Nothing happens where there are none.

    A part of what was accelerated (the transformer of a pipeline) can be restored alone.

    Raises:
        RuntimeError: and nothing is changed, where another patch lies on top of a swap; undo that first.
    """
    found = _applied(model)
    undo_all([edit for _, state in found for edit in state.edits])
    for root, _ in found:
        del vars(root)[STATE]


@contextlib.contextmanager
def accelerated(model: Any, recipe: Any = "lossless", **options: Any) -> Iterator[Report]:
    """`accelerate` for the length of a `with` block; the model is restored however it ends.

    Example:
        >>> import saccade
        >>> from torch import nn
        >>> with saccade.accelerated(nn.Linear(4, 4), "lossless") as report:
        ...     len(report.swapped)
        0
    """
    report = accelerate(model, recipe, **options)
    try:
        yield report
    finally:
        restore(model)
