"""Captioner and generator on the clip, stock and at three levels: time of each part, what is kept, how far the result is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from saccade.attention.plot import query_row
from saccade.demo import captioner, exact, generator
from saccade.demo.captioner import Inputs
from saccade.demo.checks import Check
from saccade.demo.generator import Sample
from saccade.demo.levels import Variant, restored, time_parts, variants
from saccade.demo.video import Clip
from saccade.swap.transformers.visual_tokens import VisualMerging, plan_visual
from saccade.testing import error_budget

__all__ = ["STEPS", "Line", "Study", "study"]

Tensor = torch.Tensor
Sizes = tuple[int, int, int]
STEPS = 4
_STEP = 20  # of denoising: behind the dense first steps of every level
_SECONDS = 3.0  # of timing, for each model


@dataclass(frozen=True)
class Line:
    """One model at one level.

    Args:
        level: "stock", or the preset.
        sites: that were swapped.
        seconds: median of each part, of the "rest", and of the "whole".
        kept: of the captioner the tokens that enter the language model, of the generator the share of the blocks that is computed.
        change: RMS of the difference to stock's output, relative to the RMS of that.
        same: of the captioner, the share of the caption's tokens that stock would choose too.
    """

    level: str
    sites: int
    seconds: dict[str, float]
    kept: float
    change: float
    same: float | None = None


@dataclass
class Study:
    """Everything that the page, the tables and result.json say about the levels.

    Args:
        visual: (T, h, w) tokens of the video in the captioner.
        sample: of the generator.
        query: (t, h, w) of the token of the generator whose view is drawn.
        captioner, generator: a line for each level.
        groups: for each level, int64 [T, h, w]: the group of visual tokens that each became a part of.
        seen: for each level, bool [T, h, w]: what the query attends to in the last layer.
        checks: of both models.
    """

    visual: Sizes
    sample: Sample
    query: Sizes
    captioner: list[Line] = field(default_factory=list)
    generator: list[Line] = field(default_factory=list)
    groups: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "captioner": {"visual_tokens": list(self.visual), "levels": [asdict(line) for line in self.captioner]},
            "generator": {
                "grid": list(self.sample.grid),
                "denoising_step": _STEP,
                "query": list(self.query),
                "levels": [asdict(line) for line in self.generator],
            },
        }


def _lines(found: Sequence[Variant], kept: Sequence[float], rows: slice = slice(None), *, words: bool) -> list[Line]:
    """A line for each level, by these rows of the output; `words`: they are logits of words."""
    stock, lines = found[0].out[rows].double(), []
    for v, own in zip(found, kept, strict=True):
        out = v.out[rows].double()
        change = float(((out - stock).square().mean() / stock.square().mean()).sqrt())
        same = float((out.argmax(-1) == stock.argmax(-1)).float().mean()) if words else None
        lines.append(Line(v.level, v.sites, v.seconds, own, change, same))
    return lines


def _lossless(name: str, found: Sequence[Variant], true: Tensor) -> Check:
    stock, ours = (v.out for v in found if v.level in ("stock", "lossless"))
    budget = error_budget(ours, stock, true)
    detail = budget.problem or f"error {budget.error:.1e}, allowed {budget.allowed:.1e}"
    return Check(name, budget.ok, detail, budget.error, budget.allowed)


def _swaps(name: str, found: Sequence[Variant]) -> Check:
    """Every level swaps something, and serves what it promised."""
    notes = [note for v in found if v.report is not None for note in v.report.notes]
    counts = ", ".join(f"{v.level} {v.sites}" for v in found[1:])
    return Check(name, not notes and all(v.sites for v in found[1:]), notes[0] if notes else counts)


def _less(captions: Sequence[Line], videos: Sequence[Line]) -> Check:
    """Lossless keeps all, and each level behind it less than the one before."""
    kept = [[line.kept for line in lines] for lines in (captions, videos)]
    ok = all(k[0] == k[1] and k[1] > k[2] > k[3] > 0 for k in kept)
    tokens, blocks = " > ".join(f"{k:.0f}" for k in kept[0][1:]), " > ".join(f"{k:.0%}" for k in kept[1][1:])
    return Check(
        "each level keeps less", ok, f"{tokens} tokens in the language model, {blocks} of the generator's blocks"
    )


@dataclass
class _Prompt:
    """What the language model of a captioner got: embeddings [1, S, C], and how many rows its first layer saw."""

    embeds: Tensor
    rows: int

    @classmethod
    def of(cls, model: Any, inputs: Inputs) -> _Prompt:
        """From one forward."""
        text, seen = model.model.language_model, {}

        def watch(name: str, argument: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                seen[name] = args[0] if args else kwargs[argument]

            return hook

        hooks = [
            text.register_forward_pre_hook(watch("embeds", "inputs_embeds"), with_kwargs=True),
            text.layers[0].register_forward_pre_hook(watch("rows", "hidden_states"), with_kwargs=True),
        ]
        try:
            captioner.forward(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(seen["embeds"], seen["rows"].shape[1])


def _groups(variant: Variant, prompt: _Prompt, inputs: Inputs) -> Tensor:
    """int64 [T, h, w]: the groups of a level, by its own rule on the embeddings that its language model got."""
    start, grid, _ = inputs.segments
    place = torch.arange(inputs.ids.shape[1])
    visual = (place >= start) & (place < start + grid[0] * grid[1] * grid[2])
    row = place
    for context in () if variant.report is None else variant.report.contexts:
        if isinstance(context, VisualMerging):
            plan = plan_visual(prompt.embeds, visual[None], context.rule.params["keep"])
            row = place if plan is None else plan.inverse[0]
    groups: Tensor = row[visual].unique(return_inverse=True)[1]
    return groups.view(grid)


def _captioner(found: Study, model: Any, inputs: Inputs, advance: Callable[[], None]) -> None:
    t, h, w = found.visual
    text = inputs.ids.shape[1] - t * h * w
    edge = model.config.vision_config.spatial_merge_size

    def run(one: Any) -> Tensor:
        return captioner.forward(one, inputs)

    levels = variants(model, run, grid=(t, edge * h, edge * w), text=text)
    prompts = [_Prompt.of(v.model, inputs) for v in levels]
    found.groups = {v.level: _groups(v, prompt, inputs) for v, prompt in zip(levels, prompts, strict=True)}
    parts = {"vision tower": lambda m: [m.model.visual], "language model": lambda m: [m.model.language_model]}
    time_parts(levels, run, parts, _SECONDS)
    rows = [prompt.rows for prompt in prompts]
    found.captioner = _lines(levels, rows, slice(inputs.target - 1, -1), words=True)
    advance()
    twin = exact.double(model)
    with exact.plain(twin):
        true = run(twin)
    drawn = [int(groups.max()) + 1 + text for groups in found.groups.values()]
    found.checks += [
        _lossless("captioner, lossless", levels, true),
        _swaps("captioner's swapped sites", levels),
        Check("merged groups as drawn", drawn == rows, f"{', '.join(map(str, rows))} rows in the first text layer"),
        restored("captioner restored", levels, run),
    ]
    advance()


def _layouts(model: Any) -> list[Any]:
    """The layout of every self-attention in the call that ran last; None where it was dense."""
    attends = [getattr(block.attn1.processor, "attend", None) for block in model.blocks]
    slots = [None if attend is None else attend.rule_now() for attend in attends]
    return [None if slot is None else slot.layout for slot in slots]


def _generator(found: Study, model: Any, advance: Callable[[], None]) -> None:
    sample = found.sample
    t, h, w = sample.grid
    token = (found.query[0] * h + found.query[1]) * w + found.query[2]

    def run(one: Any) -> Tensor:
        return generator.forward(one, sample)

    levels = variants(model, run, step=_STEP, grid=sample.grid)
    density = []
    for v in levels:
        layouts = _layouts(v.model)
        density.append(sum(1.0 if own is None else float(own.density) for own in layouts) / len(layouts))
        last = layouts[-1]
        seen = torch.ones(t * h * w, dtype=torch.bool) if last is None else query_row(last, token)
        found.seen[v.level] = seen.view(t, h, w)
    time_parts(levels, run, {"self-attention": lambda m: [block.attn1 for block in m.blocks]}, _SECONDS)
    found.generator = _lines(levels, density, words=False)
    advance()
    early = []
    for v in levels[2:]:
        assert v.report is not None
        v.report.set_step(0)
        early.append(torch.equal(run(v.model), levels[1].out))
        v.report.set_step(_STEP)
    said = "at step 0 balanced and aggressive give lossless's bits" if all(early) else "sparse at step 0 already"
    found.checks += [
        _lossless("generator, lossless", levels, generator.exact_forward(model, sample)),
        _swaps("generator's swapped sites", levels),
        Check("first steps are dense", all(early), said),
        restored("generator restored", levels, run),
    ]
    advance()


@torch.no_grad()
def study(model: Any, inputs: Inputs, clip: Clip, advance: Callable[[], None] = lambda: None) -> Study:
    """Both models at all levels; `advance` is called after each of `STEPS` steps.

    Args:
        model: the captioner; it stays as it is.
        inputs: of it.
        clip: of which the generator's latents are made.
    """
    sample = generator.sample_of(clip)
    t, h, w = sample.grid
    found = Study(inputs.segments[1], sample, (t // 2, h // 2, w // 2))
    _captioner(found, model, inputs, advance)
    _generator(found, generator.load(), advance)
    found.checks.append(_less(found.captioner, found.generator))
    return found
