"""`saccade doctor`: what is installed, what this machine can run, and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from saccade import _dispatch
from saccade._dispatch import Case
from saccade._load import BINARY

_PACKAGES = ("saccade", "torch", "triton", "transformers", "diffusers", "timm", "liger-kernel", "av")
_CPU_FEATURES = (
    "sse4_2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "amx_tile",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Vector extensions of the processor that matter here."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return ()
    return tuple(f for f in _CPU_FEATURES if f in flags)


def gpus() -> tuple[list[str], str]:
    """One line per NVIDIA GPU that NVML shows, and the driver version or why there is none."""
    if importlib.util.find_spec("pynvml") is None:
        return [], "unknown: nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"none ({error})"
    try:
        lines = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            lines.append(f"{pynvml.nvmlDeviceGetName(handle)}, sm_{major}{minor}, {memory:.0f} GiB")
        return lines, str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _facts() -> Table:
    table = Table(title="saccade doctor", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    table.add_row("torch's CUDA", torch.version.cuda or "none: a CPU build")
    table.add_row("processor", f"{cpu_model()}; {torch.get_num_threads()} threads")
    table.add_row("CPU features", " ".join(cpu_features()) or "unknown")
    lines, driver = gpus()
    table.add_row("GPU", "\n".join(lines) or "none")
    table.add_row("driver", driver)
    if BINARY.problem:
        table.add_row("compiled library", f"[red]{BINARY.problem}[/red]")
    else:
        table.add_row(
            "compiled library", f"loaded; CPU kernels for {BINARY.info['cpu']}, compiler {BINARY.info['compiler']}"
        )
        built = ", ".join(f"sm_{a}" for a in BINARY.architectures)
        table.add_row(
            "built for CUDA",
            f"{built} (CUDA {BINARY.info['cuda']})" if built else "no: nvcc was not found, or SACCADE_CUDA=OFF",
        )
    return table


def _cases() -> list[tuple[str, Case]]:
    cases = [("CPU, float32", Case("cpu", torch.float32, 128))]
    for index in range(torch.cuda.device_count()):
        cases.append((f"cuda:{index}, bfloat16", Case("cuda", torch.bfloat16, 128, _dispatch.capability(index))))
    return cases


def _ops() -> Table:
    table = Table(title="which implementation runs", title_justify="left")
    for column in ("op", "on", "runs", "why not the others"):
        table.add_column(column, overflow="fold")
    for op in _dispatch.ops():
        for label, case in _cases():
            answer = _dispatch.explain_case(op, case)
            others = [f"{name}: {why}" for name, why in answer.verdicts.items() if why != "can run"]
            table.add_row(op, label, f"[green]{answer.chosen}[/green]", "\n".join(others))
    return table


def run(console: Console) -> int:
    """Print the report; 1 where the compiled library is broken (not merely absent), else 0."""
    console.print(_facts())
    console.print(_ops())
    broken = BINARY.problem is not None and not BINARY.problem.startswith("no compiled library")
    return 1 if broken else 0
