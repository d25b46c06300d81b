"""The rooms of the house and the arrows between them: dependencies point down only."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python/saccade"
FAMILIES = {"rope", "attention", "merge", "distill"}
FOUNDATION = {"_load", "_dispatch", "_arguments", "_tensors", "reference"}

# room -> rooms it may import (itself always)
MAY = {
    "_load": set(),
    "_dispatch": {"_load"},
    "_arguments": set(),
    "_tensors": set(),
    "reference": set(),
    **{family: FOUNDATION | {"_triton"} for family in FAMILIES},
    "_triton": {"_load"},
    "testing": FAMILIES | FOUNDATION,
    "swap": FAMILIES | FOUNDATION,
    "demo": FAMILIES | FOUNDATION | {"swap", "testing", "doctor"},
    "doctor": {"_load", "_dispatch"},
    "cli": {"doctor", "demo", "swap"},
    "__init__": FAMILIES | {"_dispatch", "_triton", "_load", "swap"},
}
# A family may use another's specs and positions, never its kernels.
MAY["attention"] |= {"rope"}
MAY["merge"] |= {"rope"}


def room(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels/triton"):
        return "_triton"
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("saccade.")}
    return rooms


def wrong_arrows(files: dict[Path, str]) -> list[str]:
    wrong = []
    for path, source in files.items():
        here = room(path)
        for there in imported_rooms(source) - {here}:
            a_room = (PACKAGE / there).exists() or (PACKAGE / f"{there}.py").exists() or there == "_triton"
            if a_room and there not in MAY.get(here, set()):
                wrong.append(f"{path.relative_to(ROOT)}: {here} -> {there}")
    return sorted(wrong)


def python_files() -> dict[Path, str]:
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels/triton").rglob("*.py")]
    return {p: p.read_text() for p in paths}


def test_python_arrows_point_down():
    assert wrong_arrows(python_files()) == []


def test_a_wrong_arrow_is_seen():
    bad = {PACKAGE / "reference/apply_rope.py": "from saccade.rope import apply_rope\n"}
    assert wrong_arrows(bad) == ["python/saccade/reference/apply_rope.py: reference -> rope"]


def test_every_room_has_its_arrows():
    rooms = {
        p.name.removesuffix(".py")
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())
    }
    assert rooms <= set(MAY), f"add {rooms - set(MAY)} to MAY, with what they may import"


# ---- C++ -----------------------------------------------------------------------------------------------------------------
def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


def test_device_code_knows_no_torch():
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in (".h", ".cuh", ".cu"):
            assert not [i for i in includes(path) if "torch" in i or "ATen" in i or "c10" in i or "csrc" in i], path


def test_cpu_kernels_know_neither_torch_nor_cuda():
    for path in (ROOT / "csrc/cpu").iterdir():
        assert not [i for i in includes(path) if "torch" in i or "cuda" in i], path


def test_host_code_uses_the_stable_abi_only():
    banned = re.compile(r"torch/extension\.h|torch/library\.h|torch/all\.h|ATen/|c10/|AT_DISPATCH|pybind11")
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not banned.search(path.read_text()), path
    assert not re.search(r"^\s*find_package\(Torch", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)


def test_ops_include_launchers_not_kernels():
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert not [i for i in includes(path) if i.endswith((".cuh", ".cu"))], path


# ---- one op, one name ----------------------------------------------------------------------------------------------------
def ops() -> set[str]:
    names = re.findall(r'^OP\("(\w+)\(', (PACKAGE / "_schemas.inc").read_text(), re.MULTILINE)
    return {re.sub(r"(_bwd|_)$", "", n) for n in names}


@pytest.mark.parametrize("op", sorted(ops()))
def test_an_op_has_one_name_in_every_folder(op):
    for place in (
        f"csrc/ops/{op}.cpp",
        f"csrc/cpu/{op}.cpp",
        f"kernels/cuda/{op}.cuh",
        f"kernels/cuda/{op}.h",
        f"kernels/cuda/{op}.cu",
        f"kernels/triton/{op}.py",
        f"python/saccade/reference/{op}.py",
    ):
        assert (ROOT / place).exists(), f"{op}: {place} is missing"


# ---- small rooms -----------------------------------------------------------------------------------------------------------
def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / f for f in listed if Path(f).suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and (ROOT / f).exists()]


def test_files_stay_small():
    lengths = sorted(len(p.read_text().splitlines()) for p in sources())
    assert lengths[-1] <= 600, [str(p) for p in sources() if len(p.read_text().splitlines()) > 600]
    assert lengths[len(lengths) // 2] < 200


def test_nothing_speaks_of_a_machine():
    """No paths of a machine and no registry's host in what is committed."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    banned = re.compile(r"(^|[^\w.])/(root|home|work|tmp)/|--(extra-)?index-url|" + "pypi" + r"\.org")
    found = []
    for name in listed:
        path = ROOT / name
        if path.suffix in (".png", ".mp4", ".gif") or not path.exists():
            continue
        found += [
            f"{name}: {line.strip()[:100]}"
            for line in path.read_text(errors="replace").splitlines()
            if banned.search(line)
        ]
    assert found == []
