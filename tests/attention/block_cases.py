"""Calls of the planning ops by implementation, inputs that are exact in fp32, and what each result must satisfy: for pytest and for
Triton's interpreter alike."""

from __future__ import annotations

import itertools

import torch

from saccade._dispatch import raw
from saccade.reference import block_pool as pool_reference
from saccade.reference import block_select as select_reference
from saccade.reference import block_transpose as transpose_reference
from saccade.testing import check_budget

TOP, SHARE, THRESHOLD = range(3)
POOL_SHAPES = ((1, 1, 1, 8, 64), (2, 3, 130, 64, 64), (1, 2, 257, 72, 128), (1, 1, 64, 256, 64), (2, 1, 65, 33, 64))
# batch, heads, key heads, query blocks, key blocks, head dim
SELECT_SHAPES = ((1, 2, 1, 5, 7, 8), (2, 4, 2, 19, 70, 64), (1, 1, 1, 1, 1, 8), (1, 2, 2, 3, 130, 12))
RULES = tuple(itertools.product((TOP, SHARE, THRESHOLD), (0, 1, 3, 1000), (0.0, 0.01, 0.4, 0.9, 1.0)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(op, impl, *arguments):
    """The raw op `op` of an implementation."""
    references = {
        "block_pool": pool_reference.block_pool,
        "block_select": select_reference.block_select,
        "block_transpose": transpose_reference.block_transpose,
    }
    return (references[op] if impl == "reference" else raw(op, impl))(*arguments)


def small_numbers(*shape, seed=0):
    """Whole numbers, so that products and their ties are exact in fp32."""
    return torch.randint(-3, 4, shape, generator=seeded(seed)).float()


def an_order(tokens, block, lead=(1, 1), seed=0, holes=True):
    """Positions [*lead, P] int32 in any order, with holes."""
    positions = (-(-tokens // block) + (1 if holes else 0)) * block
    rows = [torch.randperm(positions, generator=seeded(seed + i)) for i in range(lead[0] * lead[1])]
    order = torch.stack(rows).reshape(*lead, positions).int()
    return order.masked_fill(order >= tokens, -1)


def check_pool(impl, device, shape, dtype, kind="plain"):
    """Against the mean in float64, inside twice the error of torch's mean in fp32."""
    batch, heads, tokens, width, block = shape
    x = torch.randn(batch, heads, tokens, width, generator=seeded(1), dtype=torch.float64).to(dtype)
    lead = {"plain": None, "order": (1, 1), "orders": (batch, heads)}[kind]
    order = None if lead is None else an_order(tokens, block, lead)
    exact = pool_reference.block_pool(x.double(), order, block)
    same = pool_reference.block_pool(x, order, block)
    wide = torch.full((batch, tokens, heads, width + 8), float("nan"), dtype=dtype)
    wide[..., 4:-4] = x.transpose(1, 2)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 4:-4].transpose(1, 2)):
        out = call("block_pool", impl, given.to(device), None if order is None else order.to(device), block)
        assert out.dtype == torch.float32
        check_budget("block_pool", out.cpu(), same, exact)


def check_pool_exact(impl, device):
    """Whole numbers over full blocks: every implementation gives the same bits."""
    x = small_numbers(2, 2, 256, 40, seed=2)
    for block in (64, 128):
        assert torch.equal(
            call("block_pool", impl, x.to(device), None, block).cpu(), call("block_pool", "reference", x, None, block)
        )


def check_pool_contains(impl, device):
    """A token that is not finite spoils its block, no other; one that has no position spoils nothing."""
    x = torch.randn(1, 1, 200, 16, generator=seeded(3))
    clean = call("block_pool", impl, x.to(device), None, 64).cpu()
    bad = x.clone()
    bad[0, 0, 70, 3] = float("nan")
    bad[0, 0, 199, 5] = float("inf")
    out = call("block_pool", impl, bad.to(device), None, 64).cpu()
    assert out[0, 0, 1, 3].isnan() and out[0, 0, 3, 5].isinf()
    out[0, 0, 1, 3], out[0, 0, 3, 5] = clean[0, 0, 1, 3], clean[0, 0, 3, 5]
    assert torch.equal(out, clean)
    order = torch.arange(256, dtype=torch.int32)[None, None].clone()
    order[order >= 199] = -1
    order[0, 0, 70] = -1
    assert call("block_pool", impl, bad.to(device), order.to(device), 64).isfinite().all()


def some_classes(lead, q_blocks, k_blocks, seed=0):
    return torch.randint(0, 5, (*lead, q_blocks, k_blocks), generator=seeded(seed)).to(torch.uint8)


def check_select(impl, device, shape, classes, rules=RULES):
    """The same lists as the specification's."""
    batch, heads, kv_heads, q_blocks, k_blocks, width = shape
    q = small_numbers(batch, heads, q_blocks, width, seed=4)
    k = small_numbers(batch, kv_heads, k_blocks, width, seed=5)
    lead = {"none": None, "shared": (1, 1), "own": (batch, heads)}[classes]
    given = None if lead is None else some_classes(lead, q_blocks, k_blocks)
    there = [t if t is None else t.to(device) for t in (q, k, given)]
    for mode, keep, p in rules:
        ours = call("block_select", impl, *there, mode, keep, p, 0.25)
        theirs = call("block_select", "reference", q, k, given, mode, keep, p, 0.25)
        for name, a, b in zip(("counts", "indices", "p_counts", "p_indices"), ours, theirs, strict=True):
            assert a.dtype == torch.int32 and a.shape == b.shape, (name, a.shape, b.shape)
            assert torch.equal(a.cpu(), b), (name, mode, keep, p)


def check_select_special(impl, device):
    """NaN is chosen last, after -inf of a lower place; infinities have shares; rows that are all alike take the lowest places."""
    inf, nan = float("inf"), float("nan")
    rows = [[nan, 1.0, -inf, nan, 2.0, -inf], [inf, 3.0, inf, -inf, nan, 0.0], [nan] * 6, [-inf] * 6, [0.0, -0.0] * 3]
    # One column: the score is that of the key alone, times 1.
    for row in rows:
        q, k = torch.ones(1, 1, 1, 1), torch.tensor(row)[None, None, :, None]
        for mode, keep, p in (
            (TOP, 1, 0.0),
            (TOP, 3, 0.0),
            (TOP, 5, 0.0),
            (SHARE, 1, 0.5),
            (SHARE, 0, 0.95),
            (THRESHOLD, 1, 0.3),
        ):
            ours = call("block_select", impl, q.to(device), k.to(device), None, mode, keep, p, 1.0)
            theirs = call("block_select", "reference", q, k, None, mode, keep, p, 1.0)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True)), (
                row,
                mode,
                keep,
                p,
                ours,
                theirs,
            )


def some_lists(lead, rows, columns, storage, seed=0):
    """starts, counts, indices, ids of random ascending lists, "padded" or "compressed" (in any order, with gaps)."""
    chosen = torch.rand(*lead, rows, columns, generator=seeded(seed)) < 0.4
    counts = chosen.sum(-1).int()
    if storage == "padded":
        order = (~chosen).int().argsort(dim=-1, stable=True).int()
        starts = (torch.arange(counts.numel()) * columns).view(counts.shape).int()
        indices = order.contiguous()
    else:
        flat, begin = [], {}
        places = list(itertools.product(*map(range, counts.shape)))
        for i in torch.randperm(len(places), generator=seeded(seed)).tolist():
            flat.append(-1)  # a gap
            begin[places[i]] = len(flat)
            flat += chosen[places[i]].nonzero().flatten().tolist()
        starts = torch.tensor([begin[p] for p in places], dtype=torch.int32).view(counts.shape)
        indices = torch.tensor(flat, dtype=torch.int32)
    ids = torch.randint(0, 1000, indices.shape, generator=seeded(seed)).int()
    return starts, counts, indices, ids


def check_transpose(impl, device, lead, rows, columns, storage, with_ids):
    """The same lists as the specification's, to the last unused entry."""
    starts, counts, indices, ids = some_lists(lead, rows, columns, storage)
    ids = ids if with_ids else None
    there = [t if t is None else t.to(device) for t in (starts, counts, indices, ids)]
    ours = call("block_transpose", impl, *there, columns)
    theirs = call("block_transpose", "reference", starts, counts, indices, ids, columns)
    for name, a, b in zip(("starts", "counts", "indices", "ids"), ours, theirs, strict=True):
        assert a.dtype == torch.int32 and a.shape == b.shape, (name, a.shape, b.shape)
        assert torch.equal(a.cpu(), b), name
