"""Prompt-guided pooling, against PPLLaVA's formulas written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from merge.merge_cases import generator

import saccade
from saccade import merge as M
from saccade.testing import check_budget, error_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# grid, kernel, stride
WINDOWS = (
    ((4, 6, 6), (2, 3, 3), None),
    ((1, 6, 6), (1, 3, 3), None),
    ((5, 7, 8), (2, 3, 3), (2, 3, 3)),  # a remainder on every axis
    ((3, 5, 4), (2, 3, 2), (1, 1, 2)),  # overlap
    ((3, 5, 7), (1, 2, 2), (2, 3, 4)),  # gaps
    ((2, 3, 1), (2, 3, 1), None),  # one window
    ((1, 1, 1), (1, 1, 1), None),
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def by_windows(x, p, kernel, stride, temperature, dtype):
    """sum_i a_i x_i of every window, one after the other, each operation in `dtype`."""
    x, p = x.to(dtype), p.to(dtype)
    stride = stride or kernel
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], kernel, stride, strict=True)]
    out = torch.zeros(x.shape[0], *size, x.shape[4], dtype=dtype)
    for b, *o in itertools.product(range(x.shape[0]), *map(range, size)):
        at = (b, *(slice(i * s, i * s + k) for i, s, k in zip(o, stride, kernel, strict=True)))
        a = torch.softmax(p[at].flatten() / temperature, 0)
        out[(b, *o)] = (a[:, None] * x[at].reshape(-1, x.shape[4])).sum(0)
    return out


def ppllava_weights(visual, prompt, scale, bias=0.0):
    """All pairs of samples and prompts, then the diagonal, then a softmax over all tokens."""
    e = visual / visual.norm(dim=-1, keepdim=True)
    t = prompt / prompt.norm(dim=-1, keepdim=True)
    pairs = torch.einsum("ac,bnc->abn", t, e)
    return (scale * pairs.diagonal(dim1=0, dim2=1).mT + bias).softmax(-1)


def focused(grid, batch=2, seed=0, dtype=torch.float64):
    """Weights that sum to 1, most of them in a few tokens."""
    p = (6 * normal(batch, math.prod(grid), seed=seed)).softmax(-1)
    return p.to(dtype).view(batch, *grid)


# ---- pooling ---------------------------------------------------------------------------------------------------------------
def test_by_hand():
    x = torch.tensor([[0.0, 10.0], [1.0, 20.0]]).view(1, 1, 1, 2, 2)
    p = torch.tensor([0.0, 0.01 * math.log(3.0)]).view(1, 1, 1, 2)  # a = 1/4, 3/4
    y = M.prompt_pool3d(x, p, (1, 1, 2), impl="reference")
    assert torch.allclose(y.flatten(), torch.tensor([0.75, 17.5]), atol=1e-5)


@pytest.mark.parametrize("case", range(len(WINDOWS)))
def test_exact_in_float64(case):
    grid, kernel, stride = WINDOWS[case]
    x, p = normal(2, *grid, 5), focused(grid)
    y = M.prompt_pool3d(x, p, kernel, stride=stride)
    assert torch.allclose(y, by_windows(x, p, kernel, stride, 0.01, torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(WINDOWS)))
def test_within_budget(every, case, dtype):
    impl, device = every
    grid, kernel, stride = WINDOWS[case]
    x, p = normal(2, *grid, 24, dtype=dtype), focused(grid, dtype=torch.float32)
    y = M.prompt_pool3d(x.to(device), p.to(device), kernel, stride=stride, impl=impl)
    assert y.dtype == dtype
    peer = by_windows(x, p, kernel, stride, 0.01, torch.float32).to(dtype)
    check_budget("prompt_pool3d", y, peer, by_windows(x, p, kernel, stride, 0.01, torch.float64))


def test_tokens_with_a_grid_and_strides(every):
    impl, device = every
    x, p = normal(2, 4, 6, 6, 8, dtype=torch.float32).to(device), focused((4, 6, 6), dtype=torch.float32).to(device)
    y = M.prompt_pool3d(x, p, (2, 3, 3), impl=impl)
    flat = M.prompt_pool3d(x.flatten(1, 3), p.flatten(1), (2, 3, 3), grid=(4, 6, 6), impl=impl)
    wide = torch.full((2, 144, 3, 8), float("nan"), device=device)
    wide[:, :, 1] = x.flatten(1, 3)
    packed = M.prompt_pool3d(wide[:, :, 1], p, (2, 3, 3), grid=[4, 6, 6], impl=impl)
    alone = torch.cat([M.prompt_pool3d(x[i : i + 1], p[i : i + 1], (2, 3, 3), impl=impl) for i in range(2)])
    for other in (flat, packed, alone, M.prompt_pool3d(x, p, (2, 3, 3), impl=impl)):
        assert torch.equal(other, y)


def test_nan_stays_in_its_windows(every):
    impl, device = every
    x, p = normal(1, 2, 4, 4, 8, dtype=torch.float32), focused((2, 4, 4), 1, dtype=torch.float32)
    clean = M.prompt_pool3d(x.to(device), p.to(device), (1, 2, 2), impl=impl)
    x[0, 1, 3, 0] = float("nan")
    y = M.prompt_pool3d(x.to(device), p.to(device), (1, 2, 2), impl=impl)
    assert y[0, 1, 1, 0].isnan().all() and int(y.isnan().sum()) == 8
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])


@pytest.mark.parametrize("case", (0, 3, 4))
def test_gradcheck(case):
    grid, kernel, stride = WINDOWS[case]
    x, p = normal(1, *grid, 2).requires_grad_(), focused(grid, 1).requires_grad_()
    torch.autograd.gradcheck(
        lambda x, p: M.prompt_pool3d(x, p, kernel, stride=stride, temperature=0.5), (x, p), fast_mode=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (0, 2, 3, 4))
def test_gradients(every, case, dtype):
    impl, device = every
    grid, kernel, stride = WINDOWS[case]
    x, p = normal(2, *grid, 24, dtype=dtype), focused(grid, dtype=torch.float32)

    def grads(x, p, call):
        x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
        y = call(x, p)
        y.backward(normal(*y.shape, seed=3).to(y))
        return x.grad, p.grad

    got = grads(x.to(device), p.to(device), lambda x, p: M.prompt_pool3d(x, p, kernel, stride=stride, impl=impl))
    peer = grads(x, p, lambda x, p: by_windows(x, p, kernel, stride, 0.01, torch.float32).to(dtype))
    exact = grads(x.double(), p.double(), lambda x, p: by_windows(x, p, kernel, stride, 0.01, torch.float64))
    for name, g, t, e in zip(("dx", "dweights"), got, peer, exact, strict=True):
        check_budget(name, g, t, e, factor=3.0)


def test_one_gradient_at_a_time(every):
    impl, device = every
    x, p = normal(1, 2, 4, 4, 8, dtype=torch.float32).to(device), focused((2, 4, 4), 1, dtype=torch.float32).to(device)
    M.prompt_pool3d(x.requires_grad_(), p, (1, 2, 2), impl=impl).sum().backward()
    only_x, x = x.grad, x.detach()
    M.prompt_pool3d(x, p.requires_grad_(), (1, 2, 2), impl=impl).sum().backward()
    assert only_x.shape == x.shape and p.grad.shape == p.shape and x.grad is None


def test_empty(every):
    impl, device = every
    for shape in ((0, 2, 4, 4, 8), (2, 2, 4, 4, 0)):
        y = M.prompt_pool3d(
            torch.ones(shape, device=device), torch.ones(shape[:4], device=device), (1, 2, 2), impl=impl
        )
        assert list(y.shape) == [shape[0], 2, 2, 2, shape[4]]


X, P = torch.ones(2, 3, 4, 5, 8), torch.ones(2, 3, 4, 5)
BAD_POOL = {
    "x not a tensor": (([1.0], P, (1, 2, 2)), {}, TypeError, "x: expected a tensor"),
    "x of int": ((X.long(), P, (1, 2, 2)), {}, TypeError, "x: expected dtype"),
    "x without a grid": ((X.flatten(1, 3), P, (1, 2, 2)), {}, ValueError, "grid: expected (T, H, W)"),
    "x of 4 dimensions": ((X[0], P, (1, 2, 2)), {}, ValueError, "x: expected 5 dimensions"),
    "grid of another size": (
        (X.flatten(1, 3), P, (1, 2, 2)),
        {"grid": (3, 4, 4)},
        ValueError,
        "grid: (3, 4, 4) has 48",
    ),
    "grid beside a volume": ((X, P, (1, 2, 2)), {"grid": (3, 5, 4)}, ValueError, "grid: expected (3, 4, 5) or None"),
    "grid of two": ((X.flatten(1, 3), P, (1, 2, 2)), {"grid": (12, 5)}, ValueError, "grid: expected three sizes"),
    "weights not a tensor": ((X, 1.0, (1, 2, 2)), {}, TypeError, "weights: expected a tensor"),
    "weights shape": ((X, P[:1], (1, 2, 2)), {}, ValueError, "weights: expected [2, 3, 4, 5]"),
    "weights of int": ((X, P.long(), (1, 2, 2)), {}, TypeError, "weights: expected a float dtype"),
    "weights device": ((X, P.to("meta"), (1, 2, 2)), {}, ValueError, "weights: expected the device of x"),
    "kernel too large": ((X, P, (4, 2, 2)), {}, ValueError, "kernel: 4 along T does not fit the grid's 3"),
    "kernel of zero": ((X, P, (0, 2, 2)), {}, ValueError, "kernel[0]: expected a whole number of at least 1"),
    "kernel of two": ((X, P, (2, 2)), {}, ValueError, "kernel: expected three sizes"),
    "kernel of floats": ((X, P, (1, 2, 2.0)), {}, TypeError, "kernel[2]: expected a whole number"),
    "stride of zero": (
        (X, P, (1, 2, 2)),
        {"stride": (1, 0, 1)},
        ValueError,
        "stride[1]: expected a whole number of at",
    ),
    "temperature of zero": (
        (X, P, (1, 2, 2)),
        {"temperature": 0.0},
        ValueError,
        "temperature: expected a number above 0",
    ),
    "temperature below": (
        (X, P, (1, 2, 2)),
        {"temperature": -1.0},
        ValueError,
        "temperature: expected a number above 0",
    ),
    "temperature nan": ((X, P, (1, 2, 2)), {"temperature": math.nan}, ValueError, "temperature: expected a finite"),
    "impl": ((X, P, (1, 2, 2)), {"impl": "fast"}, ValueError, "impl: expected one of"),
    "float64 by a kernel": ((X.double(), P, (1, 2, 2)), {"impl": "cpu"}, ValueError, "no float64 kernel of this op"),
}


@pytest.mark.parametrize("case", BAD_POOL)
def test_bad_pool(case):
    arguments, named, error, message = BAD_POOL[case]
    with pytest.raises(error) as caught:
        M.prompt_pool3d(*arguments, **named)
    assert message in str(caught.value)


# ---- similarity and weights ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_prompt_only(every, dtype):
    impl, device = every
    visual, prompt = normal(3, 37, 48, dtype=dtype), normal(3, 48, seed=1, dtype=dtype)
    got = M.prompt_similarity(visual.to(device), prompt.to(device), impl=impl)
    peer = torch.cosine_similarity(visual.float(), prompt.float()[:, None], dim=-1)
    exact = torch.cosine_similarity(visual.double(), prompt.double()[:, None], dim=-1)
    check_budget("prompt_similarity", got, peer, exact)
    assert got.dtype == torch.float32
    alone = M.prompt_similarity(visual[1:2].to(device), prompt[1:2].to(device), impl=impl)
    assert torch.equal(alone, got[1:2])


def test_weights_are_ppllavas_double_softmax():
    visual, prompt = normal(3, 37, 16), normal(3, 16, seed=1)
    bias = normal(3, 37, seed=2)
    for scale, b in ((14.3, None), (torch.tensor(14.3), 0.3), (torch.tensor([3.0], dtype=torch.float64), bias)):
        got = M.prompt_weights(visual, prompt, scale, b)
        expected = ppllava_weights(visual, prompt, float(scale), 0.0 if b is None else b)
        assert torch.allclose(got, expected, rtol=1e-6 if isinstance(scale, torch.Tensor) else 1e-12)
        assert torch.allclose(got.sum(-1), torch.ones(3, dtype=torch.float64))


def test_weights_are_fp32_and_one_bias_for_all_changes_nothing():
    visual, prompt = normal(2, 50, 16, dtype=torch.float16), normal(2, 16, seed=1, dtype=torch.float16)
    p = M.prompt_weights(visual, prompt, 100.0)
    exact = ppllava_weights(visual.double(), prompt.double(), 100.0)
    assert p.dtype == torch.float32
    assert error_budget(p, ppllava_weights(visual.float(), prompt.float(), 100.0), exact).ok
    assert torch.allclose(M.prompt_weights(visual, prompt, 100.0, bias=-10.0), p, rtol=1e-4)


def test_tokens_and_prompts_that_are_not_finite(every):
    impl, device = every
    visual, prompt = normal(2, 9, 8, dtype=torch.float32).to(device), normal(2, 8, dtype=torch.float32).to(device)
    visual[0, 4, 2] = float("nan")
    visual[0, 5, 2] = float("inf")
    visual[0, 6] = 0
    cosine = M.prompt_similarity(visual, prompt, impl=impl)
    assert cosine.isnan().nonzero().tolist() == [[0, 4], [0, 5]] and cosine[0, 6] == 0
    p = M.prompt_weights(visual, prompt, 10.0, impl=impl)
    others = [0, 1, 2, 3, 6, 7, 8]
    assert (p[0, [4, 5]] == 0).all()
    assert torch.equal(p[0, others], M.prompt_weights(visual[:, others], prompt, 10.0, impl=impl)[0])
    prompt[1, 0] = float("nan")
    p = M.prompt_weights(visual, prompt, 10.0, impl=impl)
    assert p[1].isnan().all() and not p[0].isnan().any()


def test_similarity_gradient_by_the_reference_alone():
    visual, prompt = normal(2, 4, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    scale, bias = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), normal(2, 4, seed=2).requires_grad_()
    torch.autograd.gradcheck(M.prompt_weights, (visual, prompt, scale, bias))
    wide = visual.float().detach().requires_grad_()
    answer = saccade.explain("prompt_similarity", wide, prompt.float())
    assert answer.chosen == "reference" and "no gradient" in answer.verdicts["cpu"]
    for impl in ("cpu", "cuda", "triton"):
        with pytest.raises(ValueError, match="impl: .* cannot run prompt_similarity here: no gradient"):
            M.prompt_similarity(wide, prompt.float().detach(), impl=impl)
    with torch.no_grad():
        assert "no gradient" not in saccade.explain("prompt_similarity", wide, prompt.float()).verdicts["cpu"]


V, T = torch.ones(2, 5, 8), torch.ones(2, 8)
BAD_WEIGHTS = {
    "visual not a tensor": (("v", T, 1.0), TypeError, "visual: expected a tensor"),
    "visual of 2 dimensions": ((V[0], T, 1.0), ValueError, "visual: expected 3 dimensions"),
    "visual of int": ((V.int(), T.int(), 1.0), TypeError, "visual: expected dtype"),
    "prompt not a tensor": ((V, None, 1.0), TypeError, "prompt: expected a tensor [2, 8]"),
    "one prompt for two": ((V, T[:1], 1.0), ValueError, "prompt: expected [2, 8], got [1, 8]"),
    "prompt dtype": ((V, T.half(), 1.0), TypeError, "prompt: expected the dtype of visual"),
    "prompt device": ((V, T.to("meta"), 1.0), ValueError, "prompt: expected the device of visual"),
    "scale of text": ((V, T, "1"), TypeError, "logit_scale: expected a number"),
    "scale infinite": ((V, T, math.inf), ValueError, "logit_scale: expected a finite number"),
    "scale of many": ((V, T, torch.ones(2)), ValueError, "logit_scale: expected one float"),
    "scale of int": ((V, T, torch.tensor(1)), ValueError, "logit_scale: expected one float"),
    "bias shape": (
        (V, T, 1.0, torch.ones(3, 5)),
        ValueError,
        "bias: expected a number or a tensor that spreads to [2, 5]",
    ),
    "bias dimensions": ((V, T, 1.0, torch.ones(1, 2, 5)), ValueError, "bias: expected a number or a tensor"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(case):
    arguments, error, message = BAD_WEIGHTS[case]
    with pytest.raises(error) as caught:
        M.prompt_weights(*arguments)
    assert message in str(caught.value)


# ---- module ----------------------------------------------------------------------------------------------------------------
def module_inputs(dtype=torch.float64):
    return (
        normal(2, 4, 6, 6, 12, dtype=dtype),
        normal(2, 144, 9, seed=1, dtype=dtype),
        normal(2, 9, seed=2, dtype=dtype),
    )


def test_projection_commutes_with_pooling():
    torch.manual_seed(0)
    projection = torch.nn.Linear(12, 20).double()
    inputs = module_inputs()
    before = M.PromptPool3d((2, 3, 3), projection=projection, order="pre")(*inputs, 60.0)
    after = M.PromptPool3d((2, 3, 3), projection=projection)(*inputs, 60.0)
    assert after.shape == (2, 2, 2, 2, 20)
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-13)
    p = ppllava_weights(inputs[1], inputs[2], 60.0).view(2, 4, 6, 6)
    assert torch.allclose(before, by_windows(projection(inputs[0]), p, (2, 3, 3), None, 0.01, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_orders_are_within_the_budget(every, dtype):
    impl, device = every
    torch.manual_seed(0)
    projection = torch.nn.Linear(12, 20).to(dtype)
    inputs = module_inputs(dtype)
    wide = torch.nn.Linear(12, 20).double()
    wide.load_state_dict(projection.state_dict())
    f, v, t = (i.double() for i in inputs)
    exact = by_windows(wide(f), ppllava_weights(v, t, 60.0).view(2, 4, 6, 6), (2, 3, 3), None, 0.01, torch.float64)
    p = ppllava_weights(inputs[1].float(), inputs[2].float(), 60.0).view(2, 4, 6, 6)
    peer = by_windows(projection(inputs[0]), p, (2, 3, 3), None, 0.01, torch.float32).to(dtype)
    for order in ("pre", "post"):
        pool = M.PromptPool3d(projection=projection, order=order, impl=impl).to(device)
        with torch.no_grad():
            check_budget(order, pool(*(i.to(device) for i in inputs), 60.0), peer, exact)


def test_module():
    pool = M.PromptPool3d((2, 3, 3), projection=torch.nn.Linear(12, 20))
    assert "kernel=(2, 3, 3), stride=(2, 3, 3), temperature=0.01, order='post'" in repr(pool)
    features, visual, prompt = module_inputs(torch.float32)
    y = pool(features.flatten(1, 3), visual, prompt, 60.0, grid=(4, 6, 6))
    assert torch.equal(y, pool(features, visual, prompt, 60.0))
    y.sum().backward()
    assert pool.projection.weight.grad.abs().sum() > 0
    plain = M.PromptPool3d((2, 3, 3))
    weights = M.prompt_weights(visual, prompt, 60.0)
    assert torch.equal(plain(features, visual, prompt, 60.0), M.prompt_pool3d(features, weights, (2, 3, 3)))


@pytest.mark.parametrize(
    "named,error,message",
    [
        ({"kernel": (2, 3)}, ValueError, "kernel: expected three sizes"),
        ({"stride": (0, 3, 3)}, ValueError, "stride[0]: expected"),
        ({"temperature": 0}, ValueError, "temperature: expected a number above 0"),
        ({"order": "both"}, ValueError, "order: expected one of 'pre', 'post'"),
        ({"projection": lambda x: x}, TypeError, "projection: expected an nn.Module or None"),
    ],
)
def test_bad_module(named, error, message):
    with pytest.raises(error) as caught:
        M.PromptPool3d(**named)
    assert message in str(caught.value)


def test_compiles_into_one_graph():
    pool = M.PromptPool3d((2, 3, 3), projection=torch.nn.Linear(12, 20))
    inputs = module_inputs(torch.float32)
    whole = torch.compile(pool, fullgraph=True, backend="eager")
    assert torch.equal(whole(*inputs, 60.0), pool(*inputs, 60.0))
