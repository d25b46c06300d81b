"""What a benchmark case is, and the registry: a family is one module in this folder.

A family module has `cases(request) -> list[Case]`, and may have `checks(rows, request) -> list[Check]`. Its name is the family's.
Modules whose name begins with an underscore are its helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch

Role = Literal["ours", "eager", "compile", "peer", "copy"]
Level = Literal["strict", "plain"]


class Refused(Exception):
    """Raised by `Provider.make` where a provider cannot run the case; the message becomes its row."""


@dataclass(frozen=True)
class Counts:
    """What a call must do at least, counted by the author of the case.

    Args:
        bytes: each input read once, each output written once.
        flops: operations executed.
        dense_flops: operations of the dense computation that a sparse one stands for.
        unit: which measured rate bounds `flops`: "float32" for plain arithmetic, "bfloat16" for tensor cores.
    """

    bytes: int
    flops: int = 0
    dense_flops: int | None = None
    unit: str = "float32"


@dataclass(frozen=True)
class Call:
    """A provider ready to run.

    Args:
        runs: the timed call, once per buffer set; they do the same work on different memory.
        outputs: one untimed call on fresh inputs, for the gate; None where there is nothing to check.
        warm: the same op on a few tokens: threads and code pages exist before memory is measured.
        capturable: may be captured into a CUDA graph.
    """

    runs: Sequence[Callable[[], Any]]
    outputs: Callable[[], Sequence[torch.Tensor]] | None = None
    warm: Callable[[], Any] | None = None
    capturable: bool = True


@dataclass(frozen=True)
class Provider:
    """One competitor of a case.

    Args:
        name: what stands in the table.
        role: "ours", "eager" and "compile" (the two baselines of speed-ups), "peer", or "copy" (the roof).
        make: prepares the call, outside the clock: imports, compilation, tables. May raise `Refused`.
        level: whose error the gate doubles: "strict" is fp32 arithmetic with one rounding, "plain" the eager code of models.
        version: of the package it comes from.
        counts: where it differs from the case's.
    """

    name: str
    role: Role
    make: Callable[[], Call]
    level: Level = "strict"
    version: str = ""
    counts: Counts | None = None


@dataclass(frozen=True)
class Expected:
    """The float64 results and, per level, the error of torch in the same precision, both per output."""

    names: tuple[str, ...]
    exact: tuple[torch.Tensor, ...]
    errors: dict[str, tuple[float, ...]]
    factor: float = 2.0


@dataclass(frozen=True)
class Problem:
    """A case with its inputs in memory."""

    providers: Sequence[Provider]
    expected: Callable[[], Expected]
    sets: int = 1


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: everything known before any memory is taken. `build` takes it."""

    family: str
    name: str
    op: str
    mode: Literal["forward", "backward"]
    dtype: str
    shape: str
    counts: Counts
    build: Callable[[], Problem]


@dataclass(frozen=True)
class Request:
    """What was asked for: which device, and whether quick."""

    device: str = "cpu"
    quick: bool = False
    l2_bytes: int = 0
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Check:
    """A threshold, evaluated from the rows of one run; `ok` None means not measured, which counts as failed."""

    name: str
    measured: str
    wanted: str
    ok: bool | None


def families() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def family(name: str) -> ModuleType:
    """The module of a family."""
    return importlib.import_module(f"{__name__}.{name}")


def buffer_sets(set_bytes: int, request: Request, most: int = 64) -> int:
    """How many buffer sets of `set_bytes` to rotate so that the GPU's L2 holds none from the last turn; 1 where large or CPU.

    Too small to fill the cache even `most` times over: 1, and the timing is labelled hot.
    """
    if request.device != "cuda" or set_bytes >= 4 * request.l2_bytes:
        return 1
    wanted = -(-4 * request.l2_bytes // max(set_bytes, 1))
    return wanted if wanted <= most else 1
