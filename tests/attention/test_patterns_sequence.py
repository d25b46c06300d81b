"""Patterns along one sequence against masks written from their definitions."""

from __future__ import annotations

import pytest
import torch
from attention import brute_masks as brute
from attention.exact import check_exact

from saccade.attention import patterns


@pytest.mark.parametrize("block", [64, 128, (64, 128)])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (1, 1), (200, 200), (130, 0), (64, 300), (300, 64)])
def test_dense_and_causal(q_len, k_len, block):
    check_exact(patterns.dense(q_len, k_len, block=block), torch.ones(q_len, k_len, dtype=torch.bool))
    for window in (None, 1, 70):
        mask = [
            [j <= i + k_len - q_len and (window is None or i + k_len - q_len - j < window) for j in range(k_len)]
            for i in range(q_len)
        ]
        wanted = torch.tensor(mask, dtype=torch.bool).reshape(q_len, k_len)
        check_exact(patterns.causal(q_len, k_len, window=window, block=block), wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("q_ends", "k_ends", "q_len", "k_len"),
    [
        ([0, 100, 101, 101, 250], None, 260, None),  # one token, none, and tokens that belong to none
        ([0, 64, 128, 300], None, 300, None),
        ([0], None, 70, None),
        ([0, 90, 90, 200], [0, 10, 150, 155], 200, 155),  # a sequence of keys without queries
        ([0, 0, 0], None, 0, None),
    ],
)
def test_packed(q_ends, k_ends, q_len, k_len, block, causal):
    keys = None if k_ends is None else torch.tensor(k_ends, dtype=torch.int32)
    layout = patterns.packed(torch.tensor(q_ends), q_len, cu_seqlens_k=keys, k_len=k_len, causal=causal, block=block)
    check_exact(layout, brute.packed(q_ends, k_ends or q_ends, q_len, q_len if k_len is None else k_len, causal))


@pytest.mark.parametrize("see", ["latest", "previous"])
@pytest.mark.parametrize(("count", "tokens", "block"), [(3, 64, 64), (2, 30, 128), (4, 1, 64)])
def test_media_time(see, count, tokens, block):
    generator = torch.Generator().manual_seed(count)
    media = torch.rand(2, 150, generator=generator) < 0.02
    media[1] = False
    media[1, 100] = True
    layout = patterns.media_time(media, count, tokens, see=see, block=block)
    check_exact(layout, brute.media_time(media.tolist(), count, tokens, see))
    alone = patterns.media_time(media[0], count, tokens, see=see, block=block)
    check_exact(alone, brute.media_time(media[:1].tolist(), count, tokens, see))


def test_text_before_any_medium_sees_nothing():
    layout = patterns.media_time(torch.tensor([False, False, True]), 1, 2)
    assert layout.to_mask()[0, 0].any(1).tolist() == [False, False, True]
