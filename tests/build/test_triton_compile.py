"""Every Triton kernel cross-compiled for the GPUs in use, without a GPU, and its machine code held to triton_resources.json.

By the installed Triton, and by 3.6, the oldest in use, from an environment of its own without torch. To set the budgets anew
after a deliberate change: `python tests/build/test_triton_compile.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="not run: Triton is not installed")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import triton_launches  # noqa: E402
import triton_launches_attention  # noqa: E402
import triton_launches_merge  # noqa: E402

BUDGETS = HERE / "triton_resources.json"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
OLDEST = "3.6.0"
# Each launch of attention is compiled for every capability, by one of the two Tritons; with SACCADE_TRITON=all by both (ten minutes more).
BOTH = os.environ.get("SACCADE_TRITON") == "all"
pytestmark = pytest.mark.slow

# Kernels that multiply on tensor cores where this argument is not fp32; on sm_90 those of attention by warp groups.
MULTIPLIED = {
    "match_kernel": "x_ptr", "knn_density_distances_kernel": "x_ptr", "sparse_attention_kernel": "q_ptr",
    "attention_dk_dv_kernel": "q_ptr", "attention_dq_kernel": "q_ptr", "attention_bias_grad_kernel": "q_ptr",
    "axial_kernel": "q_ptr", "axial_packed_kernel": "q_ptr", "axial_packed_bwd_kernel": "q_ptr", "axial_prefix_kernel": "q_ptr",
    "axial_dk_dv_kernel": "q_ptr", "axial_dq_kernel": "q_ptr", "attention_rows_kernel": "q_ptr", "attention_columns_kernel": "q_ptr",
}  # fmt: skip


def installed() -> Path:
    return Path(sys.executable)


def oldest() -> Path:
    """Python of an environment with Triton 3.6 alone, made under build/ if need be."""
    folder = ROOT / "build" / "triton36"
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True)
        if subprocess.run([python, "-c", f"import triton; assert triton.__version__ == '{OLDEST}'"]).returncode:
            command = [python, "-m", "pip", "install", "-q", f"triton=={OLDEST}"]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        detail = getattr(error, "stderr", b"") or b""
        pytest.skip(f"not run: no environment with Triton {OLDEST} ({error}) {detail.decode()[-200:]}")
    return python


TRITONS = {"installed": installed, OLDEST: oldest}


def compile_all(python: Path, capability: int, launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What triton_compile.py reads from the machine code of every launch."""
    done = subprocess.run(
        [python, str(HERE / "triton_compile.py"), str(ROOT / "kernels" / "triton"), str(capability)],
        input=json.dumps(launches), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    assert [r["label"] for r in results] == [launch["label"] for launch in launches]
    return results


def problems(
    result: dict[str, Any], launch: triton_launches.Launch, budget: dict[str, int], capability: int
) -> list[str]:
    """What is wrong with one compiled kernel."""
    if "error" in result:
        return [f"{launch.label}: {result['error']}"]
    count = lambda prefix: sum(n for name, n in result["instructions"].items() if name.startswith(prefix))  # noqa: E731
    wide = f".{launch.vector_bytes * 8}"
    limits = [
        ("bytes of stack", result["stack"], 0),
        ("bytes of local memory", result["local"], 0),
        ("loads and stores of local memory", count("LDL") + count("STL"), 0),
        ("registers", result["registers"], budget["registers"]),
        ("bytes of shared memory", result["shared"] + result["static_shared"], SHARED_BYTES[capability]),
        ("16-bit loads", count("LDG.E.U16"), budget["narrow_loads"]),
    ]
    if launch.kernel == "apply_rope_kernel":  # fused, a product and a sum have other bits
        limits.append(("fused multiply-adds", count("FFMA"), 0))
        limits.append(("layout conversions in loops", result["conversions_in_loops"], 0))
    if launch.kernel == "match_kernel":
        limits.append(("layout conversions in loops", result["conversions_in_loops"], 0))
    found = [f"{launch.label}: {value} {what}, at most {limit}" for what, value, limit in limits if value > limit]
    multiplied = MULTIPLIED.get(launch.kernel)
    if multiplied and launch.signature[multiplied] != "*fp32":
        if not count("HMMA") + count("HGMMA"):
            found.append(f"{launch.label}: no tensor-core instructions")
        if capability == 90 and multiplied == "q_ptr" and not count("HGMMA"):
            found.append(f"{launch.label}: no warp-group instructions")
    if launch.vector_bytes >= 8:
        names = [name for name in result["instructions"] if name.startswith("LDG") and name.endswith(wide)]
        if launch.vector_bytes == 16 and not names:
            found.append(f"{launch.label}: no 128-bit loads")
        elif not names:
            found.append(f"{launch.label}: no {wide} loads")
    return found


def every_launch() -> dict[int, list[triton_launches.Launch]]:
    """What is compiled for each capability: the tiles of attention depend on it."""
    common = triton_launches.launches() + triton_launches_merge.launches()
    return {capability: common + triton_launches_attention.launches(capability) for capability in SHARED_BYTES}


@pytest.fixture(scope="module")
def every() -> dict[int, list[triton_launches.Launch]]:
    return every_launch()


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("version", TRITONS)
def test_resources(version: str, capability: int, every: dict[int, list[triton_launches.Launch]]) -> None:
    budgets, launches = json.loads(BUDGETS.read_text()), every[capability]
    labels = {launch.label for some in every.values() for launch in some}
    assert sorted(budgets) == sorted(labels), "budgets and launches differ"
    assert {launch.kernel for launch in launches} == set(triton_launches.KERNELS), "a kernel is never compiled"
    if not BOTH:
        turn = list(TRITONS).index(version)
        launches = [x for i, x in enumerate(launches) if i % 2 == turn or not x.label.startswith("sm")]
    results = compile_all(TRITONS[version](), capability, [dataclasses.asdict(launch) for launch in launches])
    wrong = [
        problem
        for result, launch in zip(results, launches, strict=True)
        for problem in problems(result, launch, budgets[launch.label], capability)
    ]
    assert not wrong, "\n".join(wrong)
    by_label = {result["label"]: result for result in results}
    for kernel in (
        "qk_norm_rope_head",
        "qk_norm_rope_head_bwd",
    ):  # one order of summation, so the same bits, for any number of tokens
        few, many = (by_label[f"{label}/{kernel}"]["row_sums"] for label in ("d128-few", "d128"))
        assert few == many and len(many) == 1


def test_gate_fails(every: dict[int, list[triton_launches.Launch]]) -> None:
    """Too few registers, so spills; fused multiply-adds; pointers and strides of which nothing is known."""
    by_label = {launch.label: launch for launch in every[90]}
    row, rope = by_label["d128-inter/qk_norm_rope_row"], by_label["d128/apply_rope"]
    blind = dataclasses.replace(rope, aligned=[], constants=rope.constants | {"ALIGN": 1})
    cases = [
        (row, {"options": row.options | {"maxnreg": 64}}, "bytes of stack"),
        (rope, {"options": rope.options | {"enable_fp_fusion": True}}, "fused multiply-adds"),
        (blind, {}, "no 128-bit loads"),
        (dataclasses.replace(rope, constants=rope.constants | {"BLOCK_S": 15}), {}, "CompilationError"),
    ]
    results = compile_all(installed(), 90, [dataclasses.asdict(launch) | extra for launch, extra, _ in cases])
    budgets = json.loads(BUDGETS.read_text())
    for result, (launch, _, expected) in zip(results, cases, strict=True):
        found = problems(result, launch, budgets[launch.label], 90)
        assert any(expected in problem for problem in found), (expected, found)
    assert any("registers" in p for p in problems(results[1], rope, {"registers": 16, "narrow_loads": 0}, 90))


def write_budgets() -> None:
    """Registers, rounded up to the next multiple of 8, and 16-bit loads: the most of any Triton and capability."""
    budgets: dict[str, dict[str, int]] = {}
    for version in TRITONS.values():
        for capability, launches in every_launch().items():
            for result in compile_all(version(), capability, [dataclasses.asdict(launch) for launch in launches]):
                registers = -(-result["registers"] // 8) * 8
                narrow = result["instructions"].get("LDG.E.U16", 0)
                old = budgets.setdefault(result["label"], {"registers": 0, "narrow_loads": 0})
                old["registers"] = min(255, max(old["registers"], registers))
                old["narrow_loads"] = max(old["narrow_loads"], narrow)
    lines = (f"  {json.dumps(label)}: {json.dumps(budget)}" for label, budget in sorted(budgets.items()))
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_budgets()
