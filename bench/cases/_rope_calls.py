"""Inputs of a rotary case and its competitors as calls: the copy, ours, the peer eagerly and compiled, liger-kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config

import saccade
from bench.cases import Call, Counts, Provider
from bench.cases._rope_oracle import Norm
from bench.cases._rope_peers import Peer, installed
from bench.cases._runs import free, refusable
from saccade.rope import RopeSpec, apply_rope, qk_norm_rope

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Buffer sets of q and k [B, H, S, D], their gradients, and what all share. Never written after creation."""

    pairs: tuple[Pair, ...]
    gradients: Pair
    positions: torch.Tensor
    spec: RopeSpec
    norm: Norm | None


def heads(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, layout: str, seed: int) -> torch.Tensor:
    """Normal values [B, H, S, D] stored as "bhsd" or "bshd"; made in place, a float64 copy of 3 GB would not do."""
    b, h, s, d = shape
    generator = torch.Generator(device).manual_seed(seed)
    stored = (b, h, s, d) if layout == "bhsd" else (b, s, h, d)
    x = torch.empty(stored, dtype=dtype, device=device).normal_(generator=generator)
    return x if layout == "bhsd" else x.transpose(1, 2)


def _scratch(inputs: Inputs) -> list[Pair]:
    """Memory of its own for a competitor that writes."""
    return [
        (q.clone(memory_format=torch.preserve_format), k.clone(memory_format=torch.preserve_format))
        for q, k in inputs.pairs
    ]


def _ours(inputs: Inputs, impl: str, inplace: bool) -> Callable[[torch.Tensor, torch.Tensor], Any]:
    norm, spec, positions = inputs.norm, inputs.spec, inputs.positions

    def run(q: torch.Tensor, k: torch.Tensor, place: torch.Tensor = positions, weights: Any = None) -> Any:
        if norm is None:
            return apply_rope(q, k, place, spec, inplace=inplace, impl=impl)  # type: ignore[arg-type]
        q_weight, k_weight = weights or (norm.q_weight, norm.k_weight)
        kind = "row" if norm.row else "head"
        return qk_norm_rope(
            q,
            k,
            place,
            spec,
            q_weight,
            k_weight,
            norm=kind,
            eps=norm.eps,
            inplace=inplace,
            impl=impl,  # type: ignore[arg-type]
        )

    return run


def _forward_call(
    inputs: Inputs, run: Callable[..., Any], *, writes: bool = False, warm: Callable[[], Any] | None = None
) -> Call:
    """f(q, k) on every buffer set; one that writes works on copies."""
    pairs = _scratch(inputs) if writes else inputs.pairs

    def outputs() -> Sequence[torch.Tensor]:
        q, k = inputs.pairs[0]
        if writes:
            q, k = q.clone(memory_format=torch.preserve_format), k.clone(memory_format=torch.preserve_format)
        with torch.no_grad():
            return run(q, k)  # type: ignore[no-any-return]

    runs = [free(lambda q=q, k=k: run(q, k)) for q, k in pairs]
    return Call(runs, outputs, warm)


def _backward_call(
    inputs: Inputs, run: Callable[..., Pair], weights: Sequence[torch.Tensor], writes: bool = False
) -> Call:
    """The gradient alone: forward and its graph are made here, outside the clock."""
    calls = []
    for q, k in inputs.pairs:
        if writes:
            q, k = (x.clone(memory_format=torch.preserve_format) for x in (q, k))
        leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
        outs = run(*leaves)
        wanted = [*leaves, *weights]
        # Peers that write into their gradient get their own; values stay bounded, a rotation keeps lengths.
        own = [g.clone(memory_format=torch.preserve_format) if writes else g for g in inputs.gradients]
        calls.append(
            lambda outs=outs, wanted=wanted, own=own: torch.autograd.grad(outs, wanted, own, retain_graph=True)
        )

    def outputs() -> Sequence[torch.Tensor]:
        if not writes:
            return calls[0]()  # type: ignore[no-any-return]
        q, k = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs.pairs[0])
        fresh = [g.clone(memory_format=torch.preserve_format) for g in inputs.gradients]
        return torch.autograd.grad(run(q, k), [q, k, *weights], fresh)

    return Call(calls, outputs, capturable=False)  # the engine runs on the stream of the forward, which is not captured


def ours(inputs: Inputs, impl: str, mode: str, inplace: bool) -> Call:
    """Saccade's op by one implementation."""
    run = _ours(inputs, impl, inplace)
    if mode == "backward":
        norm = inputs.norm
        weights = [] if norm is None else [w.detach().clone().requires_grad_() for w in (norm.q_weight, norm.k_weight)]
        return refusable(  # type: ignore[no-any-return]
            lambda: _backward_call(inputs, lambda q, k: run(q, k, weights=tuple(weights)), weights)
        )
    q, k = (x[:, :, :64].clone() for x in inputs.pairs[0])
    place = inputs.positions[..., :64].contiguous()
    warm = free(lambda: run(q, k, place))
    refusable(warm)
    return _forward_call(inputs, run, writes=inplace, warm=warm)


def copy(inputs: Inputs) -> Call:
    """torch.Tensor.copy_ of the same tensors."""
    targets = [(torch.empty_like(q), torch.empty_like(k)) for q, k in inputs.pairs]
    for q, k in targets:
        q.fill_(0)  # pages exist before the clock runs
        k.fill_(0)
    pairs = list(zip(inputs.pairs, targets, strict=True))
    return Call([lambda a=a, b=b: (b[0].copy_(a[0]), b[1].copy_(a[1])) for a, b in pairs])


def peer(
    inputs: Inputs, made: Peer, mode: str, *, compiled: bool = False, table: bool = False, writes: bool = False
) -> Call:
    """A peer's function, eager or compiled; `table` builds cos and sin inside the clock."""
    function = torch.compile(made.function, dynamic=False) if compiled else made.function
    cos, sin = made.table
    if mode == "backward":
        # A retained graph is run again and again: Inductor must not reuse its buffers.
        with torch._functorch.config.patch(donated_buffer=False):
            call = _backward_call(inputs, lambda q, k: function(q, k, cos, sin), made.weights, writes)
            call.runs[0]()  # compiles the backward inside the patch
        return call
    if table:
        build = made.build_table
        assert build is not None
        return _forward_call(inputs, lambda q, k: function(q, k, *build()))
    return _forward_call(inputs, lambda q, k: function(q, k, cos, sin), writes=writes)


def providers(
    inputs: Inputs,
    impls: Sequence[str],
    mode: str,
    make_peer: Callable[[], Peer],
    make_formula: Callable[[], Peer],
    make_liger: Callable[[], Peer] | None,
    package: str,
    inplace_counts: Any,
    build_table: bool = False,
) -> list[Provider]:
    """All competitors of a case, the copy first; `build_table` adds the peer with its table made inside the clock."""
    moved = Counts(2 * sum(x.nbytes for x in inputs.pairs[0]))
    found = [Provider("torch copy_", "copy", lambda: copy(inputs), version=torch.__version__, counts=moved)]
    for impl in impls:
        for inplace in (True, False) if mode == "forward" else (False,):
            name = f"saccade {impl}" + (", in place" if inplace else "")
            make = lambda impl=impl, inplace=inplace: ours(inputs, impl, mode, inplace)  # noqa: E731
            counts = inplace_counts if inplace else None
            found.append(Provider(name, "ours", make, version=saccade.__version__, counts=counts))
    version = installed(package)
    name, source = (f"{package} eager", make_peer) if version else ("formula eager", make_formula)
    version = version or torch.__version__
    found.append(Provider(name, "eager", lambda: peer(inputs, source(), mode), "plain", version))
    if build_table and mode == "forward" and installed(package):
        build = lambda: peer(inputs, source(), mode, table=True)  # noqa: E731
        found.append(Provider(f"{name} + its table", "peer", build, "plain", version))
    compiled = lambda: peer(inputs, source(), mode, compiled=True)  # noqa: E731
    found.append(
        Provider(f"torch.compile of {name.removesuffix(' eager')}", "compile", compiled, "plain", torch.__version__)
    )
    if make_liger is not None:
        # It rotates q and k where they lie, and the gradients too.
        build = lambda: peer(inputs, make_liger(), mode, writes=True)  # noqa: E731
        found.append(Provider("liger-kernel", "peer", build, "plain", installed("liger-kernel")))
    return found
