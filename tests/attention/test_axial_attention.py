"""axial_attention over implementations: outputs and gradients inside the error budget of torch, wherever its tokens lie."""

from __future__ import annotations

import pytest
import torch
from attention.axial_cases import EMPTY, FIXED, LARGE, Problem, expected, inputs, normal, torch_axial, with_gradients

import saccade
from saccade._dispatch import raw
from saccade.attention.axial_attention import axial_attention
from saccade.reference import axial_attention as reference
from saccade.testing import check_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "dq", "dk", "dv")
NAN, INF = float("nan"), float("inf")


def call(problem: Problem, **kwargs):
    """The public function on a problem."""
    query = "mean" if problem.mean else "global"
    return lambda q, k, v: axial_attention(
        q, k, v, problem.grid, "window", window=problem.box, prefix=problem.prefix, prefix_query=query, **kwargs
    )


def check(implementation, problem, head_dim, dtype, **kwargs):
    impl, device = implementation
    if impl == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit values")
    tensors = inputs(problem, head_dim, dtype, **kwargs)
    exact, same = expected(problem, tensors, head_dim**-0.5)
    found = with_gradients(call(problem, impl=impl), *(x.to(device) for x in tensors))
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=True):
        check_budget(name, ours, theirs, truth, factor=2.0 if name == "out" else 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FIXED)
def test_against_torch(implementation, name, dtype):
    check(implementation, FIXED[name], 64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_boxes_of_many_tiles(implementation, name, dtype):
    check(implementation, LARGE[name], 64, dtype, batch=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 40, 72, 80, 96, 128, 256])
def test_head_dims(implementation, head_dim, dtype):
    for name in ("time, class token", "space, mean", "ragged windows, text"):
        check(implementation, FIXED[name], head_dim, dtype, batch=1)


@pytest.mark.parametrize("strides", ["bshd", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(implementation, dtype, strides):
    for name in ("time, class token", "space, mean", "ragged windows"):
        check(implementation, FIXED[name], 64, dtype, strides=strides)
    impl, device = implementation
    if dtype == torch.bfloat16 and strides == "bshd":
        q, k, v, _ = (x.to(device) for x in inputs(FIXED["time"], 64, dtype, strides=strides))
        assert call(FIXED["time"], impl=impl)(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", EMPTY)
def test_empty(implementation, name):
    impl, device = implementation
    problem = EMPTY[name]
    dtype = torch.bfloat16
    tensors = [x.to(device) for x in inputs(problem, 64, dtype)]
    found = with_gradients(call(problem, impl=impl), *tensors)
    truth = expected(problem, [x.cpu() for x in tensors], 64**-0.5)
    for field, ours, theirs, exact in zip(NAMES, found, truth[1], truth[0], strict=True):
        check_budget(field, ours, theirs, exact, factor=3.0)
    none = [x[:0] for x in tensors]
    assert call(problem, impl=impl)(*none[:3]).shape == none[0].shape


def test_axes_are_windows():
    problem = FIXED["time, class token"]
    q, k, v, _ = inputs(problem, 64, torch.float32)
    t, h, w = problem.grid
    for axis, box in (("time", (t, 1, 1)), ("space", (1, h, w))):
        for query in ("global", "mean"):
            common = dict(prefix=1, prefix_query=query)
            found = axial_attention(q, k, v, problem.grid, axis, **common)
            assert torch.equal(found, axial_attention(q, k, v, problem.grid, "window", window=box, **common))
    whole = axial_attention(q, k, v, problem.grid, "window", window=(2, 3), prefix=1)
    assert torch.equal(whole, axial_attention(q, k, v, problem.grid, "window", window=(t, 2, 3), prefix=1))
    wide = axial_attention(q, k, v, problem.grid, "window", window=(99, 99, 99), prefix=1)
    check_budget("one box", wide, torch_axial(q, k, v, Problem(1, problem.grid, (t, h, w)), 0.125), torch_axial(
        q.double(), k.double(), v.double(), Problem(1, problem.grid, (t, h, w)), 0.125))  # fmt: skip


def test_by_hand():
    """Two frames of two tokens, q of 0: every token takes the mean of what it sees."""
    v = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 8).contiguous()
    q = torch.zeros_like(v)
    out = axial_attention(q, v, v, (2, 1, 2), "time", prefix=1)[0, 0, :, 0]
    assert torch.allclose(out, torch.tensor([2.0, 4 / 3, 2.0, 4 / 3, 2.0]))
    out = axial_attention(q, v, v, (2, 1, 2), "space", prefix=1, prefix_query="mean")[0, 0, :, 0]
    assert torch.allclose(out, torch.tensor([(1.0 + 7 / 3) / 2, 1.0, 1.0, 7 / 3, 7 / 3]))


@pytest.mark.parametrize("mean", [False, True])
def test_gradients_of_the_specification(mean):
    problem = Problem(2, (3, 2, 3), (2, 2, 2), mean)
    leaves = [x.requires_grad_() for x in inputs(problem, 8, torch.float64, batch=1, heads=1)[:3]]
    torch.autograd.gradcheck(call(problem, impl="reference"), leaves)
    numbers = problem.numbers(8**-0.5)
    dout = normal(leaves[0].shape, torch.float64, seed=9)
    outputs = reference.axial_attention(*leaves, *numbers)
    wanted = torch.autograd.grad(outputs[0], leaves, dout)
    with torch.no_grad():
        found = reference.axial_attention_bwd(dout, *leaves, *outputs, *numbers)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["time, class token", "space, mean", "ragged windows, text", "space, text"])
def test_raw_op(name):
    """lse and the terms of the mean too."""
    problem = FIXED[name]
    q, k, v, dout = inputs(problem, 64, torch.float32)
    numbers = problem.numbers(0.125)
    found = raw("axial_attention", "cpu")(q, k, v, *numbers)
    same = reference.axial_attention(q, k, v, *numbers)
    exact = reference.axial_attention(q.double(), k.double(), v.double(), *numbers)
    for field, a, b, c in zip(("out", "lse", "group_out", "group_lse"), found, same, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == c.shape
        check_budget(field, a, b, c)
    torch.library.opcheck(torch.ops.saccade.axial_attention.default, (q, k, v, *numbers))
    torch.library.opcheck(torch.ops.saccade.axial_attention_bwd.default, (dout, q, k, v, *found, *numbers))


@pytest.mark.parametrize("name", ["time, class token", "space, mean", "ragged windows, text"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(implementation, name, dtype):
    """The same bits again, by any number of threads and from any batch."""
    impl, device = implementation
    if impl == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit values")
    problem = FIXED[name]
    tensors = [x.to(device) for x in inputs(problem, 64, dtype, batch=3)]
    first = with_gradients(call(problem, impl=impl), *tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = with_gradients(call(problem, impl=impl), *tensors)
    finally:
        torch.set_num_threads(threads)
    alone = with_gradients(call(problem, impl=impl), *(x[1:2] for x in tensors))
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_stays_in_its_box(implementation, dtype, value, where):
    impl, device = implementation
    if impl == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16-bit values")
    for name in ("time", "time, class token", "time, mean", "ragged windows", "ragged windows, mean", "long time"):
        problem = FIXED[name]
        tensors = [x.to(device) for x in inputs(problem, 64, dtype)]
        clean = with_gradients(call(problem, impl=impl), *tensors)
        token = problem.prefix + 1
        broken = [x.clone() for x in tensors]
        broken[["q", "k", "v", "dout"].index(where)][1, 1, token, 5] = value
        found = with_gradients(call(problem, impl=impl), *broken)
        mask = problem.mask()
        touched = mask[:, token] if where in ("k", "v") else torch.arange(problem.tokens) == token
        columns = mask[touched].any(0) | touched
        for field, a, b, spoilt in zip(NAMES, found, clean, (touched, touched, columns, columns), strict=True):
            rows = torch.zeros(2, 2, problem.tokens, dtype=torch.bool)
            rows[1, 1] = spoilt
            rows = rows.to(device)
            assert torch.equal(a[~rows], b[~rows]), f"{name}: {field} of an untouched row changed"
        if where == "v" and value != value:
            assert found[0][1, 1, token].isnan().all() or found[0][1, 1, token].isnan().any()


def test_compiles_whole():
    torch._dynamo.reset()
    problem = FIXED["space, mean"]
    q, k, v, dout = inputs(problem, 64, torch.float32)
    function = call(problem)
    compiled = torch.compile(lambda *x: function(*x) * 2, fullgraph=True, backend="aot_eager")
    for a, b in zip(with_gradients(compiled, q, k, v, dout), with_gradients(lambda *x: function(*x) * 2, q, k, v, dout),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_explains_itself():
    q = torch.zeros(1, 1, 8, 64)
    found = saccade.explain("axial_attention", q, q, q, (2, 2, 2))
    assert found.chosen == "cpu" and "float32" in found.verdicts["cuda"]
    assert saccade.explain(axial_attention, q.double(), q.double(), q.double(), (2, 2, 2)).chosen == "reference"


X = torch.zeros(1, 2, 9, 64)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(q=[1.0]), TypeError, "q: expected a tensor"),
        (dict(q=X[0]), ValueError, "q: expected"),
        (dict(q=X.int()), TypeError, "q: expected dtype"),
        (dict(q=X[..., :60]), ValueError, "q: expected a head_dim that is a multiple of 8"),
        (dict(k=X.half()), TypeError, "k: expected the dtype of q"),
        (dict(k=X[:, :, :8], v=X[:, :, :8]), ValueError, r"k: expected the shape of q, \[1, 2, 9, 64\], got \[1, 2, 8"),
        (dict(k=X[:, :1], v=X[:, :1]), ValueError, "k: expected the shape of q"),
        (dict(v=X[:, :, :8]), ValueError, "v: expected the shape of k"),
        (dict(k=X.to("meta")), ValueError, "k: expected the device of q"),
        (dict(grid=8), TypeError, "grid: expected a list or tuple, got int"),
        (dict(grid=(2, 4)), ValueError, r"grid: expected three sizes \(T, H, W\), got 2"),
        (dict(grid=(2, 2, 2.0)), TypeError, r"grid\[2\]: expected a whole number"),
        (dict(grid=(2, 2, -2)), ValueError, r"grid\[2\]: expected a whole number of at least 0"),
        (dict(grid=(2, 2, 3)), ValueError, "q: expected prefix [+] T [*] H [*] W = 13 tokens, got 9"),
        (dict(prefix=0), ValueError, "q: expected prefix [+] T [*] H [*] W = 8 tokens, got 9"),
        (dict(prefix=-1), ValueError, "prefix: expected a whole number of at least 0, got -1"),
        (dict(prefix=True), TypeError, "prefix: expected a whole number"),
        (dict(axis="height"), ValueError, "axis: expected one of 'time', 'space', 'window', got 'height'"),
        (dict(window=(1, 1, 1)), ValueError, 'window: only for axis="window"'),
        (dict(axis="window"), ValueError, 'window: axis="window" needs'),
        (dict(axis="window", window=(2,)), ValueError, r"window: expected \(t, h, w\), or \(h, w\).*got 1 sizes"),
        (dict(axis="window", window=(0, 1, 1)), ValueError, r"window\[0\]: expected a whole number of at least 1"),
        (dict(axis="window", window=2), TypeError, "window: expected a list or tuple, got int"),
        (dict(prefix_query="first"), ValueError, "prefix_query: expected one of 'global', 'mean', got 'first'"),
        (dict(scale=NAN), ValueError, "scale: expected a finite number"),
        (dict(scale="1"), TypeError, "scale: expected a number"),
        (dict(impl="cuda"), ValueError, "impl: 'cuda' cannot run axial_attention here"),
        (dict(impl="fast"), ValueError, "impl: expected one of"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, words):
    given = dict(q=X, k=X, v=X, grid=(2, 2, 2), prefix=1) | changes
    with pytest.raises(error, match=words):
        axial_attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("grid"), **given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(t=3), "q: expected 13 tokens"), (dict(bt=0), "bt: expected 1 to"), (dict(prefix=-1), "prefix: expected 0 to"),
        (dict(q=X.double()), "k: expected the dtype"), (dict(w=2**31), "w: expected 0 to"),
    ],
)  # fmt: skip
def test_bad_input_of_the_raw_op(changes, words):
    given = dict(q=X, k=X, v=X, prefix=1, t=2, h=2, w=2, bt=2, bh=1, bw=1, mean=False, scale=1.0) | changes
    with pytest.raises(RuntimeError, match=words):
        torch.ops.saccade.axial_attention(*given.values())
