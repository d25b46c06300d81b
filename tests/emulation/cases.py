"""Problems of the emulation tests: shapes, memory layouts, positions and frequencies that are hard on a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class Case:
    """One problem; the id of a case names its reason."""

    id: str
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int, int, int, int] = (1, 2, 1, 5, 64)  # B, Hq, Hk, S, D; Hk = 0: q alone
    pairs: int | None = None
    axes: int = 1
    groups: int = 1
    shift: int = 0
    begin: int = 0
    end: int | None = None
    interleaved: bool = False
    inverse: bool = False
    scale: float = 1.0
    layout: str = "bhsd"
    inplace: bool = False
    positions: torch.dtype = torch.int64
    dense: bool = False
    base: int = 12345  # far enough for the slowest pair to turn
    shared_positions: bool = True
    seed: int = 0


def tensor(
    batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> torch.Tensor:
    """A [B, H, S, D] view: "bhsd" and "bshd" memory, "packed" (inside a wider row) or "odd" (no alignment at all)."""
    shape = {"bhsd": (batch, heads, tokens, width), "bshd": (batch, tokens, heads, width)}
    if layout in shape:
        x = torch.randn(shape[layout], generator=generator).to(dtype)
        return x if layout == "bhsd" else x.transpose(1, 2)
    extra = 16 if layout == "packed" else 3
    flat = torch.randn(batch * tokens * heads * (width + extra) + 1, generator=generator).to(dtype)
    start = 0 if layout == "packed" else 1
    return flat[start : flat.numel() - 1 + start].view(batch, tokens, heads, -1)[..., :width].transpose(1, 2)


def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    batch, q_heads, k_heads, tokens, width = case.shape
    q = tensor(batch, q_heads, tokens, width, case.dtype, case.layout, generator)
    k = tensor(batch, k_heads, tokens, width, case.dtype, case.layout, generator) if k_heads else None
    pairs = case.pairs if case.pairs is not None else width // 2
    rows = 1 if case.shared_positions else batch
    positions = torch.arange(case.base, case.base + tokens).expand(case.axes, rows, -1)
    positions = positions * torch.arange(1, case.axes + 1)[:, None, None] + torch.arange(rows)[None, :, None]
    positions = positions.to(case.positions)
    if case.positions.is_floating_point:
        positions = positions * 0.75 + 0.1
    turns = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs) / (2 * math.pi) / 2**case.shift
    steps = (turns * 2.0**64).to(torch.int64).expand(case.axes, case.groups, -1).clone()
    steps = steps // (1 + torch.arange(case.groups)[None, :, None]) - torch.arange(case.axes)[:, None, None] * 2**40
    if not case.dense:  # one axis per pair
        steps = torch.where(torch.arange(case.axes)[:, None, None] == torch.arange(pairs) % case.axes, steps, 0)
    steps[:, :, : case.begin] = 0
    if case.end is not None:
        steps[:, :, case.end :] = 0
    return q, k, positions, steps


def options(case: Case, steps: torch.Tensor) -> dict[str, Any]:
    end = steps.shape[2] if case.end is None else case.end
    return dict(
        shift=case.shift,
        begin=case.begin,
        end=end,
        interleaved=case.interleaved,
        inverse=case.inverse,
        scale=case.scale,
    )


class Outputs:
    """Inputs and poisoned outputs of a launch, in place or not."""

    def __init__(self, case: Case, q: torch.Tensor, k: torch.Tensor | None) -> None:
        given = [x for x in (q, k) if x is not None]
        if case.inplace:
            self.tensors = [x.clone(memory_format=torch.preserve_format) for x in given]
            self.inputs, self.buffers = list(self.tensors), []
        else:
            self.inputs = given
            self.tensors, self.buffers = (list(z) for z in zip(*(poisoned(x) for x in given), strict=True))

    def launch_tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """q, its output, k, its output."""
        x, y = [*self.inputs, None], [*self.tensors, None]
        assert x[0] is not None and y[0] is not None
        return x[0], y[0], x[1], y[1]

    def check_surroundings(self) -> None:
        """Nothing around the outputs was written."""
        for out, buffer in zip(self.tensors, self.buffers, strict=bool(self.buffers)):
            written = torch.zeros_like(buffer, dtype=torch.bool)
            written.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
            assert buffer[~written].isnan().all(), "wrote outside the output"


def poisoned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An output like x, with x's strides and alignment, and the NaN buffer around it."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    lead = x.data_ptr() % 16 // x.element_size()
    buffer = torch.full((span + 32 + lead,), float("nan"), dtype=x.dtype)
    base = (-buffer.data_ptr() // x.element_size()) % (16 // x.element_size()) + lead
    return buffer.as_strided(x.shape, x.stride(), base), buffer


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
