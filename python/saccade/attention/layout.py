"""`BlockLayout`: which blocks of keys each block of queries sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from saccade._arguments import whole

__all__ = ["BlockLayout", "BlockLists"]

BLOCKS = (64, 128)
SEEN_BY_ALL = -(2**31)  # at[0][j]: a key that every query sees


class BlockLists(NamedTuple):
    """For every row of blocks a list of column blocks, ascending: `indices[start : start + count]` of one flat storage.

    Args:
        starts: [Lb, Lh, rows] int32, where each list begins in the flattened `indices`.
        counts: [Lb, Lh, rows] int32, its length.
        indices: int32, any shape, contiguous. Padded lists [Lb, Lh, rows, width] and compressed ones [nnz] differ in `starts` alone.
        ids: int32, shaped as `indices`: for each entry the row of `BlockLayout.bits`, or None.
    """

    starts: torch.Tensor
    counts: torch.Tensor
    indices: torch.Tensor
    ids: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """For every batch (or 1), head (or 1) and query block the key blocks that it sees, whole or in part.

    Positions are tokens, unless `q_order` and `k_order` say which token lies at each position (tiles of a video, frame-major to
    token-major, windows): attention reads and writes the tokens where they are.

    Args:
        q_len, k_len: tokens, Sq and Sk.
        q_block, k_block: 64 or 128 positions.
        full: blocks of which every query sees every key that exists.
        partial: blocks seen in part, by `box` and `at` or by `bits`; None where there are none. A block is in one list, once.
        box, at: [1|B, 1|H, 2, A, nQ * q_block] and [1|B, 1|H, A, nK * k_block] int32: the query at position i sees the key at
            position j where `at[0][j]` is -2^31, or `box[0][a][i] <= at[a][j] < box[1][a][i]` on every axis a. Causal, frame-causal,
            3-D windows and segments are all of this form.
        bits: [n, q_block, k_block / 32] int32; bit j of word w is key `w * 32 + j` of the block; `partial.ids` says which row of it.
        q_order, k_order: [1|B, 1|H, nQ * q_block] and [1|B, 1|Hk, nK * k_block] int32, the token at each position, -1 for none;
            every query token once, every key token at most once. None: position = token.

    Build one with a pattern, a planner or a `from_` constructor: they check what they are given. The plain constructor reads no tensor.

    Example:
        >>> import torch
        >>> from saccade.attention import BlockLayout
        >>> layout = BlockLayout.from_block_map(torch.eye(3, dtype=torch.bool), q_len=150, k_len=150)
        >>> layout.counts.tolist(), layout.full.indices[0, 0].tolist(), round(float(layout.density), 3)
        ([[[1, 1, 1]]], [[0, 0, 0], [1, 0, 0], [2, 0, 0]], 0.333)
    """

    q_len: int
    k_len: int
    q_block: int
    k_block: int
    full: BlockLists
    partial: BlockLists | None = None
    box: torch.Tensor | None = None
    at: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    q_order: torch.Tensor | None = None
    k_order: torch.Tensor | None = None
    _transposed: list[tuple[BlockLists, BlockLists | None]] = field(default_factory=list, repr=False)

    # ---- sizes ---------------------------------------------------------------------------------------------------------
    @property
    def q_blocks(self) -> int:
        """Query blocks, nQ."""
        return self.full.counts.shape[2]

    @property
    def k_blocks(self) -> int:
        """Key blocks, nK."""
        positions = self.k_len if self.k_order is None else self.k_order.shape[2]
        return -(-positions // self.k_block)

    @property
    def batch(self) -> int:
        """Samples that the lists tell apart, 1 where one layout serves all."""
        return self.full.counts.shape[0]

    @property
    def heads(self) -> int:
        """Heads that the lists tell apart, 1 where one layout serves all."""
        return self.full.counts.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.full.counts.device

    @property
    def counts(self) -> torch.Tensor:
        """[Lb, Lh, nQ] int32: key blocks that each query block sees, whole or in part."""
        return self.full.counts if self.partial is None else self.full.counts + self.partial.counts

    @property
    def density(self) -> torch.Tensor:
        """Share of the block pairs that are computed, over all batches and heads: a scalar tensor, so nothing waits for it."""
        pairs = self.batch * self.heads * self.q_blocks * self.k_blocks
        return self.counts.sum() / max(pairs, 1)

    def __repr__(self) -> str:
        kind = "bits" if self.bits is not None else f"box of {self.at.shape[2]} axes" if self.at is not None else ""
        parts = [
            f"{self.q_len} x {self.k_len} tokens",
            f"blocks {self.q_block} x {self.k_block}",
            f"batch {self.batch}, heads {self.heads}",
            *([f"partial blocks by {kind}"] if self.partial is not None else []),
            *(["reordered"] if self.q_order is not None or self.k_order is not None else []),
        ]
        return f"BlockLayout({', '.join(parts)})"

    # ---- other forms ---------------------------------------------------------------------------------------------------
    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        return self._map(lambda t: t.to(device))

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor]) -> BlockLayout:
        def lists(x: BlockLists | None) -> Any:
            return (
                None
                if x is None
                else BlockLists(f(x.starts), f(x.counts), f(x.indices), None if x.ids is None else f(x.ids))
            )

        tables: dict[str, Any] = {name: t if (t := getattr(self, name)) is None else f(t) for name in TABLES}
        return replace(self, full=lists(self.full), partial=lists(self.partial), _transposed=[], **tables)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What the kernels read, in the order of their schema."""
        partial = (None,) * 4 if self.partial is None else self.partial
        return (*self.full[:3], *partial, self.bits, self.box, self.at, self.q_order, self.k_order)

    def transposed(self) -> tuple[BlockLists, BlockLists | None]:
        """The lists by key block, [Lb, Lh, nK], whose entries are query blocks, for the backward pass. Built once, on the device."""
        if self._transposed:
            return self._transposed[0]
        from saccade.attention._transpose import transpose_lists

        both = tuple(None if x is None else transpose_lists(x, self.k_blocks) for x in (self.full, self.partial))
        if not torch.compiler.is_compiling():
            self._transposed.append(both)  # type: ignore[arg-type]
        return both  # type: ignore[return-value]

    def block_map(self) -> torch.Tensor:
        """[Lb, Lh, nQ, nK] uint8: 0 not seen, 1 seen in part, 2 seen whole."""
        out = _scatter(self.full, self.k_blocks, 2)
        return out if self.partial is None else out + _scatter(self.partial, self.k_blocks, 1)

    def to_mask(self) -> torch.Tensor:
        """[1|B, 1|H, Sq, Sk] bool, by token: True where a query sees a key. The oracle of tests and pictures; it has Sq x Sk entries."""
        from saccade.attention._mask import to_mask

        return to_mask(self)

    @classmethod
    def from_block_map(
        cls,
        block_map: torch.Tensor,
        *,
        q_len: int,
        k_len: int,
        q_block: int = 64,
        k_block: int = 64,
        q_order: torch.Tensor | None = None,
        k_order: torch.Tensor | None = None,
    ) -> BlockLayout:
        """Whole blocks from a bool map [nQ, nK] or [1|B, 1|H, nQ, nK], on its device and without waiting for it.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is accepted.
        """
        from saccade.attention._compact import compact, four

        layout = cls(*_sizes(q_len, k_len, q_block, k_block), _NONE, q_order=q_order, k_order=k_order)
        q_blocks = -(-(q_len if q_order is None else q_order.shape[-1]) // q_block)
        block_map = four("block_map", block_map, torch.bool, (q_blocks, layout.k_blocks))
        return replace(layout, full=compact(block_map))

    @classmethod
    def from_lists(
        cls, q_len: int, k_len: int, q_block: int, k_block: int, full: BlockLists, **rest: Any
    ) -> BlockLayout:
        """A layout of lists from elsewhere, all arguments as in the class, after checking what they hold.

        Reads the tensors, once: entries must lie inside the layout, ascend, and stand in one list only.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is accepted.
        """
        from saccade.attention._check_layout import check_whole

        layout = cls(*_sizes(q_len, k_len, q_block, k_block), full, **rest)
        check_whole(layout)
        return layout

    @classmethod
    def from_mask(cls, mask: torch.Tensor, *, q_block: int = 64, k_block: int = 64) -> BlockLayout:
        """Exact blocks from a bool mask [Sq, Sk] or [1|B, 1|H, Sq, Sk]: whole ones, and bits for those seen in part.

        One row of bits is stored for each block seen in part, so their number is read from the device, once.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is accepted.
        """
        from saccade.attention._mask import from_mask

        return from_mask(mask, q_block, k_block)

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockLayout:
        """The layout of FlexAttention's `BlockMask`, whose lists are taken as they are; `mask_mod` is evaluated on the partial blocks."""
        from saccade.attention.flex import from_flex

        return from_flex(block_mask)

    def to_flex(self) -> Any:
        """FlexAttention's `BlockMask` of this layout, which shares its lists."""
        from saccade.attention.flex import to_flex

        return to_flex(self)

    def __or__(self, other: BlockLayout) -> BlockLayout:
        from saccade.attention.combine import union

        return union(self, other)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        from saccade.attention.combine import intersection

        return intersection(self, other)

    def plot(self, **options: Any) -> Any:
        """A picture of the pattern; see `saccade.attention.plot`."""
        from saccade.attention.plot import plot

        return plot(self, **options)

    def save(self, path: Any) -> None:
        """Write the layout to a file that `load` reads."""
        from saccade.attention.storage import save

        save(self, path)

    @classmethod
    def load(cls, path: Any) -> BlockLayout:
        """Read what `save` wrote, checked as `from_lists` checks."""
        from saccade.attention.storage import load

        return load(path)

    @classmethod
    def dense(
        cls, q_len: int, k_len: int, *, q_block: int = 64, k_block: int = 64, device: torch.device | str = "cpu"
    ) -> BlockLayout:
        """Every query sees every key."""
        q_len, k_len, q_block, k_block = _sizes(q_len, k_len, q_block, k_block)
        shape = -(-q_len // q_block), -(-k_len // k_block)
        everything = torch.ones(shape, dtype=torch.bool, device=device)
        return cls.from_block_map(everything, q_len=q_len, k_len=k_len, q_block=q_block, k_block=k_block)


TABLES = ("box", "at", "bits", "q_order", "k_order")
_NONE = BlockLists(*(torch.zeros(0, dtype=torch.int32) for _ in range(3)))


def _sizes(q_len: Any, k_len: Any, q_block: Any, k_block: Any) -> tuple[int, int, int, int]:
    for name, block in (("q_block", q_block), ("k_block", k_block)):
        if whole(block, name) not in BLOCKS:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, BLOCKS))}, got {block}")
    return whole(q_len, "q_len", 0), whole(k_len, "k_len", 0), int(q_block), int(k_block)


def _scatter(lists: BlockLists, columns: int, value: int) -> torch.Tensor:
    """[Lb, Lh, rows, columns] uint8 with `value` at every entry of the lists."""
    width = columns
    n = torch.arange(width, device=lists.counts.device)
    used = n < lists.counts[..., None]
    place = (lists.starts[..., None].long() + n).clamp(max=max(lists.indices.numel() - 1, 0))
    flat = lists.indices.flatten()
    column = flat[place.masked_fill(~used, 0)].long() if flat.numel() else torch.zeros_like(place)
    out = torch.zeros((*lists.counts.shape, columns + 1), dtype=torch.uint8, device=lists.counts.device)
    out.scatter_(-1, column.masked_fill(~used, columns), value)
    return out[..., :columns]
