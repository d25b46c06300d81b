"""Which implementation runs, and why the others do not.

An op lists its implementations in order of preference. Each has a predicate over a `Case` (plain facts: device, dtype,
head_dim, needs_grad) that returns None or the reason for refusing. `impl="auto"` takes the first that accepts; an explicit
`impl` that refuses raises with its reason. No tensor value is ever read.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from saccade._load import BINARY

Impl = Literal["auto", "cuda", "triton", "cpu", "reference"]
NAMES = ("cuda", "triton", "cpu", "reference")
Refusal = str | None


@dataclass(frozen=True)
class Case:
    """What a predicate may look at."""

    device: str
    dtype: torch.dtype
    head_dim: int
    capability: tuple[int, int] | None = None
    needs_grad: bool = False
    refused: tuple[tuple[str, str], ...] = ()  # (implementation, reason): what this op, or this call of it, adds


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`: the chosen implementation, and per implementation "runs" or the reason for refusing."""

    op: str
    chosen: str
    verdicts: dict[str, str]

    def __str__(self) -> str:
        width = max(len(name) for name in self.verdicts)
        lines = [f"{self.op}: {self.chosen} runs"]
        for name, verdict in self.verdicts.items():
            mark = "*" if name == self.chosen else " "
            lines.append(f" {mark} {name:<{width}}  {verdict}")
        return "\n".join(lines)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of CUDA device `index`."""
    return torch.cuda.get_device_capability(index)


def _cuda(case: Case) -> Refusal:
    if case.device != "cuda":
        return f"needs tensors on a CUDA device, got {case.device}"
    if BINARY.problem:
        return BINARY.problem
    if not BINARY.architectures:
        return "the library was built without CUDA (SACCADE_CUDA=OFF, or no nvcc was found)"
    if case.dtype == torch.float64:
        return "no float64 CUDA kernel"
    assert case.capability is not None
    major, minor = case.capability
    for built in BINARY.architectures:
        digits = int(built.rstrip("a"))
        # Machine code runs on its own major version, from its minor upwards; "a" code on exactly that version.
        if major == digits // 10 and (minor == digits % 10 if built.endswith("a") else minor >= digits % 10):
            return None
    return f"built for sm_{', sm_'.join(BINARY.architectures)}, the device is sm_{major}{minor}"


def _triton(case: Case) -> Refusal:
    if not has_triton():
        return "triton is not installed"
    if case.dtype == torch.float64:
        return "no float64 Triton kernel"
    if case.device == "cpu" and interpreting():
        return None
    if case.device != "cuda":
        return f"needs tensors on a CUDA device (or TRITON_INTERPRET=1), got {case.device}"
    if case.capability is not None and case.capability < (8, 0):
        return f"needs sm_80 or newer, the device is sm_{case.capability[0]}{case.capability[1]}"
    return None


def _cpu(case: Case) -> Refusal:
    if case.device != "cpu":
        return f"needs tensors on the CPU, got {case.device}"
    return BINARY.problem


def _reference(case: Case) -> Refusal:
    return None


PREDICATES: dict[str, Callable[[Case], Refusal]] = {
    "cuda": _cuda,
    "triton": _triton,
    "cpu": _cpu,
    "reference": _reference,
}
# The interpreter is for proofs: it never wins "auto" over the native CPU kernels.
ORDER = {"cuda": NAMES, "cpu": ("cpu", "reference", "triton")}


def refusal(name: str, case: Case) -> Refusal:
    """Why implementation `name` cannot run `case`; None where it can."""
    return dict(case.refused).get(name) or PREDICATES[name](case)


def case_of(tensor: torch.Tensor, *others: torch.Tensor | None, refused: tuple[tuple[str, str], ...] = ()) -> Case:
    """The facts about a call whose main input is `tensor` [..., D]."""
    device = tensor.device
    tensors = (tensor, *(t for t in others if t is not None))
    return Case(
        device=device.type,
        dtype=tensor.dtype,
        head_dim=tensor.shape[-1],
        capability=capability(device.index or 0) if device.type == "cuda" else None,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
        refused=refused,
    )


def select(op: str, impl: str, case: Case) -> str:
    """Name of the implementation that runs; ValueError with the reason where `impl` cannot."""
    if impl == "auto":
        for name in ORDER.get(case.device, ("reference",)):
            if refusal(name, case) is None:
                return name
        raise AssertionError("the reference accepts every case")
    if impl not in PREDICATES:
        raise ValueError(f'impl: expected one of "auto", {", ".join(repr(n) for n in NAMES)}, got {impl!r}')
    reason = refusal(impl, case)
    if reason is not None:
        raise ValueError(f"impl: {impl!r} cannot run {op} here: {reason}")
    return impl


def explain_case(op: str, case: Case) -> Explanation:
    """Verdict of every implementation on `case`."""
    return Explanation(op, select(op, "auto", case), {n: refusal(n, case) or "can run" for n in NAMES})


def raw(op: str, impl: str) -> Any:
    """The op in torch.ops.saccade that `impl` means; `cuda` and `cpu` share one name and differ by dispatch key."""
    return getattr(torch.ops.saccade, f"{op}_triton" if impl == "triton" else op)


_OPS: dict[str, Callable[..., Case]] = {}


def public_op(case: Callable[..., Case]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a public function with the function that turns its arguments into a `Case`, for `explain` and `doctor`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _OPS[function.__name__] = case
        return function

    return register


def ops() -> tuple[str, ...]:
    """Names of all public ops."""
    return tuple(_OPS)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation `op(*args, **kwargs)` would run, and why the others would not.

    Args:
        op: a public function (`saccade.rope.apply_rope`) or its name.
        *args, **kwargs: the arguments of the call.

    Example:
        >>> import torch, saccade
        >>> spec = saccade.rope.vanilla(64, base=10000.0)
        >>> q = torch.randn(1, 2, 5, 64)
        >>> saccade.explain("apply_rope", q, None, torch.arange(5), spec).verdicts["cuda"]
        'needs tensors on a CUDA device, got cpu'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {name}")
    return explain_case(name, _OPS[name](*args, **kwargs))
