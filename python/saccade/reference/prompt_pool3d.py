r"""Prompt-guided pooling (PPLLaVA, arXiv 2411.02327, section 3.2): a softmax inside every window.

For the window of output o, over the input places i inside it, with prompt weights p [B, T, H, W] and temperature tau:

    a_i = exp(p_i / tau) / sum_{j in o} exp(p_j / tau)        y_o = sum_{i in o} a_i x_i

Windows lie wholly inside the input (a remainder is left out) and may overlap: out = (in - kernel) // stride + 1 on each axis.

Gradients: dx_i = sum over windows of a_i dy_o;  dp_i = sum over windows of a_i (dy_o . (x_i - y_o)) / tau.

p is fp32 whatever x is: uniform weights over 18,432 tokens are 5e-5, which fp16 no longer holds as a normal number.
"""

from __future__ import annotations

import torch

from saccade.reference.match import compute_dtype

Sizes = tuple[int, int, int]


def windows(x: torch.Tensor, kernel: Sizes, stride: Sizes) -> torch.Tensor:
    """x [B, T, H, W, ...] to [B, To, Ho, Wo, ..., kt * kh * kw], a view until its last step."""
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), 1):
        x = x.unfold(axis, k, s)
    return x.flatten(-3)


def prompt_pool3d(
    x: torch.Tensor, weights: torch.Tensor, kernel: Sizes, stride: Sizes, temperature: float
) -> torch.Tensor:
    """Y [B, To, Ho, Wo, D] in x's dtype, for x [B, T, H, W, D] and weights [B, T, H, W]."""
    wide = x.to(compute_dtype(x))
    a = (windows(weights.to(wide.dtype), kernel, stride) / temperature).softmax(-1)  # [B, To, Ho, Wo, k]
    return (windows(wide, kernel, stride) @ a[..., None])[..., 0].to(x.dtype)
