"""Rotary embeddings: the shapes of the models that use them, against those models' own code.

Bytes: q and k read once and written once (normalised backward: read twice), positions and weights once; in place without a norm
the columns of identity pairs do not move. FLOPs: 3 per rotated element (two products and a sum), 4 more with a norm (10 in its backward),
34 per pair and token for cos and sin, which all heads share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import memory
from bench.cases import Case, Check, Counts, Problem, Request, buffer_sets
from bench.cases import _rope_peers as peers
from bench.cases._rope_calls import Inputs, heads, providers
from bench.cases._rope_oracle import Norm, expected
from bench.cases._rope_sanitize import calls
from bench.rows import Row
from saccade.rope import RopeSpec, presets
from saccade.rope import positions as place

BF16, FP32 = "bfloat16", "float32"
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """A model's rotary embedding at one size; `peer` names its code in _rope_peers."""

    name: str
    spec: Callable[[], RopeSpec]
    positions: Callable[[], torch.Tensor]
    q_heads: int
    k_heads: int
    tokens: int
    peer: str
    layout: str = "bshd"
    norm: str | None = None
    theta: float = 1e6
    sections: tuple[int, ...] = ()
    grid: Grid = (0, 0, 0)


def _qwen(name: str, video: Grid, text: int, **more: object) -> Model:
    """A prompt of text, one video and text, `text` tokens in all beside the video's."""
    tokens = text + video[0] * video[1] * video[2]
    segments = [text // 2, video, text - text // 2]
    sections = (16, 24, 24)
    return Model(
        name,
        lambda: presets.mrope(128, 1e6, sections),
        lambda: place.multimodal_positions(segments, rule="mrope")[0],
        28,
        4,
        tokens,
        "qwen2_5_vl",
        sections=sections,
        **more,  # type: ignore[arg-type]
    )


def _hope(model: Model, video: Grid, text: int) -> Model:
    segments = [text // 2, video, text - text // 2]
    return replace(
        model,
        name=model.name.replace("M-RoPE", "HoPE"),
        spec=lambda: presets.hope(128, 1e6),
        positions=lambda: place.multimodal_positions(segments, rule="hope", gamma=0.75)[0],
        sections=(),
    )


def _qwen3(model: Model, q_heads: int, k_heads: int, name: str) -> Model:
    sections = (24, 20, 20)
    return replace(
        model,
        name=name,
        spec=lambda: presets.mrope_interleaved(128, 5e6, sections),
        q_heads=q_heads,
        k_heads=k_heads,
        peer="qwen3_vl",
        norm="head",
        theta=5e6,
        sections=sections,
    )


def _grid(name: str, spec: Callable[[], RopeSpec], n: int, grid: Grid, peer: str, norm: str | None = None) -> Model:
    tokens = grid[0] * grid[1] * grid[2]
    return Model(name, spec, lambda: place.grid_positions(grid), n, n, tokens, peer, norm=norm, grid=grid)


def _wan(name: str, n: int, grid: Grid, norm: str | None = "row") -> Model:
    return _grid(name, lambda: presets.wan(128), n, grid, "wan", norm)


def _decode(tokens: int) -> Model:
    base = _qwen(f"Qwen2.5-VL-7B decode of {tokens}", (0, 0, 0), tokens)
    return replace(base, positions=lambda: torch.arange(32768, 32768 + tokens).expand(3, -1).contiguous())


def _cpu(quick: bool) -> list[tuple[Model, str, tuple[str, ...]]]:
    """(model, mode, dtypes); the first model is the case that the thresholds of `checks` are about."""
    video, text = ((1, 28, 36), 16) if quick else ((8, 28, 36), 128)  # 1,024 or 8,192 tokens
    grid = (1, 32, 32) if quick else (8, 32, 32)
    plain = _qwen("Qwen2.5-VL M-RoPE", video, text, layout="bhsd")
    head = _qwen3(plain, 28, 4, "Qwen3-VL norm + M-RoPE")
    row = _wan("Wan norm + RoPE", 12, grid)
    both = (FP32, BF16)
    if quick:
        return [
            (plain, "forward", both),
            (head, "forward", (BF16,)),
            (row, "forward", (BF16,)),
            (plain, "backward", (BF16,)),
        ]
    return [
        (plain, "forward", both),
        (head, "forward", both),
        (row, "forward", both),
        (_hope(plain, video, text), "forward", both),
        (plain, "backward", both),
        (head, "backward", (BF16,)),
        (row, "backward", (BF16,)),
        (replace(plain, name="Qwen2.5-VL M-RoPE, [B, S, H, D] memory", layout="bshd"), "forward", (BF16,)),
    ]


def _cuda(quick: bool) -> list[tuple[Model, str, tuple[str, ...]]]:
    """Most important first: a run that is cut short has them."""
    video, text = ((4, 28, 36), 64) if quick else ((32, 28, 36), 512)  # 4,096 or 32,768 tokens
    big: Grid = (3, 45, 80) if quick else (21, 45, 80)
    qwen = _qwen("Qwen2.5-VL-7B M-RoPE", video, text)
    qwen3 = _qwen3(qwen, 32, 8, "Qwen3-VL-8B norm + M-RoPE")
    wan, wan_rope = _wan("Wan2.1-14B norm + RoPE", 40, big), _wan("Wan2.1-14B RoPE", 40, big, None)
    hunyuan = _grid("HunyuanVideo RoPE", lambda: presets.hunyuan_video(128), 24, (33, 45, 80), "diffusers")
    cog = _grid("CogVideoX-5B RoPE", lambda: presets.cogvideox(64), 48, (13, 30, 45), "diffusers")
    ltx_grid = (16, 34, 60)
    ltx = _grid("LTX-Video RoPE", lambda: presets.ltx(64, 32), 32, ltx_grid, "ltx")
    ltx = replace(ltx, positions=lambda: place.ltx_positions(ltx_grid, scale=(8 / 25, 32, 32)))
    order = [
        (qwen, "forward", (BF16,)),
        (wan_rope, "forward", (BF16,)),
        (qwen, "backward", (BF16,)),
        (wan_rope, "backward", (BF16,)),
        (wan, "forward", (BF16,)),
        (qwen3, "forward", (BF16,)),
        (_hope(qwen, video, text), "forward", (BF16,)),
        (wan, "backward", (BF16,)),
        (qwen3, "backward", (BF16,)),
    ]
    if quick:
        return order
    return [
        *order,
        (hunyuan, "forward", (BF16,)),
        (ltx, "forward", (BF16,)),
        (cog, "forward", (BF16,)),
        (_wan("Wan2.1-1.3B norm + RoPE", 12, (21, 30, 52)), "forward", (BF16,)),
        *((_decode(n), "forward", (BF16,)) for n in (1, 16, 256)),
        (qwen, "forward", (FP32,)),
        (hunyuan, "backward", (BF16,)),
    ]


def counts(model: Model, spec: RopeSpec, mode: str, size: int, *, inplace: bool = False) -> Counts:
    """Bytes and FLOPs of a case, see above; `size` is bytes per element."""
    elements = (model.q_heads + model.k_heads) * model.tokens * spec.head_dim
    rotated = 2 * (spec.active[1] - spec.active[0]) / spec.head_dim
    moved = rotated if inplace and model.norm is None else 1.0
    passes = 3 if mode == "backward" and model.norm else 2
    norm_flops = 0 if model.norm is None else 10 if mode == "backward" else 4
    assert spec.axes is not None
    angles = 34 * model.tokens * spec.groups * (spec.active[1] - spec.active[0])
    small = spec.axes * model.tokens * 8
    if model.norm:
        small += size * (spec.head_dim * (model.q_heads + model.k_heads) if model.norm == "row" else 2 * spec.head_dim)
    return Counts(
        bytes=round(passes * elements * size * moved) + small,
        flops=round(elements * (3 * rotated + norm_flops)) + angles,
    )


def _peer(model: Model, inputs: Inputs) -> peers.Peer:
    q, k = inputs.pairs[0]
    spec, positions, norm = inputs.spec, inputs.positions, inputs.norm
    if model.peer.startswith("qwen"):
        return peers.qwen(model.peer, spec, positions, q, k, norm, model.theta, model.sections)
    if model.peer == "wan":
        return peers.wan(q, k, norm, model.grid)
    return (peers.diffusers_ltx if model.peer == "ltx" else peers.diffusers_pairs)(spec, positions, q, k)


def _build(model: Model, mode: str, dtype: str, request: Request) -> Problem:
    kind, device, spec = getattr(torch, dtype), request.device, model.spec()
    shapes = [(1, n, model.tokens, spec.head_dim) for n in (model.q_heads, model.k_heads)]
    make = partial(heads, dtype=kind, device=device, layout=model.layout)
    sets = buffer_sets(counts(model, spec, mode, kind.itemsize).bytes, request) if mode == "forward" else 1
    pairs = tuple((make(shapes[0], seed=2 * i), make(shapes[1], seed=2 * i + 1)) for i in range(sets))
    positions = model.positions()[:, None].to(device)
    norm = None
    if model.norm is not None:
        sizes = [n * spec.head_dim if model.norm == "row" else spec.head_dim for n in (model.q_heads, model.k_heads)]
        q_weight, k_weight = (1 + 0.1 * heads((1, 1, 1, n), kind, device, "bhsd", 90 + n).flatten() for n in sizes)
        norm = Norm(q_weight, k_weight, model.norm == "row")
    gradients = (make(shapes[0], seed=70), make(shapes[1], seed=71)) if mode == "backward" else pairs[0]
    inputs = Inputs(pairs, gradients, positions, spec, norm)
    competitors = providers(
        inputs,
        ("cuda", "triton") if device == "cuda" else ("cpu",),
        mode,
        lambda: _peer(model, inputs),
        lambda: peers.formula(spec, positions, *pairs[0], norm),
        (lambda: peers.liger(spec, positions, pairs[0][0])) if model.peer == "qwen2_5_vl" else None,
        "transformers" if model.peer.startswith("qwen") else "diffusers",
        counts(model, spec, mode, kind.itemsize, inplace=True),
        build_table=bool(model.sections) and model.norm is None,
    )
    wanted = gradients if mode == "backward" else None
    return Problem(competitors, lambda: expected(pairs[0], norm, positions, spec, wanted), sets)


def cases(request: Request) -> list[Case]:
    """All cases of the family, most important first."""
    found = []
    for model, mode, dtypes in (_cuda if request.device == "cuda" else _cpu)(request.quick):
        spec = model.spec()
        for dtype in dtypes:
            shape = f"1x{model.q_heads}+{model.k_heads}x{model.tokens}x{spec.head_dim}"
            size = getattr(torch, dtype).itemsize
            op = "apply_rope" if model.norm is None else "qk_norm_rope"
            build = partial(_build, model, mode, dtype, request)
            found.append(Case("rope", model.name, op, mode, dtype, shape, counts(model, spec, mode, size), build))  # type: ignore[arg-type]
    return found


def checks(rows: Sequence[Row], request: Request) -> list[Check]:
    """The thresholds of the family, from the rows of this run."""
    from bench.cases._rope_checks import cpu_checks, cuda_checks

    if request.device == "cuda":
        return cuda_checks(rows)
    return cpu_checks(rows, {c.name + c.mode + c.dtype: c for c in cases(request)}, memory.peak_extra_fresh, request)


def sanitize(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Small awkward calls of every op, for compute-sanitizer."""
    return calls(impl, device)
