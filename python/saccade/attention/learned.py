"""`LearnedSparseMask`: SwinBERT's mask over video tokens, learned softly, then hardened into a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from saccade._arguments import choice, number, whole
from saccade.attention.layout import BlockLayout

__all__ = ["LearnedSparseMask", "MaskDensity"]

Tensor = torch.Tensor
UPSTREAM = "learn_vid_att.weight"


class MaskDensity(NamedTuple):
    """What a hardened mask keeps.

    Args:
        kept: share of the video-video pairs that are kept, the diagonal included: what a kernel could save at best.
        blocks: share of the block pairs that are computed, text included: what it saves at this block size.
        between: share of the pairs whose soft bias is neither near 0 (above -1) nor out of reach (below -20): these, and no others, the
            hardened mask treats in another way than the soft one.
    """

    kept: float
    blocks: float
    between: float


class LearnedSparseMask(nn.Module):
    """One mask of L x L video tokens, shared by all samples, heads and layers (Lin et al. 2022, SwinBERT, arXiv 2111.13196, section 3.2).

    With A = sigmoid(weight), mask M = I + (1 - I) A: every token sees itself. Soft, it is a bias -depth (1 - M) on the scores, and
    `sparsity_loss` pulls it towards 0. Hard, it is M >= threshold, and `layout` gives it to the block-sparse kernels.
    `sparse_attention` returns its gradient summed over samples, heads and (by autograd) layers, deterministically.

    The bias is -depth sigmoid(-weight) in fp32: published code takes 1 - sigmoid in the model's dtype, and in fp16, where the numbers
    below 1 are 2^-11 apart, its bias is 0, -4.9, -9.8, ... Two properties of the published settings (normal init, depth 10^4) to know:
    at the start the bias is near -5000, so every video token sees itself alone; and the task reaches a weight only where its bias is
    within reach of the softmax, from about 6 upwards. Start with `init=8` to let the task choose.

    Args:
        tokens: L, video tokens (SwinBERT: 784 for 32 frames of 224 x 224).
        init: standard normal where None, else every weight.
        depth: of the bias of a pair that is not kept.
        hard: whether `bias` takes the hardened mask, without gradient.
        threshold: of M, for the hard mask; above 0, at most 1.
        device, dtype: of the weight.

    Example:
        >>> mask = LearnedSparseMask(4, init=-3.0)
        >>> mask.bias(text=2)[0, 0].detach().round(decimals=-2)
        tensor([[     0., -10000.,      0.,      0.,      0.,      0.],
                [     0.,      0.,      0.,      0.,      0.,      0.],
                [-10000., -10000.,      0.,  -9500.,  -9500.,  -9500.],
                [-10000., -10000.,  -9500.,      0.,  -9500.,  -9500.],
                [-10000., -10000.,  -9500.,  -9500.,      0.,  -9500.],
                [-10000., -10000.,  -9500.,  -9500.,  -9500.,      0.]])
    """

    def __init__(
        self,
        tokens: int,
        *,
        init: float | None = None,
        depth: float = 1e4,
        hard: bool = False,
        threshold: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tokens = whole(tokens, "tokens", 1)
        start = None if init is None else float(number(init, "init"))
        self.depth, self.hard = float(number(depth, "depth", 0)), bool(hard)
        self.threshold = check_threshold(threshold)
        weight = torch.empty(self.tokens, self.tokens, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight.normal_() if start is None else weight.fill_(start))

    # ---- the mask ------------------------------------------------------------------------------------------------------
    def values(self) -> Tensor:
        """[L, L] fp32: M, soft."""
        return torch.where(self._diagonal(), 1.0, self.weight.float().sigmoid())

    def kept(self, threshold: float | None = None) -> Tensor:
        """[L, L] bool: M >= threshold, exactly as fp32 has it; `self.threshold` where None."""
        level = self.threshold if threshold is None else check_threshold(threshold)
        with torch.no_grad():
            return self.values() >= level

    def bias(self, text: int = 0) -> Tensor:
        """[1, 1, T + L, T + L] fp32, added to scores: text sees earlier text, itself and all video; video sees video by the mask, no text.

        What is not seen has -depth, as published; no row is without a key that has 0.

        Args:
            text: T, caption tokens before the video.
        """
        count = whole(text, "text", 0)
        if self.hard:
            video = torch.where(self.kept(), 0.0, -self.depth)
        else:
            video = torch.where(self._diagonal(), 0.0, -self.depth * (-self.weight.float()).sigmoid())
        if count == 0:
            return video[None, None]
        frame = torch.where(self._seen(count)[:count], 0.0, -self.depth)
        hidden = torch.full((self.tokens, count), -self.depth, device=self.weight.device)
        return torch.cat((frame, torch.cat((hidden, video), 1)))[None, None]

    def forward(self, text: int = 0) -> Tensor:
        """`bias`."""
        return self.bias(text)

    def sparsity_loss(self) -> Tensor:
        """Mean of |(1 - I) A| over all L x L pairs; SwinBERT adds 0.5 of it to the loss (0.1 for TVC). Soft also where `hard` is set."""
        off = self.weight.float().sigmoid().masked_fill(self._diagonal(), 0.0)
        return off.abs().mean()

    def harden(self, threshold: float | None = None) -> LearnedSparseMask:
        """Take the hard mask from now on; returns self."""
        if threshold is not None:
            self.threshold = check_threshold(threshold)
        self.hard = True
        return self

    def layout(
        self,
        text: int = 0,
        *,
        threshold: float | None = None,
        learned: bool = True,
        block: int | tuple[int, int] = 64,
    ) -> BlockLayout:
        """The hardened mask with T text tokens before it, exact for every pair; reads the number of partial blocks from the device.

        Attention over it equals that with the hard `bias` wherever exp(-depth) is 0 in fp32: for a depth above 104.

        Args:
            text: T.
            threshold: of M; `self.threshold` where None.
            learned: False leaves video-video pairs as they are, all seen: the layout to train the soft bias in.
            block: 64 or 128, or (of queries, of keys).
        """
        count = whole(text, "text", 0)
        q_block, k_block = block if isinstance(block, (tuple, list)) else (block, block)
        seen = self._seen(count)
        if learned:
            seen[count:, count:] = self.kept(threshold)
        return BlockLayout.from_mask(seen, q_block=q_block, k_block=k_block)

    def density(
        self, text: int = 0, *, threshold: float | None = None, block: int | tuple[int, int] = 64
    ) -> MaskDensity:
        """What the hardened mask keeps, of pairs and of blocks; reads the device."""
        blocks = self.layout(text, threshold=threshold, block=block).density
        with torch.no_grad():
            soft = (self.depth * (-self.weight.float()).sigmoid()).masked_fill(self._diagonal(), 0.0)
        between = ((soft > 1) & (soft < 20)).float().mean()
        return MaskDensity(float(self.kept(threshold).float().mean()), float(blocks), float(between))

    # ---- other lengths -------------------------------------------------------------------------------------------------
    def resized(
        self,
        tokens: int,
        how: str = "interpolate",
        *,
        frame: int | None = None,
        outside: float = -4.0,
    ) -> LearnedSparseMask:
        """A new mask for another number of video tokens, made from this one's weights.

        Args:
            tokens: L of the new one.
            how: "interpolate", bilinear over the L x L map (published code computes this and drops it: its weights stay as they were).
                "frames", linear over the frames of both tokens, for each pair of places in a frame: the map of a video with more
                frames. "tile", copies along the diagonal, the last one cut where it does not fit; all other weights become `outside`
                (published code leaves them random).
            frame: tokens of a frame, for "frames": 49 in SwinBERT. Both lengths must be multiples of it.
            outside: weight of pairs in different copies.
        """
        size, old = whole(tokens, "tokens", 1), self.weight.detach()
        method = choice(how, "how", ("interpolate", "frames", "tile"))
        if (frame is None) == (method == "frames"):
            raise ValueError(
                f'frame: expected the tokens of a frame with how="frames" alone, got {frame} with how="{method}"'
            )
        if method == "interpolate":
            new = _scaled(old[None, None], size)[0, 0]
        elif method == "frames":
            per = whole(frame, "frame", 1)
            for name, length in (("tokens", size), ("the mask's tokens", self.tokens)):
                if length % per:
                    raise ValueError(f"frame: expected a number that divides {name}, {length}, got {per}")
            split = old.reshape(self.tokens // per, per, self.tokens // per, per).permute(1, 3, 0, 2)
            new = _scaled(split, size // per).permute(2, 0, 3, 1).reshape(size, size)
        else:
            new = torch.full((size, size), float(number(outside, "outside")), device=old.device, dtype=old.dtype)
            for start in range(0, size, self.tokens):
                part = min(self.tokens, size - start)
                new[start : start + part, start : start + part] = old[:part, :part]
        out = LearnedSparseMask(
            size,
            init=0.0,
            depth=self.depth,
            hard=self.hard,
            threshold=self.threshold,
            device=old.device,
            dtype=old.dtype,
        )
        with torch.no_grad():
            out.weight.copy_(new)
        return out

    # ---- published checkpoints -----------------------------------------------------------------------------------------
    @classmethod
    def from_upstream(cls, weights: Tensor | Mapping[str, Tensor], **options: Any) -> LearnedSparseMask:
        """The mask of a SwinBERT checkpoint: its state dict, or the entry `learn_vid_att.weight` [L * L, 1] of it.

        Args:
            weights: as above.
            options: of the class.
        """
        if isinstance(weights, Mapping):
            if UPSTREAM not in weights:
                raise ValueError(f"weights: expected a state dict with {UPSTREAM}, got {len(weights)} other entries")
            weights = weights[UPSTREAM]
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: expected a tensor [L * L, 1] or a state dict, got {type(weights).__name__}")
        side = round(weights.numel() ** 0.5)
        if side * side != weights.numel() or side == 0:
            raise ValueError(f"weights: expected L * L numbers, got shape {list(weights.shape)}")
        out = cls(side, init=0.0, device=weights.device, dtype=weights.dtype, **options)
        with torch.no_grad():
            out.weight.copy_(weights.detach().reshape(side, side))
        return out

    def upstream_state(self) -> dict[str, Tensor]:
        """{"learn_vid_att.weight": [L * L, 1]}, what a SwinBERT checkpoint holds."""
        return {UPSTREAM: self.weight.detach().reshape(-1, 1)}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # As an attribute `learn_vid_att` of a model this loads a published checkpoint as it is.
        given = state_dict.get(prefix + "weight")
        if isinstance(given, Tensor) and given.shape == (self.tokens**2, 1):
            state_dict = {**state_dict, prefix + "weight": given.reshape(self.tokens, self.tokens)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Size and mode."""
        return f"{self.tokens}, depth={self.depth:g}, " + (f"hard at {self.threshold:g}" if self.hard else "soft")

    def _diagonal(self) -> Tensor:
        return torch.eye(self.tokens, dtype=torch.bool, device=self.weight.device)

    def _seen(self, text: int) -> Tensor:
        """[T + L, T + L] bool: all that may be seen, before the learned mask."""
        size = text + self.tokens
        seen = torch.ones(size, size, dtype=torch.bool, device=self.weight.device)
        seen[text:, :text] = False
        seen[:text, :text] = seen[:text, :text].tril()
        return seen


def check_threshold(value: Any) -> float:
    """`value` as a threshold of M, which lies above 0 and at 1 on the diagonal."""
    level = float(number(value, "threshold", 0))
    if level > 1:
        raise ValueError(f"threshold: expected a number above 0, at most 1, got {value}")
    return level


def _scaled(maps: Tensor, size: int) -> Tensor:
    """[.., n, n] to [.., size, size], bilinear."""
    wide = torch.nn.functional.interpolate(maps.float(), size=(size, size), mode="bilinear", align_corners=False)
    return wide.to(maps.dtype)
