"""ctypes mirrors of kernels/block_args.h; sizes are checked against the compiler's in test_structs.py."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from emulation.attention_structs import BlockLists, PositionTable
from emulation.merge_structs import named


class BlockPoolArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64 * 3),
        ("order", PositionTable),
        *named(c_int64, "batch", "tokens"),
        *named(c_int32, "heads", "head_dim", "block", "blocks", "dtype"),
        ("out", c_void_p),
    ]


class BlockSelectArgs(Structure):
    _fields_ = [
        *named(c_void_p, "q", "k", "classes"),
        ("class_stride", c_int64 * 2),
        ("batch", c_int64),
        *named(c_int32, "heads", "kv_heads", "head_dim", "q_blocks", "k_blocks", "mode", "keep"),
        *named(c_float, "p", "scale"),
        ("width", c_int32),
        *named(c_void_p, "counts", "indices", "p_counts", "p_indices", "workspace"),
    ]


class BlockTransposeArgs(Structure):
    _fields_ = [
        ("lists", BlockLists),
        ("groups", c_int64),
        *named(c_int32, "rows", "columns"),
        ("entries", c_int64),
        *named(c_void_p, "t_starts", "t_counts", "t_indices", "t_ids", "workspace"),
    ]
