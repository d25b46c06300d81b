"""ctypes mirrors of kernels/attention_args.h; sizes are checked against the compiler's in test_structs.py."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_void_p

from emulation.merge_structs import named


class BlockLists(Structure):
    _fields_ = [*named(c_void_p, "starts", "counts", "indices", "ids"), ("stride", c_int64 * 2)]


class PositionTable(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 2)]


class BlockLayoutArgs(Structure):
    _fields_ = [
        *named(BlockLists, "full", "partial", "t_full", "t_partial"),
        ("bits", c_void_p),
        *named(PositionTable, "box", "at", "q_order", "k_order"),
        *named(c_int32, "axes", "q_block", "k_block", "q_blocks", "k_blocks"),
    ]


class AttentionInputs(Structure):
    _fields_ = [
        *named(c_void_p, "q", "k", "v"),
        *named(c_int64 * 3, "q_stride", "k_stride", "v_stride"),
        ("bias", c_void_p),
        ("bias_stride", c_int64 * 3),
        ("key_bias", c_void_p),
        *named(c_int64, "key_bias_stride", "batch", "q_len", "k_len"),
        *named(c_int32, "heads", "kv_heads", "head_dim"),
        ("scale", c_float),
        *named(c_int32, "dtype", "bias_dtype"),
        ("layout", BlockLayoutArgs),
    ]


class SparseAttentionArgs(Structure):
    _fields_ = [
        ("in", AttentionInputs),
        ("out", c_void_p),
        ("out_stride", c_int64 * 3),
        *named(c_void_p, "lse", "workspace"),
    ]


class SparseAttentionGradArgs(Structure):
    _fields_ = [
        ("in", AttentionInputs),
        *named(c_void_p, "dout", "out"),
        *named(c_int64 * 3, "dout_stride", "out_stride"),
        *named(c_void_p, "lse", "dlse", "dq", "dk", "dv"),
        *named(c_int64 * 3, "dq_stride", "dk_stride", "dv_stride"),
        *named(c_void_p, "dkey_bias", "delta", "workspace"),
    ]


class AttentionBiasGradArgs(Structure):
    _fields_ = [
        ("in", AttentionInputs),
        ("dout", c_void_p),
        ("dout_stride", c_int64 * 3),
        *named(c_void_p, "lse", "delta", "dbias"),
        ("bias_batch", c_int64),
        ("bias_heads", c_int32),
        ("workspace", c_void_p),
    ]


class AttentionMapArgs(Structure):
    _fields_ = [
        ("in", AttentionInputs),
        ("rows", c_void_p),
        ("row_count", c_int64),
        ("causal", c_bool),
        *named(c_void_p, "lse", "entropy", "columns", "workspace"),
    ]
