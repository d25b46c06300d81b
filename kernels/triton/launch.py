"""How the kernels are launched: block sizes, strides, the number of programs. Plain integers, no tensor is read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Arguments that change from call to call: a kernel must not be compiled anew for their values.
SIZES = (
    "tokens tiles groups chunks q_per_group k_per_group rows columns partial_rows tiles_per_program "
    + " ".join(
        f"{x}_stride_{d}"
        for x in ("q", "k", "q_out", "k_out", "q_dy", "k_dy", "q_dx", "k_dx", "x", "dy", "dx", "position")
        for d in "abhs"
    )
).split()

# Small arguments whose alignment is not worth a kernel of its own.
TABLES = ["position_ptr", "step_ptr"]

# Without it a * b + c becomes one operation with other bits than the CPU and CUDA implementations.
OPTIONS = {"enable_fp_fusion": False}

PROGRAMS = 528  # enough to fill the largest GPU in use (132 multiprocessors) with four programs each
FEW_TOKENS = 4  # up to here a tile holds many heads of one token instead of many tokens of one head


class Config(NamedTuple):
    """Rows of a tile, warps of a program, and registers a thread may have where the assembler's own choice spills."""

    rows: int
    warps: int
    registers: int | None = None


# {kind: {width: Config}}, width = columns of the widest tile, so pairs of a head or what lies beyond them, rounded up to a power of
# two. With 16-bit elements every thread then holds one 16-byte vector of each half of a head, and 8 pairs of cosines and sines.
_TILES = {1: 128, 2: 128, 4: 128, 8: 128, 16: 64, 32: 32, 64: 16, 128: 8, 256: 4, 512: 2}
CONFIGS: dict[str, dict[int, Config]] = {
    "apply_rope": {r: Config(rows, 4) for r, rows in _TILES.items()},
    "rope_freq_grad": {r: Config(rows, 4) for r, rows in _TILES.items()},
    "norm_head": {r: Config(rows, 4) for r, rows in _TILES.items()},
    "norm_head_bwd": {r: Config(rows, 4, 224) for r, rows in _TILES.items()},
    "norm_row": {r: Config(rows, 4) for r, rows in _TILES.items()},
    "norm_row_bwd": {r: Config(rows, 4) for r, rows in _TILES.items()},
}

HELD_TILES = 8  # of a row, or of both rows where q and k go together; more are read a second time


def power_of_two(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def widths(head_dim: int, pairs: int, interleaved: bool) -> dict[str, int]:
    """BLOCK_R and BLOCK_REST: interleaved tiles hold whole heads, half tiles the pairs, and the other columns apart."""
    if interleaved:
        return {"BLOCK_R": power_of_two((head_dim + 1) // 2), "BLOCK_REST": 1}
    return {"BLOCK_R": power_of_two(pairs), "BLOCK_REST": power_of_two(head_dim - 2 * pairs)}


def config(kind: str, width: dict[str, int]) -> Config:
    """Launch configuration for the result of `widths`."""
    return CONFIGS[kind][max(width["BLOCK_R"], width["BLOCK_REST"])]


def options(config: Config) -> dict[str, Any]:
    """Options of Triton's compiler."""
    limit = {} if config.registers is None else {"maxnreg": config.registers}
    return {"num_warps": config.warps, **limit, **OPTIONS}


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Batch, head and token stride in elements; 0 where the axis has one entry."""
    b, h, s = (0 if n == 1 else st for n, st in zip(x.shape[:3], x.stride()[:3], strict=True))
    return b, h, s


def alignment(tensors: Iterable[torch.Tensor], pairs: int) -> int:
    """Largest power of two, at most 16 bytes, that divides every stride (and `pairs`, for half pairing), in elements.

    Were the first half of a head aligned better than the second, both would be moved through shared memory to agree.
    """
    align = pairs
    for x in tensors:
        align = math.gcd(align, 16 // x.element_size(), *strides(x))
    return align


def vector(x: torch.Tensor, pairs: int, interleaved: bool) -> int:
    """Elements per vector that the normalising kernels insist on, so that a row is summed in one order wherever it lies."""
    return math.gcd(16 // x.element_size(), x.shape[-1], 0 if interleaved else pairs)


def regular(tensors: Iterable[torch.Tensor], align: int) -> bool:
    """Whether strides are multiples of `align` elements and every tensor begins at a multiple of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and all(st % align == 0 for st in strides(x)) for x in tensors)


def stride_args(align: int, **tensors: torch.Tensor) -> dict[str, int]:
    """`<name>_stride_{b,h,s}` of every tensor, in units of `align` elements."""
    return {
        f"{name}_stride_{d}": st // align
        for name, x in tensors.items()
        for d, st in zip("bhs", strides(x), strict=True)
    }


def position_args(positions: torch.Tensor) -> dict[str, Any]:
    """Arguments for positions [A, B|1, S]."""
    a, b, s = positions.stride()
    return {
        "position_ptr": positions,
        "position_stride_a": a,
        "position_stride_b": 0 if positions.shape[1] == 1 else b,
        "position_stride_s": s,
    }


def token_blocks(rows: int, tokens: int) -> dict[str, int]:
    """BLOCK_S and BLOCK_H: one of two shapes, so that the length of a sequence compiles nothing anew."""
    few = tokens <= min(FEW_TOKENS, rows)
    return {"BLOCK_S": 1, "BLOCK_H": rows} if few else {"BLOCK_S": rows, "BLOCK_H": 1}


def row_blocks(rows: int, q_heads: int, k_heads: int, grouped: bool) -> dict[str, Any]:
    """Blocks of the kernels that take all heads of a token, and whether they hold q and k in registers."""
    # Angles are computed once for BLOCK_S tokens by every warp; with one group, few heads a tile share that work best.
    fits_four = max(q_heads, k_heads) <= 4 or (q_heads % 8 and q_heads % 4 == 0 and q_heads < 32)
    block_h = min(rows, 16 if grouped else 4 if fits_four else 8)
    q_tiles, k_tiles = -(-q_heads // block_h), -(-k_heads // block_h)
    return {
        "BLOCK_H": block_h,
        "BLOCK_S": rows // block_h,
        "HOLD_Q": q_tiles <= HELD_TILES,
        "HOLD_K": k_tiles <= HELD_TILES,
        "JOINT": grouped and q_heads == k_heads and q_tiles + k_tiles <= HELD_TILES,
    }


def head_chunks(programs: int, heads: int, block_h: int) -> int:
    """Number of programs that share the heads of a group, where there are too few programs otherwise."""
    return max(1, min(-(-heads // block_h), PROGRAMS // max(1, programs)))


def float32() -> torch.dtype:
    """torch.float32; torch is not imported where kernels are only compiled."""
    import torch

    return torch.float32


def on_device(x: torch.Tensor) -> Any:
    """Triton launches on the current device; make it that of `x`."""
    import torch

    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def weight(x: torch.Tensor | None) -> torch.Tensor | None:
    """A weight that starts at a multiple of 16 bytes; one that does not would be read, and so its rows summed, otherwise."""
    return x if x is None or x.data_ptr() % 16 == 0 else aligned(x)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, which starts at a multiple of 16 bytes."""
    import torch

    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`torch.empty_like` with last stride 1."""
    import torch

    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 or y.shape[-1] == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
