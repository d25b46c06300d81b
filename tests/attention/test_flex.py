"""Layouts from FlexAttention's BlockMask and back: the same pairs, the same storage, and refusals with reasons."""

from __future__ import annotations

import pytest
import torch
from attention.exact import check_exact
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from saccade.attention import BlockLayout, patterns

TABLE = torch.tensor([0, 3, 50, 500])


def causal(b, h, q, k):
    return q >= k


def far_by_head(b, h, q, k):
    return (q - k).abs() <= TABLE[h + 2 * b]


def documents(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return lambda b, h, q, k: ids[q] == ids[k]  # has no entry behind the last token


def everything(b, h, q, k):
    return b.new_ones((), dtype=torch.bool)


def nothing(b, h, q, k):
    return q < -1


CASES = [
    (causal, None, None, 300, 300),
    (causal, None, None, 64, 200),
    (far_by_head, 2, 2, 200, 330),
    (documents([100, 1, 199]), None, 3, 300, 300),
    (everything, None, None, 256, 200),
    (nothing, 1, 1, 130, 130),
]
cases = pytest.mark.parametrize(("mod", "batch", "heads", "q_len", "k_len"), CASES)


@cases
@pytest.mark.parametrize("block", [128, 64, (64, 128)])
def test_from_flex(mod, batch, heads, q_len, k_len, block):
    mask = create_block_mask(mod, batch, heads, q_len, k_len, device="cpu", BLOCK_SIZE=block)
    layout = BlockLayout.from_flex(mask)
    wanted = create_mask(mod, batch, heads, q_len, k_len, device="cpu")
    assert torch.equal(layout.to_mask(), wanted)
    assert layout.full.indices.data_ptr() == mask.full_kv_indices.data_ptr()
    assert layout.full.counts.data_ptr() == mask.full_kv_num_blocks.data_ptr()
    if layout.partial is not None:
        assert layout.partial.indices.data_ptr() == mask.kv_indices.data_ptr()


@cases
def test_there_and_back(mod, batch, heads, q_len, k_len):
    mask = create_block_mask(mod, batch, heads, q_len, k_len, device="cpu", BLOCK_SIZE=64)
    back = BlockLayout.from_flex(mask).to_flex()
    assert back.seq_lengths == mask.seq_lengths and back.BLOCK_SIZE == mask.BLOCK_SIZE
    assert torch.equal(back.to_dense(), mask.to_dense())
    assert torch.equal(
        create_mask(back.mask_mod, *mask.shape, device="cpu"), create_mask(mod, *mask.shape, device="cpu")
    )
    assert back.full_kv_indices.data_ptr() == mask.full_kv_indices.data_ptr()


def test_a_mask_without_full_blocks():
    counts, indices = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, mask_mod=causal)
    wanted = torch.zeros(256, 256, dtype=torch.bool)
    wanted[128:] = torch.ones(256, 256).tril().bool()[128:]  # block (0, 1) lies above the diagonal
    assert torch.equal(BlockLayout.from_flex(mask).to_mask()[0, 0], wanted)


@pytest.mark.parametrize(
    "layout",
    [
        patterns.dense(200, 300),
        patterns.causal(200, block=128),
        patterns.neighborhood((3, 5, 7), 3, prefix=5),
        patterns.radial((5, 9, 11), least=4, suffix=9),
        patterns.packed(torch.tensor([0, 100, 250]), 260),
        BlockLayout.from_mask(torch.rand(2, 3, 150, 200, generator=torch.Generator().manual_seed(0)) < 0.01),
        BlockLayout.from_block_map(torch.rand(1, 2, 3, 3) < 0.5, q_len=180, k_len=190),
    ],
    ids=repr,
)
def test_to_flex_in_the_eager_form(layout):
    mask, wanted = layout.to_flex(), layout.to_mask()
    shape = (*wanted.shape[:2], layout.q_len, layout.k_len)
    assert torch.equal(create_mask(mask.mask_mod, *shape, device="cpu"), wanted)
    q = torch.randn(wanted.shape[0], wanted.shape[1], layout.q_len, 16)
    k, v = torch.randn(2, wanted.shape[0], wanted.shape[1], layout.k_len, 16).unbind()
    seen = wanted.any(-1)
    out = flex_attention(q, k, v, block_mask=mask)
    peer = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=wanted)
    assert torch.allclose(out[seen], peer[seen], atol=1e-5)


def test_to_flex_of_tokens_in_another_order_is_refused():
    with pytest.raises(ValueError, match="layout: expected one whose positions are tokens"):
        patterns.temporal((3, 5, 7)).to_flex()


def test_other_blocks_are_refused():
    mask = create_block_mask(causal, None, None, 300, 300, device="cpu", BLOCK_SIZE=256)
    with pytest.raises(ValueError, match=r"block_mask: expected BLOCK_SIZE 64 or 128.*got \(256, 256\)"):
        BlockLayout.from_flex(mask)
    with pytest.raises(TypeError, match="block_mask: expected a torch BlockMask, got Tensor"):
        BlockLayout.from_flex(torch.ones(3, 3))


def test_unsorted_lists_are_refused():
    counts, indices = torch.tensor([[[2]]], dtype=torch.int32), torch.tensor([[[[1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128)
    with pytest.raises(ValueError, match="ascending"):
        BlockLayout.from_flex(mask)


def test_an_exact_layout_stays_exact():
    layout = patterns.causal(300, block=128)
    check_exact(BlockLayout.from_flex(layout.to_flex()), layout.to_mask())
