"""Lists of blocks by column instead of by row."""

from __future__ import annotations

from saccade import _dispatch
from saccade._dispatch import raw
from saccade.attention.layout import BlockLists
from saccade.reference import block_transpose as reference


def transpose_lists(lists: BlockLists, columns: int) -> BlockLists:
    """The same entries by column, rows ascending in each, on the device of the lists."""
    case = _dispatch.case_of(lists.counts)
    chosen = _dispatch.select("block_transpose", "auto", case)
    op = reference.block_transpose if chosen == "reference" else raw("block_transpose", chosen)
    starts, counts, indices, ids = op(lists.starts, lists.counts, lists.indices, lists.ids, columns)
    return BlockLists(starts, counts, indices, None if lists.ids is None else ids)
