"""Calls every CUDA op once per awkward shape and holds each result against the reference: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python -m bench.sanitize

Inputs are made and results compared on the CPU, so that hardly any kernel but ours runs on the device (the tools slow each down
a hundredfold). A family offers its calls as `sanitize(impl, device)` in its module; an op of the schema table that no family
calls is a failure.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import families, family
from saccade._load import schemas


class _Called(TorchDispatchMode):
    """Collects the names of the saccade ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = str(op)
        if name.startswith("saccade."):
            self.names.add(name.split(".")[1])
        return op(*arguments, **(options or {}))


def run(impl: str, device: str) -> tuple[int, list[str]]:
    """Number of calls, and what is wrong: results over budget, ops of the table that were never called."""
    problems: list[str] = []
    count = 0
    with _Called() as called:
        for name in families():
            module = family(name)
            if not hasattr(module, "sanitize"):
                problems.append(f"{name}: the family offers no sanitize()")
                continue
            for label, call in module.sanitize(impl, device):
                count += 1
                try:
                    call()
                except Exception as error:
                    problems.append(
                        f"{name}: {label}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
    suffix = "_triton" if impl == "triton" else ""
    problems += [f"{op} was never called" for op in schemas() if op + suffix not in called.names]
    return count, problems


def main() -> int:
    """Exit code 1 where anything is wrong, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--impl", default="cuda", choices=("cuda", "triton", "cpu"))
    impl = parser.parse_args().impl
    if impl != "cpu" and not torch.cuda.is_available():
        print("not run: torch finds no CUDA GPU here")
        return 3
    count, problems = run(impl, "cpu" if impl == "cpu" else "cuda")
    if impl != "cpu":
        torch.cuda.synchronize()
    print("\n".join(problems) or f"{count} calls agree with the reference")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
