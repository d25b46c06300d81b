"""`BlockLayout` itself: its constructors against masks, other forms, files, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from attention.exact import check_exact

from saccade.attention import BlockLayout, BlockLists, patterns, sparse_attention
from saccade.attention.orders import frame_order, tile_order, token_order, window_order


def random_mask(*shape, share=0.02, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("q_block", "k_block"), [(64, 64), (128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (5, 0), (64, 128), (130, 200), (2, 3, 129, 65)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_from_mask(shape, q_block, k_block, share):
    mask = random_mask(*shape, share=share)
    check_exact(BlockLayout.from_mask(mask, q_block=q_block, k_block=k_block), mask)


def test_from_mask_with_the_sign_bit():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, 31] = mask[3, 63] = True
    check_exact(BlockLayout.from_mask(mask), mask)


@pytest.mark.parametrize("block", [64, 128])
def test_from_block_map(block):
    blocks = random_mask(2, 3, -(-300 // block), -(-200 // block), share=0.4)
    mask = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :300, :200]
    layout = BlockLayout.from_block_map(blocks, q_len=300, k_len=200, q_block=block, k_block=block)
    assert layout.partial is None
    check_exact(layout, mask)
    assert float(layout.density) == pytest.approx(float(blocks.float().mean()))


@pytest.mark.parametrize(
    "layout",
    [
        patterns.dense(200, 130),
        patterns.neighborhood((5, 9, 11), 3, prefix=5),
        patterns.sliding_tile((5, 9, 11), (2, 4, 4), [(1, 1, 1), (3, 3, 1)]),
        BlockLayout.from_mask(random_mask(2, 2, 200, 300)),
    ],
    ids=repr,
)
def test_by_column(layout):
    blocks = layout.block_map()
    for value, lists in zip((2, 1), layout.transposed(), strict=True):
        if lists is None:
            assert value == 1 and layout.partial is None
            continue
        for b, h, column in torch.cartesian_prod(*(torch.arange(n) for n in lists.counts.shape)).tolist():
            start, count = int(lists.starts[b, h, column]), int(lists.counts[b, h, column])
            rows = lists.indices.flatten()[start : start + count].tolist()
            assert rows == (blocks[b, h, :, column] == value).nonzero().flatten().tolist()
    assert layout.transposed() is layout.transposed()


@pytest.mark.parametrize("name", ["full", "box", "bits", "order"])
def test_save_and_load(name, tmp_path):
    layout = {
        "full": patterns.dense(200),
        "box": patterns.causal(200),
        "bits": BlockLayout.from_mask(random_mask(2, 1, 200, 100)),
        "order": patterns.temporal((3, 5, 7), sink=True, prefix=5),
    }[name]
    layout.save(tmp_path / "layout.pt")
    back = BlockLayout.load(tmp_path / "layout.pt")
    assert repr(back) == repr(layout)
    check_exact(back, layout.to_mask())


def test_a_file_of_something_else(tmp_path):
    torch.save({"format": "other"}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="path: expected a file of saccade.BlockLayout/1, got other"):
        BlockLayout.load(tmp_path / "x.pt")
    patterns.causal(200).save(tmp_path / "y.pt")
    held = torch.load(tmp_path / "y.pt")
    held["full"][2] = held["full"][2] + 7
    torch.save(held, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="full.indices: expected blocks 0 to 3"):
        BlockLayout.load(tmp_path / "y.pt")
    del held["bits"]
    torch.save(held, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="path: the file lacks bits"):
        BlockLayout.load(tmp_path / "y.pt")


def lists(starts, counts, indices, ids=None):
    return BlockLists(int32(*starts)[None, None], int32(*counts)[None, None], int32(*indices), ids)


@pytest.mark.parametrize(
    ("full", "options", "error", "message"),
    [
        (lists([0, 2], [2, 1], [0, 2, 1]), {}, ValueError, "full.indices: expected blocks 0 to 1, got 0 to 2"),
        (lists([0, 2], [2, 1], [-1, 1, 1]), {}, ValueError, "full.indices: expected blocks 0 to 1"),
        (lists([0, 2], [2, 1], [1, 1, 1]), {}, ValueError, "full.indices: expected each list ascending"),
        (lists([0, 2], [2, 1], [1, 0, 1]), {}, ValueError, "full.indices: expected each list ascending"),
        (lists([0, 2], [2, 2], [0, 1, 1]), {}, ValueError, "full.starts: a list ends behind the 3 entries"),
        (lists([0, 2], [3, 1], [0, 1, 1]), {}, ValueError, "full.counts: expected 0 to 2, got 1 to 3"),
        (lists([0], [2], [0, 1]), {}, ValueError, r"full: expected starts and counts \[1\|B, 1\|H, 2\]"),
        (lists([0, 2], [2, 1], [0, 1, 1]), {"partial": lists([0, 0], [1, 0], [0])}, ValueError, "partial: a block stands in the full list too"),  # noqa: E501
        (lists([0, 0], [0, 0], []), {"partial": lists([0, 0], [1, 0], [0])}, ValueError, "box, at: expected both, or bits"),
        (lists([0, 0], [0, 0], []), {"bits": torch.zeros(1, 64, 2, dtype=torch.int32)}, ValueError, "expected None where there are no partial blocks"),  # noqa: E501
        (lists([0, 0], [0, 0], []), {"q_order": int32(*range(127), 126)[None, None]}, ValueError, "q_order: token 126 stands at two positions"),  # noqa: E501
        (lists([0, 0], [0, 0], []), {"q_order": int32(*range(100), *[-1] * 28)[None, None]}, ValueError, "q_order: token 100 stands at no position"),  # noqa: E501
        (lists([0, 0], [0, 0], []), {"k_order": int32(*range(1, 129))[None, None]}, ValueError, "k_order: expected tokens 0 to 127"),
    ],
)  # fmt: skip
def test_lists_from_outside(full, options, error, message):
    with pytest.raises(error, match=message):
        BlockLayout.from_lists(128, 128, 64, 64, full, **options)


def test_a_layout_for_other_lengths_is_refused():
    q = torch.randn(1, 1, 110, 16)
    with pytest.raises(ValueError, match="layout: made for 100 queries and 100 keys, got q with 110"):
        sparse_attention(q, q, q, patterns.causal(100))


def test_orders_hold_every_token_once():
    grid = (3, 5, 7)
    for block in (64, 128):
        around = {"prefix": 5, "suffix": 70, "block": block}
        for order in (
            frame_order(grid, **around),
            token_order(grid, **around),
            tile_order(grid, (2, 2, 4), **around),
            window_order(grid, (2, 3, 4), shift=(1, 0, 2), **around),
        ):
            assert order.dtype == torch.int32 and order.shape[2] % block == 0
            assert sorted(order[order >= 0].tolist()) == list(range(180))
            assert order[0, 0, :5].tolist() == [0, 1, 2, 3, 4] and int(order[0, 0, 5]) == -1


def test_token_order_is_the_transpose_of_frame_order():
    there = token_order((4, 3, 5))[0, 0, :60].long()
    assert torch.equal(there, torch.arange(60).reshape(4, 15).T.reshape(-1))


BAD = [
    (lambda: patterns.dense(-1), ValueError, "q_len: expected a whole number of at least 0, got -1"),
    (lambda: patterns.causal(10, block=32), ValueError, "block: expected one of 64, 128"),
    (lambda: patterns.causal(10, block=(64, 3)), ValueError, "block: expected one of 64, 128"),
    (lambda: patterns.causal(10, window=0), ValueError, "window: expected a whole number of at least 1, got 0"),
    (lambda: patterns.packed([0, 3], 3), TypeError, "cu_seqlens: expected an int32 or int64 tensor"),
    (lambda: patterns.packed(torch.tensor([0.0, 3.0]), 3), TypeError, "cu_seqlens: expected int32 or int64, got float32"),
    (lambda: patterns.packed(torch.tensor([0, 3]), 3, k_len=3), ValueError, "k_len: expected together with cu_seqlens_k"),
    (lambda: patterns.packed(torch.tensor([0, 3]), 3, causal=1), TypeError, "causal: expected True or False, got 1"),
    (lambda: patterns.media_time(torch.tensor([0, 1]), 1, 1), TypeError, "media: expected a bool tensor .* got int64"),
    (lambda: patterns.media_time(torch.tensor([True]), 1, 1, see="all"), ValueError, "see: expected one of 'latest', 'previous'"),
    (lambda: patterns.sliding_tile((4, 4), (1, 1, 1)), ValueError, r"grid: expected three sizes \(T, H, W\), got 2"),
    (lambda: patterns.sliding_tile((8, 8, 8), (1, 1, 1), (2, 1, 1)), ValueError, "window: expected odd numbers of tiles, or the whole axis of 8, got 2"),  # noqa: E501
    (lambda: patterns.sliding_tile((8, 8, 8), (0, 1, 1)), ValueError, r"tile\[0\]: expected a whole number of at least 1, got 0"),
    (lambda: patterns.sliding_tile((8, 8, 8), (1, 1, 1), []), ValueError, "window: expected a window"),
    (lambda: patterns.neighborhood((8, 8, 8), 3, stride=4), ValueError, "stride: expected at most the window, 3, got 4 for axis 0"),
    (lambda: patterns.neighborhood((8, 8, 8), 3, causal=(True, 0, False)), TypeError, r"causal\[1\]: expected True or False"),
    (lambda: patterns.window((8, 8, 8), (2, 2, 2), shift=(2, 0, 0)), ValueError, r"shift\[0\]: expected less than the window, 2, got 2"),
    (lambda: patterns.spatial((8, 8, 8), 0), ValueError, "width: expected a number above 0, got 0"),
    (lambda: patterns.radial((8, 8, 8), near="ltx"), ValueError, "near: expected one of 'wan', 'hunyuan'"),
    (lambda: patterns.radial((8, 8, 8), decay=float("nan")), ValueError, "decay: expected a finite number"),
    (lambda: patterns.frame_causal((8, 8, 8), prefix_sees="video"), ValueError, "prefix_sees: expected one of 'prefix', 'all'"),
    (lambda: patterns.frame_causal((8, 8, 8), prefix=1.5), TypeError, "prefix: expected a whole number"),
    (lambda: tile_order((8, 8, 8), (1, 1)), ValueError, r"window: expected three sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
