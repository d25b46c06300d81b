"""The stamp of a run: what a reader must know to believe a number. No host name, no path, nothing that names a person.

Every probe is guarded: what cannot be read is null, never an error.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import saccade
from saccade._load import BINARY

PACKAGES = ("torch", "triton", "transformers", "diffusers", "liger-kernel", "timm", "numpy")
# Variables that change what runs or how fast.
_VARIABLES = re.compile(
    r"SACCADE_|OMP_|GOMP_|KMP_|MKL_|MALLOC_|TRITON_|TORCHINDUCTOR_|TORCH_|PYTORCH_|CUDA_|NVIDIA_TF32|CUBLAS_|LD_PRELOAD$"
)
# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean "slower than it could be".
THROTTLE = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
_ROOT = Path(__file__).parent.parent
T = TypeVar("T")


def _guard(probe: Callable[[], T]) -> T | None:
    try:
        return probe()
    except Exception:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def git() -> dict[str, Any]:
    """Commit and whether tracked files differ from it; SACCADE_GIT_SHA stands in where there is no repository."""
    sha = _guard(lambda: _git("rev-parse", "--short=12", "HEAD"))
    if sha is None:
        return {"sha": os.environ.get("SACCADE_GIT_SHA"), "dirty": None}
    return {"sha": sha, "dirty": _guard(lambda: bool(_git("status", "--porcelain", "--untracked-files=no")))}


def versions() -> dict[str, str | None]:
    """Installed versions of saccade, Python and every peer; None where it is missing."""
    found: dict[str, str | None] = {"saccade": saccade.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = _guard(lambda name=name: importlib.metadata.version(name))  # type: ignore[misc]
    found["torch"] = torch.__version__
    return found


def cpu_model() -> str:
    """Marketing name of the processor."""
    for line in (_guard(lambda: Path("/proc/cpuinfo").read_text()) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest CPU cache; 0 where unknown."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _guard(path.read_text) or "0K"
        sizes.append(int(re.sub(r"\D", "", text) or 0) << {"K": 10, "M": 20}.get(text.strip()[-1:], 0))
    return max(sizes, default=0)


def cpu() -> dict[str, Any]:
    """Processor, cores and threads, and the instruction set that the compiled library chose."""
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "isa": BINARY.info.get("cpu"),
        "torch_isa": _guard(torch.backends.cpu.get_cpu_capability),
        "load": _guard(lambda: os.getloadavg()[0]),
    }


def variables() -> dict[str, str]:
    """Environment variables that change behaviour; a value that is a path keeps its last part."""
    return {
        key: Path(value).name if "/" in value else value
        for key, value in sorted(os.environ.items())
        if _VARIABLES.match(key)
    }


class Nvml:
    """State of one GPU through NVML; all None where nvidia-ml-py or the driver is missing."""

    def __init__(self, index: int = 0) -> None:
        self._library: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(index)
            if hasattr(properties, "pci_bus_id"):  # NVML does not follow CUDA_VISIBLE_DEVICES, the PCI address does
                address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
                self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._library = pynvml
        except Exception:
            self._library = None

    def _get(self, name: str, *arguments: Any) -> Any:
        if self._library is None:
            return None
        return _guard(lambda: getattr(self._library, name)(self._handle, *arguments))

    def state(self) -> dict[str, Any]:
        """Clocks (MHz), power (W), temperature (C) and the reasons for running slower, now."""
        library = self._library
        reasons = self._get("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._get("nvmlDeviceGetCurrentClocksThrottleReasons")  # the name before driver 535
        power = self._get("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": self._get("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM) if library else None,
            "memory_mhz": self._get("nvmlDeviceGetClockInfo", library.NVML_CLOCK_MEM) if library else None,
            "power_w": None if power is None else power / 1000,
            "temperature_c": self._get("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU) if library else None,
            "throttle": None if reasons is None else [name for bit, name in THROTTLE.items() if reasons & bit],
        }

    def fixed(self) -> dict[str, Any]:
        """Driver, limits and modes: what does not change during a run."""
        library = self._library
        limit = self._get("nvmlDeviceGetEnforcedPowerLimit")
        ecc = self._get("nvmlDeviceGetEccMode")
        others = self._get("nvmlDeviceGetComputeRunningProcesses")
        driver = _guard(library.nvmlSystemGetDriverVersion) if library else None
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "power_limit_w": None if limit is None else limit / 1000,
            "max_sm_mhz": self._get("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_SM) if library else None,
            "ecc": None if ecc is None else bool(ecc[0]),
            "persistence": self._get("nvmlDeviceGetPersistenceMode"),
            "compute_processes": None if others is None else len(others),
        }


def gpu(nvml: Nvml) -> dict[str, Any] | None:
    """The current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        **nvml.fixed(),
        "state": nvml.state(),
    }


def stamp(nvml: Nvml | None = None) -> dict[str, Any]:
    """Everything above as one JSON-ready dict."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": git(),
        "versions": versions(),
        "system": platform.system(),
        "cpu": cpu(),
        "gpu": gpu(nvml or Nvml()),
        "binary": {"problem": None if BINARY.problem is None else BINARY.problem.partition("(")[0], **BINARY.info},
        "variables": variables(),
    }


def device_slug(device: str) -> str:
    """Folder name of a device: "nvidia-h200", "amd-epyc-2-threads"."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
