"""The peers of the rotary ops: the functions that transformers, diffusers and liger-kernel run, called as their models call them.

Every peer is a function f(q, k, cos, sin) -> (q, k) on [B, H, S, D] views in the memory layout of its model, with the weights
of its norms and its table of cos and sin prepared outside.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Refused
from bench.cases._rope_oracle import Norm
from saccade.rope import RopeSpec

Tensor = torch.Tensor
Function = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Peer:
    """A peer's function, its table, the weights that take a gradient, and how it builds its table (None: not timed)."""

    function: Function
    table: tuple[Tensor, Tensor]
    weights: tuple[Tensor, ...] = ()
    build_table: Callable[[], tuple[Tensor, Tensor]] | None = None


def installed(package: str) -> str:
    """Version, or "" where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{name.partition('.')[0]} is not installed ({error.name})") from error


def columns(spec: RopeSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A model's table [B, G, S, D] (G groups of heads) for any spec: fp32 angles, cos and sin stored in `dtype`."""
    frequencies = torch.tensor(spec.dense(), dtype=torch.float32, device=positions.device)  # [A, G, R]
    angle = torch.zeros(())
    for place, row in zip(positions.float(), frequencies, strict=True):
        angle = angle + place[:, None, :, None] * row[:, None, :]
    angle = torch.cat((angle, angle), -1) if spec.pairing == "half" else angle.repeat_interleave(2, -1)
    return (angle.cos() * spec.attention_factor).to(dtype), (angle.sin() * spec.attention_factor).to(dtype)


def formula(spec: RopeSpec, positions: Tensor, q: Tensor, k: Tensor, norm: Norm | None) -> Peer:
    """The textbook code in plain torch, for machines without the peer's package."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if spec.pairing == "half":
            a, b = x.chunk(2, -1)
            turned = torch.cat((-b, a), -1)
        else:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((-b, a), -1).flatten(-2)
        return x * cos + turned * sin

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        assert norm is not None
        y = y * torch.rsqrt(y.square().mean((1, 3) if norm.row else 3, keepdim=True) + norm.eps)
        return y.to(x.dtype) * (weight.view(x.shape[1], 1, -1) if norm.row else weight)

    weights = () if norm is None else tuple(w.detach().clone().requires_grad_() for w in (norm.q_weight, norm.k_weight))

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if weights:
            q, k = scaled(q, weights[0]), scaled(k, weights[1])
        return turn(q, cos, sin), turn(k, cos, sin)

    cos, sin = columns(spec, positions, q.dtype)
    if spec.groups > 1:
        cos, sin = (t.repeat_interleave(q.shape[1] // spec.groups, 1) for t in (cos, sin))
    return Peer(run, (cos, sin), weights)


def _config(module: Any, name: str, q: Tensor, k: Tensor, theta: float, sections: tuple[int, ...]) -> Any:
    """A text config whose rotary embedding is that of the model; transformers 4 and 5 name its parameters differently."""
    heads, head_dim = q.shape[1], q.shape[3]
    extra: dict[str, Any] = {"mrope_section": list(sections)}
    if "Qwen3" in name:
        extra["mrope_interleaved"] = True
    options = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": k.shape[1],
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
    }
    major = int(installed("transformers").partition(".")[0] or 0)
    if major >= 5:
        parameters = {"rope_type": "default", "rope_theta": theta, **extra}
        return getattr(module, name)(**options, rope_parameters=parameters)
    return getattr(module, name)(**options, rope_theta=theta, rope_scaling={"rope_type": "default", **extra})


def qwen(
    model: str,
    spec: RopeSpec,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    norm: Norm | None,
    theta: float,
    sections: tuple[int, ...],
) -> Peer:
    """Qwen2.5-VL ("qwen2_5_vl") or, with a norm over each head, Qwen3-VL ("qwen3_vl"), from transformers.

    Where `sections` is empty (HoPE: transformers has no such model) the table is ours, in the dtype that theirs would have.
    """
    modeling = _module(f"transformers.models.{model}.modeling_{model}")
    configuration = _module(f"transformers.models.{model}.configuration_{model}")
    prefix = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VLText"}[model]
    config_name = {"qwen2_5_vl": "Qwen2_5_VLTextConfig", "qwen3_vl": "Qwen3VLTextConfig"}[model]
    apply = getattr(modeling, "apply_rotary_pos_emb", None)
    old = apply is None  # before transformers 5 the sections were picked in the function, from a table of three planes
    if old:
        apply = modeling.apply_multimodal_rotary_pos_emb
    build = None
    if sections:
        config = _config(configuration, config_name, q, k, theta, sections)
        rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(config).to(q.device)
        build = lambda: rotary(q, positions)  # noqa: E731
        table = build()
    else:
        table = tuple(t.squeeze(1) for t in columns(spec, positions, q.dtype))
        if old:
            table = tuple(t.expand(3, *t.shape) for t in table)
    norms: tuple[Any, ...] = ()
    if norm is not None:
        kind = getattr(modeling, f"{prefix}RMSNorm")
        norms = tuple(kind(q.shape[3], eps=norm.eps).to(q.device) for _ in range(2))
        for layer, weight in zip(norms, (norm.q_weight, norm.k_weight), strict=True):
            layer.weight = torch.nn.Parameter(weight.detach().clone())

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if norms:
            q, k = norms[0](q), norms[1](k)
        return apply(q, k, cos, sin, list(sections or (64,))) if old else apply(q, k, cos, sin)  # type: ignore[no-any-return]

    return Peer(run, table, tuple(layer.weight for layer in norms), build)


class _Pair:
    """Carries the rotated q and k out of a processor that goes on to attention and output projections."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.q, self.k = q, k

    def flatten(self, *_: int) -> _Pair:
        return self

    def type_as(self, _: Tensor) -> _Pair:
        return self


def _same(x: Any) -> Any:
    return x


class _WanAttention:
    """What WanAttnProcessor asks of its module, with projections that pass through, so that only norm and rotation run."""

    add_k_proj = None
    fused_projections = False
    is_cross_attention = False
    to_q = to_k = to_v = staticmethod(_same)
    to_out = (_same, _same)

    def __init__(self, heads: int, norm_q: Any, norm_k: Any) -> None:
        self.heads, self.norm_q, self.norm_k = heads, norm_q, norm_k


def wan(q: Tensor, k: Tensor, norm: Norm | None, grid: tuple[int, int, int]) -> Peer:
    """diffusers' own WanAttnProcessor up to where attention would begin, with its own table."""
    module = _module("diffusers.models.transformers.transformer_wan")
    code = module.WanAttnProcessor.__call__
    scope = {**module.__dict__, "dispatch_attention_fn": lambda query, key, value, **_: _Pair(query, key)}
    call = types.FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
    processor = module.WanAttnProcessor()
    heads, head_dim = q.shape[1], q.shape[3]
    norms: list[Any] = []
    if norm is not None:
        norms = [torch.nn.RMSNorm(heads * head_dim, eps=norm.eps).to(q.device) for _ in range(2)]
        for layer, weight in zip(norms, (norm.q_weight, norm.k_weight), strict=True):
            layer.weight = torch.nn.Parameter(weight.detach().clone())
    attention = _WanAttention(heads, *(norms or (_same, _same)))

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        flat_q, flat_k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # views: the memory is [B, S, H, D]
        both = call(processor, attention, flat_q, flat_k, None, (cos, sin))
        return both.q.transpose(1, 2), both.k.transpose(1, 2)

    rotary = module.WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024).to(q.device)
    latent = torch.empty(1, 1, *grid, device=q.device)
    return Peer(run, rotary(latent), tuple(n.weight for n in norms), lambda: rotary(latent))


def diffusers_pairs(spec: RopeSpec, positions: Tensor, q: Tensor, k: Tensor) -> Peer:
    """diffusers' `apply_rotary_emb` on [B, H, S, D], as CogVideoX and HunyuanVideo call it; table fp32 [S, D]."""
    apply = _module("diffusers.models.embeddings").apply_rotary_emb
    cos, sin = (t[0, 0] for t in columns(spec, positions, torch.float32))
    return Peer(lambda q, k, cos, sin: (apply(q, (cos, sin)), apply(k, (cos, sin))), (cos, sin))


def diffusers_ltx(spec: RopeSpec, positions: Tensor, q: Tensor, k: Tensor) -> Peer:
    """diffusers' LTX-Video rotation of [B, S, H * D] with a table of that width, fp32."""
    apply = _module("diffusers.models.transformers.transformer_ltx").apply_rotary_emb
    heads = q.shape[1]
    cos, sin = (t.transpose(1, 2).flatten(2) for t in columns(spec, positions, torch.float32))

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        out = (apply(x.transpose(1, 2).flatten(2), (cos, sin)) for x in (q, k))
        q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in out)
        return q, k

    return Peer(run, (cos, sin))


def liger(spec: RopeSpec, positions: Tensor, q: Tensor) -> Peer:
    """liger-kernel's rotary op; it takes the table that transformers 5 makes, with the sections already picked."""
    if q.device.type != "cuda":
        raise Refused("liger-kernel's rotary op is a Triton kernel and needs a CUDA device")
    apply = _module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    if "cos" not in inspect.signature(apply).parameters:
        raise Refused("this version of liger-kernel has another signature")
    cos, sin = (t.squeeze(1) for t in columns(spec, positions, q.dtype))
    return Peer(lambda q, k, cos, sin: apply(q, k, cos, sin), (cos, sin))
