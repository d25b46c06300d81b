"""SwinBERT's learned mask against its formulas, published checkpoints, other lengths, and through attention."""

from __future__ import annotations

import pytest
import torch
from attention.exact import check_exact
from torch import nn

from saccade.attention import BlockLayout, sparse_attention
from saccade.attention.learned import LearnedSparseMask

L, T = 24, 7


def upstream_bias(weight, text, hard=False):
    """As published, in float64: mask of all tokens, then (1 - mask) * -10000."""
    tokens = weight.shape[0]
    eye = torch.eye(tokens, dtype=torch.float64)
    video = eye + (1 - eye) * weight.detach().double().sigmoid()
    if hard:
        video = (video >= 0.5).double()
    mask = torch.ones(text + tokens, text + tokens, dtype=torch.float64)
    mask[:text, :text] = torch.ones(text, text).tril()
    mask[text:, :text] = 0
    mask[text:, text:] = video
    return (1 - mask) * -10000.0


def seeded(tokens=L, **options):
    torch.manual_seed(tokens)
    return LearnedSparseMask(tokens, **options)


@pytest.mark.parametrize("text", [0, 1, T])
@pytest.mark.parametrize("hard", [False, True])
def test_bias_is_the_published_one(text, hard):
    mask = seeded(hard=hard)
    out = mask(text)
    assert out.shape == (1, 1, text + L, text + L) and out.dtype == torch.float32
    assert torch.allclose(out[0, 0].double(), upstream_bias(mask.weight, text, hard), rtol=1e-6)


def test_bias_keeps_what_fp16_loses():
    weight = torch.full((L, L), 9.0, dtype=torch.float16)
    mask = LearnedSparseMask.from_upstream(weight.reshape(-1, 1))
    off = ~torch.eye(L, dtype=torch.bool)
    exact = -1e4 * torch.tensor(-9.0, dtype=torch.float64).sigmoid()
    assert torch.allclose(mask.bias()[0, 0][off].double(), exact, rtol=1e-6)
    published = ((1 - weight.sigmoid()) * -1e4)[off]
    assert float(published[0]) == 0.0  # 1 - sigmoid(9) rounds to 0


def test_sparsity_loss():
    mask = seeded()
    off = mask.weight.detach().double().sigmoid()
    off.fill_diagonal_(0)
    loss = mask.sparsity_loss()
    assert torch.allclose(loss.double(), off.abs().mean(), rtol=1e-6)
    loss.backward()
    s = mask.weight.detach().double().sigmoid()
    wanted = (s * (1 - s) / L**2).fill_diagonal_(0)
    assert torch.allclose(mask.weight.grad.double(), wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("block", [64, 128])
def test_layout_is_exact(threshold, block):
    mask = seeded(130)
    seen = torch.zeros(T + 130, T + 130, dtype=torch.bool)
    seen[:T, :T] = torch.ones(T, T).tril()
    seen[:T, T:] = True
    seen[T:, T:] = mask.values() >= (0.5 if threshold is None else threshold)
    check_exact(mask.layout(T, threshold=threshold, block=block), seen)
    density = mask.density(T, threshold=threshold, block=block)
    assert density.kept == pytest.approx(float(seen[T:, T:].float().mean()))
    assert density.blocks == pytest.approx(float(mask.layout(T, threshold=threshold, block=block).density))


def test_a_mask_of_the_diagonal_alone():
    mask = LearnedSparseMask(256, init=-5.0)
    density = mask.density(block=64)
    assert density.kept == pytest.approx(1 / 256) and density.blocks == pytest.approx(1 / 4) and density.between == 0
    assert LearnedSparseMask(64, init=8.0).density().between == pytest.approx(1 - 1 / 64)
    assert bool(LearnedSparseMask(64, init=-5.0).layout(5, learned=False).to_mask()[0, 0, 5:, 5:].all())


def test_hard_bias_and_layout_give_the_same_attention():
    mask = seeded(100).harden()
    q, k, v = torch.randn(3, 2, 2, T + 100, 32).unbind()
    everything = BlockLayout.dense(T + 100, T + 100)
    by_bias = sparse_attention(q, k, v, everything, bias=mask(T), impl="reference")
    by_layout = sparse_attention(q, k, v, mask.layout(T), impl="reference")
    assert torch.allclose(by_bias, by_layout, atol=1e-6)


def test_gradient_through_attention():
    """Summed over samples and heads, into the weight of pairs of video tokens, none into the diagonal."""
    mask = seeded(40, init=8.0)
    with torch.no_grad():
        mask.weight.add_(torch.randn(40, 40))
    inputs = [torch.randn(2, 3, T + 40, 16) for _ in range(3)]
    upstream = torch.randn(2, 3, T + 40, 16)
    out = sparse_attention(*inputs, mask.layout(T, learned=False), bias=mask(T), impl="cpu" if _cpu() else "reference")
    out.backward(upstream)
    weight = mask.weight.detach().double().requires_grad_()
    q, k, v = (x.double() for x in inputs)
    eye = torch.eye(40, dtype=torch.bool)
    bias = upstream_bias(weight, T)
    video = torch.where(eye, 0.0, -1e4 * (-weight).sigmoid())
    bias = torch.cat((bias[:T], torch.cat((bias[T:, :T], video), 1)))
    wanted = (q @ k.mT / 4 + bias).softmax(-1) @ v
    (wanted * upstream.double()).sum().backward()
    assert torch.allclose(out.double(), wanted, atol=1e-4)
    assert torch.allclose(mask.weight.grad.double(), weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))
    assert bool((mask.weight.grad.diagonal() == 0).all())


def _cpu():
    from saccade._dispatch import raw

    try:
        lists = torch.zeros(1, 1, 1, dtype=torch.int32)
        raw("block_transpose", "cpu")(lists, lists, torch.zeros(1, dtype=torch.int32), None, 1)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def test_published_checkpoints_load():
    theirs = nn.Embedding(L * L, 1).state_dict()["weight"]
    mask = LearnedSparseMask.from_upstream({"learn_vid_att.weight": theirs, "fc.weight": torch.zeros(1)})
    assert torch.equal(mask.weight, theirs.reshape(L, L))
    assert torch.equal(mask.upstream_state()["learn_vid_att.weight"], theirs)
    model = nn.Module()
    model.learn_vid_att = LearnedSparseMask(L)
    model.load_state_dict({"learn_vid_att.weight": theirs})
    assert torch.equal(model.learn_vid_att.weight, theirs.reshape(L, L))
    again = LearnedSparseMask(L)
    again.load_state_dict(model.learn_vid_att.state_dict())
    assert torch.equal(again.weight, theirs.reshape(L, L))
    with pytest.raises(RuntimeError, match="size mismatch"):
        LearnedSparseMask(L + 1).load_state_dict({"weight": theirs})


def test_interpolation_is_that_of_upsample():
    mask = seeded()
    wider = mask.resized(2 * L)
    wanted = nn.Upsample(scale_factor=2, mode="bilinear")(mask.weight.detach()[None, None])[0, 0]
    assert torch.equal(wider.weight, wanted) and wider.tokens == 2 * L
    assert torch.equal(mask.resized(L).weight, mask.weight)
    assert mask.resized(L + 5).weight.shape == (L + 5, L + 5)


def test_interpolation_over_frames_keeps_places():
    per, frames = 4, L // 4
    mask = seeded()
    longer = mask.resized(2 * L, "frames", frame=per)
    old = mask.weight.detach().reshape(frames, per, frames, per)
    new = longer.weight.detach().reshape(2 * frames, per, 2 * frames, per)
    for a in range(per):
        for b in range(per):
            wanted = nn.functional.interpolate(old[:, a, :, b][None, None], scale_factor=2, mode="bilinear")[0, 0]
            assert torch.equal(new[:, a, :, b], wanted)


def test_tiles_along_the_diagonal():
    mask = seeded()
    new = mask.resized(2 * L + 5, "tile", outside=-9.0).weight.detach()
    wanted = torch.full((2 * L + 5, 2 * L + 5), -9.0)
    wanted[:L, :L] = wanted[L : 2 * L, L : 2 * L] = mask.weight.detach()
    wanted[2 * L :, 2 * L :] = mask.weight.detach()[:5, :5]
    assert torch.equal(new, wanted)
    assert torch.equal(mask.resized(10, "tile").weight, mask.weight[:10, :10])


@pytest.mark.parametrize("how", ["interpolate", "tile"])
def test_a_resized_mask_keeps_its_options(how):
    mask = seeded(depth=200.0, threshold=0.7).harden()
    new = mask.resized(30, how)
    assert (new.depth, new.threshold, new.hard) == (200.0, 0.7, True)
    assert new.weight.requires_grad and new.weight is not mask.weight


BAD = [
    (lambda: LearnedSparseMask(0), ValueError, "tokens: expected a whole number of at least 1, got 0"),
    (lambda: LearnedSparseMask(4, init=float("inf")), ValueError, "init: expected a finite number"),
    (lambda: LearnedSparseMask(4, depth=0), ValueError, "depth: expected a number above 0, got 0"),
    (lambda: LearnedSparseMask(4, threshold=1.5), ValueError, "threshold: expected a number above 0, at most 1, got 1.5"),
    (lambda: LearnedSparseMask(4).bias(-1), ValueError, "text: expected a whole number of at least 0, got -1"),
    (lambda: LearnedSparseMask(4).layout(block=32), ValueError, "q_block: expected one of 64, 128, got 32"),
    (lambda: LearnedSparseMask(4).resized(8, "nearest"), ValueError, "how: expected one of 'interpolate', 'frames', 'tile'"),
    (lambda: LearnedSparseMask(4).resized(8, "frames"), ValueError, "frame: expected the tokens of a frame"),
    (lambda: LearnedSparseMask(4).resized(8, "frames", frame=3), ValueError, "frame: expected a number that divides tokens, 8, got 3"),
    (lambda: LearnedSparseMask.from_upstream(torch.zeros(5, 1)), ValueError, r"weights: expected L \* L numbers, got shape \[5, 1\]"),
    (lambda: LearnedSparseMask.from_upstream({}), ValueError, "weights: expected a state dict with learn_vid_att.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
