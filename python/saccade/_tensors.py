"""What the checks of every family say and do about a tensor: its dtype in words, its last stride, what takes float64."""

from __future__ import annotations

import torch

NO_FLOAT64 = "no float64 kernel of this op; the reference takes it"


def names(*dtypes: torch.dtype) -> str:
    """Dtypes as a user writes them."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def dense_columns(x: torch.Tensor) -> torch.Tensor:
    """`x` with a last stride of 1, which kernels read: a copy only where it has another (gradients of a sum have 0)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def float64_refusals(x: torch.Tensor) -> tuple[tuple[str, str], ...]:
    """For families whose fast kernels take fp32 and below: who refuses `x`, and why."""
    if x.dtype != torch.float64:
        return ()
    return tuple((name, NO_FLOAT64) for name in ("cuda", "triton", "cpu"))
