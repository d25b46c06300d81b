"""`MergePlan`: which token goes to which row."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, BinaryIO

import torch

__all__ = ["MergePlan"]

_VERSION = 1


@dataclass(frozen=True)
class MergePlan:
    """Which token goes to which row; made by `match`, used by `merge`, `unmerge` and `merge_positions` as often as wanted.

    Across layers, denoising steps and the branches of classifier-free guidance: a plan of batch 1 serves any batch.

    Args:
        inverse: [Bp, N] int32, the row of each token; -1 where it was dropped.
        ptr: [Bp, M + 1] int32; the members of row m are `members[ptr[m]:ptr[m + 1]]`.
        members: [Bp, N] int32, the tokens row by row, ascending in each; -1 behind the last.
        head: [Bp, M] int32, the token whose place the row takes; -1 where the row is padding.
        counts: [Bp] int32, rows in use, on the device; the rows behind them are padding (only where a threshold, a budget of the
            whole batch or the data decides how many tokens are merged).
        score: [Bp, N] fp32, how similar each source is to its destination, -inf for other tokens; None where there is none.
        cu_rows: lengths of packed sequences after merging, as cumulative sums, [S + 1] int32; None where tokens are not packed.
    """

    inverse: torch.Tensor
    ptr: torch.Tensor
    members: torch.Tensor
    head: torch.Tensor
    counts: torch.Tensor
    score: torch.Tensor | None = None
    cu_rows: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """Batch of the plan, 1 where it is shared."""
        return self.inverse.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens before merging, N."""
        return self.inverse.shape[1]

    @property
    def rows(self) -> int:
        """Rows after merging, M, padding included."""
        return self.head.shape[1]

    @property
    def valid(self) -> torch.Tensor:
        """[Bp, M] bool: rows in use, the others are padding."""
        return self.head >= 0

    @property
    def dropped(self) -> torch.Tensor:
        """[Bp] int32: tokens that found no row (not finite, and fewer others could be merged than asked), on the device."""
        return self.tokens - self.ptr[:, -1]

    def to_source(self) -> torch.Tensor:
        """[Bp, M, N] bool: which tokens each row holds. For pictures and tests; it has M x N entries."""
        row = torch.arange(self.rows, device=self.inverse.device)
        return self.inverse[:, None, :] == row[:, None]

    def to(self, device: torch.device | str) -> MergePlan:
        """The same plan on another device."""
        return self._map(lambda t: t.to(device))

    def narrow(self, batch: int) -> MergePlan:
        """The plan of one sample, as a shared one; negative numbers count from the end."""
        if not -self.batch <= batch < self.batch:
            raise ValueError(f"batch: expected a sample of the plan's {self.batch}, got {batch}")
        return self._map(lambda t: t[batch % self.batch][None])

    def compact(self) -> MergePlan:
        """Without the padding that all samples have in common. Waits for the device: not for a hot path."""
        rows = int(self.counts.max()) if self.batch else 0
        return replace(self, ptr=self.ptr[:, : rows + 1].contiguous(), head=self.head[:, :rows].contiguous())

    def check(self, x: torch.Tensor, name: str, length: int, what: str) -> None:
        """Raise ValueError where x [B, length, ...] does not fit the plan."""
        if x.shape[1] != length:
            raise ValueError(f"{name}: the plan is for {length} {what}, got {x.shape[1]} (shape {list(x.shape)})")
        if self.batch not in (1, x.shape[0]):
            raise ValueError(f"{name}: the plan is for a batch of {self.batch}, got {x.shape[0]}")
        if x.device != self.inverse.device:
            raise ValueError(f"{name}: expected the device of the plan, {self.inverse.device}, got {x.device}")

    def save(self, file: str | PathLike[str] | BinaryIO | io.BytesIO) -> None:
        """Write the plan to a file that `load` reads."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        torch.save({"saccade_merge_plan": _VERSION, **{k: v for k, v in tensors.items() if v is not None}}, file)

    @classmethod
    def load(
        cls, file: str | PathLike[str] | BinaryIO | io.BytesIO, device: torch.device | str | None = None
    ) -> MergePlan:
        """Read a plan that `save` wrote."""
        content = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(content, dict) or "saccade_merge_plan" not in content:
            raise ValueError("file: this is no saved MergePlan")
        if content["saccade_merge_plan"] != _VERSION:
            raise ValueError(f"file: expected version {_VERSION} of a MergePlan, got {content['saccade_merge_plan']}")
        del content["saccade_merge_plan"]
        return cls(**content)

    def _map(self, change: Any) -> MergePlan:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return MergePlan(**{k: v if v is None or k == "cu_rows" else change(v) for k, v in values.items()})
