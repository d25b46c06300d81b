"""Compiles the CUDA kernels without a GPU and reads what they use; `python tests/build/resources.py` renews the budgets.

Registers are budgeted in steps of 8, as they are allocated. The file resources.json is reviewed like code: a larger number in
it is a slower kernel.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "kernels" / "cuda"
BUDGETS = HERE / "resources.json"
ARCHS = ("80", "89", "90a")
SHARED_LIMIT = {"80": 163 * 1024, "89": 99 * 1024, "90a": 227 * 1024}  # per block, CUDA programming guide
SYSTEM_SHARED = {"80": 0, "89": 0, "90a": 1024}  # what the system takes of every block on sm_90, counted by cuobjdump
FLAGS = ("-std=c++17", "-O3", "-fmad=false")  # as in CMakeLists.txt


class MissingTool(RuntimeError):
    """A program that the check needs is not on this machine."""


@functools.cache
def tool(name: str) -> str:
    """Path of nvcc, cuobjdump or nvdisasm: on PATH, in CUDA_HOME, or inside the triton wheel."""
    candidates = [shutil.which(name)]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(str(Path(home) / "bin" / name))
    candidates.append(f"/usr/local/cuda/bin/{name}")
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    for path in candidates:
        if path is not None and os.access(path, os.X_OK):
            return path
    raise MissingTool(f"{name} is neither on PATH, nor in CUDA_HOME, nor in the triton wheel")


def run(*command: str) -> str:
    """Standard output; a failure carries what the program said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor, and what its machine code shows."""

    registers: int
    stack: int
    local: int
    shared: int  # static
    sass: frozenset[str]  # instruction names, with their modifiers


def readable(mangled: str) -> str:
    """Name and template arguments of a kernel: `_ZN7saccade1fINS_1TELi8ELb0EEEv...` is `f<T, 8, false>`."""
    rest = mangled[mangled.index("7saccade") + len("7saccade") :].lstrip("L")
    length = re.match(r"\d+", rest)
    assert length is not None, mangled
    end = length.end() + int(length[0])
    arguments = template_arguments(rest[end:])
    return rest[length.end() : end] + (f"<{', '.join(arguments)}>" if arguments else "")


def template_arguments(mangled: str) -> list[str]:
    """The template arguments that a mangled name goes on with, in order."""
    found: list[str] = []
    rest = mangled.removeprefix("I") if mangled.startswith("I") else ""
    while kind := re.match(r"NS_(\d+)|Li(\d+)E|Lb([01])E", rest):
        end = kind.end() + (int(kind[1]) + 1 if kind[1] else 0)  # a type ends with E
        found.append(rest[kind.end() : end - 1] if kind[1] else kind[2] or ("true" if kind[3] == "1" else "false"))
        rest = rest[end:]
    return found


def compile_kernels(source: Path, arch: str) -> Path:
    """A cubin of `source`, kept under a name that depends on the compiler, the flags and all kernel sources."""
    command = [tool("nvcc"), *FLAGS, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", str(source)]
    digest = hashlib.sha256((" ".join(command) + run(tool("nvcc"), "--version")).encode())
    for path in (source, *sorted(CUDA.parent.rglob("*.*h")), *sorted(CUDA.glob("*.cu"))):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"saccade-cubins-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:24]}.cubin"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "built.cubin"
            run(*command, "-o", str(built))
            built.replace(target)
    return target


def parse_usage(text: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, stack, local and static shared memory of every kernel in a dump of cuobjdump, by mangled name."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: (int(reg), int(stack), int(local), int(shared))
        for name, reg, stack, shared, local in re.findall(pattern, text)
    }


def read_usage(cubin: Path, arch: str) -> dict[str, Usage]:
    """Usage of every kernel of a cubin, by readable name."""
    sass: dict[str, set[str]] = {}
    section: set[str] = set()
    for line in run(tool("nvdisasm"), "-c", str(cubin)).splitlines():
        if line.startswith(".text."):
            section = sass.setdefault(line.removeprefix(".text.").rstrip(":"), set())
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            section.add(found[1])
    usage = parse_usage(run(tool("cuobjdump"), "--dump-resource-usage", str(cubin)))
    return {
        readable(name): Usage(reg, stack, local, shared - SYSTEM_SHARED[arch], frozenset(sass[name]))
        for name, (reg, stack, local, shared) in usage.items()
    }


def measure(archs: tuple[str, ...] = ARCHS) -> dict[str, dict[str, dict[str, Usage]]]:
    """Usage by source, kernel and architecture, of everything in kernels/cuda."""
    jobs = [(source, arch) for source in sorted(CUDA.glob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        cubins = list(pool.map(lambda job: compile_kernels(*job), jobs))
    result: dict[str, dict[str, dict[str, Usage]]] = {}
    for (source, arch), cubin in zip(jobs, cubins, strict=True):
        for kernel, usage in read_usage(cubin, arch).items():
            result.setdefault(source.stem, {}).setdefault(kernel, {})[arch] = usage
    return result


def violations(kernel: str, arch: str, usage: Usage, registers: int, shared: int, dynamic_shared: int) -> list[str]:
    """What is wrong with a kernel, given its budget of registers, static and dynamic shared memory."""
    where, wrong = f"{kernel} on sm_{arch}", []
    if usage.registers > registers:
        wrong.append(f"{where}: {usage.registers} registers, budget {registers}")
    if usage.shared > shared:
        wrong.append(f"{where}: {usage.shared} bytes of static shared memory, budget {shared}")
    if (total := shared + dynamic_shared) > SHARED_LIMIT[arch]:
        wrong.append(f"{where}: {total} bytes of shared memory, the block has {SHARED_LIMIT[arch]}")
    if usage.stack or usage.local:
        wrong.append(f"{where}: {usage.stack} bytes of stack, {usage.local} of local memory, budget 0")
    if spills := sorted(name for name in usage.sass if name.startswith(("LDL", "STL"))):
        wrong.append(f"{where}: local memory instructions {', '.join(spills)}")
    return wrong


def renew() -> None:
    """Write what the kernels use now as their budgets; dynamic shared memory is kept as it is written."""
    old = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    new = {}
    for source, kernels in measure().items():
        table = {}
        for kernel, usages in sorted(kernels.items()):
            registers = {arch: -(-usage.registers // 8) * 8 for arch, usage in usages.items()}
            table[kernel] = {"registers": registers, "shared": max(usage.shared for usage in usages.values())}
        new[source] = {"dynamic_shared": old.get(source, {}).get("dynamic_shared", 0), "kernels": table}
    lines = []
    for source, entry in sorted(new.items()):
        rows = ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in entry["kernels"].items())
        lines.append(
            f'  "{source}": {{\n    "dynamic_shared": {entry["dynamic_shared"]},\n    "kernels": {{\n{rows}\n    }}\n  }}'
        )
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    renew()
