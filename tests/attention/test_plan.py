"""Planners: what they choose, text and static layouts, in the attention they serve; bad input; no waiting; one graph."""

from __future__ import annotations

import pytest
import torch
from attention.attention_cases import inputs, normal
from torch.utils._python_dispatch import TorchDispatchMode

import saccade
from saccade.attention import BlockLayout, patterns, sparse_attention
from saccade.attention.orders import tile_order
from saccade.attention.plan import from_scores, threshold, top_k, top_p
from saccade.reference.sparse_attention import sparse_attention as exact_attention
from saccade.testing import check_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLANNERS = {
    "top_k": lambda q, k, **kw: top_k(q, k, keep=3, **kw),
    "top_k share": lambda q, k, **kw: top_k(q, k, keep=0.4, **kw),
    "top_p": lambda q, k, **kw: top_p(q, k, 0.6, **kw),
    "threshold": lambda q, k, **kw: threshold(q, k, 0.15, keep=2, **kw),
}
EMBEDDINGS = torch.eye(16).repeat_interleave(64, 0)  # block n of 64 tokens points along axis n


def whole_numbers(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Every token of a block of 64 alike and whole, so that means and scores are exact in every dtype."""
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(-2, 3, (batch, heads, -(-tokens // 64), width), generator=generator).to(dtype)
    return blocks.repeat_interleave(64, 2)[:, :, :tokens].contiguous().to(device)


def same(a: BlockLayout, b: BlockLayout) -> bool:
    return torch.equal(a.block_map().cpu(), b.block_map().cpu())


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 2, 300, 300, 64), (2, 4, 2, 130, 515, 72), (1, 1, 1, 1, 1, 8)])
def test_like_the_reference(implementation, name, dtype, shape):
    impl, device = implementation
    batch, heads, kv_heads, q_len, k_len, width = shape
    q = whole_numbers(batch, heads, q_len, width, dtype=dtype, device=device)
    k = whole_numbers(batch, kv_heads, k_len, width, seed=1, dtype=dtype, device=device)
    ours = PLANNERS[name](q, k, impl=impl)
    theirs = PLANNERS[name](q.cpu(), k.cpu(), impl="reference")
    assert same(ours, theirs) and (ours.q_len, ours.k_len) == (q_len, k_len)
    assert (ours.batch, ours.heads) == (batch, heads)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_it_chooses_the_pooled_best(dtype):
    q, k = (normal((2, 4, 700, 64), dtype, seed=s) for s in (1, 2))
    layout = top_k(q, k[:, :2], keep=4)
    means = [torch.nn.functional.pad(x.double(), (0, 0, 0, 4)).unflatten(2, (11, 64)).sum(3) for x in (q, k[:, :2])]
    means[1][:, :, -1] *= 64 / 60  # the sum over a last block of 60 tokens, as if it had 64
    scores = means[0] @ means[1].repeat_interleave(2, 1).mT
    want = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(4).indices, True)
    assert torch.equal(layout.block_map() == 2, want)


def test_needles_are_found():
    """Each block of queries points at one block of keys, the one that it must find."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    q = EMBEDDINGS[None, None]
    k = torch.eye(16)[order].repeat_interleave(64, 0)[None, None]
    where = order.argsort()
    for layout in (top_k(q, k, keep=1), top_p(q, k, 0.9, scale=8.0), threshold(q, k, 0.5, scale=8.0)):
        assert layout.full.indices.view(16, -1)[:, 0].tolist() == where.tolist() and (layout.counts == 1).all()


def test_share_follows_the_content():
    q = k = EMBEDDINGS[None, None]
    assert (top_p(q, k, 0.5, scale=0.0).counts == 8).all() and (top_p(q, k, 1.0, scale=50.0).counts == 16).all()
    assert (top_p(q, k, 0.5, scale=50.0).counts == 1).all() and (
        top_p(q, k, 0.5, keep=0.25, scale=50.0).counts == 4
    ).all()
    assert (threshold(q, k, 1 / 16, scale=0.0).counts == 16).all() and (
        threshold(q, k, 0.07, scale=0.0, keep=1).counts == 1
    ).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("prefix, suffix", [(10, 0), (0, 70), (64, 1), (130, 130)])
def test_text_is_exempt(impl, prefix, suffix):
    q, k = (normal((1, 2, 700, 32), seed=s) for s in (1, 2))
    seen = top_k(q, k, keep=2, prefix=prefix, suffix=suffix, impl=impl).block_map() > 0
    first, last = -(-prefix // 64), (700 - suffix) // 64 if suffix else 11
    assert seen[..., :first].all() and seen[..., last:].all()  # every query sees text
    assert seen[:, :, :first].all() and seen[:, :, last:].all()  # text sees everything
    assert (seen[:, :, first:last, first:last].sum(-1) == 2).all()  # on top of what is kept


def test_text_in_an_order():
    grid = (4, 8, 8)
    order = tile_order(grid, (2, 4, 8), prefix=20)
    q, k = (normal((1, 2, 276, 32), seed=s) for s in (1, 2))
    layout = top_k(q, k, keep=1, prefix=20, q_order=order, k_order=order)
    mask = layout.to_mask()
    assert mask[:, :, :20].all() and mask[..., :20].all()
    assert (mask[:, :, 20:, 20:].sum(-1) == 64).all()  # one tile
    tile = order[0, 0, 64:128].long()
    assert (mask[:, :, tile] == mask[:, :, tile[:1]]).all()


WITHIN = {
    "causal": lambda: patterns.causal(500),
    "windows": lambda: patterns.sliding_tile((4, 16, 16), (2, 8, 8), (1, 3, 1)),
    "exact windows": lambda: patterns.neighborhood((4, 16, 16), (3, 7, 7)),
    "bits": lambda: BlockLayout.from_mask(
        torch.rand(1, 4, 300, 300, generator=torch.Generator().manual_seed(5)) < 0.02
    ),
}


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("planner", PLANNERS)
def test_within_a_static_layout(name, impl, planner):
    """Never more than the static layout shows, block by block the same pairs, and attention over it is exact."""
    within = WITHIN[name]()
    q, k, v = inputs(2, 4, 2, within.q_len, within.k_len, 32)
    layout = PLANNERS[planner](q, k, within=within, impl=impl)
    fence, mask = within.to_mask(), layout.to_mask()
    assert (mask <= fence).all()
    kept = (layout.block_map() > 0) & (within.block_map() > 0)
    assert torch.equal(layout.block_map() > 0, kept)  # no block that is not there
    assert torch.equal(torch.where(kept, within.block_map(), 0), layout.block_map())  # of its kind
    if planner == "top_k":
        assert torch.equal(layout.counts, within.counts.clamp(max=3).expand_as(layout.counts))
    out = sparse_attention(q, k, v, layout, impl=impl)
    exact = exact_attention(q.double(), k.double(), v.double(), mask, None, None, 32**-0.5)[0]
    peer = exact_attention(q, k, v, mask, None, None, 32**-0.5)[0]
    check_budget("out", out, peer, exact)


def test_all_that_a_static_layout_shows():
    within = patterns.causal(500)
    q, k = (normal((1, 2, 500, 32), seed=s) for s in (1, 2))
    for layout in (top_k(q, k, keep=1.0, within=within), top_p(q, k, 1.0, within=within)):
        assert torch.equal(layout.to_mask(), within.to_mask().expand(1, 2, -1, -1))


def test_always():
    q, k = (normal((1, 2, 640, 32), seed=s) for s in (1, 2))
    own = torch.eye(10, dtype=torch.bool)
    seen = top_k(q, k, keep=2, always=own).block_map() > 0
    assert seen[..., own].all() and (seen.sum(-1) == 3).all()
    seen = top_k(q, k, keep=1, within=patterns.causal(640), always=torch.ones(10, 10, dtype=torch.bool)).to_mask()
    assert torch.equal(seen, patterns.causal(640).to_mask().expand(1, 2, -1, -1))


def test_from_scores_equals_the_planners():
    q, k = (normal((2, 4, 700, 64), seed=s) for s in (1, 2))
    pooled = [torch.ops.saccade.block_pool(x, None, 64) for x in (q, k)]
    scores = pooled[0] @ pooled[1].mT / 8
    sizes = dict(q_len=700, k_len=700)
    assert same(from_scores(scores, keep=3, **sizes), top_k(q, k, keep=3))
    assert same(from_scores(scores, p=0.5, **sizes), top_p(q, k, 0.5))
    assert same(from_scores(scores, threshold=0.11, keep=2, **sizes), threshold(q, k, 0.11, keep=2))
    assert same(from_scores(scores, keep=3, prefix=70, **sizes), top_k(q, k, keep=3, prefix=70))
    one = from_scores(torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]), keep=1, q_len=100, k_len=128)
    assert one.full.indices[0, 0, :, 0].tolist() == [1, 1]
    assert from_scores(scores.bfloat16(), keep=3, **sizes).heads == 4


def test_what_is_not_finite_chooses_only_for_itself():
    q, k = (normal((1, 1, 640, 32), seed=s) for s in (1, 2))
    clean = top_k(q, k, keep=3).block_map()
    q[0, 0, 100, 0] = float("nan")
    found = top_k(q, k, keep=3).block_map()
    assert found[0, 0, 1].nonzero().flatten().tolist() == [0, 1, 2]  # all scores of that row count as -inf
    found[0, 0, 1] = clean[0, 0, 1]
    assert torch.equal(found, clean)
    k[0, 0, 500, 1] = float("nan")
    assert not top_k(q, k, keep=9).block_map()[0, 0, [0, 2, 3], 7].any()  # a block of NaN is chosen last


# ---- bad input -------------------------------------------------------------------------------------------------------------
Q = torch.zeros(1, 2, 200, 16)
ORDER = torch.arange(256, dtype=torch.int32).where(torch.arange(256) < 200, -1).int()[None, None]
BAD = {
    "q": (dict(q=[1.0]), TypeError, "q: expected a tensor [B, H, Sq, D], got list"),
    "dtype": (dict(q=Q.long()), TypeError, "q: expected dtype"),
    "heads": (dict(k=torch.zeros(1, 3, 200, 16)), ValueError, "k: expected a number of heads that divides the 2 of q, got 3"),
    "keep zero": (dict(keep=0), ValueError, "keep: expected a whole number of at least 1, got 0"),
    "keep share": (dict(keep=1.5), ValueError, "keep: expected a number of blocks, or a share of them between 0.0 and 1.0, got 1.5"),
    "keep nan": (dict(keep=float("nan")), ValueError, "keep: expected a number of blocks"),
    "keep text": (dict(keep="all"), TypeError, "keep: expected a whole number, got 'all'"),
    "keep bool": (dict(keep=True), TypeError, "keep: expected a whole number, got True"),
    "block": (dict(block=32), ValueError, "block: expected one of 64, 128, or one for queries and one for keys, got 32"),
    "block pair": (dict(block=(64, 64, 64)), ValueError, "block: expected one of 64, 128"),
    "prefix": (dict(prefix=-1), ValueError, "prefix: expected a whole number of at least 0, got -1"),
    "text": (dict(prefix=150, suffix=51), ValueError, "prefix, suffix: expected at most the 200 tokens together, got 150 and 51"),
    "order": (dict(q_order=ORDER.long()), TypeError, "q_order: expected an int32 tensor [1 or 1, 1 or 2, n * 64], got int64"),
    "order shape": (dict(k_order=ORDER[..., :200]), ValueError, "k_order: expected an int32 tensor"),
    "order type": (dict(q_order=[1, 2]), TypeError, "q_order: expected an int32 tensor [1 or 1, 1 or 2, n * 64], got list"),
    "within": (dict(within="causal"), TypeError, "within: expected a BlockLayout, got str"),
    "within length": (dict(within=patterns.causal(100)), ValueError, "within: made for 100 queries and 100 keys, got 200 and 200"),
    "within and block": (dict(within=patterns.causal(200), block=64), ValueError, "block: expected None where `within` is given"),
    "within and order": (dict(within=patterns.causal(200), q_order=ORDER), ValueError, "q_order: expected None where"),
    "always": (dict(always=torch.ones(3, 3, dtype=torch.bool)), ValueError, "always: expected a bool tensor [4, 4] or"),
    "always dtype": (dict(always=torch.ones(4, 4)), TypeError, "always: expected a bool tensor"),
    "always heads": (dict(always=torch.ones(1, 3, 4, 4, dtype=torch.bool)), ValueError, "always: expected [1 or 1, 1 or 2, ...]"),
    "scale": (dict(scale=float("inf")), ValueError, "scale: expected a finite number, got inf"),
    "impl": (dict(impl="fast"), ValueError, 'impl: expected one of "auto"'),
    "impl cuda": (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run top_k here: needs tensors on a CUDA device, got cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, words = BAD[name]
    with pytest.raises(error) as caught:
        top_k(**{"q": Q, "k": Q, "keep": 2} | change)
    assert words in str(caught.value)


@pytest.mark.parametrize("planner", [top_p, threshold])
@pytest.mark.parametrize(
    "p, error",
    [(0.0, ValueError), (1.01, ValueError), (float("nan"), ValueError), ("0.5", TypeError), (True, TypeError)],
)
def test_bad_share(planner, p, error):
    with pytest.raises(error, match="p: expected"):
        planner(Q, Q, p)


SCORES = {
    "nothing": (dict(), ValueError, "keep: expected a number or share of blocks, or p or threshold in its place"),
    "both": (dict(p=0.5, threshold=0.1), ValueError, "p, threshold: expected one of them, got 0.5 and 0.1"),
    "type": (dict(keep=1, scores=[[1.0]]), TypeError, "scores: expected a float tensor [nQ, nK] or [B, H, nQ, nK], got list"),
    "dtype": (dict(keep=1, scores=torch.ones(4, 4).int()), TypeError, "scores: expected a float tensor"),
    "dims": (dict(keep=1, scores=torch.ones(1, 4, 4)), ValueError, "scores: expected [nQ, nK] or [B, H, nQ, nK], got shape [1, 4, 4]"),
    "shape": (dict(keep=1, scores=torch.ones(4, 5)), ValueError, "scores: expected [.., 4, 4] for these lengths, got [1, 1, 4, 5]"),
    "share": (dict(p=0.0), ValueError, "p: expected a share, above 0 and at most 1, got 0.0"),
    "threshold": (dict(threshold=2), ValueError, "threshold: expected a share, above 0 and at most 1, got 2"),
    "length": (dict(keep=1, q_len=-1), ValueError, "q_len: expected a whole number of at least 0, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_bad_scores(name):
    change, error, words = SCORES[name]
    with pytest.raises(error) as caught:
        from_scores(**{"scores": torch.ones(4, 4), "q_len": 200, "k_len": 200} | change)
    assert words in str(caught.value)


# ---- how it runs -----------------------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Fails where an op makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "aten.item", "_unique", "is_nonzero")), (
            name
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("within", [None, "causal", "bits"])
def test_nothing_waits_for_the_device(name, within):
    fence = None if within is None else WITHIN[within]()
    length = 500 if fence is None else fence.q_len
    q, k = (normal((1, 4, length, 32), seed=s) for s in (1, 2))
    scores = torch.zeros(1, 4, -(-length // 64), -(-length // 64))
    with Watch():
        PLANNERS[name](q, k, within=fence, prefix=3)
        from_scores(scores, p=0.5, q_len=length, k_len=length, within=fence, suffix=2)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("within", [False, True])
def test_one_graph(name, within):
    torch._dynamo.reset()
    fence = patterns.causal(300) if within else None

    def function(q, k):
        layout = PLANNERS[name](q, k, within=fence, prefix=0 if within else 5)
        return layout.full.counts, layout.full.indices, layout.counts

    q, k = (normal((1, 2, 300, 32), seed=s) for s in (1, 2))
    for a, b in zip(torch.compile(function, fullgraph=True, backend="eager")(q, k), function(q, k), strict=True):
        assert torch.equal(a, b)


def test_explain():
    answer = saccade.explain("top_k", Q, Q, keep=2)
    assert answer.chosen == "cpu" and "CUDA" in answer.verdicts["cuda"]
    assert saccade.explain(top_p, Q.double(), Q.double(), 0.5).chosen == "reference"
    long = torch.zeros(1, 1, 1, 8).expand(1, 1, 16385 * 64, 8)
    assert saccade.explain("top_k", long, long, keep=2).verdicts["cuda"] == "takes at most 16384 key blocks, got 16385"


def test_gradients_pass_by():
    q, k = (normal((1, 2, 300, 32), seed=s).requires_grad_() for s in (1, 2))
    assert not top_k(q, k, keep=2).full.indices.requires_grad
