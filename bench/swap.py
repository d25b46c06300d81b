"""`python -m bench.swap`: whole models, stock against accelerated, end to end; loading and planning excluded.

Competitors are interleaved in one run: stock eager, stock under torch.compile, and the model accelerated in one line. A lossless recipe
must keep the numerics contract (error against float64 at most twice stock's); of an approximate one the relative change of the output
is shown, |ours - stock| / |stock|. Weights are random: the change says that the kernels do what the recipe says, not what a trained model
would lose.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import saccade
from bench import report
from bench.cases import Call, Check
from bench.runner import failure
from bench.swap_models import Task, tasks
from bench.timing import CudaTimer, Effort, time_cpu
from bench.whole import begin, check_options, options_of, save
from saccade.testing import twin

HEADINGS = ("what runs", "ms", "p20..p80", "n", "speed-up", "error, or change", "note")
EAGER, COMPILED = "stock, eager", "stock, torch.compile"


@dataclass
class Result:
    """One competitor of one case."""

    case: str
    shape: str
    name: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    speedup: float | None = None  # over stock eager
    error: float | None = None
    plan_ms: float | None = None  # of `accelerate`, not in ms
    status: str = "ok"
    reason: str = ""


def gate(task: Task, stock: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor | None) -> tuple[float, str]:
    """(error or change, why the time would not count)."""
    if ours.shape != stock.shape or not ours.isfinite().all():
        return float("nan"), f"shape {list(ours.shape)}, expected {list(stock.shape)}, all finite"
    if exact is None:
        change = float((ours.double() - stock.double()).norm() / stock.double().norm())
        return change, "nothing changed: the recipe did not run" if change == 0 else ""
    error, own = (float((x.double() - exact).abs().max()) for x in (ours, stock))
    return error, "" if error <= 2 * own else f"error {error:.2e}, allowed {2 * own:.2e}"


def measure(task: Task, device: str, effort: Effort, timer: CudaTimer | None) -> list[Result]:
    """All competitors of a case, interleaved."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, run = task.make()
    exact = None
    with torch.inference_mode():
        if task.lossless:
            exact = run(copy.deepcopy(model).double())
        model = model.to(device, dtype)
        reference = run(model)
    if exact is not None:
        exact = exact.to(device)
    fast = twin(model)
    begin = time.perf_counter()
    planned = saccade.accelerate(fast, task.recipe, strict=True)
    plan_ms = 1e3 * (time.perf_counter() - begin)
    name = f"saccade, {planned.recipe.name}"
    rows = [Result(task.name, task.shape, who) for who in (EAGER, COMPILED, name)]
    rows[2].plan_ms, rows[2].reason = plan_ms, f"{task.kept}; {len(planned.swapped)} sites swapped"
    makers: list[Callable[[], nn.Module]] = [lambda: model, lambda: _compiled(model), lambda: fast]
    ready: list[tuple[Result, Call]] = []
    for row, make in zip(rows, makers, strict=True):
        try:
            call = _call(make(), run)
            out = call.runs[0]()
            row.error, problem = (
                gate(task, reference, out, exact) if row is rows[2] else (_change(out, reference, exact), "")
            )
            row.status = "wrong" if problem else "ok"
            row.reason = problem or row.reason
            if not problem:
                ready.append((row, call))
        except Exception as error:
            row.status, row.reason = failure(error)
    notes = planned.notes
    if notes:
        rows[2].status, rows[2].reason = "wrong", notes[0]
    calls = [call for _, call in ready]
    samples = time_cpu(calls, effort) if timer is None else timer.time(calls, effort)
    for (row, _), sample in zip(ready, samples, strict=True):
        row.ms, row.p20, row.p80 = (sample.quantile(q) for q in (0.5, 0.2, 0.8))
        row.n = len(sample.times)
    for row in rows:
        if row.ms is not None and rows[0].ms is not None:
            row.speedup = rows[0].ms / row.ms
    return rows


def _compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(twin(model))  # type: ignore[return-value]


def _call(model: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> Call:
    once = torch.inference_mode()(lambda: run(model))
    once()
    return Call([once])


def _change(out: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor | None) -> float:
    if exact is not None:
        return float((out.double() - exact).abs().max())
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def line(row: Result) -> tuple[str, ...]:
    """Cells of the table."""
    form = lambda value, text: "" if value is None else text.format(value)  # noqa: E731
    note = row.reason if row.plan_ms is None else f"{row.reason}; accelerate took {row.plan_ms:.0f} ms"
    return (
        row.name,
        form(row.ms, "{:.1f}") or row.status.upper(),
        "" if row.p20 is None else f"{row.p20:.1f}..{row.p80:.1f}",
        str(row.n or ""),
        form(row.speedup, "{:.2f}x"),
        form(row.error, "{:.1e}"),
        note,
    )


def checks(found: Sequence[tuple[Task, list[Result]]]) -> list[Check]:
    """The promised speed-ups over stock eager, and that torch.compile is not faster."""
    out = []
    for task, rows in found:
        ours, compiled = rows[2], rows[1]
        got = "" if ours.speedup is None else f"{ours.speedup:.2f}x"
        good = None if ours.speedup is None else ours.speedup >= task.wanted
        out.append(Check(f"{task.name}: against stock eager", got or ours.reason, f">= {task.wanted:.2f}x", good))
        if ours.ms is not None and compiled.ms is not None:
            ratio = compiled.ms / ours.ms
            out.append(Check(f"{task.name}: against torch.compile", f"{ratio:.2f}x", ">= 1.00x", ratio >= 1.0))
    return out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = options_of("swap", __doc__, "two small cases, under a minute")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    names = [task.name for task in tasks(options.device, options.quick)]
    if options.only is not None and not any(options.only in name for name in names):
        parser.error(f"--only: no case's name contains {options.only!r}; there are: {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done, and thresholds met where asked; 1: one failed, or a result was wrong; 2: bad usage."""
    options = parse(arguments)
    stamp, path, timer = begin("swap", options)
    effort = Effort(options.seconds or (5.0 if options.quick else 60.0), least=3)
    results: list[Result] = []
    done: list[tuple[Task, list[Result]]] = []
    for task in tasks(options.device, options.quick):
        if options.only is not None and options.only not in task.name:
            continue
        print(f"{task.name}, {task.shape} ...", file=sys.stderr, flush=True)
        new = measure(task, options.device, effort, timer)
        results += new
        done.append((task, new))
        report.print_table(f"{task.name}: {task.shape}", HEADINGS, [line(r) for r in new])
        save(path, stamp, results, ())
    found = checks(done) if options.check else []
    if found:
        report.print_checks(found)
    save(path, stamp, results, found)
    print(f"wrote {path.relative_to(options.out)}")
    return int(any(r.status not in ("ok", "refused") for r in results) or any(c.ok is not True for c in found))


if __name__ == "__main__":
    sys.exit(main())
