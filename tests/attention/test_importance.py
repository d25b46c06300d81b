"""token_importance, attention_lse, attention_entropy and their raw ops, against softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention.attention_cases import inputs, normal

import saccade
from saccade._dispatch import raw
from saccade._load import BINARY
from saccade.attention import BlockLayout, sparse_attention
from saccade.attention.importance import attention_entropy, attention_lse, token_importance
from saccade.reference.attention_columns import attention_columns
from saccade.reference.attention_rows import attention_rows
from saccade.testing import check_budget

INF = math.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# batch, heads, key heads, queries, keys, head dim
# Enough entries for the largest error of one and of the other to be comparable.
SHAPES = (
    (2, 4, 4, 100, 130, 64),
    (2, 4, 2, 65, 200, 72),
    (2, 6, 2, 33, 133, 256),
    (2, 8, 1, 1, 300, 128),
    (2, 4, 4, 130, 170, 32),
)
ROWS = ("all", "last", 0, [3, -1, 3], torch.tensor([5, 0, 31]))


def rows_of(rows, queries):
    if isinstance(rows, str):
        return list(range(queries)) if rows == "all" else [queries - 1]
    rows = [rows] if isinstance(rows, int) else [int(r) for r in rows]
    return [r % queries for r in rows]


def exact(q, k, rows, causal, key_bias, scale, kind=torch.float64):
    """The map's rows [B, H, R, Sk], scores and softmax, by torch."""
    q, k = q.to(kind), k.to(kind).repeat_interleave(q.shape[1] // k.shape[1], 1)
    places = torch.tensor(rows_of(rows, q.shape[2]))
    scores = q[:, :, places] @ k.mT * scale
    if key_bias is not None:
        scores = scores + key_bias.to(kind)[:, None, None]
    if causal:
        seen = torch.arange(k.shape[2]) <= places[:, None] + k.shape[2] - q.shape[2]
        scores = scores.masked_fill(~seen, -INF)
    return scores, scores.softmax(-1).nan_to_num(0.0)


def statistics(q, k, rows, causal, key_bias, scale, kind=torch.float64, lse=None):
    """lse, entropy and importance of each head; shares from `lse` [B, H, R] where it is given."""
    scores, share = exact(q, k, rows, causal, key_bias, scale, kind)
    log_share = torch.where(share > 0, share.log(), 0.0)
    if lse is not None:
        share = (scores - lse.to(kind)[..., None]).exp().nan_to_num(0.0)
    return scores.logsumexp(-1), -(share * log_share).sum(-1), share.mean(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, 1, "batch"])
def test_statistics(implementation, dtype, shape, causal, bias):
    impl, device = implementation
    rows = "all"
    batch, _, _, queries, keys, width = shape
    q, k, _ = inputs(*shape, dtype, strides="bshd")
    key_bias = None if bias is None else normal((1 if bias == 1 else batch, keys), seed=4)
    if key_bias is not None:
        key_bias[:, 1::7] = -INF
    scale = width**-0.5
    truth = statistics(q, k, rows, causal, key_bias, scale)
    # What torch makes of the same fp32 values: for 16-bit inputs the rest is fp32 there too.
    peer = statistics(q, k, rows, causal, key_bias, scale, torch.float32)
    there = dict(rows=rows, causal=causal, impl=impl, key_bias=None if key_bias is None else key_bias.to(device))
    moved = q.to(device), k.to(device)
    check_budget("lse", attention_lse(*moved, **there).cpu(), peer[0], truth[0])
    check_budget("entropy", attention_entropy(*moved, **there).cpu(), peer[1], truth[1])
    # Each op for itself: from a rounded lse, the same for all.
    whole = statistics(q, k, "all", causal, key_bias, scale)[0].float()
    given = whole[:, :, rows_of(rows, queries)]
    truth, peer = (statistics(q, k, rows, causal, key_bias, scale, x, given)[2] for x in (torch.float64, torch.float32))
    asked = torch.tensor(rows_of(rows, queries), dtype=torch.int32, device=device)
    columns = raw("attention_columns", impl)(*moved, given.to(device), asked, there["key_bias"], causal, scale)
    more = []  # over five inputs: the largest error of a few numbers is a matter of luck
    for seed in (1, 2, 3, 4):
        q2, k2, _ = inputs(*shape, dtype, strides="bshd", seed=seed)
        lse2 = statistics(q2, k2, "all", causal, key_bias, scale)[0].float()[:, :, rows_of(rows, queries)]
        both = [statistics(q2, k2, rows, causal, key_bias, scale, x, lse2)[2] for x in (torch.float32, torch.float64)]
        there2 = (q2.to(device), k2.to(device), lse2.to(device), asked, there["key_bias"])
        more.append((raw("attention_columns", impl)(*there2, causal, scale).cpu() / len(asked), *both))
    pooled = zip((columns.cpu() / len(asked), peer, truth), *more, strict=True)
    check_budget("columns", *(torch.cat(x) for x in pooled))
    for reduce in ("mean", "sum", "max"):
        take = {"mean": lambda x: x.mean(1), "sum": lambda x: x.sum(1), "max": lambda x: x.amax(1)}[reduce]
        found = token_importance(*moved, reduce=reduce, lse=whole.to(device), **there)
        assert found.dtype == torch.float32 and torch.equal(found, take(columns / len(asked)))
    own = attention_lse(*moved, **there | dict(rows="all"))
    assert torch.equal(token_importance(*moved, **there), token_importance(*moved, lse=own, **there))


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows(implementation, rows):
    impl, device = implementation
    q, k, _ = inputs(2, 4, 2, 40, 90, 64)
    truth, peer = (statistics(q, k, rows, False, None, 0.125, kind) for kind in (torch.float64, torch.float32))
    there = rows.to(device) if isinstance(rows, torch.Tensor) else rows
    q, k = q.to(device), k.to(device)
    check_budget("lse", attention_lse(q, k, rows=there, impl=impl).cpu(), peer[0], truth[0])
    found = token_importance(q, k, rows=there, impl=impl)
    assert torch.allclose(
        found.double().cpu(), truth[2].mean(1), rtol=2e-6, atol=0
    )  # two units of lse in the last place
    assert torch.allclose(found.sum(1).cpu(), torch.ones(2), atol=1e-5)
    assert torch.equal(found, token_importance(q, k, lse=attention_lse(q, k, impl=impl), rows=there, impl=impl))


def test_lse_of_attention_serves(implementation):
    """What sparse_attention returned over a dense layout, in place of a second product."""
    impl, device = implementation
    q, k, v = (x.to(device) for x in inputs(1, 2, 1, 150, 150, 64, torch.float16))
    _, lse = sparse_attention(q, k, v, BlockLayout.dense(150, 150, device=device), return_lse=True, impl=impl)
    for rows in ("all", "last", [4, 7]):
        with_lse, without = (token_importance(q, k, rows=rows, lse=x, impl=impl) for x in (lse, None))
        assert torch.allclose(with_lse, without, rtol=1e-4, atol=1e-7)


def test_by_hand():
    q = torch.tensor([[[[0.0] * 8, [1.0] * 8]]])
    k = torch.tensor([[[[0.0] * 8, [math.log(3.0) / 8] * 8]]])
    assert torch.allclose(token_importance(q, k, scale=1.0), torch.tensor([[(0.5 + 0.25) / 2, (0.5 + 0.75) / 2]]))
    assert torch.allclose(token_importance(q, k, rows="last", scale=1.0), torch.tensor([[0.25, 0.75]]))
    assert torch.allclose(attention_lse(q, k, scale=1.0), torch.tensor([[[2.0, 4.0]]]).log())
    assert token_importance(q, k, scale=1.0, causal=True)[0].tolist() == pytest.approx([(1 + 0.25) / 2, 0.75 / 2])
    assert float(attention_entropy(q, k, rows=0)) == pytest.approx(math.log(2.0))
    assert attention_lse(q.double(), k.double()).dtype == torch.float64


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_queries_that_see_nothing(impl):
    q, k, _ = inputs(1, 2, 2, 9, 4, 16)
    lse = attention_lse(q, k, causal=True, impl=impl)
    assert (lse[..., :5] == -INF).all() and lse[..., 5:].isfinite().all()  # query i sees keys up to i - 5
    assert (attention_entropy(q, k, causal=True, impl=impl)[..., :6] == 0).all()
    found = token_importance(q, k, causal=True, impl=impl)
    assert float(found.sum()) == pytest.approx(4 / 9)
    hidden = torch.full((1, 4), -INF)
    assert (attention_lse(q, k, key_bias=hidden, impl=impl) == -INF).all()
    assert not token_importance(q, k, key_bias=hidden, impl=impl).any()
    assert not attention_entropy(q, k, key_bias=hidden, impl=impl).any()
    outside = torch.tensor([-1, 9, 3])
    lse = attention_lse(q, k, rows=outside, impl=impl)
    assert (lse[..., :2] == -INF).all() and torch.equal(lse[..., 2], attention_lse(q, k, rows=3, impl=impl)[..., 0])
    assert float(token_importance(q, k, rows=outside, impl=impl).sum()) == pytest.approx(1 / 3)
    whole = attention_lse(q, k, impl=impl)
    assert float(token_importance(q, k, rows=outside, lse=whole, impl=impl).sum()) == pytest.approx(1 / 3)


def test_empty(implementation):
    impl, device = implementation
    z = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    assert token_importance(z(1, 2, 0, 8), z(1, 2, 5, 8), impl=impl).tolist() == [[0.0] * 5]
    assert token_importance(z(1, 2, 5, 8), z(1, 2, 0, 8), impl=impl).shape == (1, 0)
    assert attention_lse(z(1, 2, 3, 8), z(1, 2, 0, 8), impl=impl).flatten().tolist() == [-INF] * 6
    assert token_importance(z(0, 2, 3, 8), z(0, 2, 4, 8), impl=impl).shape == (0, 4)
    assert attention_entropy(z(1, 2, 3, 8), z(1, 2, 4, 8), rows=[], impl=impl).shape == (1, 2, 0)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_what_is_not_finite_stays_with_those_that_see_it(implementation, value):
    impl, device = implementation
    q, k, _ = (x.to(device) for x in inputs(2, 2, 1, 150, 150, 64, seed=2))
    ops = {"lse": attention_lse, "entropy": attention_entropy}
    clean = {n: f(q, k, causal=True, impl=impl) for n, f in ops.items()}
    importance = raw("attention_columns", impl)(q, k, clean["lse"], None, None, True, 0.125)
    bad_k, bad_q = k.clone(), q.clone()
    bad_k[1, 0, 90, 3] = value
    bad_q[0, 1, 40, 5] = value
    for name, f in ops.items():
        out = f(q, bad_k, causal=True, impl=impl)
        assert torch.equal(out[0], clean[name][0]) and torch.equal(out[1, :, :90], clean[name][1, :, :90])
        assert value == INF or out[1, :, 90:].isnan().all()
        out = f(bad_q, k, causal=True, impl=impl)
        spoilt = torch.zeros(2, 2, 150, dtype=torch.bool)
        spoilt[0, 1, 40] = True
        assert torch.equal(out[~spoilt], clean[name][~spoilt]) and not out[spoilt].isfinite().any()
    # A row that is not finite spoils the columns that it sees, of its head alone.
    lse = attention_lse(bad_q, k, causal=True, impl=impl)
    out = raw("attention_columns", impl)(bad_q, k, lse, None, None, True, 0.125)
    assert torch.equal(out[1], importance[1]) and torch.equal(out[0, 0], importance[0, 0])
    assert torch.equal(out[0, 1, 41:], importance[0, 1, 41:]) and (value == INF or out[0, 1, :41].isnan().all())
    # Nor does a key reach other columns, but through the rows that see it.
    out = raw("attention_columns", impl)(q, bad_k, clean["lse"], None, None, True, 0.125)
    keep = torch.arange(150) != 90
    assert torch.equal(out[0], importance[0]) and torch.equal(out[1][:, keep], importance[1][:, keep])


# ---- raw ops ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_given_rows_and_lse(implementation, dtype):
    """The op itself, where lse is not that of these rows: of a subset of keys, say."""
    impl, device = implementation
    q, k, _ = inputs(2, 4, 2, 70, 90, 96, dtype)
    rows = torch.tensor([69, 0, 5, 5, -1, 70, 33], dtype=torch.int32)
    lse = normal((2, 4, 7), seed=9)
    lse[0, 1, 2] = -INF
    arguments = (rows, normal((1, 90), seed=3), True, 0.1)
    truth = attention_columns(q.double(), k.double(), lse, *arguments)
    peer = attention_columns(q, k, lse, *arguments)
    moved = [t.to(device) for t in (q, k, lse, *arguments[:2])]
    check_budget("columns", raw("attention_columns", impl)(*moved, True, 0.1).cpu(), peer, truth)


def test_specification_is_softmax():
    q, k, _ = (x.double() for x in inputs(1, 2, 1, 20, 30, 16))
    lse, entropy = attention_rows(q, k, None, None, True, 0.3)
    want = statistics(q, k, "all", True, None, 0.3)
    assert torch.allclose(lse, want[0], atol=1e-13) and torch.allclose(entropy, want[1], atol=1e-13)
    assert torch.allclose(attention_columns(q, k, lse, None, None, True, 0.3) / 20, want[2], atol=1e-13)


def test_threads_and_batches_change_no_bit():
    q, k, _ = inputs(3, 4, 2, 130, 170, 72)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            lse, entropy = torch.ops.saccade.attention_rows(q, k, None, None, True, 0.1)
            found.append((lse, entropy, torch.ops.saccade.attention_columns(q, k, lse, None, None, True, 0.1)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for b in range(3):
        lse, entropy = torch.ops.saccade.attention_rows(q[b : b + 1], k[b : b + 1], None, None, True, 0.1)
        columns = torch.ops.saccade.attention_columns(q[b : b + 1], k[b : b + 1], lse, None, None, True, 0.1)
        assert all(torch.equal(a[0], w[b]) for a, w in zip((lse, entropy, columns), found[0], strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(implementation, causal):
    impl, device = implementation
    q, k, _ = (x.to(device) for x in inputs(1, 2, 2, 100, 120, 64))
    for op in (attention_lse, attention_entropy):
        whole = op(q, k, causal=causal, impl=impl)
        for rows in ([0], [99, 3], list(range(40, 90))):
            assert torch.equal(op(q, k, rows=rows, causal=causal, impl=impl), whole[:, :, rows])


def test_opcheck():
    assert BINARY.problem is None, BINARY.problem
    ops = torch.ops.saccade
    q, k, _ = inputs(1, 2, 1, 5, 7, 8)
    rows = torch.tensor([0, 3], dtype=torch.int32)
    for given, bias in ((None, None), (rows, normal((1, 7)))):
        torch.library.opcheck(ops.attention_rows.default, (q, k, given, bias, True, 0.3))
        lse = ops.attention_rows(q, k, given, bias, True, 0.3)[0]
        torch.library.opcheck(ops.attention_columns.default, (q, k, lse, given, bias, True, 0.3))


def test_one_graph():
    torch._dynamo.reset()

    def function(q, k, rows):
        lse = attention_lse(q, k)
        one = token_importance(q, k, lse=lse, rows=rows) + token_importance(q, k, rows="last", reduce="max")
        return one, attention_entropy(q, k, rows=0)

    q, k, _ = inputs(1, 2, 1, 30, 40, 16)
    rows = torch.tensor([1, 2])
    for a, b in zip(
        torch.compile(function, fullgraph=True, backend="eager")(q, k, rows), function(q, k, rows), strict=True
    ):
        assert torch.equal(a, b)


def test_explain():
    q, k, _ = inputs(1, 2, 1, 5, 7, 8)
    for name in ("token_importance", "attention_lse", "attention_entropy"):
        assert saccade.explain(name, q, k).chosen == "cpu"
        assert saccade.explain(name, q.double(), k.double()).chosen == "reference"


# ---- bad input -------------------------------------------------------------------------------------------------------------
Q, K = torch.zeros(2, 4, 10, 16), torch.zeros(2, 2, 12, 16)
BAD = {
    "q": (dict(q=1), TypeError, "q: expected a tensor [B, H, Sq, D], got int"),
    "k batch": (dict(k=K[:1]), ValueError, "k: expected [2, Hk, Sk, 16]"),
    "k dtype": (dict(k=K.half()), TypeError, "k: expected the dtype of q, float32, got float16"),
    "rows text": (dict(rows="first"), ValueError, "rows: expected one of 'all', 'last', got 'first'"),
    "rows far": (dict(rows=10), ValueError, "rows[0]: expected -10 to 9, one of the queries, got 10"),
    "rows list": (dict(rows=[0, -11]), ValueError, "rows[1]: expected -10 to 9"),
    "rows float": (dict(rows=1.5), TypeError, "rows: expected a whole number, got 1.5"),
    "rows mask": (dict(rows=torch.ones(10, dtype=torch.bool)), ValueError, "rows: expected an int32 or int64 tensor [R], got bool [10]"),
    "rows 2-D": (dict(rows=torch.ones(1, 2).long()), ValueError, "rows: expected an int32 or int64 tensor [R]"),
    "reduce": (dict(reduce="median"), ValueError, "reduce: expected one of 'mean', 'sum', 'max', got 'median'"),
    "causal": (dict(causal=1), TypeError, "causal: expected True or False, got 1"),
    "key_bias": (dict(key_bias=torch.zeros(2, 10)), ValueError, "key_bias: expected [1 or 2, 12], got [2, 10]"),
    "key_bias int": (dict(key_bias=torch.zeros(2, 12).int()), TypeError, "key_bias: expected a float dtype, got int32"),
    "lse": (dict(lse=torch.zeros(2, 4, 9)), ValueError, "lse: expected a float32 tensor [2, 4, 10], one for every query, got shape"),
    "lse half": (dict(lse=torch.zeros(2, 4, 10).half()), TypeError, "lse: expected a float32 tensor [2, 4, 10]"),
    "lse type": (dict(lse=0.0), TypeError, "lse: expected a float32 tensor [2, 4, 10], one for every query, got float"),
    "scale": (dict(scale="big"), TypeError, "scale: expected a number, got 'big'"),
    "impl": (dict(impl="triton"), ValueError, "impl: 'triton' cannot run token_importance here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, words = BAD[name]
    with pytest.raises(error) as caught:
        token_importance(**{"q": Q, "k": K} | change)
    assert words in str(caught.value)
