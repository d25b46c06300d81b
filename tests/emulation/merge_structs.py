"""ctypes mirrors of kernels/merge_args.h; sizes are checked against the compiler's in test_structs.py."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_void_p

COSINE, DOT, L2 = 0, 1, 2
MEAN, SUM, MAX, REPLACE = 0, 1, 2, 3


def named(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class MatchArgs(Structure):
    _fields_ = [
        ("metric", c_void_p),
        ("metric_stride", c_int64 * 2),
        *named(c_void_p, "src", "dst", "ranges", "protect"),
        *named(c_int64, "src_stride", "dst_stride", "ranges_stride", "protect_stride"),
        *named(c_int64, "batch", "tokens", "sources", "destinations"),
        *named(c_int32, "channels", "range_count", "score", "dtype"),
        *named(c_void_p, "best", "target", "workspace"),
    ]


class MergePlanArgs(Structure):
    _fields_ = [
        *named(c_void_p, "score", "target"),
        *named(c_int64, "batch", "tokens", "rows", "r"),
        ("threshold", c_float),
        ("whole_batch", c_bool),
        *named(c_void_p, "inverse", "ptr", "members", "head", "counts", "workspace"),
    ]


class PlanView(Structure):
    _fields_ = [*named(c_void_p, "inverse", "ptr", "members", "head"), ("shared", c_bool)]


class MergeArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64 * 2),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("plan", PlanView),
        *named(c_int64, "batch", "tokens", "rows", "width"),
        *named(c_int32, "mode", "dtype"),
        *named(c_void_p, "y", "total", "log_total"),
    ]


class MergeGradArgs(Structure):
    _fields_ = [
        ("dy", c_void_p),
        ("dy_stride", c_int64 * 2),
        ("x", c_void_p),
        ("x_stride", c_int64 * 2),
        ("weight", c_void_p),
        ("weight_stride", c_int64),
        ("total", c_void_p),
        ("plan", PlanView),
        *named(c_int64, "batch", "tokens", "rows", "width"),
        *named(c_int32, "mode", "dtype"),
        ("dx", c_void_p),
    ]


class UnmergeArgs(Structure):
    _fields_ = [
        ("y", c_void_p),
        ("y_stride", c_int64 * 2),
        ("residual", c_void_p),
        ("residual_stride", c_int64 * 2),
        ("gate", c_void_p),
        ("gate_stride", c_int64 * 2),
        ("inverse", c_void_p),
        ("shared", c_bool),
        *named(c_int64, "batch", "tokens", "rows", "width"),
        ("dtype", c_int32),
        ("out", c_void_p),
    ]


class PromptPoolArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64 * 4),
        ("weights", c_void_p),
        *named(c_int64, "batch", "width"),
        *((name, c_int32 * 3) for name in ("size", "kernel", "stride", "out_size")),
        ("temperature", c_float),
        ("dtype", c_int32),
        ("y", c_void_p),
    ]


class PromptPoolGradArgs(Structure):
    _fields_ = [("pool", PromptPoolArgs), *named(c_void_p, "dy", "dx", "dweights", "workspace")]


class RowSimilarityArgs(Structure):
    _fields_ = [
        *named(c_void_p, "x", "y"),
        ("x_stride", c_int64 * 2),
        ("y_stride", c_int64 * 2),
        *named(c_int64, "batch", "tokens"),
        *named(c_int32, "channels", "dtype"),
        ("out", c_void_p),
    ]


class KeepTopArgs(Structure):
    _fields_ = [
        ("scores", c_void_p),
        *named(c_int64, "score_stride", "batch", "tokens", "k"),
        ("out", c_void_p),
    ]


class KnnDensityArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64 * 2),
        *named(c_int64, "batch", "tokens"),
        *named(c_int32, "channels", "k", "dtype"),
        *named(c_void_p, "out", "workspace"),
    ]
