"""Layers over axial attention: divided space-time blocks that take TimeSformer's and Frozen in Time's weights, and windows through time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from saccade._arguments import choice, grid_sizes, items, number, whole
from saccade._dispatch import Impl
from saccade.attention.axial_attention import axial_attention

__all__ = ["DividedSpaceTime", "WindowAttention"]

Tensor = torch.Tensor
Grid = tuple[int, int, int]
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_ORDERS = ("timesformer", "frozen_in_time")
_TOKENS = ("time_major", "space_major")
_INITS = ("zeros", "random")


def _heads(dim: int, heads: int) -> tuple[int, int]:
    dim, heads = whole(dim, "dim", 1), whole(heads, "heads", 1)
    if dim % heads:
        raise ValueError(f"heads: expected a number that divides dim = {dim}, got {heads}")
    return dim, heads


def _check_tokens(x: Tensor, dim: int, prefix: int, grid: Grid) -> Grid:
    grid = grid_sizes(grid, "grid")
    tokens = prefix + grid[0] * grid[1] * grid[2]
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [B, {tokens}, {dim}], got {type(x).__name__}")
    if x.ndim != 3 or x.shape[1] != tokens or x.shape[2] != dim:
        raise ValueError(f"x: expected [B, {tokens}, {dim}] for the grid {grid}, got {list(x.shape)}")
    return grid


class _Attention(nn.Module):
    """One projection to q, k and v, attention inside boxes, one projection back; q, k and v stay where the first wrote them."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, drop: float, impl: Impl) -> None:
        super().__init__()
        self.heads, self.impl = heads, impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, grid: Grid, box: Grid, prefix: int, prefix_query: Literal["global", "mean"]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = axial_attention(
            q, k, v, grid, "window", window=box, prefix=prefix, prefix_query=prefix_query, impl=self.impl
        )
        y: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return y


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(drop)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return y


class _DropPath(nn.Module):
    """Leaves a branch out for some samples in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if self.share == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - self.share)
        return x * kept / (1.0 - self.share)


class DividedSpaceTime(nn.Module):
    """A transformer block with attention along time, then along space, and a class token in front (divided space-time attention).

    order="timesformer" (Bertasius et al. 2021, arXiv 2102.05095, equations 5 to 8):

        x' = x + temporal_fc(temporal_attn(temporal_norm1(x)))   patches alone; the class token takes no part
        y  = x' + attn(norm1(x'))                                in every frame, with the class token, whose result is the mean over frames
        z  = y + mlp(norm2(y))

    order="frozen_in_time" (Bain et al. 2021, arXiv 2104.00650, section 3.1): the class token is a key of every group, and as a query
    sees all tokens; the second residual starts from x.

        x' = x + timeattn(norm3(x)),   y = x + attn(norm1(x')),   z = y + mlp(norm2(y))

    Names and shapes of the parameters are those of a block of either published model, so its weights load. Attention itself has no
    dropout. In training, `drop_path` leaves branches out by sample.

    Args:
        dim: width of a token, C.
        heads: divides dim; dim / heads is a multiple of 8 up to 256.
        order: see above.
        tokens: "time_major" (frame by frame) or "space_major" (all times of a place together). None for that of the published model:
            space_major for TimeSformer, time_major for Frozen in Time.
        mlp_ratio: hidden width of the MLP in units of dim.
        qkv_bias: whether the projections to q, k and v have one.
        time_init: "zeros": attention along time begins as in the paper's code, so that it adds nothing in TimeSformer (temporal_fc = 0),
            or one value everywhere in Frozen in Time (qkv = 0, proj = 1). "random" leaves the default.
        norm_eps: of the layer norms.
        drop, drop_path: shares in [0, 1).
        impl: of `axial_attention`.

    Example:
        >>> import torch
        >>> from saccade.attention import DividedSpaceTime
        >>> block = DividedSpaceTime(64, 2, order="frozen_in_time")
        >>> list(block(torch.randn(1, 1 + 4 * 3 * 3, 64), (4, 3, 3)).shape)
        [1, 37, 64]
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        order: Literal["timesformer", "frozen_in_time"] = "timesformer",
        tokens: Literal["time_major", "space_major"] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        time_init: Literal["zeros", "random"] = "zeros",
        norm_eps: float = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.dim, heads = _heads(dim, heads)
        self.order = choice(order, "order", _ORDERS)
        published = "space_major" if self.order == "timesformer" else "time_major"
        self.tokens = published if tokens is None else choice(tokens, "tokens", _TOKENS)
        choice(time_init, "time_init", _INITS)
        hidden = int(self.dim * number(mlp_ratio, "mlp_ratio", 0))
        for name, share in (("drop", drop), ("drop_path", drop_path)):
            if not 0 <= number(share, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {share}")
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = _Attention(dim, heads, qkv_bias, drop, impl)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = _Mlp(dim, hidden, drop)
        self.drop_path = _DropPath(float(drop_path))
        if self.order == "timesformer":
            self.temporal_norm1 = nn.LayerNorm(dim, eps=norm_eps)
            self.temporal_attn = _Attention(dim, heads, qkv_bias, drop, impl)
            self.temporal_fc = nn.Linear(dim, dim)
            emptied = [self.temporal_fc] if time_init == "zeros" else []
        else:
            self.norm3 = nn.LayerNorm(dim, eps=norm_eps)
            self.timeattn = _Attention(dim, heads, qkv_bias, drop, impl)
            emptied = [self.timeattn.qkv, self.timeattn.proj] if time_init == "zeros" else []
        for layer in emptied:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if emptied and self.order == "frozen_in_time":
            nn.init.ones_(self.timeattn.proj.weight)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens to tokens.

        Args:
            x: [B, 1 + T * H * W, C], the class token first.
            grid: (T, H, W).

        Returns:
            [B, 1 + T * H * W, C].
        """
        t, h, w = _check_tokens(x, self.dim, 1, grid)
        if self.tokens == "space_major":
            grid, time, space = (h, w, t), (1, 1, max(t, 1)), (max(h, 1), max(w, 1), 1)
        else:
            grid, time, space = (t, h, w), (max(t, 1), 1, 1), (1, max(h, 1), max(w, 1))
        if self.order == "timesformer":
            patches = x[:, 1:]
            along = self.drop_path(self.temporal_attn(self.temporal_norm1(patches), grid, time, 0, "global"))
            x = torch.cat((x[:, :1], patches + self.temporal_fc(along)), 1)
            x = x + self.drop_path(self.attn(self.norm1(x), grid, space, 1, "mean"))
        else:
            between = x + self.timeattn(self.norm3(x), grid, time, 1, "global")
            x = x + self.drop_path(self.attn(self.norm1(between), grid, space, 1, "global"))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def extra_repr(self) -> str:
        """What tells two of them apart."""
        return f"order={self.order}, tokens={self.tokens}"


class WindowAttention(nn.Module):
    """Attention inside windows of a video, by default through all its frames (the temporal layers of Seedance 1.0, arXiv 2506.09113).

    Every frame is cut into windows, and a window sees itself in all frames: over several layers with different windows the receptive field
    is the whole video. q and k are RMS-normalised by head.

    Args:
        dim: width of a token, C.
        heads: divides dim; dim / heads is a multiple of 8 up to 256.
        window: (h, w) through all frames, or (t, h, w); at the far edges what is left.
        qkv_bias: whether the projections to q, k and v have one.
        qk_norm: whether q and k are normalised.
        norm_eps: of that norm.
        impl: of `axial_attention`.

    Example:
        >>> import torch
        >>> from saccade.attention import WindowAttention
        >>> layer = WindowAttention(64, 2, (2, 2))
        >>> list(layer(torch.randn(1, 4 * 5 * 5, 64), (4, 5, 5)).shape)
        [1, 100, 64]
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Sequence[int],
        *,
        qkv_bias: bool = True,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.heads = _heads(dim, heads)
        sizes = items(window, "window")
        if len(sizes) not in (2, 3):
            raise ValueError(f"window: expected (h, w) for all frames, or (t, h, w), got {len(sizes)} sizes")
        self.window = tuple(whole(n, f"window[{i}]", 1) for i, n in enumerate(sizes))
        self.impl: Impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        norm = (lambda: nn.RMSNorm(dim // heads, eps=norm_eps)) if qk_norm else nn.Identity
        self.norm_q, self.norm_k = norm(), norm()

    def forward(self, x: Tensor, grid: Grid, rotate: Rotate | None = None) -> Tensor:
        """Tokens to tokens.

        Args:
            x: [B, T * H * W, C], frame by frame.
            grid: (T, H, W).
            rotate: applied to q and k [B, heads, S, C / heads] after their norm, such as a module of `saccade.rope` with its positions.

        Returns:
            [B, T * H * W, C].
        """
        grid = _check_tokens(x, self.dim, 0, grid)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.norm_q(q), self.norm_k(k)
        if rotate is not None:
            q, k = rotate(q, k)
        out = axial_attention(q, k, v, grid, "window", window=self.window, impl=self.impl)
        y: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return y

    def extra_repr(self) -> str:
        """Heads and window."""
        return f"heads={self.heads}, window={self.window}"
