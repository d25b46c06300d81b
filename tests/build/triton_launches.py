"""The launches of the Triton kernels that are cross-compiled: recorded from the launchers themselves, which here launch nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from saccade._triton import (
    apply_rope,
    attention_bias_grad,
    attention_columns,
    attention_flags,
    attention_rows,
    axial_attention,
    axial_attention_bwd,
    block_pool,
    block_select,
    block_transpose,
    keep_top,
    knn_density,
    launch,
    match,
    merge,
    merge_bwd,
    merge_plan,
    merge_plan_small,
    prompt_pool3d,
    prompt_pool3d_bwd,
    qk_norm_rope,
    rope_freq_grad,
    row_similarity,
    sparse_attention,
    sparse_attention_bwd,
    sparse_attention_bwd_dq,
    sum_rows,
    unmerge,
)
from saccade.rope.spec import RopeSpec

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float64: "fp64",
    torch.uint8: "u8",
}
ROPE = apply_rope, qk_norm_rope, rope_freq_grad, sum_rows
MERGE = (
    keep_top, knn_density, match, merge, merge_bwd, merge_plan, merge_plan_small, prompt_pool3d, prompt_pool3d_bwd,
    row_similarity, unmerge,
)  # fmt: skip
ATTENTION = (
    attention_bias_grad,
    attention_columns,
    attention_flags,
    attention_rows,
    axial_attention,
    axial_attention_bwd,
    block_pool,
    block_select,
    block_transpose,
    sparse_attention,
    sparse_attention_bwd,
    sparse_attention_bwd_dq,
)
OPTIONS = ("num_warps", "num_stages", "maxnreg", *launch.OPTIONS)
KERNELS = {
    name: (module.__name__.rpartition(".")[2], getattr(module, name))
    for module in (*ROPE, *MERGE, *ATTENTION)
    for name in vars(module)
    if name.endswith("_kernel")
}


@dataclass(frozen=True)
class Launch:
    """What `triton.compile` needs, as plain data, and the bytes that one load is expected to move."""

    label: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, Any]
    vector_bytes: int


@contextmanager
def recording(found: list[Launch], label: str) -> Iterator[None]:
    """Kernels called inside are appended to `found` and not run."""

    def recorder(name: str) -> Any:
        module, kernel = KERNELS[name]

        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            options = {name: values.pop(name) for name in OPTIONS if name in values}
            signature, constants, aligned = {}, {}, []
            for parameter in kernel.params:
                value = values.pop(parameter.name)
                if parameter.is_constexpr:
                    signature[parameter.name], constants[parameter.name] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[parameter.name] = "*" + TYPES[value.dtype]
                    if parameter.name not in launch.TABLES and value.data_ptr() % 16 == 0:
                        aligned.append(parameter.name)
                else:
                    signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            assert not values, values
            data = next(t for n, t in signature.items() if t[0] == "*")
            element = {"fp32": 4}.get(data[1:], 2)
            own = f"{label}/{name.removesuffix('_kernel')}"
            vector = constants["ALIGN"] * element if "ALIGN" in constants else 4
            entry = Launch(own, module, name, signature, constants, aligned, options, vector)
            if own not in {e.label for e in found}:
                found.append(entry)

        return run

    try:
        for name, (_, kernel) in KERNELS.items():
            kernel.run = recorder(name)
        yield
    finally:
        for _, kernel in KERNELS.values():
            del kernel.run


def _spec(head_dim: int, pairs: int, interleaved: bool, groups: int) -> RopeSpec:
    freq = [[0.5**i for i in range(pairs)]] * groups
    return RopeSpec(head_dim, freq, [[i % 3 for i in range(pairs)]] * groups, "interleaved" if interleaved else "half")


# head_dim, pairs, interleaved, groups, q heads, k heads, dtype, and what is compiled of it: r apply_rope, p the same in place,
# backwards, at fractional positions and with the last quarter of the pairs left out, f rope_freq_grad, h qk_norm_rope and its
# gradient over heads, w over rows, g gradient over rows, 1 that before it with one token too.
LAYOUTS: dict[str, tuple[int, int, bool, int, int, int, torch.dtype, str]] = {
    "d128": (128, 64, False, 1, 28, 4, torch.bfloat16, "rpfh1"),  # Qwen2.5-VL
    "d128-fp32": (128, 64, False, 1, 28, 4, torch.float32, "rh"),
    "d128-inter": (128, 64, True, 1, 40, 40, torch.bfloat16, "rphwg"),  # Wan 14B
    "d128-inter-fp32": (128, 64, True, 1, 40, 40, torch.float32, "rpfwg"),
    "d128-inter-12": (128, 64, True, 1, 12, 12, torch.bfloat16, "w"),  # Wan 1.3B
    "d64-heads": (64, 32, True, 32, 32, 32, torch.bfloat16, "rfwg"),  # LTX
    "d72": (72, 36, False, 1, 16, 16, torch.float16, "rh"),  # 36 pairs: 8-byte vectors
    "d80-inter": (80, 40, True, 1, 16, 16, torch.float16, "r"),
    "d96-partial": (96, 40, False, 8, 24, 8, torch.bfloat16, "rhwg"),
    "d128-80": (128, 64, False, 1, 80, 8, torch.bfloat16, "w"),  # rows read twice
    "d256": (256, 128, False, 1, 8, 2, torch.bfloat16, "r"),
    "d512-partial": (512, 8, False, 1, 4, 4, torch.bfloat16, "rh"),  # few pairs, many columns beyond
    "d512-inter-fp32": (512, 256, True, 1, 4, 1, torch.float32, "rhw"),
    "d16-inter": (16, 8, True, 1, 4, 2, torch.float16, "r"),
    "d3": (3, 1, False, 1, 2, 1, torch.float32, "rh"),
}


def launches() -> list[Launch]:
    """Every launch to compile."""
    found: list[Launch] = []
    for label, (head_dim, pairs, interleaved, groups, q_heads, k_heads, dtype, what) in LAYOUTS.items():
        spec = _spec(head_dim, pairs, interleaved, groups)
        for tokens in (64, 1) if "1" in what else (64,):
            q, k = (torch.empty(1, tokens, h, head_dim, dtype=dtype).transpose(1, 2) for h in (q_heads, k_heads))
            whole, floating = (torch.zeros(3, 1, tokens, dtype=t) for t in (torch.int64, torch.float32))
            begin, end = spec.active
            turn = (spec.steps(), spec.shift, begin, end, interleaved, 1.0)
            name = label + ("-few" if tokens == 1 else "")
            with recording(found, name):
                if "r" in what:
                    apply_rope.apply_rope(q, k, whole, *turn, False)
                if "f" in what and tokens > 1:
                    rope_freq_grad.rope_freq_grad(q, k, q, k, floating, groups, pairs, interleaved)
                for row, forward, backward in ((False, "h", "h"), (True, "w", "g")):
                    if forward in what:
                        qk_norm_rope.qk_norm_rope(q, k, *_weights(q, k, row), whole, *turn, 1e-6, row)
                    if backward in what:
                        qk_norm_rope.qk_norm_rope_bwd(q, k, q, k, *_weights(q, k, row), whole, *turn, 1e-6, row)
            if "p" in what and tokens > 1:
                with recording(found, name + "/place"):
                    apply_rope.apply_rope_(q, k, floating, *turn[:3], end - end // 4, *turn[4:], True)
    found = [e for e in found if e.kernel != "sum_rows_kernel"]
    with recording(found, "any"):
        sum_rows.sum_rows(torch.empty(2, 128))
    return found


def _weights(q: torch.Tensor, k: torch.Tensor, row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty((x.shape[1] if row else 1) * x.shape[3], dtype=x.dtype) for x in (q, k))  # type: ignore[return-value]
