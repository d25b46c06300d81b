"""`prompt_pool3d`: video tokens pooled by what the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from saccade import _dispatch
from saccade._arguments import choice, grid_sizes, number
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.merge._check import check_device, check_values
from saccade.merge.similarity import prompt_weights
from saccade.reference import prompt_pool3d as reference

__all__ = ["PromptPool3d", "prompt_pool3d"]

Sizes = tuple[int, int, int]


def _case(x: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any) -> Case:
    return _dispatch.case_of(x, weights, refused=float64_refusals(x))


class _PromptPool(torch.autograd.Function):
    """The softmax of a window is cheap beside its D columns: backward forms it again from the weights."""

    @staticmethod
    def forward(ctx: Any, x, weights, sizes, temperature, impl):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weights)
        ctx.sizes, ctx.temperature, ctx.impl = sizes, temperature, impl
        return raw("prompt_pool3d", impl)(x, weights, *sizes, temperature)

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[no-untyped-def]
        x, weights = ctx.saved_tensors
        op = raw("prompt_pool3d_bwd", ctx.impl)
        dx, dweights = op(dy.contiguous(), x, weights, *ctx.sizes, ctx.temperature)
        need_x, need_weights = ctx.needs_input_grad[:2]
        return dx if need_x else None, dweights if need_weights else None, None, None, None


def _windows(kernel: Any, stride: Any, size: Sequence[int] | None = None) -> tuple[Sizes, Sizes]:
    """Checked kernel and stride."""
    kernel = grid_sizes(kernel, "kernel", 1)
    stride = kernel if stride is None else grid_sizes(stride, "stride", 1)
    for axis, k, n in zip("THW", kernel, size or (), strict=False):
        if k > n:
            raise ValueError(f"kernel: {k} along {axis} does not fit the grid's {n}")
    return kernel, stride


def _volume(x: Any, grid: Sequence[int] | None) -> torch.Tensor:
    """x as [B, T, H, W, D]."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: expected a tensor [B, T, H, W, D], or [B, N, D] with a grid, got {type(x).__name__}")
    if grid is None:
        if x.ndim == 3:
            raise ValueError(f"grid: expected (T, H, W) for x of 3 dimensions {list(x.shape)}, got None")
        return check_values("x", x, "[B, T, H, W, D]")
    t, h, w = grid_sizes(grid, "grid")
    if x.ndim == 5:
        if (t, h, w) != tuple(x.shape[1:4]):
            raise ValueError(f"grid: expected {tuple(x.shape[1:4])} or None for shape {list(x.shape)}, got {grid}")
        return check_values("x", x, "[B, T, H, W, D]")
    tokens = check_values("x", x, "[B, N, D]")
    if t * h * w != tokens.shape[1]:
        raise ValueError(f"grid: {(t, h, w)} has {t * h * w} tokens, x has {tokens.shape[1]} (shape {list(x.shape)})")
    volume: torch.Tensor = tokens.unflatten(1, (t, h, w))
    return volume


def _weights(weights: Any, x: torch.Tensor) -> torch.Tensor:
    """Weights as [B, T, H, W], contiguous, in the compute dtype."""
    batch, *size = x.shape[:4]
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"weights: expected a tensor [B, T, H, W] or [B, N], got {type(weights).__name__}")
    given = list(weights.shape)
    if given == [batch, size[0] * size[1] * size[2]]:
        weights = weights.unflatten(1, size)
    if list(weights.shape) != [batch, *size]:
        raise ValueError(f"weights: expected {[batch, *size]} or {[batch, size[0] * size[1] * size[2]]}, got {given}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights: expected a float dtype, got {names(weights.dtype)}")
    check_device("weights", weights, x, "x")
    dense: torch.Tensor = weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    return dense


@_dispatch.public_op(_case)
def prompt_pool3d(
    x: torch.Tensor,
    weights: torch.Tensor,
    kernel: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    temperature: float = 0.01,
    grid: Sequence[int] | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Pool windows of a video, each by the softmax of its prompt weights (PPLLaVA, arXiv 2411.02327, section 3.2).

    In the window of output o, over its places i, with prompt weights p and temperature tau:

        a_i = exp(p_i / tau) / sum_{j in o} exp(p_j / tau)        y_o = sum_{i in o} a_i x_i

    p is itself a softmax over all tokens, so most windows, where p / tau is near 0, are plain means, and those the prompt asks for lean
    to the tokens it asks for. One pass over x; products and sums fp32, rounded once. Differentiable in x and weights.

    Args:
        x: [B, T, H, W, D], or [B, N, D] with `grid`; fp32, fp16, bf16 (fp64 by the reference), any strides.
        weights: [B, T, H, W] or [B, N], of `prompt_weights`; taken as fp32 (fp64 beside fp64).
        kernel: (t, h, w), at most the grid's size. PPLLaVA: (2, 3, 3) for video, (1, 3, 3) for images.
        stride: (t, h, w), at least 1; None for the kernel. Windows may overlap; a remainder that fills no window is left out.
        temperature: tau, above 0.
        grid: (T, H, W) where x is [B, N, D], tokens in t-major order.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, To, Ho, Wo, D] in x's dtype, To = (T - t) // stride + 1 and so on.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.arange(4.0).view(1, 1, 2, 2, 1)
        >>> merge.prompt_pool3d(x, torch.zeros(1, 1, 2, 2), (1, 2, 2)).flatten().tolist()  # no preference: the mean
        [1.5]
        >>> merge.prompt_pool3d(x, torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]), (1, 2, 2)).flatten().tolist()
        [3.0]
    """
    x = _volume(x, grid)
    kernel, stride = _windows(kernel, stride, x.shape[1:4])
    tau = float(number(temperature, "temperature", 0))
    weights = _weights(weights, x)
    case = _case(x, weights)
    chosen = _dispatch.select("prompt_pool3d", impl, case)
    if chosen == "reference":
        return reference.prompt_pool3d(x, weights, kernel, stride, tau)
    sizes = (*kernel, *stride)
    if case.needs_grad:
        return _PromptPool.apply(x, weights, sizes, tau, chosen)  # type: ignore[no-any-return]
    return raw("prompt_pool3d", chosen)(x, weights, *sizes, tau)  # type: ignore[no-any-return]


class PromptPool3d(nn.Module):
    """PPLLaVA's prompt-guided pooling as a module, with its projection where it is cheapest (arXiv 2411.02327, section 3.2).

    PPLLaVA applies the projector's last layer to every token and pools after it. That layer is affine and the weights of a window sum
    to 1, so the two commute exactly:

        sum_i a_i (M h_i + c) = M (sum_i a_i h_i) + c        pool(linear_2(h)) = linear_2(pool(h))

    `order="post"` applies it to the pooled tokens, one in t * h * w: for 18,432 tokens (32 frames of 24 x 24), a kernel of (2, 3, 3) and
    a layer of 4096 x 4096, 2 * 1,024 * 4096^2 = 34 GFLOP in place of 618 (the pooling has 2 * 18,432 * 4096 = 0.15).

    Args:
        kernel, stride, temperature: see `prompt_pool3d`.
        projection: an affine module (`nn.Linear`: the projector's last layer) from D to D', or None. One that is not affine (with an
            activation or a norm) gives other results before and after pooling: for that, give `order="pre"`.
        order: "post", the projection after pooling; "pre", before it, as PPLLaVA does.
        impl: of the pooling and the cosines; where visual or prompt require a gradient, only "auto" and "reference" have that of the
            cosines.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> pool = merge.PromptPool3d((2, 3, 3), projection=torch.nn.Linear(8, 16))
        >>> features, visual, prompt = torch.randn(1, 4, 6, 6, 8), torch.randn(1, 144, 5), torch.randn(1, 5)
        >>> pool(features, visual, prompt, 100.0).shape
        torch.Size([1, 2, 2, 2, 16])
    """

    def __init__(
        self,
        kernel: Sequence[int] = (2, 3, 3),
        stride: Sequence[int] | None = None,
        temperature: float = 0.01,
        *,
        projection: nn.Module | None = None,
        order: Literal["pre", "post"] = "post",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.kernel, self.stride = _windows(kernel, stride)
        self.temperature = float(number(temperature, "temperature", 0))
        if projection is not None and not isinstance(projection, nn.Module):
            raise TypeError(f"projection: expected an nn.Module or None, got {type(projection).__name__}")
        self.projection = projection
        self.order = choice(order, "order", ("pre", "post"))
        self.impl: Impl = impl

    def forward(
        self,
        features: torch.Tensor,
        visual: torch.Tensor,
        prompt: torch.Tensor,
        logit_scale: float | torch.Tensor,
        bias: float | torch.Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Pooled features [B, To, Ho, Wo, D'].

        Args:
            features: [B, T, H, W, D], or [B, N, D] with `grid`: the input of the projection (or, without one, what is to be pooled).
            visual: [B, N, C], the tokens in the space shared with the text.
            prompt: [B, C], the prompt in that space.
            logit_scale, bias: see `prompt_weights`.
            grid: (T, H, W), for features [B, N, D].
        """
        weights = prompt_weights(visual, prompt, logit_scale, bias, impl=self.impl)
        if self.projection is not None and self.order == "pre":
            features = self.projection(features)
        pooled: torch.Tensor = prompt_pool3d(
            features,
            weights,
            self.kernel,
            stride=self.stride,
            temperature=self.temperature,
            grid=grid,
            impl=self.impl,
        )
        if self.projection is not None and self.order == "post":
            pooled = self.projection(pooled)
        return pooled

    def extra_repr(self) -> str:
        """Kernel, stride, temperature and order, for print."""
        return f"kernel={self.kernel}, stride={self.stride}, temperature={self.temperature}, order={self.order!r}"
