"""Peak extra memory of a call: beyond what was in use before it, its outputs included.

CUDA: the caching allocator's peak. CPU: the process's peak resident set (VmHWM), which sees every allocation, also those of
compiled code outside torch's allocator. Memory freed earlier but kept by malloc could hide a few megabytes, so the figure that
a threshold is held against comes from a fresh process: `python -m bench.memory`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Request, family


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _trim() -> None:
    """Give freed heap pages back to the system, so that the next allocation shows; glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_extra(run: Callable[[], Any], device: str) -> int | None:
    """Bytes; None where the system does not say."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
        before = _status("VmHWM")
        result = run()
        after = _status("VmHWM")
    except OSError:
        return None
    del result
    return after - before


def peak_extra_fresh(case: Case, provider: str, threads: int) -> int | None:
    """`peak_extra` of one CPU call in a process that did nothing else before."""
    arguments = [case.family, case.name, case.mode, case.dtype, provider, str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=120,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench.memory {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}")
    answer: int | None = json.loads(done.stdout.splitlines()[-1])["bytes"]
    return answer


def main() -> None:
    """Measure one provider of one case in this process and print {"bytes": N}."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=main.__doc__)
    for name in ("family", "case", "mode", "dtype", "provider"):
        parser.add_argument(name)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    key = (options.case, options.mode, options.dtype)
    case = next(c for c in family(options.family).cases(Request()) if (c.name, c.mode, c.dtype) == key)
    provider = next(p for p in case.build().providers if p.name == options.provider)
    call = provider.make()
    for _ in range(3):
        if call.warm is not None:
            call.warm()  # threads, code and lookup pages, not the tensors
    print(json.dumps({"bytes": peak_extra(call.runs[0], "cpu")}))


if __name__ == "__main__":
    main()
