"""Plans and tensors for the emulated merging kernels: hub rows, padding, dropped tokens, memory of any alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from emulation.merge_structs import PlanView

NAN = float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """int32: inverse [Bp, N], ptr [Bp, M + 1], members [Bp, N], head [Bp, M]."""

    inverse: torch.Tensor
    ptr: torch.Tensor
    members: torch.Tensor
    head: torch.Tensor

    @property
    def rows(self) -> int:
        return self.head.shape[1]

    def view(self, *, batch: int) -> PlanView:
        shared = self.inverse.shape[0] == 1 and batch != 1
        parts = (self.inverse, self.ptr, self.members, self.head)
        assert all(x.is_contiguous() and x.dtype == torch.int32 for x in parts)
        return PlanView(*(x.data_ptr() for x in parts), shared)

    def sample(self, b: int) -> Plan:
        return Plan(*(x[b : b + 1] for x in (self.inverse, self.ptr, self.members, self.head)))


def plan_of(inverse: torch.Tensor, rows: int, *, seed: int = 0) -> Plan:
    """The plan of inverse [Bp, N]; the head of a row is any one of its members."""
    generator = torch.Generator().manual_seed(seed)
    ptr, members, head = [], [], []
    for sample in inverse.tolist():
        of_row: list[list[int]] = [[] for _ in range(rows)]
        for token, row in enumerate(sample):
            if row >= 0:
                of_row[row].append(token)
        sizes = torch.tensor([0] + [len(r) for r in of_row])
        ptr.append(sizes.cumsum(0))
        flat = [token for r in of_row for token in r]
        members.append(torch.tensor(flat + [-1] * (len(sample) - len(flat)), dtype=torch.int64))
        pick = [int(torch.randint(max(len(r), 1), (1,), generator=generator)) for r in of_row]
        head.append(torch.tensor([r[i] if r else -1 for r, i in zip(of_row, pick, strict=True)], dtype=torch.int64))
    stacked = (torch.stack(x) for x in (ptr, members, head))
    return Plan(inverse.to(torch.int32), *(x.to(torch.int32).contiguous() for x in stacked))


def random_plan(samples: int, tokens: int, rows: int, *, hub: int = 0, dropped: int = 0, padding: int = 0) -> Plan:
    """Tokens spread over all but the last `padding` rows; `hub` of them belong to row 0, `dropped` to none."""
    generator = torch.Generator().manual_seed(tokens + rows)
    used = rows - padding
    inverse = torch.randint(used, (samples, tokens), generator=generator)
    for b in range(samples):
        order = torch.randperm(tokens, generator=generator)
        inverse[b, order[:hub]] = 0
        inverse[b, order[hub : hub + dropped]] = -1
    return plan_of(inverse, rows)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense", *, seed: int = 0) -> torch.Tensor:
    """Normal values, last stride 1: "dense", "packed" (in wider rows of 16 bytes' multiples), "odd" (no alignment)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "dense":
        return x
    lead, extra = (0, 16) if layout == "packed" else (1, 3)
    flat = torch.full((math.prod(shape[:-1]) * (shape[-1] + extra) + lead,), NAN, dtype=dtype)
    wide = flat[lead:].view(*shape[:-1], shape[-1] + extra)[..., : shape[-1]]
    return wide.copy_(x)


class Output:
    """A poisoned contiguous tensor, and the NaN around it that must remain."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, odd: bool = False) -> None:
        lead, count = 17 if odd else 16, math.prod(shape)
        self.buffer = torch.full((count + 40,), NAN, dtype=dtype)
        self.tensor = self.buffer[lead : lead + count].view(shape)
        self.edges = self.buffer[:lead], self.buffer[lead + count :]

    def checked(self) -> torch.Tensor:
        assert all(bool(edge.isnan().all()) for edge in self.edges), "wrote outside the output"
        return self.tensor


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])
