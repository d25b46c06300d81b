"""Presets: the published counts, and VidToMe against an oracle of its own."""

from __future__ import annotations

import math

import pytest
import torch

from saccade import merge


def tokens(n, d=6, batch=2, seed=0, dtype=torch.float64):
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- AuroraCap -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kept", "left"), [(0.01, 47), (0.05, 78), (0.1, 109), (0.2, 171), (0.3, 264), (0.4, 326), (0.5, 388), (1.0, 729)]
)
def test_auroracap_leaves_the_published_counts(kept, left):
    preset = merge.auroracap(kept, 32, (27, 27))
    assert preset.schedule.tokens(730)[-2] - 1 == left


def test_auroracap_parity():
    ours, theirs = merge.auroracap(0.2, 32, (27, 27)), merge.auroracap(0.2, 32, (27, 27), parity=True)
    assert ours.schedule == theirs.schedule and ours.schedule.protected == 1
    assert (ours.proportional, ours.order) == (True, "position")
    assert (theirs.proportional, theirs.order) == (False, "split")
    assert merge.auroracap(0.2, 32, (27, 27), parity=True, class_token=False).order == "similarity"
    x = tokens(730, 4, batch=1, dtype=torch.float32)
    y, _size, plan = theirs.merger()(x, index=3)
    assert y.shape[1] == 730 - 18 and torch.equal(y[:, 0], x[:, 0]) and plan.head[0, 0] == 0


def test_a_bias_along_the_queries_is_none():
    """Why parity has no bias: added to whole rows of scores, as upstream does, log(size) cancels in the softmax."""
    scores, log_size = tokens(9, 9), torch.rand(2, 9, 1, dtype=torch.float64)
    torch.testing.assert_close((scores + log_size).softmax(-1), scores.softmax(-1))
    assert not torch.allclose((scores + log_size.mT).softmax(-1), scores.softmax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 12, (8, 8)), "kept_ratio: "),
        ((1.1, 12, (8, 8)), "kept_ratio: "),
        ((0.5, 0, (8, 8)), "layers: "),
        ((0.5, 2, (8,)), "grid: "),
    ],
)
def test_auroracap_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge.auroracap(*arguments)


# ---- VidToMe ---------------------------------------------------------------------------------------------------------------
def best(rows, src, dst):
    """[(score, source, destination)] by cosine, over several samples at once: the best of any sample."""
    found = []
    for i in src:
        options = []
        for x in rows:
            for j in dst:
                a, b = x[i], x[j]
                options.append((float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)), j))
        score, j = max(options, key=lambda o: o[0])
        found.append((score, i, j))
    return sorted(found, key=lambda f: -f[0])


def vidtome(x, frames, phases, ratio, stride):
    """Token that each token of x [B, F * P, C] takes its value from, by repeated rounds over explicit lists."""
    each = x.shape[1] // frames
    source_of = list(range(x.shape[1]))
    spare, groups = [], [list(range(f * each, (f + 1) * each)) for f in range(frames)]
    while len(groups) > 1:
        phase = phases(len(groups))
        kept = groups[phase::stride]
        src = [t for g in groups if g not in kept for t in g]
        dst = spare + [t for g in kept for t in g]
        count = int(len(src) * ratio)
        merged = {i: j for _, i, j in best(x, src, dst)[:count]}
        source_of = [merged.get(s, s) for s in source_of]
        spare, groups = [t for t in src if t not in merged] + spare, kept
    return source_of


@pytest.mark.parametrize(("frames", "stride"), [(2, 4), (4, 4), (5, 2), (9, 4)])
@pytest.mark.parametrize("index", [0, 3])
def test_vidtome_local(frames, stride, index):
    x = tokens(frames * 5)
    merger = merge.vidtome(frames, stride=stride, seed=11, local_ratio=0.7)
    y, plan = merger(x, index=index)
    expected = vidtome(x, frames, lambda f: merger._draw(index, f) % min(stride, f), 0.7, stride)
    assert torch.equal(plan.unmerge(y), x[:, expected])
    assert y.shape[1] == len(set(expected))


def test_vidtome_global():
    x, bank = tokens(2 * 6), tokens(9, seed=4)
    merger = merge.vidtome(2, seed=1)
    seen = set()
    for index in range(6):
        local, _ = merger(x, index=index)
        y, plan = merger(x, bank, index=index)
        joint, n = torch.cat((local, bank), 1), local.shape[1]
        chunk, rest = list(range(n)), list(range(n, joint.shape[1]))
        chunk_is_source = merger._draw(index, 2) % 2 == 0
        seen.add(chunk_is_source)
        src, dst = (chunk, rest) if chunk_is_source else (rest, chunk)
        merged = {i: j for _, i, j in best(joint, src, dst)[: int(len(src) * 0.8)]}
        assert y.shape[1] == joint.shape[1] - len(merged)
        taken = torch.tensor([merged.get(t, t) for t in range(n)])
        within = merge.unmerge(joint[:, taken], plan.within)
        assert torch.equal(plan.unmerge(y), within)
    assert seen == {True, False}


def test_vidtome_defaults_are_the_papers():
    merger = merge.vidtome(16)
    assert (merger.ratio, merger.bank_ratio, merger.stride, merger.mode, merger.share_batch) == (
        0.9,
        0.8,
        4,
        "replace",
        True,
    )
    x = tokens(16 * 4)
    assert merger(x)[1].within.batch == 1
    alone = merge.vidtome(16, share_batch=False)(x)[1].within
    assert alone.batch == 2


# ---- PPLLaVA, FrameFusion, EVS -------------------------------------------------------------------------------------------------
def test_ppllava_windows_and_parity():
    video, image = merge.ppllava(), merge.ppllava(image=True, parity=True)
    assert (video.kernel, video.stride, video.temperature, video.order) == ((2, 3, 3), (2, 3, 3), 0.01, "post")
    assert (image.kernel, image.order) == ((1, 3, 3), "pre")
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 7).double()
    x, visual, prompt = tokens(4 * 36), tokens(4 * 36, 5, seed=1), tokens(1, 5, seed=2)[:, 0]
    outs = [
        merge.ppllava(projection=layer, parity=parity)(x, visual, prompt, 100.0, grid=(4, 6, 6))
        for parity in (False, True)
    ]
    assert outs[0].shape == (2, 2, 2, 2, 7)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)


def test_framefusion():
    frame = tokens(6, 8, batch=1)
    video = frame.repeat(1, 4, 1)
    video[:, 12:] = -video[:, 12:]  # frames 2 and 3 are the opposite of 0 and 1
    x = torch.cat((tokens(3, 8, batch=1, seed=5), video, tokens(2, 8, batch=1, seed=6)), 1)
    fusion = merge.framefusion()
    y, size, plan = fusion.merge(x, 4, prefix=3, suffix=2)
    assert plan.counts.tolist() == [3 + 12 + 2]
    assert size[0, :17, 0].tolist() == [1.0] * 3 + [2.0] * 12 + [1.0] * 2
    torch.testing.assert_close(y[:, 3:9], frame, rtol=1e-14, atol=1e-14)
    # Budget: 28 layers of 100 tokens at 0.3 are 840; after 100 and 60 the other 26 may have 26 each.
    rows = fusion.rows([100, 60], 100, 28)
    assert rows == (840 - 160) // 26
    kept = fusion.prune(tokens(100, 1)[..., 0], rows)
    assert kept.shape == (2, rows) and torch.equal(kept, kept.sort(1).values)
    assert fusion.rows([100] * 20, 100, 28) == 0
    with pytest.raises(ValueError, match="budget: "):
        merge.framefusion(budget=1.5)
    with pytest.raises(ValueError, match="layers: "):
        fusion.rows([1, 1], 10, 2)


def test_evs():
    keep = merge.evs(4, 0.6)
    x = tokens(4 * 10, dtype=torch.float32)
    y, indices = keep(x)
    assert y.shape[1] == keep.count(40) == 16
    assert torch.equal(indices[:, :10], torch.arange(10).expand(2, -1)) and torch.equal(y[:, :10], x[:, :10])
    assert merge.evs(4, 0.9).count(40) == 10  # never less than a frame
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="ratio: "):
            merge.evs(4, bad)
