"""Inputs of the merging cases and their competitors as calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import saccade
from bench.cases import Call, Counts, Expected, Problem, Provider, Request
from bench.cases import _merge_peers as peers
from bench.cases._runs import Run, free, refusable
from bench.gate import largest_error
from saccade import merge as m
from saccade.merge import Alternate, Grid, Partition


def _values(shape: Sequence[int], dtype: str, request: Request, seed: int) -> torch.Tensor:
    generator = torch.Generator(request.device).manual_seed(seed)
    return torch.empty(list(shape), dtype=getattr(torch, dtype), device=request.device).normal_(generator=generator)


def _impls(request: Request) -> tuple[str, ...]:
    return ("cuda", "triton") if request.device == "cuda" else ("cpu",)


def _ours(impl: str, run: Run, outputs: Callable[[], Sequence[torch.Tensor]] | None) -> Provider:
    def make() -> Call:
        refusable(free(run))
        return Call([free(run)], outputs, warm=free(run))

    return Provider(f"saccade {impl}", "ours", make, version=saccade.__version__)


def _peer(
    name: str, run: Callable[..., Any], arguments: Sequence[Any], outputs: Any = None, role: str = "eager"
) -> Provider:
    """A peer's function; its `outputs` get its result."""

    def make() -> Call:
        function = torch.compile(run, dynamic=False) if role == "compile" else run
        check = None if outputs is None else (lambda: outputs(function(*arguments)))
        return Call([free(lambda: function(*arguments))], check)

    return Provider(name, role, make, "plain", torch.__version__)  # type: ignore[arg-type]


def _tomesd(make: Callable[[Any], Run]) -> Provider:
    try:
        found = version("tomesd")
    except PackageNotFoundError:
        found = ""

    def build() -> Call:
        import tomesd.merge

        return Call([free(make(tomesd.merge))])

    return Provider("tomesd", "peer", build, "plain", found)


def _copy(x: torch.Tensor) -> Provider:
    def make() -> Call:
        target = torch.empty_like(x)
        target.fill_(0)
        return Call([lambda: target.copy_(x)])

    return Provider("torch copy_", "copy", make, version=torch.__version__, counts=Counts(2 * x.nbytes))


def match(
    batch: int, tokens: int, channels: int, partition: Partition, r: int, dtype: str, request: Request
) -> Problem:
    """`match` with its plan, held to the float64 score of the best destination, and of the one that was chosen."""
    metric = _values((batch, tokens, channels), dtype, request, 1)
    src, dst = (t[0].long() for t in partition.lists(tokens, metric.device))

    def ours(impl: str) -> Provider:
        def outputs() -> Sequence[torch.Tensor]:
            from saccade.merge.match import scores_of

            lists = partition.lists(tokens, metric.device)
            score, target = scores_of(metric, lists, None, None, 0, impl)
            chosen = peers.exact_score(metric, src, target.long()[:, src])
            return score[:, src], chosen.float()

        run = lambda: m.match(metric, r, partition=partition, impl=impl)  # type: ignore[arg-type]  # noqa: E731
        return _ours(impl, run, outputs)

    alternate = isinstance(partition, Alternate)
    arguments = (metric, r) if alternate else (metric, src, dst, r)
    eager = peers.match_alternate if alternate else peers.match

    def results(found: Any) -> Sequence[torch.Tensor]:
        return found[0], peers.exact_score(metric, src, dst[found[1]]).float()

    def product() -> Call:
        a, b = metric[:, src].contiguous(), metric[:, dst].contiguous().mT
        out = torch.empty(batch, len(src), len(dst), dtype=metric.dtype, device=metric.device)
        return Call([lambda: torch.bmm(a, b, out=out)])

    def expected() -> Expected:
        exact = peers.exact_best(metric, src, dst)
        errors = {}
        for level, kind in (("strict", torch.float32), ("plain", metric.dtype)):
            best, place = eager(metric.to(kind), *arguments[1:])[:2]
            chosen = peers.exact_score(metric, src, dst[place])
            errors[level] = (largest_error(best, exact), max(largest_error(chosen, exact), largest_error(best, exact)))
        return Expected(("score", "chosen"), (exact, exact), errors)

    providers = [ours(impl) for impl in _impls(request)]
    providers.append(Provider("torch.bmm, the product alone", "peer", product, version=torch.__version__))
    providers.append(_peer("ToMe eager", eager, arguments, results))
    providers.append(_peer("torch.compile of ToMe", eager, arguments, results, "compile"))
    if isinstance(partition, Grid):
        _, h, w = partition.grid
        call = lambda t: lambda: t.bipartite_soft_matching_random2d(metric, w, h, 2, 2, r, no_rand=True)  # noqa: E731
        providers.append(_tomesd(call))
    return Problem(providers, expected)


def _alternate_indices(plan: m.MergePlan) -> tuple[torch.Tensor, ...]:
    """Kept and merged sources, and the latter's destinations, as ToMe's merge takes them."""
    batch, tokens, r = plan.batch, plan.tokens, plan.tokens - plan.rows
    place = torch.arange(tokens, device=plan.head.device)
    merged = plan.head.long().gather(1, plan.inverse.long()) != place
    order = merged[:, ::2].long().argsort(dim=1, stable=True)
    kept, gone = order[:, : order.shape[1] - r], order[:, order.shape[1] - r :]
    into = plan.head.long().gather(1, plan.inverse.long().gather(1, 2 * gone)) // 2
    return kept, gone, into.view(batch, r)


def _by_position(plan: m.MergePlan, y: torch.Tensor) -> torch.Tensor:
    """Rows [kept sources | destinations] in the order of their tokens."""
    kept, _, _ = _alternate_indices(plan)
    places = torch.cat((2 * kept, torch.arange(1, plan.tokens, 2, device=kept.device).expand(plan.batch, -1)), 1)
    order = places.argsort(dim=1)
    return y.gather(1, order[..., None].expand_as(y))


def merge(batch: int, tokens: int, width: int, r: int, dtype: str, mode: str, request: Request) -> Problem:
    """`merge` by size-weighted mean along a plan that is given, or its gradient."""
    x = _values((batch, tokens, width), dtype, request, 2)
    plan = m.match(_values((batch, tokens, 64), "float32", request, 3), r)
    size = torch.randint(1, 5, (batch, tokens, 1), device=x.device).to(torch.float32)
    indices = _alternate_indices(plan)
    dy = _values((batch, tokens - r, width), dtype, request, 4)

    def exact(kind: torch.dtype) -> torch.Tensor:
        leaf = x.to(kind).requires_grad_(mode == "backward")
        y = _by_position(plan, peers.merge_mean(leaf, size.to(kind), *indices)[0])
        return torch.autograd.grad(y, leaf, dy.to(kind))[0] if mode == "backward" else y

    def expected() -> Expected:
        truth = exact(torch.float64)
        errors = {
            "strict": (largest_error(exact(torch.float32).to(x.dtype), truth),),
            "plain": (largest_error(exact(x.dtype), truth),),
        }
        return Expected(("y",) if mode == "forward" else ("dx",), (truth,), errors, 2.0 if mode == "forward" else 3.0)

    if mode == "backward":
        return Problem(_merge_backward(x, plan, size, dy, indices, request), expected)
    providers = [_copy(x[:, : tokens - r // 2].contiguous())]
    for impl in _impls(request):
        run = lambda impl=impl: m.merge(x, plan, size, impl=impl)  # noqa: E731
        providers.append(_ours(impl, run, lambda run=run: [run()[0]]))
    arguments = (x, size.to(x.dtype), *indices)
    results = lambda found: [_by_position(plan, found[0])]  # noqa: E731
    providers.append(_peer("ToMe eager", peers.merge_mean, arguments, results))
    providers.append(_peer("torch.compile of ToMe", peers.merge_mean, arguments, results, "compile"))
    return Problem(providers, expected)


def _merge_backward(
    x: torch.Tensor, plan: m.MergePlan, size: torch.Tensor, dy: torch.Tensor, indices: Any, request: Request
) -> list[Provider]:
    def gradient(name: str, role: str, run: Callable[[torch.Tensor], torch.Tensor], level: str) -> Provider:
        def make() -> Call:
            leaf = x.detach().requires_grad_()
            y = refusable(lambda: run(leaf))
            call = lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)  # noqa: E731
            return Call([call], call, capturable=False)

        return Provider(name, role, make, level)  # type: ignore[arg-type]

    found = [_copy(x)]
    for impl in _impls(request):
        found.append(gradient(f"saccade {impl}", "ours", lambda t, i=impl: m.merge(t, plan, size, impl=i)[0], "strict"))
    weights = size.to(x.dtype)
    eager = lambda t: _by_position(plan, peers.merge_mean(t, weights, *indices)[0])  # noqa: E731
    return [*found, gradient("ToMe eager", "eager", eager, "plain")]


def there_and_back(batch: int, side: int, width: int, r: int, dtype: str, request: Request) -> Problem:
    """merge and unmerge along a plan of 2 x 2 cells, against tomesd's own functions."""
    x = _values((batch, side * side, width), dtype, request, 5)
    plan = m.match(x, r, partition=Grid((side, side), (2, 2)))

    def exact(kind: torch.dtype) -> torch.Tensor:
        row = plan.inverse.long()
        total = torch.zeros(batch, plan.rows, width, dtype=kind, device=x.device)
        total.scatter_add_(1, row[..., None].expand(-1, -1, width), x.to(kind))
        total /= plan.ptr.diff(dim=1)[..., None].to(kind)
        return total.gather(1, row[..., None].expand(-1, -1, width))

    def expected() -> Expected:
        truth = exact(torch.float64)
        error = lambda t: (largest_error(exact(t).to(x.dtype), truth),)  # noqa: E731
        return Expected(("x",), (truth,), {"strict": error(torch.float32), "plain": error(x.dtype)})

    providers = [_copy(x)]
    for impl in _impls(request):
        run = lambda impl=impl: m.unmerge(m.merge(x, plan, impl=impl)[0], plan, impl=impl)  # noqa: E731
        providers.append(_ours(impl, run, lambda run=run: [run()]))

    def peer(tomesd: Any) -> Run:
        there, back = tomesd.bipartite_soft_matching_random2d(x, side, side, 2, 2, r, no_rand=True)
        return lambda: back(there(x))

    return Problem([*providers, _tomesd(peer)], expected)


def whole(tokens: int, channels: int, width: int, r: int, dtype: str, request: Request) -> Problem:
    """All four steps, as a layer of a diffusion transformer would call them."""
    metric, x = _values((1, tokens, channels), dtype, request, 6), _values((1, tokens, width), dtype, request, 7)
    size = torch.ones(1, tokens, 1, device=x.device)

    def ours(impl: Any) -> torch.Tensor:
        plan = m.match(metric, r, impl=impl)
        return m.unmerge(m.merge(x, plan, impl=impl)[0], plan, impl=impl)

    def eager(metric: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        _, _, kept, merged, into = peers.match_alternate(metric, r)
        y, _ = peers.merge_mean(x, size.to(x.dtype), kept, merged, into)
        out = torch.empty_like(x)
        body, dst = y[:, : kept.shape[1]], y[:, kept.shape[1] :]
        out[:, 1::2] = dst
        out.scatter_(1, 2 * kept[..., None].expand(-1, -1, x.shape[2]), body)
        back = dst.gather(1, into[..., None].expand(-1, -1, x.shape[2]))
        return out.scatter_(1, 2 * merged[..., None].expand(-1, -1, x.shape[2]), back)

    providers = [_ours(impl, lambda impl=impl: ours(impl), None) for impl in _impls(request)]
    providers.append(_peer("ToMe eager", eager, (metric, x, size)))
    providers.append(_peer("torch.compile of ToMe", eager, (metric, x, size), role="compile"))
    return Problem(providers, lambda: Expected((), (), {"strict": (), "plain": ()}))


def pool(grid: Any, kernel: Any, width: int, dtype: str, request: Request) -> Problem:
    """PPLLaVA's pooling."""
    x = _values((1, *grid, width), dtype, request, 8)
    weights = (20 * _values((1, *grid), "float32", request, 9)).flatten(1).softmax(-1).view(1, *grid)

    def exact(kind: torch.dtype) -> torch.Tensor:
        work = torch.float64 if kind == torch.float64 else torch.float32
        return peers.prompt_pool(x.to(kind), weights.to(work), kernel, kernel, 0.01)

    def expected() -> Expected:
        truth = exact(torch.float64)
        strict, plain = exact(torch.float32).to(x.dtype), exact(x.dtype)
        return Expected(
            ("y",), (truth,), {"strict": (largest_error(strict, truth),), "plain": (largest_error(plain, truth),)}
        )

    providers = [_copy(x.flatten(1, 3)[:, : x[0, ..., 0].numel() * 19 // 36].contiguous())]
    for impl in _impls(request):
        run = lambda impl=impl: m.prompt_pool3d(x, weights, kernel, impl=impl)  # noqa: E731
        providers.append(_ours(impl, run, lambda run=run: [run()]))
    arguments = (x, weights, kernel, kernel, 0.01)
    providers.append(_peer("PPLLaVA eager", peers.prompt_pool, arguments, lambda y: [y]))
    providers.append(_peer("torch.compile of PPLLaVA", peers.prompt_pool, arguments, lambda y: [y], "compile"))
    return Problem(providers, expected)


def frames(count: int, places: int, channels: int, dtype: str, request: Request) -> Problem:
    """Similarity of consecutive frames."""
    x = _values((1, count * places, channels), dtype, request, 10)

    def expected() -> Expected:
        truth = peers.frame_cosine(x.double(), count)
        error = lambda t: (largest_error(peers.frame_cosine(x.to(t), count), truth),)  # noqa: E731
        return Expected(("similarity",), (truth,), {"strict": error(torch.float32), "plain": error(x.dtype)})

    providers = []
    for impl in _impls(request):
        run = lambda impl=impl: m.frame_similarity(x, count, impl=impl)  # noqa: E731
        providers.append(_ours(impl, run, lambda run=run: [run()]))
    providers.append(_peer("torch eager", peers.frame_cosine, (x, count), lambda s: [s]))
    providers.append(_peer("torch.compile", peers.frame_cosine, (x, count), lambda s: [s], "compile"))
    return Problem(providers, expected)
