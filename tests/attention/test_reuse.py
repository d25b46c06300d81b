"""PlanCache: when a plan is made anew, and the recall that it watches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention.attention_cases import inputs

from saccade.attention import BlockLayout, sparse_attention
from saccade.attention.importance import attention_lse
from saccade.attention.plan import top_k
from saccade.attention.reuse import PlanCache, attention_recall

Q, K, V = inputs(1, 2, 1, 320, 320, 32)


def recall_of(layout, q=Q, k=K, **kwargs):
    _, lse = sparse_attention(q, k, V, layout, return_lse=True)
    return attention_recall(q, k, lse, **kwargs)


def test_recall_is_the_share_that_is_seen():
    layout = top_k(Q, K, keep=2)
    share = (Q @ K.repeat_interleave(2, 1).mT * 32**-0.5).softmax(-1)
    want = (share * layout.to_mask()).sum(-1)
    assert float(recall_of(layout, rows=320)) == pytest.approx(float(want.mean()), rel=1e-5)
    places = (torch.arange(7) * 320 + 160) // 7
    assert float(recall_of(layout, rows=7)) == pytest.approx(float(want[:, :, places].mean()), rel=1e-5)
    assert float(recall_of(BlockLayout.dense(320, 320))) == pytest.approx(1.0, abs=1e-5)


def test_recall_bad_input():
    with pytest.raises(ValueError, match=r"lse: expected \[1, 2, 320\], one for every query, got \[1, 2, 5\]"):
        attention_recall(Q, K, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="rows: expected a whole number of at least 1"):
        attention_recall(Q, K, torch.zeros(1, 2, 320), rows=0)


def test_every_so_many_steps():
    cache = PlanCache(partial(top_k, keep=2), every=3)
    made = [cache(Q, K, key=layer, step=step) for step in range(7) for layer in ("a", "b")]
    assert cache.planned == 6 and cache.reused == 8
    for layer in (0, 1):
        own = made[layer::2]
        assert own[0] is own[1] is own[2] and own[2] is not own[3] and own[3] is own[5] and own[5] is not own[6]
    assert made[0] is not made[1]


def test_another_size_or_another_video_plans_anew():
    cache = PlanCache(partial(top_k, keep=2), every=100)
    first = cache(Q, K, step=0)
    assert cache(Q, K, step=5) is first and cache(Q[:, :, :256], K, step=6).q_len == 256 and cache.planned == 2
    assert cache(Q[:, :, :256], K, step=0) is not first and cache.planned == 3  # steps begin again
    cache.clear()
    cache(Q[:, :, :256], K, step=1)
    assert cache.planned == 4


def test_first_steps_are_dense():
    cache = PlanCache(partial(top_k, keep=1), every=2, dense_steps=2)
    made = [cache(Q, K, step=step) for step in range(5)]
    assert [int(x.counts.max()) for x in made] == [5, 5, 1, 1, 1] and made[0] is made[1]
    assert made[2] is made[3] and made[3] is not made[4]
    assert cache.observe(Q, K, torch.zeros(1, 2, 320)) is None


def test_recall_that_falls_renews():
    cache = PlanCache(partial(top_k, keep=4), recall=0.5)
    assert cache.last_recall() is None
    layout = cache(Q, K, step=0)
    _, lse = sparse_attention(Q, K, V, layout, return_lse=True)
    found = cache.observe(Q, K, lse)
    assert float(found) > 0.5 and cache.last_recall() == float(found)
    assert cache(Q, K, step=1) is layout  # good still
    fallen = attention_lse(Q, K) - 1.0  # as if a share of exp(-1) were seen
    assert float(cache.observe(Q, K, fallen)) == pytest.approx(0.3679, rel=1e-3)
    renewed = cache(Q, K, step=2)
    assert renewed is not layout and cache(Q, K, step=3) is renewed and cache.planned == 2
    cache.observe(Q, K, torch.full((1, 2, 320), float("nan")))
    assert cache(Q, K, step=4) is not renewed  # what is not a number is no recall


def test_queries_that_see_nothing_lose_nothing():
    lse = torch.full((1, 2, 320), float("-inf"))
    assert float(attention_recall(Q, torch.full_like(K, float("-inf"))[:, :, :0], lse)) == 1.0
    assert float(attention_recall(Q[:, :, :0], K, lse[..., :0])) == 1.0


BAD = {
    "plan": (dict(plan=3, every=1), TypeError, "plan: expected a function of q and k, got int"),
    "every": (dict(every=0), ValueError, "every: expected a whole number of at least 1, got 0"),
    "never": (dict(), ValueError, "every: expected a number of steps, or a recall in its place"),
    "recall": (dict(recall=1.5), ValueError, "recall: expected a share, above 0 and at most 1, got 1.5"),
    "dense": (dict(every=1, dense_steps=-1), ValueError, "dense_steps: expected a whole number of at least 0"),
    "rows": (dict(every=1, rows=0), ValueError, "rows: expected a whole number of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, words = BAD[name]
    with pytest.raises(error) as caught:
        PlanCache(**{"plan": top_k} | change)
    assert words in str(caught.value)


def test_bad_calls():
    cache = PlanCache(partial(top_k, keep=1), every=2)
    with pytest.raises(ValueError, match="step: expected a whole number of at least 0"):
        cache(Q, K, step=-1)
    with pytest.raises(ValueError, match="key: no plan has been made for 'x'"):
        cache.observe(Q, K, torch.zeros(1, 2, 320), key="x")
