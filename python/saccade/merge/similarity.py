"""Cosines of matching rows: of a token and its prompt, and of a place in one frame and the next. No score matrix exists."""

from __future__ import annotations

from typing import Any

import torch

from saccade import _dispatch
from saccade._arguments import number, whole
from saccade._dispatch import Case, Impl, raw
from saccade._tensors import float64_refusals, names
from saccade.merge._check import check_device, check_like, check_values
from saccade.reference import row_similarity as reference

__all__ = ["frame_similarity", "prompt_similarity", "prompt_weights"]

NO_GRADIENT = "no gradient; the reference has one"


def no_gradient(*tensors: torch.Tensor) -> tuple[tuple[str, str], ...]:
    """Refusals of the fast implementations where a gradient is wanted: nothing is detached in silence."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return ()
    return tuple((name, NO_GRADIENT) for name in ("cuda", "triton", "cpu"))


def _case(x: torch.Tensor, *others: Any, **_: Any) -> Case:
    tensors = [t for t in others if isinstance(t, torch.Tensor)]
    return _dispatch.case_of(x, *tensors, refused=no_gradient(x, *tensors) + float64_refusals(x))


def cosines(op: str, x: torch.Tensor, y: torch.Tensor, impl: str) -> torch.Tensor:
    """Cosine of matching rows [B, N] of x and y [B, N, C], for the public function `op`."""
    chosen = _dispatch.select(op, impl, _case(x, y))
    alike: torch.Tensor = (reference.row_similarity if chosen == "reference" else raw("row_similarity", chosen))(x, y)
    return alike


def by_frame(x: Any, frames: int | None, name: str = "x") -> tuple[torch.Tensor, int]:
    """Tokens [B, T * P, C] (a view where the strides allow it) and T, of [B, T * P, C] with `frames` or of [B, T, P, C]."""
    if isinstance(x, torch.Tensor) and x.ndim == 4:
        x = check_values(name, x, "[B, T, P, C]")
        if frames is not None and whole(frames, "frames", 1) != x.shape[1]:
            raise ValueError(f"frames: expected {x.shape[1]} or None for shape {list(x.shape)}, got {frames}")
        return x.flatten(1, 2), x.shape[1]
    x = check_values(name, x, "[B, T * P, C]")
    if frames is None:
        raise ValueError(f"frames: expected the number of frames, for {name} of shape {list(x.shape)}")
    count = whole(frames, "frames", 1)
    if x.shape[1] % count:
        raise ValueError(f"frames: {count} frames do not divide {x.shape[1]} tokens ({name} {list(x.shape)})")
    return x, count


@_dispatch.public_op(_case)
def frame_similarity(
    x: torch.Tensor, frames: int | None = None, *, stride: int = 1, impl: Impl = "auto"
) -> torch.Tensor:
    """Cosine of every token with the token at its place `stride` frames before (FrameFusion, arXiv 2501.01986, section 3).

    Differentiable in x, by the reference alone: the fast implementations refuse where x requires a gradient.

    Args:
        x: [B, T * P, C], tokens frame by frame, or [B, T, P, C]; fp32, fp16, bf16 (fp64 by the reference), any strides.
        frames: T; None for x [B, T, P, C].
        stride: distance of the frames compared, at least 1.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, T - stride, P] fp32 (fp64 for fp64); entry t compares frames t + stride and t. [B, 0, P] where there are no such frames. 0
        where a row is zero, NaN where one is not finite.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]]])  # two frames of two tokens
        >>> merge.frame_similarity(x, 2).tolist()
        [[[1.0, 0.0]]]
    """
    x, count = by_frame(x, frames)
    step = whole(stride, "stride", 1)
    places = x.shape[1] // count
    pairs = max(count - step, 0)
    later, before = x[:, min(step, count) * places :], x[:, : pairs * places]
    return cosines("frame_similarity", later, before, impl).reshape(x.shape[0], pairs, places)


@_dispatch.public_op(_case)
def prompt_similarity(visual: torch.Tensor, prompt: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """Cosine of every visual token with the prompt of its own sample (PPLLaVA, arXiv 2411.02327, section 3.2).

    PPLLaVA forms the cosines with all prompts of the batch and takes the diagonal; here the others never exist, and the prompt is not
    repeated in memory. Differentiable in both, by the reference alone: the fast implementations refuse where a gradient is wanted.

    Args:
        visual: [B, N, C], embeddings in the space shared with the text, fp32, fp16, bf16 (fp64 by the reference), any strides.
        prompt: [B, C], of visual's dtype.
        impl: "auto", or one of "cuda", "triton", "cpu", "reference", which raises where it cannot run.

    Returns:
        [B, N] fp32 (fp64 for fp64). 0 where a row is zero, NaN where one is not finite.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> merge.prompt_similarity(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[3.0, 0.0]])).tolist()
        [[1.0, 0.0]]
    """
    visual = check_values("visual", visual, "[B, N, C]")
    prompt = check_like("prompt", prompt, visual, "visual", (visual.shape[0], visual.shape[2]))
    return cosines("prompt_similarity", visual, prompt[:, None].expand(visual.shape), impl)


def prompt_weights(
    visual: torch.Tensor,
    prompt: torch.Tensor,
    logit_scale: float | torch.Tensor,
    bias: float | torch.Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """How much the prompt asks for each token: the weights of `prompt_pool3d` (PPLLaVA, arXiv 2411.02327, section 3.2).

        p = softmax over all N tokens of (logit_scale * cos(visual_n, prompt) + bias_n)

    fp32 whatever comes in: uniform weights over 18,432 tokens are 5e-5, which fp16 no longer holds as a normal number. Differentiable
    in visual and prompt (see `prompt_similarity`), in logit_scale and bias.

    Args:
        visual: [B, N, C]; see `prompt_similarity`.
        prompt: [B, C].
        logit_scale: what multiplies the cosine, a number or a tensor of one element: for CLIP, whose parameter is its logarithm,
            `model.logit_scale.exp()`.
        bias: added to the logits, a number or a tensor that spreads to [B, N]. One number for all tokens (SigLIP's) changes nothing.
        impl: of the cosines.

    Returns:
        [B, N] fp32 (fp64 for fp64). A token that is not finite has weight 0; a prompt that is not finite gives NaN.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.

    Example:
        >>> import torch
        >>> from saccade import merge
        >>> p = merge.prompt_weights(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[3.0, 0.0]]), 100.0)
        >>> p.tolist()
        [[1.0, 3.783505853677006e-44]]
    """
    cosine = prompt_similarity(visual, prompt, impl=impl)
    unfit = cosine.isnan()
    logits = cosine.where(~unfit, 0.0) * _scale(logit_scale, cosine)
    if bias is not None:
        logits = logits + _bias(bias, cosine)
    weights: torch.Tensor = logits.masked_fill(unfit, float("-inf")).softmax(-1)
    return weights


def _scale(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return number(value, "logit_scale")
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise ValueError(f"logit_scale: expected one float, got {names(value.dtype)} {list(value.shape)}")
    if value.ndim:
        check_device("logit_scale", value, like, "visual")
    return value.reshape(()).to(like.dtype)


def _bias(value: Any, like: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return number(value, "bias")
    batch, tokens = like.shape
    shape = (1, 1, *value.shape)[-2:] if value.ndim <= 2 else ()
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] not in (1, tokens):
        raise ValueError(
            f"bias: expected a number or a tensor that spreads to [{batch}, {tokens}], got {list(value.shape)}"
        )
    if value.ndim:
        check_device("bias", value, like, "visual")
    return value.to(like.dtype)
