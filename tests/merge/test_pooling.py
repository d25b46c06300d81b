"""Plain pooling, against loops, LLaVA's `get_2dPool` and the models' own functions in transformers."""

from __future__ import annotations

import math

import pytest
import torch
from merge.merge_cases import generator
from torch.nn import functional as F

from saccade import merge as M
from saccade.testing import check_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")
# grid, kernel, stride, ceil
WINDOWS = (
    ((2, 4, 6), 2, None, False),
    ((2, 5, 7), 2, None, False),
    ((2, 5, 7), 2, None, True),
    ((1, 7, 5), (3, 2), (2, 3), False),
    ((1, 7, 5), (3, 2), (2, 3), True),
    ((3, 4, 4), (4, 4), 1, True),
    ((1, 3, 3), 1, 3, True),  # a window that would begin beyond the edge is none
    ((2, 1, 1), 1, None, False),
)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def by_windows(x, grid, kernel, stride, ceil, mode, dtype):
    """One window after the other."""
    t, h, w = grid
    (kh, kw), (sh, sw) = pair(kernel), pair(stride or kernel)
    volume = x.to(dtype).view(x.shape[0], t, h, w, -1)

    def starts(n, k, s):
        return [i for i in range(0, n, s) if i + k <= n or (ceil and (i == 0 or i - s + k < n))]

    rows = []
    for frame in range(t):
        for i in starts(h, kh, sh):
            for j in starts(w, kw, sw):
                window = volume[:, frame, i : i + kh, j : j + kw].flatten(1, 2)
                rows.append(window.mean(1) if mode == "mean" else window.amax(1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("mode", ("mean", "max"))
@pytest.mark.parametrize("case", range(len(WINDOWS)))
def test_windows(case, mode):
    grid, kernel, stride, ceil = WINDOWS[case]
    x = normal(2, math.prod(grid), 5)
    got = M.pool2d(x, grid, kernel, mode=mode, stride=stride, ceil=ceil)
    assert torch.allclose(got, by_windows(x, grid, kernel, stride, ceil, mode, torch.float64), rtol=1e-13, atol=1e-13)
    for empty in (x[:0], x[..., :0]):
        out = M.pool2d(empty, grid, kernel, mode=mode, stride=stride, ceil=ceil)
        assert out.shape == (empty.shape[0], got.shape[1], empty.shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(WINDOWS)))
def test_one_rounding(case, dtype):
    grid, kernel, stride, ceil = WINDOWS[case]
    x = normal(2, math.prod(grid), 40, dtype=dtype)
    got = M.pool2d(x, grid, kernel, stride=stride, ceil=ceil)
    assert got.dtype == dtype
    peer = by_windows(x, grid, kernel, stride, ceil, "mean", torch.float32).to(dtype)
    check_budget("pool2d", got, peer, by_windows(x, grid, kernel, stride, ceil, "mean", torch.float64))
    most = M.pool2d(x, grid, kernel, stride=stride, ceil=ceil, mode="max")
    assert torch.equal(most, by_windows(x, grid, kernel, stride, ceil, "max", dtype))


def get_2d_pool(x, frames, side, mode, stride=2):
    """LLaVA's: frame by frame to channels first, pooled, and back."""
    image = x.view(frames, side, side, -1).permute(0, 3, 1, 2).contiguous()
    if mode == "bilinear":
        image = F.interpolate(image, size=[math.ceil(side / stride)] * 2, mode="bilinear")
    else:
        image = (F.avg_pool2d if mode == "mean" else F.max_pool2d)(image, stride)
    return image.permute(0, 2, 3, 1).reshape(frames, -1, x.shape[-1])


@pytest.mark.parametrize("mode,tokens", (("mean", 169), ("max", 169), ("bilinear", 196)))
def test_llavas_pooling(mode, tokens):
    x = normal(3, 729, 16, dtype=torch.float32)
    got = M.pool2d(x.view(1, 3 * 729, 16), (3, 27, 27), mode=mode)
    assert got.shape == (1, 3 * tokens, 16)
    assert torch.allclose(got.view(3, tokens, 16), get_2d_pool(x, 3, 27, mode), rtol=1e-6, atol=1e-6)
    assert M.pool2d(x, (1, 27, 27), ceil=True).shape == (3, 196, 16)


def test_bilinear_by_hand():
    # 3 points to 2: centres at 0.25 and 1.75 of 0, 1, 2.
    x = torch.tensor([0.0, 4.0, 8.0]).view(1, 3, 1).expand(1, 3, 1)
    assert M.pool2d(x, (1, 1, 3), (1, 2), mode="bilinear").flatten().tolist() == [1.0, 7.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bilinear_within_budget(dtype):
    x = normal(2, 49, 16, dtype=dtype)
    image = x.view(2, 7, 7, 16).permute(0, 3, 1, 2)
    exact, peer = (F.interpolate(image.to(d), size=(4, 4), mode="bilinear") for d in (torch.float64, torch.float32))
    exact, peer = (i.permute(0, 2, 3, 1).reshape(2, 16, 16) for i in (exact, peer.to(dtype)))
    check_budget("bilinear", M.pool2d(x, (1, 7, 7), mode="bilinear"), peer, exact)


@pytest.mark.parametrize("mode", ("mean", "max", "bilinear"))
@pytest.mark.parametrize("grid,kernel", (((2, 5, 3), 2), ((1, 6, 4), (3, 1))))
def test_gradcheck(grid, kernel, mode):
    x = normal(2, math.prod(grid), 2).requires_grad_()
    torch.autograd.gradcheck(lambda x: M.pool2d(x, grid, kernel, mode=mode), (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bilinear_gradient(dtype):
    x = normal(1, 2 * 81, 8, dtype=dtype)
    dy = normal(1, 50, 8, dtype=dtype, seed=1)

    def grad(x, dy):
        image = x.detach().requires_grad_()
        out = F.interpolate(image.view(2, 9, 9, 8).permute(0, 3, 1, 2), size=(5, 5), mode="bilinear")
        out.permute(0, 2, 3, 1).reshape(1, 50, 8).backward(dy)
        return image.grad

    x.requires_grad_()
    M.pool2d(x, (2, 9, 9), mode="bilinear").backward(dy)
    check_budget("dx", x.grad, grad(x.float(), dy.float()).to(dtype), grad(x.double(), dy.double()), factor=3.0)


def test_strides_and_nan():
    x = normal(2, 2 * 16, 8, dtype=torch.float32)
    wide = torch.full((2, 32, 24), NAN)
    wide[..., 8:16] = x
    for mode in ("mean", "max", "bilinear"):
        clean = M.pool2d(x, (2, 4, 4), mode=mode)
        assert torch.equal(M.pool2d(wide[..., 8:16], (2, 4, 4), mode=mode), clean)
        assert torch.equal(M.pool2d(x.transpose(0, 1).contiguous().transpose(0, 1), (2, 4, 4), mode=mode), clean)
        broken = x.clone()
        broken[1, 16 + 5, 3] = NAN  # frame 1, row 1, column 1: window (0, 0)
        got = M.pool2d(broken, (2, 4, 4), mode=mode)
        assert got.isnan().nonzero().tolist() == [[1, 4, 3]]
        assert torch.equal(got[~got.isnan()], clean[~got.isnan()])


# ---- pixel shuffle -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid,factor", (((1, 4, 4), 2), ((3, 4, 6), 2), ((2, 6, 3), 3), ((1, 2, 5), 1)))
def test_pixel_shuffle(grid, factor):
    t, h, w = grid
    x = normal(2, math.prod(grid), 5)
    y = M.pixel_shuffle(x, grid, factor)
    volume = x.view(2, t, h, w, 5)
    rows = [
        torch.cat([volume[:, n, factor * i + a, factor * j + b] for a in range(factor) for b in range(factor)], -1)
        for n in range(t)
        for i in range(h // factor)
        for j in range(w // factor)
    ]
    assert torch.equal(y, torch.stack(rows, 1))
    assert torch.equal(M.pixel_unshuffle(y, grid, factor), x)
    assert torch.equal(M.pixel_shuffle(x.transpose(0, 1).contiguous().transpose(0, 1), grid, factor), y)
    assert M.pixel_shuffle(x[:0], grid, factor).shape == (0, *y.shape[1:])


@pytest.mark.slow  # the import
def test_pixel_shuffle_is_internvls():
    internvl = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    x = normal(2, 36, 8, dtype=torch.float32)
    theirs = internvl.InternVLModel.pixel_shuffle(None, x.view(2, 6, 6, 8), 0.5)
    assert torch.equal(M.pixel_shuffle(x, (1, 6, 6), 2), theirs.reshape(2, 9, 32))


def test_pixel_shuffle_gradient():
    x = normal(1, 16, 2).requires_grad_()
    torch.autograd.gradcheck(lambda x: M.pixel_shuffle(x, (1, 4, 4), 2), (x,))
    y = normal(1, 4, 8).requires_grad_()
    torch.autograd.gradcheck(lambda y: M.pixel_unshuffle(y, (1, 4, 4), 2), (y,))


def test_compiles_into_one_graph():
    x = normal(2, 32, 8, dtype=torch.float32)

    def all_of_them(x):
        pooled = [M.pool2d(x, (2, 4, 4), mode=mode) for mode in ("mean", "max", "bilinear")]
        return (*pooled, M.pixel_unshuffle(M.pixel_shuffle(x, (2, 4, 4)), (2, 4, 4)))

    compiled = torch.compile(all_of_them, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), all_of_them(x), strict=True))


X, G = torch.ones(2, 24, 8), (2, 3, 4)
BAD = {
    "type": (lambda: M.pool2d([1.0], G), TypeError, "x: expected a tensor"),
    "dimensions": (lambda: M.pool2d(X[0], G), ValueError, "x: expected 3 dimensions"),
    "dtype": (lambda: M.pool2d(X.int(), G), TypeError, "x: expected dtype"),
    "grid": (lambda: M.pool2d(X, (2, 4, 4)), ValueError, "grid: (2, 4, 4) has 32 tokens, x has 24"),
    "grid of two": (lambda: M.pool2d(X, (4, 6)), ValueError, "grid: expected three sizes"),
    "kernel": (lambda: M.pool2d(X, G, (4, 2)), ValueError, "kernel: 4 along H does not fit the grid's 3"),
    "kernel of zero": (lambda: M.pool2d(X, G, 0), ValueError, "kernel: expected a whole number of at least 1"),
    "kernel of three": (lambda: M.pool2d(X, G, (1, 2, 2)), ValueError, "kernel: expected 2 entries, got 3"),
    "kernel type": (lambda: M.pool2d(X, G, 2.0), TypeError, "kernel: expected a whole number"),
    "stride": (lambda: M.pool2d(X, G, 2, stride=(1, 0)), ValueError, "stride[1]: expected a whole number of at least 1"),
    "stride of bilinear": (lambda: M.pool2d(X, G, 2, stride=1, mode="bilinear"), ValueError, "stride: expected None"),
    "mode": (lambda: M.pool2d(X, G, mode="average"), ValueError, "mode: expected one of 'mean', 'max', 'bilinear'"),
    "shuffle grid": (lambda: M.pixel_shuffle(X, (2, 4, 4)), ValueError, "grid: (2, 4, 4) has 32 tokens, x has 24"),
    "shuffle factor": (lambda: M.pixel_shuffle(X, G, 2), ValueError, "factor: 2 does not divide the grid's 3 along H"),
    "shuffle factor of zero": (lambda: M.pixel_shuffle(X, G, 0), ValueError, "factor: expected a whole number of at"),
    "shuffle type": (lambda: M.pixel_shuffle(None, G), TypeError, "x: expected a tensor"),
    "unshuffle tokens": (lambda: M.pixel_unshuffle(X, (1, 4, 4)), ValueError, "grid: (1, 2, 2) has 4 tokens, y has 24"),
    "unshuffle width": (lambda: M.pixel_unshuffle(X[..., :6], (6, 4, 4)), ValueError, "y: expected a width that 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
