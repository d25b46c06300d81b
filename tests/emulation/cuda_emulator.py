"""Builds the emulated CUDA kernels with g++ and calls them on CPU tensors through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
FLAGS = ["-std=c++20", "-O0", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread", "-Wall", "-Wextra"]
# A misaligned access, which a GPU refuses and this processor does not, stops the program.
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
FLAGS += ["-Wno-unknown-pragmas", "-DSACCADE_ENOUGH_BLOCKS=4", f"-I{HERE}"]

LIBRARY = ["-shared", "-fPIC", "-DSACCADE_EMULATION_FIBERS"]  # the sanitizers watch real threads

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
POSITION_DTYPES = {torch.int32: 0, torch.int64: 1, torch.float32: 2, torch.float64: 3}


class Heads(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("y", c_void_p),
        ("heads", c_int64),
        ("x_stride", c_int64 * 3),
        ("y_stride", c_int64 * 3),
    ]


class Angles(Structure):
    _fields_ = [
        ("positions", c_void_p),
        ("position_dtype", c_int32),
        ("position_stride", c_int64 * 3),
        ("steps", c_void_p),
        *((name, c_int32) for name in ("axes", "groups", "pairs", "shift", "begin", "end")),
        ("interleaved", c_bool),
        ("inverse", c_bool),
        ("scale", c_float),
    ]


class RopeArgs(Structure):
    _fields_ = [
        ("q", Heads),
        ("k", Heads),
        ("angles", Angles),
        ("batch", c_int64),
        ("tokens", c_int64),
        ("head_dim", c_int32),
        ("dtype", c_int32),
    ]


class NormArgs(Structure):
    _fields_ = [
        ("rope", RopeArgs),
        ("q_weight", c_void_p),
        ("k_weight", c_void_p),
        ("weight_dtype", c_int32),
        ("eps", c_double),
        ("row", c_bool),
    ]


class NormGradArgs(Structure):
    _fields_ = [
        ("norm", NormArgs),
        ("q_dy", c_void_p),
        ("k_dy", c_void_p),
        ("q_dy_stride", c_int64 * 3),
        ("k_dy_stride", c_int64 * 3),
        ("q_dweight", c_void_p),
        ("k_dweight", c_void_p),
        ("workspace", c_void_p),
    ]


class FreqGradArgs(Structure):
    _fields_ = [
        ("rope", RopeArgs),
        ("q_dx", c_void_p),
        ("k_dx", c_void_p),
        ("q_dx_stride", c_int64 * 3),
        ("k_dx_stride", c_int64 * 3),
        ("out", c_void_p),
        ("workspace", c_void_p),
    ]


def compile_op(op: str, *flags: str, shared: bool = True) -> Path:
    """Compile <op>.cpp; the result is kept, under a name that depends on all sources and flags."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"the emulation needs a C++20 compiler, {compiler} is not there")
    command = [compiler, *FLAGS, *(LIBRARY if shared else ["-g"]), *flags, str(HERE / f"{op}.cpp")]
    sources = sorted(p for p in (*KERNELS.rglob("*"), *HERE.glob("*")) if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"saccade-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{op}-{digest.hexdigest()[:24]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "built"
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(target)
    return target


@functools.cache
def library(op: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_op(op)))


def strides(x: torch.Tensor) -> ctypes.Array[c_int64]:
    return (c_int64 * 3)(*x.stride()[:3])


def heads(x: torch.Tensor | None, y: torch.Tensor | None) -> Heads:
    if x is None or y is None:
        return Heads()
    assert x.stride(3) == 1 == y.stride(3)
    return Heads(x.data_ptr(), y.data_ptr(), x.shape[1], strides(x), strides(y))


def rope_args(
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor | None,
    k_out: torch.Tensor | None,
    positions: torch.Tensor,
    steps: torch.Tensor | None,
    *,
    groups: int | None = None,
    pairs: int | None = None,
    shift: int = 0,
    begin: int = 0,
    end: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    scale: float = 1.0,
) -> RopeArgs:
    """As the raw ops take them: q [B, Hq, S, D], positions [A, B|1, S], steps [A, G, R]."""
    if steps is not None:
        assert steps.is_contiguous() and steps.dtype == torch.int64
        groups, pairs = steps.shape[1:]
    assert groups is not None and pairs is not None
    step = list(positions.stride())
    if positions.shape[1] == 1:
        step[1] = 0
    angles = Angles(
        positions.data_ptr(),
        POSITION_DTYPES[positions.dtype],
        (c_int64 * 3)(*step),
        None if steps is None else steps.data_ptr(),
        positions.shape[0],
        groups,
        pairs,
        shift,
        begin,
        pairs if end is None else end,
        interleaved,
        inverse,
        scale,
    )
    batch, _, tokens, head_dim = q.shape
    return RopeArgs(heads(q, q_out), heads(k, k_out), angles, batch, tokens, head_dim, DTYPES[q.dtype])


def call(op: str, name: str, args: Structure) -> None:
    """Run a launcher; raises with its error text."""
    function = getattr(library(op), f"emulated_{name}")
    function.restype, function.argtypes = c_char_p, [POINTER(type(args))]
    if (error := function(byref(args))) is not None:
        raise RuntimeError(error.decode())


def workspace(op: str, name: str, args: Structure) -> torch.Tensor:
    """A poisoned workspace of the size the launcher asks for."""
    function = getattr(library(op), f"emulated_{name}_workspace")
    function.restype, function.argtypes = c_int64, [POINTER(type(args))]
    size = function(byref(args))
    assert size >= 0 and size % 4 == 0
    return torch.full((size // 4 + 4,), float("nan"))[: size // 4]
