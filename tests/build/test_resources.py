"""Every CUDA kernel, for every architecture, stays inside its committed budget, and its machine code is what was meant.

The kernels are compiled here; with SACCADE_BINARY=path/to/_C.so the built extension is read instead of compiling for the budgets.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from build.resources import (
    ARCHS,
    BUDGETS,
    SYSTEM_SHARED,
    MissingTool,
    Usage,
    compile_kernels,
    measure,
    parse_usage,
    read_usage,
    readable,
    run,
    tool,
    violations,
)

TABLE = json.loads(BUDGETS.read_text())
KERNELS = [(source, kernel) for source, entry in TABLE.items() for kernel in entry["kernels"]]


def need(*tools: str) -> None:
    """Skip where a tool is missing, unless the build demands CUDA: then that is a failure."""
    try:
        for name in tools:
            tool(name)
    except MissingTool as missing:
        if os.environ.get("SACCADE_CUDA") == "ON":
            pytest.fail(f"SACCADE_CUDA=ON, but {missing}")
        pytest.skip(f"not run: {missing}")


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, Usage]]]:
    need("nvcc", "cuobjdump", "nvdisasm")
    return measure()


def test_the_budgets_name_every_kernel_and_no_other(measured: dict[str, dict[str, dict[str, Usage]]]) -> None:
    compiled = {(source, kernel) for source, kernels in measured.items() for kernel in kernels}
    assert compiled == set(KERNELS)


@pytest.mark.parametrize(("source", "kernel"), KERNELS)
def test_inside_the_budget(source: str, kernel: str, measured: dict[str, dict[str, dict[str, Usage]]]) -> None:
    budget, wrong = TABLE[source]["kernels"][kernel], []
    for arch in ARCHS:
        usage = measured[source][kernel][arch]
        wrong += violations(
            kernel, arch, usage, budget["registers"][arch], budget["shared"], TABLE[source]["dynamic_shared"]
        )
    assert not wrong, "\n".join(wrong)


SUMS = ("rope_freq_grad_kernel", "row_similarity_kernel", "prompt_pool3d_bwd_window_kernel")  # results of one number


def is_vectorised(kernel: str) -> bool:
    """16-byte accesses: access width 4 of float32 or 8 of the 16-bit types, and the row kernels."""
    return bool(re.search(r"<(Float32, 4|B?Float16, 8)\b", kernel)) or "_row_kernel" in kernel


@pytest.mark.parametrize(("source", "kernel"), [k for k in KERNELS if is_vectorised(k[1])])
def test_vectorised_kernels_move_16_bytes_at_a_time(
    source: str, kernel: str, measured: dict[str, dict[str, dict[str, Usage]]]
) -> None:
    for arch, usage in measured[source][kernel].items():
        loads = [name for name in usage.sass if name.startswith("LDG") and "128" in name.split(".")]
        stores = [name for name in usage.sass if name.startswith("STG") and "128" in name.split(".")]
        assert loads, f"{kernel} on sm_{arch} has no LDG.E.128"
        assert stores or kernel.split("<")[0] in SUMS, f"{kernel} on sm_{arch} has no STG.E.128"


@pytest.mark.parametrize(("source", "kernel"), [k for k in KERNELS if k[0] == "apply_rope"])
def test_nothing_is_contracted(source: str, kernel: str, measured: dict[str, dict[str, dict[str, Usage]]]) -> None:
    """The same bits as on the CPU need separate multiplications and additions."""
    for arch, usage in measured[source][kernel].items():
        assert any(name.startswith("FMUL") for name in usage.sass)
        fused = [name for name in usage.sass if name.startswith(("FFMA", "HFMA2.BF16", "DFMA"))]
        assert not fused, f"{kernel} on sm_{arch}: {fused}"


def test_shared_memory_is_read_16_bytes_at_a_time(measured: dict[str, dict[str, dict[str, Usage]]]) -> None:
    """Angles come from the table two pairs at a time."""
    for kernel, usages in measured["apply_rope"].items():
        for arch, usage in usages.items():
            assert "LDS.128" in usage.sass, f"{kernel} on sm_{arch}"


ON_TENSOR_CORES = "match|knn_density|sparse_attention|sparse_attention_bwd|attention_bias_grad"
TENSOR_CORES = [k for k in KERNELS if re.match(rf"({ON_TENSOR_CORES})_kernel<B?Float16", k[1])]


@pytest.mark.parametrize(("source", "kernel"), TENSOR_CORES)
def test_products_of_16_bit_rows_use_tensor_cores(
    source: str, kernel: str, measured: dict[str, dict[str, dict[str, Usage]]]
) -> None:
    """fp32 sums, matrices read by LDSM, rows brought in by LDGSTS."""
    for arch, usage in measured[source][kernel].items():
        for name in ("HMMA.16816.F32", "LDSM.16", "LDGSTS.E"):
            assert any(found.startswith(name) for found in usage.sass), f"{kernel} on sm_{arch} has no {name}"


def test_the_built_extension() -> None:
    """The binary holds every architecture and every kernel, inside the same budgets."""
    binary = os.environ.get("SACCADE_BINARY")
    if not binary:
        pytest.skip("not run: SACCADE_BINARY names no built extension")
    need("cuobjdump")
    text = run(tool("cuobjdump"), "--dump-resource-usage", binary)
    seen: dict[str, set[str]] = {}
    wrong = []
    for arch, part in re.findall(r"arch = sm_(\w+)(.*?)(?=\narch = |\Z)", text, re.S):
        for name, (registers, stack, local, shared) in parse_usage(part).items():
            kernel = readable(name)
            seen.setdefault(arch, set()).add(kernel)
            usage = Usage(registers, stack, local, shared - SYSTEM_SHARED[arch], frozenset())
            budget = max(e["kernels"][kernel]["registers"][arch] for e in TABLE.values() if kernel in e["kernels"])
            static = max(e["kernels"][kernel]["shared"] for e in TABLE.values() if kernel in e["kernels"])
            wrong += violations(kernel, arch, usage, budget, static, 0)
    assert set(seen) == set(ARCHS)
    assert all(kernels == {kernel for _, kernel in KERNELS} for kernels in seen.values())
    assert not wrong, "\n".join(wrong)


# ---- the gate itself -------------------------------------------------------------------------------------------------

GREEDY = """
namespace saccade {
__global__ void greedy_kernel(const int* where, float* out) {
  float array[64] = {};
  for (int i = 0; i < 1024; ++i) array[where[i]] += out[i];
  out[threadIdx.x] = array[where[threadIdx.x]];
}
}  // namespace saccade
"""


def test_a_kernel_with_a_local_array_is_rejected(tmp_path: Path) -> None:
    need("nvcc", "cuobjdump", "nvdisasm")
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    for arch in ARCHS:
        (usage,) = read_usage(compile_kernels(source, arch), arch).values()
        wrong = "\n".join(violations("greedy_kernel", arch, usage, 255, 0, 0))
        assert "bytes of stack" in wrong and "local memory instructions" in wrong


def test_every_excess_is_named() -> None:
    modest = Usage(64, 0, 0, 128, frozenset({"LDG.E.128"}))
    assert violations("k", "80", modest, 64, 128, 1024) == []
    assert "65 registers, budget 64" in violations("k", "80", Usage(65, 0, 0, 0, frozenset()), 64, 0, 0)[0]
    assert "static shared memory" in violations("k", "80", modest, 64, 64, 0)[0]
    assert "the block has" in violations("k", "89", modest, 64, 128, 99 * 1024)[0]
    assert "STL.64" in violations("k", "80", Usage(1, 0, 0, 0, frozenset({"STL.64"})), 64, 0, 0)[0]


def test_names_are_read_out_of_mangled_ones() -> None:
    name = "_ZN7saccade17apply_rope_kernelINS_8BFloat16ELi8ELb1EEEvNS_8RopeArgsENS_8RopePlanE"
    assert readable(name) == "apply_rope_kernel<BFloat16, 8, true>"
    assert readable("_ZN7saccadeL19add_partials_kernelEPKfllPf") == "add_partials_kernel"


@pytest.mark.parametrize(("demanded", "outcome"), [("ON", pytest.fail.Exception), ("AUTO", pytest.skip.Exception)])
def test_a_missing_compiler_fails_only_where_cuda_is_demanded(
    demanded: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACCADE_CUDA", demanded)
    with pytest.raises(outcome, match="no-such-compiler is neither on PATH"):
        need("no-such-compiler")
