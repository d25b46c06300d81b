"""Times and errors: the rotary ops at the head counts of the 7B model, and the whole captioner."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saccade._dispatch import explain
from saccade.demo import exact
from saccade.demo.captioner import ROTARY, Inputs, backward, forward
from saccade.rope.apply_rope import apply_rope
from saccade.rope.qk_norm_rope import qk_norm_rope
from saccade.rope.spec import RopeSpec
from saccade.swap import accelerated
from saccade.swap.transformers.qwen_rotary import text_spec, vision_spec
from saccade.testing import Budget, error_budget

__all__ = ["Cell", "Row", "implementation", "op_rows", "time_calls", "whole_row"]

Call = Callable[[], Any]
_VISION_HEADS = 16  # Qwen2.5-VL-7B
_TEXT_HEADS = (28, 4)


@dataclass(frozen=True)
class Cell:
    """Median seconds and largest error of one implementation, or why there is none."""

    seconds: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    detail: str
    stock: Cell
    compiled: Cell
    saccade: Cell
    budget: Budget | None = None

    @property
    def speedup(self) -> float | None:
        """Stock eager's time over Saccade's."""
        if self.stock.seconds is None or self.saccade.seconds is None:
            return None
        return self.stock.seconds / self.saccade.seconds

    def to_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {**asdict(self), "speedup": self.speedup}


def time_calls(calls: list[Call], *, budget: float = 1.0, least: int = 3) -> list[float]:
    """Median seconds of each call; the calls take turns, so that a busy moment hits all of them.

    Args:
        calls: already warm.
        budget: seconds in all, after which no further round starts.
        least: rounds that are run whatever they cost.
    """
    spent: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    while len(spent[0]) < least or time.perf_counter() < end:
        for call, times in zip(calls, spent, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in spent]


def _largest(outs: Any, exacts: Any) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(outs, exacts, strict=True))


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Only errors of a logger: machines without CUDA get a warning about it from the compiler."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _compile(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Call | None, str]:
    """A compiled call that has run once, or the reason why there is none."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    try:
        with _quiet("torch.utils.cpp_extension"), _quiet("torch._inductor"):
            compiled(*arguments)
    except Exception as error:  # whatever the compiler finds wrong is the answer
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "compiler" in str(error).lower() or "g++" in str(error):
            reason = "no working C++ compiler"
        return None, reason.strip()[:60]
    return (lambda: compiled(*arguments)), ""


def _op_row(
    name: str,
    detail: str,
    stock: Callable[..., Any],
    arguments: tuple[Any, ...],
    saccade: Callable[[bool], Any],
    exacts: tuple[torch.Tensor, ...],
) -> Row:
    """`saccade(inplace)` returns fresh outputs, or writes into copies of its own."""
    compiled, reason = _compile(stock, arguments)
    outs = [stock(*arguments), saccade(False)]
    saccade(True)
    calls: list[Call] = [lambda: stock(*arguments), lambda: saccade(True), *([compiled] if compiled else [])]
    times = time_calls(calls, least=5)
    theirs, ours, true = (torch.cat([x.flatten() for x in pair]) for pair in (*outs, exacts))
    return Row(
        name,
        detail,
        Cell(times[0], _largest(outs[0], exacts)),
        Cell(times[2], _largest(compiled(), exacts)) if compiled else Cell(note=reason),
        Cell(times[1], _largest(outs[1], exacts)),
        error_budget(ours, theirs, true),
    )


def implementation(model: Any, inputs: Inputs) -> str:
    """Which implementation of apply_rope runs on these inputs."""
    spec = text_spec(model.config.text_config)
    q = torch.empty(1, 1, inputs.ids.shape[1], spec.head_dim)
    return explain("apply_rope", q, None, inputs.positions, spec).chosen


def _heads(count: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    """[1, H, S, D] as a projection leaves it: a transposed view of [1, S, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, count, width, generator=generator).transpose(1, 2)


def _vision_row(model: Any, inputs: Inputs) -> Row:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
    from transformers.vision_utils import get_vision_position_ids

    tower = model.model.visual
    spec = vision_spec(tower)
    places = get_vision_position_ids(inputs.grid, tower.spatial_merge_size)  # [N, 2]
    q, k = (_heads(_VISION_HEADS, len(places), spec.head_dim, seed) for seed in (0, 1))
    cos, sin = tower.rotary_pos_emb(q, places)
    flat = tuple(x[0].transpose(0, 1) for x in (q, k))  # [N, H, D], as the tower has it
    positions = places.t().contiguous()
    turn = exact.vision_turn(model.config.vision_config.rope_parameters["rope_theta"])
    exacts = tuple(x[0].transpose(0, 1) for x in turn(q.double(), k.double(), positions[:, None]))
    mine = q.clone(), k.clone()

    def saccade(inplace: bool) -> Any:
        here = mine if inplace else (q, k)
        outs = apply_rope(here[0], here[1], positions, spec, inplace=inplace)
        return tuple(x[0].transpose(0, 1) for x in outs if x is not None)

    detail = f"{_VISION_HEADS} heads x {len(places)} x {spec.head_dim}"
    return _op_row("vision rotary", detail, stock.apply_rotary_pos_emb_vision, (*flat, cos, sin), saccade, exacts)


def _text_rows(model: Any, inputs: Inputs) -> list[Row]:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

    config = model.config.text_config
    spec: RopeSpec = text_spec(config)
    positions = inputs.positions
    tokens = positions.shape[-1]
    q, k = (_heads(count, tokens, spec.head_dim, seed) for seed, count in enumerate(_TEXT_HEADS))
    cos, sin = model.model.language_model.rotary_emb(q, positions)
    sections = list(config.rope_parameters.get("mrope_section", [16, 24, 24]))
    turn = exact.mrope_turn(config.rope_parameters["rope_theta"], sections)
    exacts = turn(q.double(), k.double(), positions)
    mine = q.clone(), k.clone()
    detail = f"{_TEXT_HEADS[0]}+{_TEXT_HEADS[1]} heads x {tokens} x {spec.head_dim}"

    def rotate(inplace: bool) -> Any:
        here = mine if inplace else (q, k)
        return apply_rope(here[0], here[1], positions, spec, inplace=inplace)

    rows = [_op_row("text rotary (M-RoPE)", detail, stock.apply_rotary_pos_emb, (q, k, cos, sin), rotate, exacts)]
    norms = [stock.Qwen2_5_VLRMSNorm(spec.head_dim) for _ in range(2)]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.rand(spec.head_dim, generator=generator) + 0.5 for _ in norms]
    for norm, weight in zip(norms, weights, strict=True):
        norm.weight.data.copy_(weight)

    def eager(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return stock.apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)

    def norm_and_rotate(inplace: bool) -> Any:
        here = mine if inplace else (q, k)
        return qk_norm_rope(here[0], here[1], positions, spec, weights[0], weights[1], inplace=inplace)

    normed = [
        x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        for x, weight in zip((q, k), weights, strict=True)
    ]
    exacts = turn(normed[0], normed[1], positions)
    rows.append(
        _op_row("q/k norm + rotary", "the same, as in Qwen3-VL", eager, (q, k, cos, sin), norm_and_rotate, exacts)
    )
    return rows


@torch.no_grad()
def op_rows(model: Any, inputs: Inputs, advance: Callable[[], None]) -> list[Row]:
    """Vision rotary, text rotary, and text rotary after RMSNorm, in fp32."""
    rows = [_vision_row(model, inputs)]
    advance()
    rows += _text_rows(model, inputs)
    advance()
    return rows


def whole_row(name: str, model: Any, inputs: Inputs, errors: tuple[float, float], *, gradients: bool) -> Row:
    """The captioner from patches to logits, with or without the backward pass; `errors` of stock and Saccade."""

    def call() -> None:
        if gradients:
            backward(model, inputs)
        else:
            with torch.no_grad():
                forward(model, inputs)

    def swapped() -> None:
        with accelerated(model, ROTARY):  # putting it in and out is part of the time
            call()

    times = time_calls([call, swapped], budget=4.0)  # both are warm from the checks
    layers = len(model.model.visual.blocks), len(model.model.language_model.layers)
    detail = f"{layers[0]} vision, {layers[1]} text layers"
    return Row(
        name,
        detail,
        Cell(times[0], errors[0]),
        Cell(note="-"),
        Cell(times[1], errors[1]),
    )
