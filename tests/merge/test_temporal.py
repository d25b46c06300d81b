"""Ops along time, against FrameFusion, DyCoke, EVS and HoliTom written out with loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from merge.merge_cases import generator

import saccade
from saccade import merge as M
from saccade.testing import check_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def video(batch, frames, places, channels=16, flips=2, seed=0):
    """[B, T * P, C] of +-1, a few signs of which change from frame to frame: with C = 16 every cosine is a multiple of 1/8, exactly."""
    g = generator(seed)
    first = torch.randint(0, 2, (batch, 1, places, channels), generator=g) * 2.0 - 1.0
    change = torch.rand(batch, frames, places, channels, generator=g) < flips / channels
    change[:, 0] = False
    return (first * torch.where(change, -1.0, 1.0).cumprod(1)).flatten(1, 2)


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0


def on(every, *tensors):
    return [t.to(every[1]) for t in tensors]


# ---- similarity of frames ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2, 4))
def test_frame_similarity(every, stride, dtype):
    x = torch.randn(2, 5, 70, 24, generator=generator(0)).to(dtype)  # many, so that the largest errors compare
    got = M.frame_similarity(x.flatten(1, 2).to(every[1]), 5, stride=stride, impl=every[0])
    peer, exact = (torch.cosine_similarity(y[:, stride:], y[:, :-stride], dim=-1) for y in (x.float(), x.double()))
    assert got.shape == (2, 5 - stride, 70) and got.dtype == torch.float32
    check_budget("frame_similarity", got, peer, exact)
    wide = torch.full((2, 5, 70, 48), NAN, dtype=dtype, device=every[1])
    wide[..., 24:] = x
    for same in (x.to(every[1]), wide[..., 24:]):
        assert torch.equal(M.frame_similarity(same, stride=stride, impl=every[0]), got)
    assert torch.equal(M.frame_similarity(x[1:].to(every[1]), stride=stride, impl=every[0]), got[1:])


def test_no_such_frames():
    x = torch.ones(2, 6, 4)
    for frames, stride in ((1, 1), (3, 3), (3, 5)):
        assert M.frame_similarity(x, frames, stride=stride).shape == (2, 0, 6 // frames)
    assert M.frame_similarity(torch.ones(0, 6, 4), 3).shape == (0, 2, 2)


def test_frame_similarity_gradient_by_the_reference_alone():
    x = torch.randn(2, 6, 3, generator=generator(0), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: M.frame_similarity(x, 3), (x,))
    wide = x.detach().float().requires_grad_()
    assert saccade.explain("frame_similarity", wide, 3).chosen == "reference"
    with pytest.raises(ValueError, match="impl: 'cpu' cannot run frame_similarity here: no gradient"):
        M.frame_similarity(wide, 3, impl="cpu")


# ---- runs (FrameFusion) ------------------------------------------------------------------------------------------------------
def runs(x, frames, links, before=0):
    """Rows of one sample [N, C] in order, the tokens of each, given links[t][p]: whether (t, p) joins (t - 1, p)."""
    x, places = x.double(), len(links[0])
    groups = {i: [i] for i in range(len(x))}
    for p in range(places):
        root = p + before
        for t in range(1, frames):
            token = t * places + p + before
            if links[t][p]:
                groups[root] += groups.pop(token)
            else:
                root = token
    return [groups[i] for i in sorted(groups)]


def links_of(x, frames, threshold, before=0):
    places = (len(x)) // frames
    at = lambda t, p: x[before + t * places + p]  # noqa: E731
    return [[t > 0 and cosine(at(t, p), at(t - 1, p)) >= threshold for p in range(places)] for t in range(frames)]


def check_rows(plan, x, groups, b):
    inverse = torch.full((x.shape[1],), -1, dtype=torch.int32)
    for row, tokens in enumerate(groups):
        inverse[tokens] = row
    assert torch.equal(plan.inverse[b].cpu(), inverse)
    assert int(plan.counts[b]) == len(groups)
    assert plan.head[b, : len(groups)].tolist() == [tokens[0] for tokens in groups]
    y, size = M.merge(x, plan)
    means = torch.stack([x[b, tokens].double().mean(0) for tokens in groups])
    assert torch.allclose(y[b, : len(groups)].double(), means, rtol=1e-5, atol=1e-6)
    assert size[b, : len(groups), 0].tolist() == [len(tokens) for tokens in groups]


def test_runs_by_hand(every):
    a = torch.tensor([[[0.9, 0.5], [0.7, 0.6], [0.1, 0.9]]])  # place 0: 0-1-2 | 3; place 1: 0 | 1-2-3
    plan = M.merge_runs(None, 4, 0.6, similarity=a.to(every[1]), impl=every[0])
    assert plan.inverse.tolist() == [[0, 1, 0, 2, 0, 2, 3, 2]]
    assert plan.counts.tolist() == [4] and plan.rows == 8
    assert plan.score[0].tolist() == pytest.approx([-INF, -INF, 0.9, -INF, 0.7, 0.6, -INF, 0.9])


@pytest.mark.parametrize("frames,places", ((1, 5), (2, 5), (6, 7), (9, 1)))
def test_runs_are_framefusions(every, frames, places):
    x = video(2, frames, places, seed=frames)
    (moved,) = on(every, x)
    for threshold in (0.5, 0.75, 1.0, -INF, INF):
        plan = M.merge_runs(moved, frames, threshold, impl=every[0])
        for b in range(2):
            check_rows(plan, moved, runs(x[b], frames, links_of(x[b], frames, threshold)), b)
        similar = M.frame_similarity(moved, frames, impl=every[0])
        again = M.merge_runs(None, frames, threshold, similarity=similar, impl=every[0])
        assert torch.equal(again.inverse, plan.inverse) and torch.equal(again.members, plan.members)


def test_text_around_the_video_stays(every):
    x = video(2, 4, 6)
    text = torch.ones(2, 5, 16)
    (whole,) = on(every, torch.cat((text[:, :3], x, text[:, 3:]), 1))
    plan = M.merge_runs(whole, 4, 0.75, prefix=3, suffix=2, impl=every[0])
    for b in range(2):
        groups = runs(x[b], 4, links_of(x[b], 4, 0.75))
        groups = [[0], [1], [2], *([i + 3 for i in g] for g in groups), [27], [28]]
        check_rows(plan, whole, groups, b)


def test_protected_tokens_neither_merge_nor_are_merged_into(every):
    x = torch.ones(2, 1 + 4 * 2, 8)
    (moved,) = on(every, x)
    plan = M.merge_runs(moved, 4, 0.5, protect=[1 + 2 * 1], prefix=1, impl=every[0])  # frame 1, place 0
    assert plan.inverse.tolist() == [[0, 1, 2, 3, 2, 4, 2, 4, 2]] * 2
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 3] = True
    plan = M.merge_runs(moved, 4, 0.5, protect=mask.to(every[1]), prefix=1, impl=every[0])
    assert plan.inverse.tolist() == [[0, 1, 2, 1, 2, 1, 2, 1, 2], [0, 1, 2, 3, 2, 4, 2, 4, 2]]


def best_links(x, frames, r, threshold=-INF):
    places = len(x) // frames
    scored = [
        (-cosine(x[t * places + p], x[(t - 1) * places + p]), t, p) for t in range(1, frames) for p in range(places)
    ]
    chosen = {(t, p) for s, t, p in sorted(scored)[:r] if -s >= threshold}
    return [[(t, p) in chosen for p in range(places)] for t in range(frames)]


@pytest.mark.parametrize("r", (0, 1, 9, 35))
def test_the_r_most_similar_links(every, r):
    x = video(2, 6, 7, seed=r)
    (moved,) = on(every, x)
    exact = M.merge_runs(moved, 6, r=r, impl=every[0])
    assert exact.rows == 42 - r and exact.counts.tolist() == [42 - r] * 2
    at_most = M.merge_runs(moved, 6, 0.75, r=r, impl=every[0])
    assert at_most.rows == 42
    for b in range(2):
        check_rows(exact, moved, runs(x[b], 6, best_links(x[b], 6, r)), b)
        check_rows(at_most, moved, runs(x[b], 6, best_links(x[b], 6, r, 0.75)), b)


def test_not_finite_tokens_never_link(every):
    x = torch.ones(1, 4 * 2 + 1, 8)
    x[0, 2, 3] = NAN  # frame 1, place 0
    (moved,) = on(every, x)
    plan = M.merge_runs(moved, 4, 0.5, suffix=1, impl=every[0])
    assert plan.inverse.tolist() == [[0, 1, 2, 1, 3, 1, 3, 1, 4]]
    y = M.merge(moved, plan)[0]
    assert y[0].isnan().any(-1).nonzero().flatten().tolist() == [2]
    # Exactly 6 were asked for and 4 links are numbers: the token that is not finite and the run behind it go, no text.
    plan = M.merge_runs(moved, 4, r=6, suffix=1, impl=every[0])
    assert plan.rows == 3 and plan.inverse.tolist() == [[0, 1, -1, 1, -1, 1, -1, 1, 2]]


def test_gradient_of_merged_runs():
    x = video(1, 3, 4).double().requires_grad_()
    plan = M.merge_runs(x, 3, 0.75)
    torch.autograd.gradcheck(lambda x: M.merge(x, plan)[0], (x,))


# ---- retention (EVS), pairs (DyCoke) --------------------------------------------------------------------------------------------
def evs(x, frames, ratio):
    """Indices kept of one sample [T * P, C]."""
    places = len(x) // frames
    score = [INF if i < places else 1 - cosine(x[i], x[i - places]) for i in range(len(x))]
    keep = max(places, int(len(x) * (1 - ratio)))
    return sorted(sorted(range(len(x)), key=lambda i: (-score[i], i))[:keep])


@pytest.mark.parametrize("ratio", (0, 0.1, 0.5, 0.7, 0.99, 1))
@pytest.mark.parametrize("frames,places", ((1, 6), (5, 6), (8, 3)))
def test_retain_is_evs(every, frames, places, ratio):
    x = video(2, frames, places, seed=frames)
    got = M.retain(x.to(every[1]), frames, ratio=ratio, impl=every[0])
    assert got.dtype == torch.int64
    assert got.tolist() == [evs(x[b], frames, ratio) for b in range(2)]
    volume = x.unflatten(1, (frames, places)).to(every[1])
    assert torch.equal(M.retain(volume, ratio=ratio, impl=every[0]), got)


def dycoke(x, frames, ratio):
    """Indices kept of one sample [T * P, C]: the paper's method, every frame by its own pair."""
    places = len(x) // frames
    keep = int((1 - ratio) * places)
    kept = {t: list(range(places)) for t in range(frames)}

    def different(t, before):
        alike = [cosine(x[t * places + p], x[before * places + p]) for p in range(places)]
        return sorted(range(places), key=lambda p: (alike[p], p))[:keep]

    for t in range(0, frames - 1, 2):
        kept[t + 1] = different(t + 1, t)
    for t in range(0, frames - 2, 4):
        kept[t + 2] = different(t + 2, t)
    return sorted(t * places + p for t in kept for p in kept[t])


@pytest.mark.parametrize("ratio", (0, 0.3, 0.7, 1))
@pytest.mark.parametrize("frames,places", ((1, 6), (2, 6), (3, 6), (4, 5), (5, 5), (8, 7), (11, 3)))
def test_prune_pairs_is_dycoke(every, frames, places, ratio):
    x = video(2, frames, places, seed=frames)
    got = M.prune_pairs(x.to(every[1]), frames, ratio=ratio, impl=every[0])
    assert got.tolist() == [dycoke(x[b], frames, ratio) for b in range(2)]


def test_the_share_that_dycoke_keeps():
    assert M.prune_pairs(torch.ones(1, 32 * 196, 4), 32).shape[1] == 8 * 196 + 24 * 58


def test_not_finite_tokens_go_first():
    x = video(1, 4, 4, flips=4)
    x[0, 5, 0] = NAN
    assert 5 not in M.retain(x, 4, ratio=0.25)[0] and 5 not in M.prune_pairs(x, 4, ratio=0.5)[0]


# ---- keep_top, select -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_keep_top(every, dtype):
    if dtype == torch.float64 and every[0] != "reference":
        pytest.skip("no float64 kernel")
    scores = torch.randint(-3, 4, (3, 50), generator=generator(0)).to(dtype)  # ties everywhere
    scores[0, ::7], scores[1, 3:9], scores[2, 5], scores[2, 6] = NAN, INF, -INF, NAN
    for k in (0, 1, 7, 49, 50):
        key = lambda b: lambda i: (bool(scores[b, i].isnan()), -float(scores[b, i].nan_to_num(0.0)), i)  # noqa: E731
        expected = [sorted(sorted(range(50), key=key(b))[:k]) for b in range(3)]
        got = M.keep_top(scores.to(every[1]), k, impl=every[0])
        assert got.tolist() == expected and got.dtype == torch.int64
        assert torch.equal(M.keep_top(scores.to(every[1]).T.contiguous().T, k, impl=every[0]), got)


def test_select():
    x = torch.randn(2, 5, 3, generator=generator(0), dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 3], [1, 4]])
    assert torch.equal(M.select(x, indices), torch.stack((x[0, [0, 3]], x[1, [1, 4]])))
    assert torch.equal(M.select(x[..., 0], indices[:1]), x[:, [0, 3], 0])
    torch.autograd.gradcheck(lambda x: M.select(x, indices), (x,))


# ---- static windows (HoliTom) ---------------------------------------------------------------------------------------------------
def spared(similarity, tau, s, e):
    """Tokens that the window of frames [s, e] spares, of similarity [T - 1][P]."""
    return (e - s) * sum(all(similarity[t][p] > tau for t in range(s, e)) for p in range(len(similarity[0])))


def holitom(similarity, frames, tau, longest):
    """Windows as (first, last), by the recursion, shorter windows first among equals."""
    best, first = [], []
    for e in range(frames):
        choices = []
        for length in range(1, min(e + 1, longest) + 1):
            s = e - length + 1
            choices.append((best[s - 1] if s else 0) + (spared(similarity, tau, s, e) if length > 1 else 0))
        best.append(max(choices))
        first.append(e - choices.index(max(choices)))
    windows, e = [], frames - 1
    while e >= 0:
        windows.append((first[e], e))
        e = first[e] - 1
    return windows[::-1], best[-1]


def best_cut(similarity, frames, tau, longest):
    """Of all ways to cut, what the best spares."""
    most = 0
    for cuts in itertools.product((False, True), repeat=frames - 1):
        starts = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), frames]
        windows = [(a, b - 1) for a, b in itertools.pairwise(starts)]
        if all(e - s < longest for s, e in windows):
            most = max(most, sum(spared(similarity, tau, s, e) for s, e in windows if e > s))
    return most


def window_groups(similarity, windows, tau, places):
    groups = {}
    for s, e in windows:
        for p in range(places):
            if e > s and all(similarity[t][p] > tau for t in range(s, e)):
                groups[s * places + p] = [t * places + p for t in range(s, e + 1)]
            else:
                groups.update({t * places + p: [t * places + p] for t in range(s, e + 1)})
    return [groups[i] for i in sorted(groups)]


@pytest.mark.parametrize("longest", (None, 1, 2, 3))
@pytest.mark.parametrize("frames,places", ((1, 4), (2, 4), (7, 6), (10, 5)))
def test_windows_are_holitoms(every, frames, places, longest):
    x = video(3, frames, places, flips=1.2, seed=frames)
    (moved,) = on(every, x)
    window, plan = M.static_windows(moved, frames, 0.75, max_window=longest, impl=every[0])
    assert window.dtype == torch.int64
    for b in range(3):
        at = lambda t, p: x[b, t * places + p]  # noqa: E731, B023
        similarity = [[cosine(at(t + 1, p), at(t, p)) for p in range(places)] for t in range(frames - 1)] or [[]]
        windows, most = holitom(similarity, frames, 0.75, longest or frames)
        assert window[b].tolist() == [i for i, (s, e) in enumerate(windows) for _ in range(s, e + 1)]
        check_rows(plan, moved, window_groups(similarity, windows, 0.75, places), b)
        assert frames * places - int(plan.counts[b]) == most
        if frames < 8:
            assert most == best_cut(similarity, frames, 0.75, longest or frames)


def test_windows_with_text_and_nan(every):
    alike = torch.tensor([[[0.9, NAN], [0.9, 0.9]]])
    window, plan = M.static_windows(None, 3, 0.8, similarity=alike.to(every[1]), prefix=1, suffix=1, impl=every[0])
    # [0..2] spares 2 x 1, [1..2] spares 1 x 2: equal, and the shorter last window is taken.
    assert window.tolist() == [[0, 1, 1]]
    assert plan.inverse.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]


# ---- all of them -------------------------------------------------------------------------------------------------------------
CALLS = {
    "frame_similarity": lambda x, impl: M.frame_similarity(x, 6, impl=impl),
    "merge_runs": lambda x, impl: M.merge_runs(x, 6, 0.6, impl=impl).inverse,
    "merge_runs r": lambda x, impl: M.merge_runs(x, 6, r=11, impl=impl).inverse,
    "prune_pairs": lambda x, impl: M.prune_pairs(x, 6, impl=impl),
    "retain": lambda x, impl: M.retain(x, 6, ratio=0.6, impl=impl),
    "static_windows": lambda x, impl: torch.cat(
        [M.static_windows(x, 6, 0.6, impl=impl)[0], M.static_windows(x, 6, 0.6, impl=impl)[1].inverse], 1
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_every_time_and_for_any_batch(every, call):
    (x,) = on(every, video(3, 6, 7))
    first = CALLS[call](x, every[0])
    assert torch.equal(CALLS[call](x, every[0]), first)
    assert torch.equal(torch.cat([CALLS[call](x[i : i + 1], every[0]) for i in range(3)]), first)
    assert torch.equal(CALLS[call](x, "reference"), first)  # the cosines are exact


@pytest.mark.parametrize("call", CALLS)
def test_compiles_into_one_graph(call):
    x = video(2, 6, 7)
    compiled = torch.compile(CALLS[call], fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, "auto"), CALLS[call](x, "auto"))


X, S = torch.ones(2, 12, 4), torch.ones(2, 2, 4)
BAD = {
    "similarity x": (lambda: M.frame_similarity([1.0], 3), TypeError, "x: expected a tensor"),
    "similarity dtype": (lambda: M.frame_similarity(X.long(), 3), TypeError, "x: expected dtype"),
    "similarity dimensions": (lambda: M.frame_similarity(X[0], 3), ValueError, "x: expected 3 dimensions"),
    "similarity without frames": (lambda: M.frame_similarity(X), ValueError, "frames: expected the number of frames"),
    "similarity frames": (lambda: M.frame_similarity(X, 5), ValueError, "frames: 5 frames do not divide 12 tokens"),
    "similarity no frames": (lambda: M.frame_similarity(X, 0), ValueError, "frames: expected a whole number of at"),
    "similarity volume": (lambda: M.frame_similarity(X.view(2, 3, 4, 4), 4), ValueError, "frames: expected 3 or None"),
    "similarity stride": (lambda: M.frame_similarity(X, 3, stride=0), ValueError, "stride: expected a whole number"),
    "runs frames": (lambda: M.merge_runs(X, 5, 0.5), ValueError, "frames: 5 frames do not divide the 12 tokens"),
    "runs text": (lambda: M.merge_runs(X, 3, 0.5, prefix=1), ValueError, "frames: 3 frames do not divide the 11 tokens"),
    "runs prefix": (lambda: M.merge_runs(X, 3, 0.5, prefix=-3), ValueError, "prefix: expected a whole number of at"),
    "runs suffix": (lambda: M.merge_runs(X, 3, 0.5, suffix=15), ValueError, "frames: 3 frames do not divide the -3"),
    "runs neither": (lambda: M.merge_runs(X, 3), ValueError, "threshold: expected the lowest similarity to merge, or r"),
    "runs threshold": (lambda: M.merge_runs(X, 3, NAN), ValueError, "threshold: expected a number, got nan"),
    "runs threshold type": (lambda: M.merge_runs(X, 3, "0.5"), TypeError, "threshold: expected a number"),
    "runs both": (lambda: M.merge_runs(X, 3, 0.5, similarity=S), ValueError, "similarity: expected in place of x"),
    "runs nothing": (lambda: M.merge_runs(None, 3, 0.5), ValueError, "similarity: expected in place of x"),
    "runs similarity": (lambda: M.merge_runs(None, 4, 0.5, similarity=S), ValueError, "similarity: expected [B, 3, P]"),
    "runs similarity type": (lambda: M.merge_runs(None, 3, 0.5, similarity=1), TypeError, "similarity: expected a tens"),
    "runs similarity dtype": (lambda: M.merge_runs(None, 3, 0.5, similarity=S.int()), TypeError, "similarity: expected a"),
    "runs r": (lambda: M.merge_runs(X, 3, r=9), ValueError, "r: at most 8 of 12 tokens"),
    "runs r protected": (lambda: M.merge_runs(X, 3, r=8, protect=1), ValueError, "r: at most 7 of 12 tokens"),
    "runs r below": (lambda: M.merge_runs(X, 3, r=-1), ValueError, "r: expected a whole number of at least 0"),
    "runs protect": (lambda: M.merge_runs(X, 3, 0.5, protect=[12]), ValueError, "protect: position 12 is outside"),
    "windows threshold": (lambda: M.static_windows(X, 3, NAN), ValueError, "threshold: expected a number, got nan"),
    "windows longest": (lambda: M.static_windows(X, 3, max_window=0), ValueError, "max_window: expected a whole number"),
    "windows frames": (lambda: M.static_windows(X, 5), ValueError, "frames: 5 frames do not divide"),
    "windows similarity": (lambda: M.static_windows(None, 5, similarity=S), ValueError, "similarity: expected [B, 4, P]"),
    "retain frames": (lambda: M.retain(X, 5, ratio=0.5), ValueError, "frames: 5 frames do not divide 12 tokens"),
    "retain ratio": (lambda: M.retain(X, 3, ratio=1.5), ValueError, "ratio: expected the share of tokens to drop"),
    "retain ratio type": (lambda: M.retain(X, 3, ratio=None), TypeError, "ratio: expected a number"),
    "pairs frames": (lambda: M.prune_pairs(X, 5), ValueError, "frames: 5 frames do not divide 12 tokens"),
    "pairs ratio": (lambda: M.prune_pairs(X, 3, ratio=-0.1), ValueError, "ratio: expected the share of tokens to drop"),
    "top type": (lambda: M.keep_top([1.0], 1), TypeError, "scores: expected a tensor"),
    "top dimensions": (lambda: M.keep_top(X, 1), ValueError, "scores: expected 2 dimensions"),
    "top dtype": (lambda: M.keep_top(S[0].int(), 1), TypeError, "scores: expected dtype"),
    "top k": (lambda: M.keep_top(S[0], 5), ValueError, "k: expected at most 4"),
    "top k below": (lambda: M.keep_top(S[0], -1), ValueError, "k: expected a whole number of at least 0"),
    "top k type": (lambda: M.keep_top(S[0], 1.0), TypeError, "k: expected a whole number"),
    "top float64": (lambda: M.keep_top(S[0].double(), 1, impl="cpu"), ValueError, "no float64 kernel of this op"),
    "select x": (lambda: M.select([1], torch.zeros(1, 1).long()), TypeError, "x: expected a tensor"),
    "select x dimensions": (lambda: M.select(X[0, 0], torch.zeros(1, 1).long()), ValueError, "x: expected 2 dimensions"),
    "select indices": (lambda: M.select(X, torch.zeros(2, 1)), TypeError, "indices: expected a tensor [B, K] int64"),
    "select list": (lambda: M.select(X, [[0]]), TypeError, "indices: expected a tensor [B, K] int64, got list"),
    "select batch": (lambda: M.select(X, torch.zeros(3, 1).long()), ValueError, "indices: expected [2 or 1, K]"),
    "select device": (lambda: M.select(X, torch.zeros(2, 1).long().to("meta")), ValueError, "indices: expected the device"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_empty_batch():
    x = torch.ones(0, 12, 4)
    assert M.merge_runs(x, 3, 0.5).inverse.shape == (0, 12)
    assert M.static_windows(x, 3)[0].shape == (0, 3)
    assert M.retain(x, 3, ratio=0.5).shape == (0, 6)
    assert M.prune_pairs(x, 3, ratio=0.5).shape == (0, 8)
    assert math.prod(M.keep_top(torch.ones(0, 4), 2).shape) == 0
