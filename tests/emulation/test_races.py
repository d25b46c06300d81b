"""The emulated kernels under ThreadSanitizer and AddressSanitizer: clean as they are; a missing barrier is a data race."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest
from emulation.cuda_emulator import compile_op

OPS = ["apply_rope", "qk_norm_rope", "qk_norm_rope_bwd", "rope_freq_grad"]
OPS += ["match", "merge_plan", "keep_top", "knn_density"]
OPS += ["merge", "merge_bwd", "unmerge", "prompt_pool3d", "prompt_pool3d_bwd", "row_similarity"]
OPS += ["block_pool", "block_select", "block_transpose"]
OPS += ["attention_rows", "attention_columns", "axial_attention", "axial_attention_bwd"]
OPS += ["sparse_attention", "sparse_attention_bwd", "attention_bias_grad"]


def watch(op: str, *flags: str, sanitizer: str = "thread") -> subprocess.CompletedProcess[str]:
    """Build <op>.cpp with a sanitizer and run it."""
    program = compile_op(op, f"-fsanitize={sanitizer}", *flags, shared=False)
    command = [str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # Kernels with 32 bits of address randomisation are too much for the sanitizer of older compilers.
        command = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done


@pytest.mark.parametrize("op", OPS)
def test_no_data_race(op: str) -> None:
    done = watch(op)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout[-500:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("op", "barrier"),
    [
        ("apply_rope", "TABLE"),
        ("qk_norm_rope", "TABLE"),
        ("qk_norm_rope", "SUM"),
        ("qk_norm_rope_bwd", "SUM"),
        ("rope_freq_grad", "SUM"),
        ("match", "TILE"),
        ("merge_plan", "COUNT"),
        ("merge_plan", "PLAN"),
        ("keep_top", "COUNT"),
        ("knn_density", "KNN"),
        ("merge", "CHUNK"),
        ("prompt_pool3d", "STAGE"),
        ("prompt_pool3d", "POOL"),
        ("prompt_pool3d_bwd", "DOT"),
        ("sparse_attention", "KEY"),
        ("sparse_attention", "VALUE"),
        ("sparse_attention_bwd", "TILE"),
        ("sparse_attention_bwd", "COLUMN"),
        ("attention_bias_grad", "TILE"),
        ("attention_bias_grad", "PAIR"),
        ("block_pool", "BLOCK_POOL"),
        ("block_select", "CHOOSE"),
        ("block_transpose", "TRANSPOSE"),
        ("attention_rows", "PAIR"),
        ("attention_columns", "PAIR"),
        ("axial_attention", "AXIAL"),
        ("axial_attention", "JOIN"),
        ("axial_attention_bwd", "TILE"),
        ("axial_attention_bwd", "COLUMN"),
    ],
)
def test_a_missing_barrier_is_a_data_race(op: str, barrier: str) -> None:
    done = watch(op, f"-DSACCADE_MUTANT_NO_{barrier}_BARRIER")
    assert done.returncode != 0, "the kernels ran without a barrier, and nobody noticed"
    assert "data race" in done.stderr


@pytest.mark.parametrize("op", OPS)
def test_no_stray_access(op: str) -> None:
    """Nothing outside q, k, outputs, workspace and shared memory is read or written."""
    done = watch(op, sanitizer="address")
    assert done.returncode == 0, done.stderr[-3000:]
