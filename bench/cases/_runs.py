"""How a competitor's call runs: without autograd, and with a refusal told from an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import saccade
from bench.cases import Call, Provider, Refused

Run = Callable[[], Any]


def free(run: Run) -> Run:
    """The call without autograd, as in inference; weights that require grad would save their inputs."""

    def without() -> Any:
        with torch.no_grad():
            return run()

    return without


def refusable(run: Run) -> Any:
    """Run; the dispatcher's refusal of an explicit `impl` becomes a row of its own."""
    try:
        return run()
    except ValueError as error:
        if str(error).startswith("impl:"):
            raise Refused(str(error)) from error
        raise


def one_pass(
    name: str,
    role: str,
    function: Callable[..., torch.Tensor],
    tensors: Sequence[torch.Tensor],
    dout: torch.Tensor | None,
    part: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Provider:
    """`function(*tensors)`, or where `dout` is given its backward pass alone; compiled where that is its role.

    The gate sees `part` of every output or gradient; None: nothing is checked.
    """

    def make() -> Call:
        run = torch.compile(function, dynamic=False) if role == "compile" else function
        if dout is None:
            call = free(lambda: (run(*tensors),))
            refusable(call)
        else:
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = refusable(lambda: run(*leaves))
            if not out.requires_grad:
                raise Refused("it has no backward pass here")
            call = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)  # noqa: E731
        outputs = None if part is None else lambda: [part(x) for x in call()]
        return Call([call], outputs, warm=call, capturable=dout is None)

    version = saccade.__version__ if role == "ours" else torch.__version__
    return Provider(name, role, make, version=version)  # type: ignore[arg-type]
