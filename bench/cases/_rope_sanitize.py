"""Small awkward calls of the rotary ops: odd widths, single tokens, ends of tiles, head groups, padding between rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from saccade.rope import RopeSpec, apply_rope, qk_norm_rope
from saccade.testing import check_budget, rope_inputs

# head_dim, pairs, groups, identity pairs at the end, pairing, tokens, layout, dtype
SHAPES = (
    (128, 64, 1, 16, "half", 33, "bshd", torch.bfloat16),
    (128, 64, 1, 0, "interleaved", 65, "packed", torch.bfloat16),
    (64, 32, 4, 0, "interleaved", 31, "bshd", torch.float16),
    (72, 36, 1, 0, "half", 5, "bhsd", torch.float32),
    (80, 13, 1, 2, "interleaved", 1, "packed", torch.bfloat16),
    (96, 48, 2, 3, "half", 17, "bshd", torch.float32),
    (256, 128, 1, 5, "half", 3, "bhsd", torch.float16),
    (32, 16, 1, 0, "half", 129, "packed", torch.float32),
)


def _spec(head_dim: int, pairs: int, groups: int, zeros: int, pairing: str) -> RopeSpec:
    rows = [
        [0.0 if i >= pairs - zeros else (1 + 0.2 * g) * 1e4 ** (-i / pairs) for i in range(pairs)]
        for g in range(groups)
    ]
    axis = [[i % 3 for i in range(pairs)] for _ in range(groups)]
    return RopeSpec(head_dim, rows, axis, pairing, axes=3)  # type: ignore[arg-type]


def _on(x: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """On the device in the same strides, packed rows and all."""
    if x is None or device == "cpu":
        return x
    whole = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype)
    whole.copy_(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()))
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _hold(names: str, outs: Any, run: Callable[[str, Any], Any], tensors: Any, factor: float) -> None:
    """Compare outputs with the reference in the same precision and in float64."""
    peers = run("reference", tensors)
    exact = run("reference", [None if x is None else x.double() if x.is_floating_point() else x for x in tensors])
    for name, out, peer, truth in zip(names.split(), outs, peers, exact, strict=True):
        if out is not None:
            check_budget(name, out.cpu(), peer, truth, factor=factor)


def _forward(run: Callable[[str, Any], Any], tensors: Any, impl: str, device: str) -> None:
    outs = run(impl, [_on(x, device) for x in tensors])
    _hold("q k", outs, run, tensors, 2.0)


def _backward(run: Callable[[str, Any], Any], tensors: Any, gradients: Any, names: str, impl: str, device: str) -> None:
    """Gradients of the leading floating tensors by `run`, which returns (q, k)."""
    count = len(names.split())

    def gradient(name: str, values: Any) -> Any:
        leaves = [v.detach().requires_grad_() for v in values[:count]]
        outs = run(name, [*leaves, *values[count:]])
        there = [g.to(device=o.device, dtype=o.dtype) for g, o in zip(gradients, outs, strict=True)]
        return torch.autograd.grad(outs, leaves, there)

    outs = gradient(impl, [_on(x, device) for x in tensors])
    _hold(names, outs, gradient, tensors, 3.0)


def calls(impl: str, device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of everything; a call raises where its result is wrong."""
    for head_dim, pairs, groups, zeros, pairing, tokens, layout, dtype in SHAPES:
        spec = _spec(head_dim, pairs, groups, zeros, pairing)
        q, k, positions = rope_inputs(
            spec, batch=2, q_heads=8, k_heads=4, tokens=tokens, dtype=dtype, layout=layout, positions=torch.float64
        )
        label = f"{head_dim} {pairs} {pairing} {tokens} {layout} {str(dtype).removeprefix('torch.')}"
        gradients = rope_inputs(spec, batch=2, q_heads=8, k_heads=4, tokens=tokens, dtype=dtype, seed=9)[:2]

        def rope(name: str, t: Any, spec: RopeSpec = spec, inplace: bool = False) -> Any:
            return apply_rope(t[0], t[1], t[2], spec, inplace=inplace, impl=name)  # type: ignore[arg-type]

        tensors = [q, k, positions]
        yield f"apply_rope {label}", partial(_forward, rope, tensors, impl, device)
        # In place the reference must not see what was written: every run gets copies with the padding kept.
        yield f"apply_rope_ {label}", partial(_forward, partial(_in_place, rope), tensors, impl, device)
        yield f"apply_rope backward {label}", partial(_backward, rope, tensors, gradients, "dq dk", impl, device)
        for row in (False, True):
            sizes = [n * head_dim if row else head_dim for n in (8, 4)]
            weights = [torch.linspace(0.5, 1.5, n).to(dtype) for n in sizes]

            def norm(name: str, t: Any, spec: RopeSpec = spec, row: bool = row, inplace: bool = False) -> Any:
                kind = "row" if row else "head"
                return qk_norm_rope(t[0], t[1], t[4], spec, t[2], t[3], norm=kind, inplace=inplace, impl=name)  # type: ignore[arg-type]

            tensors = [q, k, *weights, positions]
            what = f"{'row' if row else 'head'} {label}"
            yield f"qk_norm_rope {what}", partial(_forward, norm, tensors, impl, device)
            yield f"qk_norm_rope_ {what}", partial(_forward, partial(_in_place, norm), tensors, impl, device)
            names = "dq dk dq_weight dk_weight"
            yield f"qk_norm_rope backward {what}", partial(_backward, norm, tensors, gradients, names, impl, device)
    yield "rope_freq_grad", partial(_learned, impl, device)


def _in_place(run: Callable[..., Any], name: str, tensors: Any) -> Any:
    """The in-place op on copies."""
    fresh = [_copy(x) for x in tensors[:2]]
    return run(name, [*fresh, *tensors[2:]], inplace=True)


def _copy(x: torch.Tensor) -> torch.Tensor:
    """A copy in the same strides, with padding between rows where x has it."""
    whole = torch.full((x.untyped_storage().nbytes() // x.itemsize,), float("nan"), dtype=x.dtype, device=x.device)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def _learned(impl: str, device: str) -> None:
    """Gradient of Mochi's dense frequencies."""
    generator = torch.Generator().manual_seed(3)
    frequencies = torch.rand(3, 4, 16, generator=generator, dtype=torch.float64) - 0.5
    spec = RopeSpec(32, frequencies.tolist(), None, "interleaved")
    q, k, positions = rope_inputs(spec, batch=2, q_heads=8, k_heads=4, tokens=37, positions=torch.float32)
    positions = positions / 512
    gradients = rope_inputs(spec, batch=2, q_heads=8, k_heads=4, tokens=37, seed=9)[:2]

    def gradient(name: str, values: Any) -> Any:
        leaf = values[3].detach().requires_grad_()
        learned = RopeSpec(32, leaf, None, "interleaved")
        outs = apply_rope(values[0], values[1], values[2], learned, impl=name)  # type: ignore[arg-type]
        there = [g.to(device=o.device, dtype=o.dtype) for g, o in zip(gradients, outs, strict=True)]
        return torch.autograd.grad(outs, [leaf], there)

    tensors = [q, k, positions, frequencies.float()]
    outs = gradient(impl, [_on(x, device) for x in tensors])
    _hold("inv_freq", outs, gradient, tensors, 3.0)
