"""What the axial attention kernels share: the tokens of a box, and where the rows of a prefix go.

Rows of a box are counted from the first of the prefix: x < prefix is a prefix token, x - prefix a place in the box, in t-major order.
Strides arrive divided by ALIGN elements, as in tile.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from saccade._triton import attention_launch, attention_tile, launch

if TYPE_CHECKING:
    import torch

# Arguments that change from call to call: a kernel must not be compiled anew for their values.
SIZES = attention_tile.SIZES + [
    "tokens",
    "prefix",
    "size_t",
    "size_h",
    "size_w",
    "box_t",
    "box_h",
    "box_w",
    "groups",
    "slots",
    "per_tile",
    "chunk",
    "chunks",
    "parts",
    "share",
    "rows",
]
CHUNK_KEYS = 1024  # keys of a program of prefix queries that see all tokens


class Shape(NamedTuple):
    """The numbers of the schema."""

    prefix: int
    grid: tuple[int, int, int]
    box: tuple[int, int, int]
    rows: int  # of a tile that holds several boxes, each with the prefix

    @property
    def groups(self) -> int:
        t, h, w = (-(-n // b) for n, b in zip(self.grid, self.box, strict=True))
        return t * h * w

    @property
    def slots(self) -> int:
        """Rows of a box with the prefix before it."""
        t, h, w = (min(b, n) for n, b in zip(self.grid, self.box, strict=True))
        return self.prefix + t * h * w

    @property
    def packed(self) -> bool:
        """Whether a tile holds whole boxes."""
        return self.groups > 0 and self.slots <= self.rows

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        names = ("size_t", "size_h", "size_w"), ("box_t", "box_h", "box_w")
        box = (max(1, min(b, n)) for n, b in zip(self.grid, self.box, strict=True))
        return {
            "prefix": self.prefix,
            **dict(zip(names[0], self.grid, strict=True)),
            **dict(zip(names[1], box, strict=True)),
        }

    @property
    def tiles(self) -> dict[str, int]:
        """Arguments of a kernel that packs boxes into tiles."""
        per_tile = self.rows // self.slots
        return {
            "groups": self.groups,
            "slots": self.slots,
            "per_tile": per_tile,
            "tiles": -(-self.groups // per_tile),
            "ROWS": self.rows,
        }


class Block(NamedTuple):
    """Queries and keys of a tile where a box needs several, and warps."""

    queries: int
    keys: int
    warps: int
    stages: int = 2
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        """Options of Triton's compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def shape_of(x: torch.Tensor, prefix: int, grid: tuple[int, int, int], box: tuple[int, int, int]) -> Shape:
    """The numbers of the schema for tokens x; fp32 is multiplied without tensor cores, in smaller tiles."""
    return Shape(prefix, grid, box, 32 if x.element_size() == 4 else 64)


def packed_columns(x: torch.Tensor, most: int = 256) -> int:
    """Columns that a packed kernel multiplies at once: few registers whatever the head."""
    return 64 if x.element_size() == 2 and x.shape[3] % 64 == 0 and x.shape[3] <= most else 32


def parts(x: torch.Tensor, most: int = 256) -> dict[str, int]:
    """What the kernels of tiles need to know of a head; of one wider than `most` a program does not hold the rows that it multiplies."""
    found = attention_launch.multiplied_parts(x)
    return found | {"CHUNK": 64} if found["CHUNK"] == 0 and x.shape[3] > most else found


def row_count(shape: Shape, first: int, rows: int) -> int:
    """Tiles of a box."""
    return -(-(shape.slots - first) // rows)


def empty_parts(x: torch.Tensor, count: int, prefix: int) -> torch.Tensor:
    """Terms [B, H, count, P, D] fp32 of sums over boxes or chunks."""
    return x.new_empty((*x.shape[:2], count, prefix, x.shape[3]), dtype=launch.float32())


@triton.jit
def box_at(i_g, size_t, size_h, size_w, box_t, box_h, box_w):
    """Origin and size of box i_g, one of [rows] or a scalar."""
    boxes_h = tl.maximum((size_h + box_h - 1) // box_h, 1)
    boxes_w = tl.maximum((size_w + box_w - 1) // box_w, 1)
    t, y, x = i_g // (boxes_h * boxes_w) * box_t, i_g // boxes_w % boxes_h * box_h, i_g % boxes_w * box_w
    return t, y, x, tl.minimum(box_t, size_t - t), tl.minimum(box_h, size_h - y), tl.minimum(box_w, size_w - x)


@triton.jit
def place_at(i, prefix, t, y, x, box_h, box_w):
    """Where in the grid rows i of a box at (t, y, x) are, whose places are counted in rows of box_w and planes of box_h."""
    place = i - prefix
    return t + place // (box_h * box_w), y + place // box_w % box_h, x + place % box_w


@triton.jit
def token_of(i, prefix, at_t, at_y, at_x, size_h, size_w):
    """Token [rows] int64 of rows i of a box."""
    return tl.where(i < prefix, i.to(tl.int64), prefix + (at_t.to(tl.int64) * size_h + at_y) * size_w + at_x)


@triton.jit
def token_at(i, prefix, t, y, x, box_h, box_w, size_h, size_w):
    """Both at once."""
    at_t, at_y, at_x = place_at(i, prefix, t, y, x, box_h, box_w)
    return token_of(i, prefix, at_t, at_y, at_x, size_h, size_w)


@triton.jit
def packed_rows(
    i_tile, prefix, size_t, size_h, size_w, box_t, box_h, box_w, groups, slots, per_tile, ROWS: tl.constexpr
):
    """For every row of a tile of boxes: its token, whether there is one, its row in the box, its box, its box within the tile."""
    row = tl.arange(0, ROWS)
    own, slot = row // slots, row % slots
    i_g = i_tile * per_tile + own
    t, y, x, _, _, _ = box_at(i_g, size_t, size_h, size_w, box_t, box_h, box_w)
    at_t, at_y, at_x = place_at(slot, prefix, t, y, x, box_h, box_w)
    token = token_of(slot, prefix, at_t, at_y, at_x, size_h, size_w)
    inside = (slot < prefix) | ((at_t < size_t) & (at_y < size_h) & (at_x < size_w))
    return token, inside & (own < per_tile) & (i_g < groups), slot, i_g, own


@triton.jit
def store_terms(p_row, m_row, x1, x2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of rows that are fp32."""
    first = tl.arange(0, D1)[None, :]
    tl.store(p_row + first, x1, mask=m_row & (first < D))
    if D2 > 0:
        second = D1 + tl.arange(0, D2)[None, :]
        tl.store(p_row + second, x2, mask=m_row & (second < D))
