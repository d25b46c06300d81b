"""What the benchmarks of whole models share: options, and the record of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import environment
from bench.cases import Check
from bench.timing import CudaTimer

__all__ = ["begin", "check_options", "options_of", "save"]

HERE = Path(__file__).parent


def options_of(name: str, about: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that all have; `quick` says what --quick runs."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help=f"{quick}; no thresholds")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a threshold fails")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default 2")
    parser.add_argument("--seconds", type=float, help="measuring time for each case")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results/; default bench/ itself")
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Bad usage ends the program with code 2."""
    if options.quick and options.check:
        parser.error("--check needs the full sizes: leave out --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: not run, torch finds no CUDA GPU here")
    if options.threads < 1:
        parser.error("--threads: expected at least 1")


def begin(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], Path, CudaTimer | None]:
    """The stamp of the run, the file for its results, and the GPU's timer; says where others use the machine."""
    torch.set_num_threads(options.threads)
    timer = CudaTimer() if options.device == "cuda" else None
    stamp = environment.stamp()
    run = stamp["time"].replace(":", "").replace("-", "").replace("+0000", "Z")
    stem = f"{name}-quick" if options.quick else name
    load = stamp["cpu"]["load"] or 0.0
    if load > 0.5 * (stamp["cpu"]["cores"] or 1):
        print(f"load {load:.1f} before the run: others use this machine, the timings are noise", file=sys.stderr)
    return stamp, options.out / "results" / environment.device_slug(options.device) / f"{stem}-{run}.json", timer


def save(path: Path, stamp: dict[str, Any], results: Sequence[Any], found: Sequence[Check]) -> None:
    """Rewritten after every case, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"stamp": stamp, "rows": [asdict(r) for r in results], "checks": [asdict(c) for c in found]}
    path.write_text(json.dumps(content, indent=1) + "\n")
