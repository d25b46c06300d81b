"""Cross-compiles Triton kernels for a compute capability and reads the machine code. Run as a program, it needs Triton and no torch:

python triton_compile.py <kernels/triton> <capability> < launches.json > results.json
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def import_kernels(folder: str) -> None:
    """Make `saccade._triton` importable from its source folder, without the package around it."""
    package = types.ModuleType("saccade")
    package.__path__ = []
    kernels = types.ModuleType("saccade._triton")
    kernels.__path__ = [folder]
    package._triton = kernels  # type: ignore[attr-defined]
    sys.modules.update({"saccade": package, "saccade._triton": kernels})


def compile_launch(launch: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, memory and instruction counts of one kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(importlib.import_module(f"saccade._triton.{launch['module']}"), launch["kernel"])
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch["aligned"]}
    source = ASTSource(function, launch["signature"], launch["constants"], attributes)
    target = GPUTarget("cuda", capability, 32)
    kernel = compile(source, target=target, options=launch["options"])
    return {"label": launch["label"], **read_cubin(kernel.asm["cubin"]), **read_layouts(kernel.asm["ttgir"]),
            "shared": kernel.metadata.shared}  # fmt: skip


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """What cuobjdump says of the resources, and how often each instruction occurs."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = run(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, static, local = map(int, found.groups())
    counts: dict[str, int] = {}
    for name in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code, re.MULTILINE):
        counts[name] = counts.get(name, 0) + 1
    return {"registers": registers, "stack": stack, "local": local, "static_shared": static, "instructions": counts}


def read_layouts(ttgir: str) -> dict[str, Any]:
    """Layouts in which tiles are summed along their columns, and conversions between layouts inside loops."""
    names = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", ttgir, re.MULTILINE))
    sums = re.findall(r"\}\)\s*:\s*\(tensor<(\w+), (#\w+)>\) -> tensor<\w+, #ttg\.slice<\{dim = 1", ttgir)
    depth, inside, stack = 0, 0, []
    for line in ttgir.splitlines():
        if re.search(r"\bscf\.(for|while)\b", line):
            stack.append(depth)
        if stack and "ttg.convert_layout" in line:
            inside += 1
        depth += line.count("{") - line.count("}")
        if stack and depth <= stack[-1]:
            stack.pop()
    return {"row_sums": sorted({f"{shape} {names[layout]}" for shape, layout in sums}), "conversions_in_loops": inside}


def _task(arguments: tuple[str, dict[str, Any], int]) -> dict[str, Any]:
    folder, launch, capability = arguments
    if "saccade._triton" not in sys.modules:
        import_kernels(folder)
    try:
        return compile_launch(launch, capability)
    except Exception as error:
        return {"label": launch["label"], "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Compile what stands in the input, on two processes."""
    folder, capability = sys.argv[1], int(sys.argv[2])
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(_task, [(folder, launch, capability) for launch in json.load(sys.stdin)]))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
