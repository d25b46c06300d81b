"""Tiles of the attention kernels, by architecture, columns of a head and element type; never by the length of a sequence.

Start values are those of FlashAttention 3 and 4 for these GPUs, cut down until no kernel spills (tests/build/test_triton_compile.py).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

ASSUMED = 90  # where kernels are interpreted or only recorded


class Tile(NamedTuple):
    """Rows and columns of a tile of scores, warps, stages of the pipeline, registers of a thread where the assembler's choice spills."""

    rows: int
    columns: int
    warps: int
    stages: int
    masked: int | None = None  # columns where there is a mask to compute
    registers: int | None = None

    @property
    def masked_columns(self) -> int:
        return self.masked or self.columns

    @property
    def masked_rows(self) -> int:
        return self.masked or self.rows

    def options(self) -> dict[str, Any]:
        """Options of Triton's compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@functools.cache
def _architecture(index: int) -> int:
    """80, 89 or 90: the one with as much shared memory a block, the smallest where unknown."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None:
        return 89
    return 80 if capability in ((8, 0), (8, 7)) else 90 if capability[0] in (9, 10) else 89


def architecture(x: torch.Tensor) -> int:
    """Key of the tables for the device of x."""
    return _architecture(x.device.index) if x.is_cuda else ASSUMED


# {architecture: {columns of a head: Tile}}; blocks of 64 queries have the first 64 rows of a tile and half its warps.
FORWARD: dict[int, dict[int, Tile]] = {
    80: {
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 64, 8, 3, 32),
        128: Tile(128, 64, 8, 2, 32),
        256: Tile(64, 16, 4, 2),
    },
    89: {
        32: Tile(128, 64, 8, 2),
        64: Tile(128, 64, 8, 2, 32),
        128: Tile(128, 64, 8, 2, 16),
        256: Tile(64, 16, 4, 2),
    },
    90: {32: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2, 32), 256: Tile(64, 32, 4, 2, 16)},
}
FORWARD_FP32: dict[int, Tile] = {
    32: Tile(32, 32, 4, 2, registers=255), 64: Tile(32, 32, 4, 2, registers=255), 128: Tile(32, 16, 4, 2, registers=255),
    256: Tile(32, 16, 4, 2, registers=255),
}  # fmt: skip


def width(x: torch.Tensor) -> int:
    """Columns of a head as the tables have them."""
    return max(32, 1 << (x.shape[3] - 1).bit_length())


def chunk(x: torch.Tensor, backward: bool) -> int:
    """Columns multiplied at once where a program does not hold its rows, else 0: fp32, and 256 columns but for the forward of sm_90."""
    if x.element_size() == 4:
        return 32
    return 64 if width(x) == 256 and (backward or architecture(x) < 90) else 0


def forward_tile(q: torch.Tensor, q_block: int, bias: bool, order: bool) -> Tile:
    """Of the forward kernel."""
    if q.element_size() == 4:
        return FP32["forward"][width(q)]
    tile = FORWARD[architecture(q)][width(q)]
    if bias or (order and architecture(q) < 90):  # more addresses in registers
        masked = 16 if order and width(q) > 64 else 32
        tile = tile._replace(columns=min(tile.columns, 32), masked=min(tile.masked_columns, masked))
        if width(q) == 256:
            tile = (
                tile._replace(columns=32, masked=16, warps=8)
                if architecture(q) == 90
                else tile._replace(stages=1)
                if architecture(q) == 80
                else tile
            )
    return tile if tile.rows <= q_block else tile._replace(rows=q_block, warps=tile.warps * q_block // tile.rows)


# The same; `columns` are the keys that a program of dk and dv holds, `rows` the queries that it takes at once, `masked` of them where
# there is a mask.
DK_DV: dict[int, dict[int, Tile]] = {
    80: {32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 1)},
    89: {32: Tile(64, 64, 4, 2), 64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 1)},
    90: {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2, 16), 256: Tile(16, 64, 8, 1)},
}
DQ: dict[int, dict[int, Tile]] = {
    80: {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2, 32), 128: Tile(64, 32, 4, 2, 16), 256: Tile(64, 16, 8, 1)},
    89: {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2, 32), 128: Tile(64, 32, 4, 2, 16), 256: Tile(64, 16, 8, 1)},
    90: {32: Tile(64, 64, 4, 2), 64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2, 32), 256: Tile(64, 32, 8, 1, 16)},
}
BIAS_GRAD: dict[int, Tile] = {
    32: Tile(64, 64, 4, 2), 64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(64, 16, 4, 1),
}  # fmt: skip
FP32: dict[str, dict[int, Tile]] = {
    "forward": FORWARD_FP32,
    "dk_dv": {32: Tile(16, 32, 4, 2), 64: Tile(16, 32, 8, 2), 128: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dq": {n: Tile(32, 16, 4, 2, registers=255) for n in (32, 64, 128, 256)},
    "bias_grad": {n: Tile(32, 32, 8, 2, registers=255) for n in (32, 64, 128, 256)},
}


def dk_dv_tile(q: torch.Tensor, bias: bool) -> Tile:
    """Of the kernel of the gradients of keys and values."""
    if q.element_size() == 4:
        return FP32["dk_dv"][width(q)]
    tile = DK_DV[architecture(q)][width(q)]
    if architecture(q) < 90:  # two parts of a head, or a bias, are more than the registers hold
        rows = 16 if (bias and width(q) > 32) or q.shape[3] != width(q) else tile.rows
        keys = 32 if bias and width(q) >= 128 else tile.columns
        return tile._replace(rows=rows, masked=min(rows, tile.masked_rows), columns=keys)
    if not bias:
        return tile
    rows = 16 if width(q) == 128 else 32
    return tile._replace(rows=min(tile.rows, rows), masked=min(tile.masked_rows, rows))


def dq_tile(q: torch.Tensor, bias: bool) -> Tile:
    """Of the kernel of the gradient of the queries."""
    if q.element_size() == 4:
        return FP32["dq"][width(q)]
    tile = DQ[architecture(q)][width(q)]
    if not bias:
        return tile
    columns = 16 if width(q) == 256 else 32
    return tile._replace(columns=min(tile.columns, columns), masked=min(tile.masked_columns, columns))


def bias_grad_tile(q: torch.Tensor) -> Tile:
    """Of the kernel of the gradient of the bias."""
    return (FP32["bias_grad"] if q.element_size() == 4 else BIAS_GRAD)[width(q)]
