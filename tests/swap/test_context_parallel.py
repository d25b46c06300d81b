"""Two processes that share a sequence (Ulysses, by diffusers' own hooks, over gloo) give what one process gives."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("diffusers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)
if not hasattr(__import__("diffusers"), "ContextParallelConfig"):
    pytest.skip("diffusers has context parallelism from 0.36", allow_module_level=True)

import saccade
from swap import models, ranks

pytestmark = pytest.mark.slow


def two(family, recipe, first="swap", **degrees):
    """(output, gradients, notes, swapped) of each of the two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (port, family, recipe, first, degrees or {"ulysses_degree": 2}, results)
    running = mp.spawn(ranks.rank, arguments, nprocs=2, join=False)
    found = {}
    while len(found) < 2:
        if results.empty():
            if running.join(timeout=0.1):  # raises what a process raised
                break
            continue
        index, out, grads, notes, swapped = results.get()
        found[index] = torch.from_numpy(out), {k: torch.from_numpy(v) for k, v in grads.items()}, notes, swapped
    while not running.join():
        pass
    return found[0], found[1]


def one(family, recipe):
    """The same in this process, and in float64 the tables' sake aside."""
    model, given = ranks.build(family)
    if recipe != "stock":
        saccade.accelerate(model, ranks.RECIPES[recipe], strict=True)
    out, _ = models.run(model, given)
    return out, models.run(model, given, backward=True)[1]


def close(ours, want):
    scale = float(want.abs().max()) or 1.0
    assert float((ours - want).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize(
    ("family", "recipe", "first"),
    [("wan", "lossless", "swap"), ("wan", "sparse", "swap"), ("wan", "sparse", "parallel"), ("ltx", "sparse", "swap")],
)
def test_ulysses(family, recipe, first):
    want, want_grads = one(family, recipe)
    ranks_found = two(family, recipe, first)
    for out, grads, notes, swapped in ranks_found:
        assert not notes and any(path.endswith("attn1") for path in swapped)
        assert ("rope" in swapped) == (first == "swap")  # hooks around the tables are not ours to cover
        close(out, want)
        assert set(grads) == set(want_grads)
        widest = max(float(grad.abs().max()) for grad in want_grads.values())
        for name in grads:
            assert float((grads[name] - want_grads[name]).abs().max()) <= 1e-5 * widest, name
    if recipe == "sparse":
        stock = one(family, "stock")[0]
        assert float((ranks_found[0][0] - stock).abs().max()) > 1e-3 * float(stock.abs().max())


@pytest.mark.parametrize(
    ("degrees", "why"), [({"ring_degree": 2}, "a ring"), ({"ulysses_degree": 2, "ulysses_anything": True}, "unequal")]
)
def test_what_cannot_be_shared_runs_stock(degrees, why):
    want, _ = one("wan", "stock")
    for out, _, notes, _ in two("wan", "sparse", **degrees):
        assert len(notes) == 1 and why in notes[0]
        close(out, want)
