"""ctypes mirrors of kernels/axial_args.h; sizes are checked against the compiler's in test_structs.py."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_void_p

from emulation.merge_structs import named


class AxialGeometry(Structure):
    _fields_ = [("prefix", c_int32), ("grid", c_int32 * 3), ("box", c_int32 * 3), ("mean", c_bool)]


class AxialAttentionArgs(Structure):
    _fields_ = [
        *named(c_void_p, "q", "k", "v"),
        *named(c_int64 * 3, "q_stride", "k_stride", "v_stride"),
        *named(c_int64, "batch", "tokens"),
        *named(c_int32, "heads", "head_dim"),
        ("scale", c_float),
        ("dtype", c_int32),
        ("geometry", AxialGeometry),
        ("out", c_void_p),
        ("out_stride", c_int64 * 3),
        *named(c_void_p, "lse", "group_out", "group_lse", "workspace"),
    ]


class AxialAttentionGradArgs(Structure):
    _fields_ = [
        ("forward", AxialAttentionArgs),
        ("dout", c_void_p),
        ("dout_stride", c_int64 * 3),
        *named(c_void_p, "dq", "dk", "dv"),
        *named(c_int64 * 3, "dq_stride", "dk_stride", "dv_stride"),
        ("workspace", c_void_p),
    ]
