"""What attention_rows and attention_columns share: the queries asked for, how many keys each sees, tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from saccade._triton import attention_launch, launch
from saccade._triton.attention_configs import Tile, chunk

SIZES = [
    *("heads", "group", "tiles", "q_len", "k_len", "row_count", "scale", "key_bias_stride"),
    *(f"{x}_stride_{d}" for x in "qk" for d in "bhs"),
]


@triton.jit
def queries_at(row_ptr, r, row_count, q_len, k_len, CAUSAL: tl.constexpr, HAS_ROWS: tl.constexpr):
    """The query of each entry r (int64), whether it is one, and how many keys it sees: the first ones."""
    m = r < row_count
    query = r
    if HAS_ROWS:
        query = tl.load(row_ptr + r, mask=m, other=-1)
    m = m & (query >= 0) & (query < q_len)
    sees = tl.where(m, k_len, 0)
    if CAUSAL:
        sees = tl.where(m, tl.minimum(tl.maximum(query + 1 + (k_len - q_len), 0), k_len), 0)
    return query.to(tl.int64), m, sees


def tile_of(q) -> Tile:
    """Entries and keys of a tile of scores."""
    if q.element_size() == 4:
        return Tile(32, 32, 4, 2)
    return Tile(64, 64, 8, 2) if q.shape[3] > 128 else Tile(64, 64, 4, 2)


def arguments(q, k, rows, key_bias, causal, scale, stand_in):
    """Arguments of both kernels; stand_in is a tensor for pointers that are not read."""
    (_, heads, q_len, head_dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    align, tile = attention_launch.alignment(q, k), tile_of(q)
    return {
        "q_ptr": q, "k_ptr": k, "row_ptr": stand_in if rows is None else rows.contiguous(),
        "key_bias_ptr": stand_in if key_bias is None else key_bias.contiguous(),
        "heads": heads, "group": heads // kv_heads, "q_len": q_len, "k_len": k_len,
        "row_count": q_len if rows is None else rows.shape[0], "scale": float(scale),
        "key_bias_stride": 0 if key_bias is None or key_bias.shape[0] == 1 else k_len,
        **launch.stride_args(align, q=q, k=k), **attention_launch.head_parts(head_dim, 128 if q.element_size() == 4 else 256),
        "CHUNK": chunk(q, True), "ALIGN": align, "CAUSAL": causal, "HAS_ROWS": rows is not None,
        "HAS_KEY_BIAS": key_bias is not None, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, **tile.options(),
    }  # fmt: skip
