"""Stock against Saccade, by the rule of the project: at most twice stock's own error against float64, three times for gradients.

Each check can fail: the last one makes sure of it by giving Saccade exchanged heights and widths, which must not pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saccade.demo import exact
from saccade.demo.captioner import ROTARY, Inputs, backward, forward
from saccade.demo.measure import Row
from saccade.rope.multimodal import multimodal_positions
from saccade.swap import Recipe, Rule, accelerated
from saccade.testing import Budget, error_budget

__all__ = ["Check", "Results", "check_all", "of_row"]


@dataclass(frozen=True)
class Check:
    """What was compared, whether it passed, and the figures."""

    name: str
    ok: bool
    detail: str
    error: float | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Results:
    """Checks of the whole model, and (stock, Saccade) errors of logits and of gradients for the table."""

    checks: list[Check]
    logits: tuple[float, float]
    gradients: tuple[float, float]


def _check(name: str, budget: Budget, more: str = "") -> Check:
    detail = budget.problem or f"error {budget.error:.1e}, allowed {budget.allowed:.1e}"
    return Check(name, budget.ok, detail + more, budget.error, budget.allowed)


def of_row(row: Row) -> Check:
    """The check that belongs to an op's row of the table."""
    assert row.budget is not None
    return _check(row.name, row.budget)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _state(model: Any) -> list[tuple[str, int, tuple[tuple[str, int], ...]]]:
    """Every module with its attributes by identity: what `restore` must bring back."""
    return [(name, id(m), tuple((key, id(v)) for key, v in vars(m).items())) for name, m in model.named_modules()]


def _positions(model: Any, inputs: Inputs) -> Check:
    place, _ = multimodal_positions(
        inputs.segments,
        rule="mrope_time",
        after_vision="hw",
        tokens_per_second=model.config.vision_config.tokens_per_second,
        second_per_grid=torch.tensor([inputs.seconds_per_step]),
    )
    same = torch.equal(place, inputs.positions[:, 0])
    detail = f"all {place.shape[1]} x 3 equal those of transformers" if same else "differ from those of transformers"
    return Check("M-RoPE positions", same, detail)


def _gradients(stock: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> Check:
    if stock.keys() != ours.keys() or stock.keys() != true.keys():
        return Check("gradients, fp32", False, "not the same parameters have a gradient")
    budgets = {name: error_budget(ours[name], stock[name], true[name], factor=3.0) for name in true}
    worst = max(budgets, key=lambda n: (not budgets[n].ok, budgets[n].error / budgets[n].allowed))
    return _check("gradients, fp32", budgets[worst], f" (worst of {len(budgets)} parameters)")


def _float64(ours: torch.Tensor, naive: torch.Tensor, true: torch.Tensor, fp32_error: float) -> Check:
    """In float64 Saccade and the formula of the twin, which share no code, must agree far below what they judge."""
    error, allowed = _distance(ours, true), fp32_error / 1000
    detail = f"error {error:.1e}, allowed {allowed:.1e}; transformers' own float64: {_distance(naive, true):.1e}"
    return Check("logits, float64", error <= allowed, detail, error, allowed)


def _in_bf16(model: Any) -> Any:
    """A bf16 copy as `from_pretrained(dtype=bfloat16)` makes it: frequencies stay fp32."""
    small = copy.deepcopy(model).to(torch.bfloat16)
    for path, buffer in model.named_buffers():
        if path.endswith("inv_freq"):
            owner, _, name = path.rpartition(".")
            setattr(small.get_submodule(owner), name, buffer)
    return small


@torch.no_grad()
def _bf16(model: Any, inputs: Inputs) -> Check:
    small = _in_bf16(model)
    stock = forward(small, inputs)
    with accelerated(small, ROTARY):
        ours = forward(small, inputs)
    rounded = Inputs(**{**vars(inputs), "pixels": inputs.pixels.bfloat16().float()})
    twin = exact.double(small)
    with exact.plain(twin):
        return _check("logits, bf16", error_budget(ours, stock, forward(twin, rounded)))


@torch.no_grad()
def _hope(model: Any, twin: Any, inputs: Inputs, gamma: float, mrope_logits: torch.Tensor) -> Check:
    """HoPE has no stock: its peer is the formula in plain torch fp32."""
    config = model.config.text_config
    base = config.rope_parameters["rope_theta"]
    place, _ = multimodal_positions(inputs.segments, rule="hope", gamma=gamma)
    there = inputs.at(place)
    rule = Rule("rotary", role="text", params={"positions": "hope", "gamma": gamma})
    with accelerated(model, Recipe((rule, *ROTARY.rules))):
        ours = forward(model, there)
    with exact.plain(model, exact.hope_turn(base)):
        peer = forward(model, there)
    with exact.plain(twin, exact.hope_turn(base)):
        true = forward(twin, there)
    moved = _distance(ours, mrope_logits)
    return _check(
        f"logits with HoPE (gamma {gamma:g})", error_budget(ours, peer, true), f"; M-RoPE's differ by {moved:.1f}"
    )


def check_all(model: Any, inputs: Inputs, gamma: float, advance: Callable[[], None]) -> Results:
    """Run the captioner stock, with Saccade and in float64, and compare; `advance` is called after each of 6 steps."""
    before = _state(model)
    stock, stock_gradients = backward(model, inputs)
    advance()
    with accelerated(model, ROTARY):
        ours, our_gradients = backward(model, inputs)
    advance()
    restored = _state(model) == before
    again = forward(model, inputs).detach()
    twin = exact.double(model)
    with exact.plain(twin):
        true, true_gradients = backward(twin, inputs)
    advance()
    with accelerated(twin, ROTARY), torch.no_grad():
        ours64 = forward(twin, inputs)
    with torch.no_grad():
        naive64 = forward(twin, inputs)  # its tables of cos and sin are still fp32
    advance()
    logits = error_budget(ours, stock, true)
    with accelerated(model, ROTARY), torch.no_grad():
        wrong = error_budget(forward(model, inputs.at(inputs.positions[[0, 2, 1], 0])), stock, true)
    checks = [
        _positions(model, inputs),
        _check("logits, fp32", logits),
        _gradients(stock_gradients, our_gradients, true_gradients),
        _float64(ours64, naive64, true, _distance(stock, true)),
        _bf16(model, inputs),
    ]
    advance()
    checks += [
        _hope(model, twin, inputs, gamma, ours),
        Check(
            "stock again after the swap",
            restored and torch.equal(again, stock),
            "same attributes of every module, same bits of logits" if restored else "the swap left attributes behind",
        ),
        Check(
            "a wrong rotation is caught",
            not wrong.ok,
            f"height and width exchanged: error {wrong.error:.1e}, {wrong.error / wrong.allowed:.0f} x the allowed",
            wrong.error,
            wrong.allowed,
        ),
    ]
    advance()
    largest = [
        max(_distance(found[name], true_gradients[name]) for name in true_gradients)
        for found in (stock_gradients, our_gradients)
    ]
    return Results(checks, (_distance(stock, true), logits.error), (largest[0], largest[1]))
