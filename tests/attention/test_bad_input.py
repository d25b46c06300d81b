"""Bad input of sparse_attention and of layouts: an error that names the argument, what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

from saccade.attention import BlockLayout, BlockLists, sparse_attention

Q = torch.zeros(2, 4, 70, 64)
K = torch.zeros(2, 2, 90, 64)
LAYOUT = BlockLayout.dense(70, 90)


def lists(counts, indices, starts=None, **kw):
    counts = torch.tensor(counts, dtype=torch.int32)[None, None]
    indices = torch.tensor(indices, dtype=torch.int32)
    if starts is None:
        starts = torch.arange(counts.numel(), dtype=torch.int32).reshape(counts.shape) * indices.shape[-1]
    return BlockLists(starts, counts, indices, **kw)


def call(**changes):
    given = dict(q=Q, k=K, v=K, layout=LAYOUT) | changes
    return sparse_attention(**given)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=[1.0]), TypeError, r"q: expected a tensor \[B, H, Sq, D\], got list"),
        (dict(q=Q[0]), ValueError, r"q: expected \[B, H, Sq, D\], got shape \[4, 70, 64\]"),
        (dict(q=Q.int()), TypeError, "q: expected dtype float32, float16, bfloat16, float64, got int32"),
        (dict(q=Q[..., :63]), ValueError, "q: expected a head_dim that is a multiple of 8 up to 256, got 63"),
        (dict(k=K[:1]), ValueError, r"k: expected \[2, Hk, Sk, 64\]"),
        (dict(k=K[..., :32]), ValueError, r"k: expected \[2, Hk, Sk, 64\]"),
        (dict(k=torch.zeros(2, 3, 90, 64)), ValueError, "k: expected a number of heads that divides the 4 of q, got 3"),
        (dict(k=K.half()), TypeError, "k: expected the dtype of q, float32, got float16"),
        (dict(v=K[:, :, :80]), ValueError, r"v: expected the shape of k, \[2, 2, 90, 64\], got \[2, 2, 80, 64\]"),
        (dict(v=K.double()), TypeError, "v: expected the dtype of q"),
        (dict(k=K.to("meta")), ValueError, "k: expected the device of q, cpu, got meta"),
        (dict(layout=torch.ones(70, 90)), TypeError, "layout: expected a BlockLayout, got Tensor"),
        (dict(layout=BlockLayout.dense(90, 90)), ValueError, "layout: made for 90 queries and 90 keys, got q with 70"),
        (
            dict(layout=BlockLayout.from_block_map(torch.ones(3, 1, 2, 2, dtype=torch.bool), q_len=70, k_len=90)),
            ValueError,
            "layout: made for 3 samples, expected 1 or the 2 of q",
        ),
        (
            dict(layout=BlockLayout.from_block_map(torch.ones(1, 2, 2, 2, dtype=torch.bool), q_len=70, k_len=90)),
            ValueError,
            "layout: made for 2 heads, expected 1 or the 4 of q",
        ),
        (dict(layout=LAYOUT.to("meta")), ValueError, r"layout: expected the device of q, cpu, got meta; use layout.to"),
        (dict(bias=torch.zeros(70, 90)), ValueError, r"bias: expected \[B, H, Sq, Sk\], got shape \[70, 90\]"),
        (dict(bias=torch.zeros(1, 2, 70, 90)), ValueError, r"bias: expected \[1 or 2, 1 or 4, 70, 90\]"),
        (dict(bias=torch.zeros(1, 1, 90, 70)), ValueError, r"bias: expected \[1 or 2, 1 or 4, 70, 90\]"),
        (dict(bias=torch.zeros(1, 1, 70, 90).bool()), TypeError, "bias: expected float32 or float32, got bool"),
        (dict(bias=torch.zeros(1, 1, 70, 90).half()), TypeError, "bias: expected float32 or float32, got float16"),
        (dict(key_bias=torch.zeros(2, 70)), ValueError, r"key_bias: expected \[1 or 2, 90\], got \[2, 70\]"),
        (dict(key_bias=torch.zeros(90)), ValueError, r"key_bias: expected \[B, Sk\]"),
        (dict(key_bias=torch.zeros(2, 90).int()), TypeError, "key_bias: expected a float dtype, got int32"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
        (dict(scale="1"), TypeError, "scale: expected a number"),
        (dict(impl="gpu"), ValueError, "impl: expected one of"),
        (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run sparse_attention here: no float32 CUDA kernel"),
        (dict(q=Q.double(), k=K.double(), v=K.double(), impl="cpu"), ValueError, "no float64 kernel"),
    ],
)
def test_sparse_attention(changes, error, words):
    with pytest.raises(error, match=words):
        call(**changes)


GOOD = lists([2, 1], [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            dict(full=lists([2, 1], [[1, 0], [1, 0]])),
            ValueError,
            "full.indices: expected each list ascending.*got block 1 before 0",
        ),
        (dict(full=lists([2, 1], [[1, 1], [1, 0]])), ValueError, "without repetition, got block 1 before 1 in list 0"),
        (dict(full=lists([2, 1], [[0, 2], [1, 0]])), ValueError, "full.indices: expected blocks 0 to 1, got 0 to 2"),
        (dict(full=lists([2, 1], [[-1, 1], [1, 0]])), ValueError, "full.indices: expected blocks 0 to 1, got -1"),
        (dict(full=lists([3, 1], [[0, 1], [1, 0]])), ValueError, "full.counts: expected 0 to 2, got 1 to 3"),
        (
            dict(full=lists([2, 2], [[0, 1], [0, 1]], torch.tensor([[[0, 3]]], dtype=torch.int32))),
            ValueError,
            "full.starts",
        ),
        (dict(full=lists([2], [[0, 1]])), ValueError, r"full: expected starts and counts \[1\|B, 1\|H, 2\]"),
        (dict(full=GOOD._replace(counts=GOOD.counts.long())), TypeError, "full.counts: expected int32, got int64"),
        (dict(full=GOOD._replace(indices=GOOD.indices.T)), ValueError, "full.indices: expected a contiguous tensor"),
        (dict(partial=GOOD), ValueError, "partial: a block stands in the full list too"),
        (dict(partial=lists([0, 1], [[0, 0], [0, 0]])), ValueError, "box, at: expected both, or bits"),
        (
            dict(partial=lists([0, 1], [[0, 0], [0, 0]]), bits=torch.zeros(1, 64, 2, dtype=torch.int32)),
            ValueError,
            "partial.ids: expected the row of bits of every entry, got None",
        ),
        (
            dict(bits=torch.zeros(1, 64, 2, dtype=torch.int32)),
            ValueError,
            "box, at, bits: expected None where there are no",
        ),
        (
            dict(q_order=torch.zeros(1, 1, 128, dtype=torch.int32)),
            ValueError,
            "q_order: token 0 stands at two positions",
        ),
        (
            dict(q_order=torch.arange(70, dtype=torch.int32)[None, None]),
            ValueError,
            r"q_order: expected \[1\|B, 1\|H, 128\]",
        ),
        (dict(k_order=torch.full((1, 1, 128), 90, dtype=torch.int32)), ValueError, "k_order: expected tokens 0 to 89"),
        (
            dict(q_order=torch.full((1, 1, 128), -1, dtype=torch.int32)),
            ValueError,
            "q_order: token 0 stands at no position",
        ),
        (dict(q_block=32), ValueError, "q_block: expected one of 64, 128, got 32"),
        (dict(q_len=-1), ValueError, "q_len: expected a whole number of at least 0, got -1"),
        (dict(k_len=9.5), TypeError, "k_len: expected a whole number"),
    ],
)
def test_layouts_from_outside(changes, error, words):
    given = dict(q_len=70, k_len=90, q_block=64, k_block=64, full=GOOD) | changes
    with pytest.raises(error, match=words):
        BlockLayout.from_lists(**given)


def test_a_good_layout_passes():
    assert BlockLayout.from_lists(70, 90, 64, 64, GOOD).counts.tolist() == [[[2, 1]]]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: BlockLayout.from_block_map(torch.ones(2, 2), q_len=70, k_len=90),
            TypeError,
            "block_map: expected a bool",
        ),
        (lambda: BlockLayout.from_block_map(torch.ones(2, 3).bool(), q_len=70, k_len=90), ValueError, r"\[2, 2\]"),
        (lambda: BlockLayout.from_block_map([[True]], q_len=64, k_len=64), TypeError, "block_map: .* got list"),
        (lambda: BlockLayout.from_mask(torch.ones(2, 2)), TypeError, "mask: expected a bool tensor .* got float32"),
        (lambda: BlockLayout.from_mask(torch.ones(2).bool()), ValueError, r"mask: expected \[Sq, Sk\]"),
        (lambda: BlockLayout.dense(10, 10, k_block=100), ValueError, "k_block: expected one of 64, 128, got 100"),
    ],
)
def test_constructors(make, error, words):
    with pytest.raises(error, match=words):
        make()
