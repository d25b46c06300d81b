"""The layers over axial attention, against blocks written out group by group, and the names of published weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from attention.axial_cases import normal

from saccade.attention.modules import DividedSpaceTime, WindowAttention
from saccade.testing import check_budget

GRID = (3, 2, 4)
DIM, HEADS = 32, 2
COMMON = {"norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
          "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}  # fmt: skip


def block(order, **kwargs):
    made = DividedSpaceTime(DIM, HEADS, order=order, **kwargs)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(0.3 * normal(tuple(p.shape), seed=i))
    return made


def attend(layer, queries, keys):
    """Multi-head attention of rows [n, C] over rows [m, C], both normalised."""
    q = layer.qkv(queries)[:, :DIM]
    k, v = layer.qkv(keys)[:, DIM:].chunk(2, -1)
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def groups(tokens):
    """Patches of each place, and of each frame, as rows of the sequence."""
    t, h, w = GRID
    order = torch.arange(t * h * w)
    order = order.view(t, h * w) if tokens == "time_major" else order.view(h * w, t).T
    return [1 + order[:, i] for i in range(h * w)], [1 + order[i] for i in range(t)]


def timesformer(b, x, tokens):
    places, frames = groups(tokens)
    along = torch.zeros_like(x)
    for rows in places:
        y = b.temporal_norm1(x[rows])
        along[rows] = b.temporal_fc(attend(b.temporal_attn, y, y))
    x = x + along
    across, first = torch.zeros_like(x), []
    for rows in frames:
        y = b.norm1(torch.cat((x[:1], x[rows])))
        y = attend(b.attn, y, y)
        across[rows] = y[1:]
        first.append(y[:1])
    across[:1] = torch.stack(first).mean(0)
    x = x + across
    return x + b.mlp(b.norm2(x))


def frozen_in_time(b, x, tokens):
    def one(layer, y, some):
        out = torch.zeros_like(y)
        out[:1] = attend(layer, y[:1], y)
        for rows in some:
            out[rows] = attend(layer, y[rows], torch.cat((y[:1], y[rows])))
        return out

    places, frames = groups(tokens)
    between = x + one(b.timeattn, b.norm3(x), places)
    y = x + one(b.attn, b.norm1(between), frames)
    return y + b.mlp(b.norm2(y))


ORACLES = {"timesformer": timesformer, "frozen_in_time": frozen_in_time}


@pytest.mark.parametrize("tokens", ["time_major", "space_major"])
@pytest.mark.parametrize("order", ORACLES)
def test_against_the_block_written_out(order, tokens):
    b = block(order, tokens=tokens)
    x = normal((2, 1 + 24, DIM), seed=50)
    wide, exact = copy.deepcopy(b).double(), []
    weights = normal(tuple(x.shape), seed=51)
    results = []
    for made, kind in ((b, torch.float32), (wide, torch.float64)):
        leaf = x.to(kind).requires_grad_()
        out = torch.stack([ORACLES[order](made, one, tokens) for one in leaf])
        results.append([out, *torch.autograd.grad((out * weights.to(kind)).sum(), [leaf, *made.parameters()])])
    same, exact = results
    leaf = x.clone().requires_grad_()
    out = b(leaf, GRID)
    found = [out, *torch.autograd.grad((out * weights).sum(), [leaf, *b.parameters()])]
    names = ["out", "dx", *(n for n, _ in b.named_parameters())]
    for name, ours, theirs, truth in zip(names, found, same, exact, strict=True):
        check_budget(name, ours, theirs, truth, factor=2.0 if name == "out" else 3.0)


def test_names_of_published_weights():
    """As the blocks of facebookresearch/TimeSformer and m-bain/frozen-in-time have them."""
    own = {f"temporal_{n}" for n in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
                                     "attn.proj.bias", "fc.weight", "fc.bias")}  # fmt: skip
    assert set(DividedSpaceTime(DIM, HEADS).state_dict()) == COMMON | own
    own = {"norm3.weight", "norm3.bias"} | {
        f"timeattn.{n}" for n in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    assert set(DividedSpaceTime(DIM, HEADS, order="frozen_in_time").state_dict()) == COMMON | own
    assert DividedSpaceTime(DIM, HEADS).tokens == "space_major"
    assert DividedSpaceTime(DIM, HEADS, order="frozen_in_time").tokens == "time_major"


def test_beginning_of_training():
    """With time_init zeros, TimeSformer's block is that of a ViT on every frame."""
    b = DividedSpaceTime(DIM, HEADS, tokens="time_major")
    x = normal((1, 25, DIM), seed=3)
    x[0, 1:] = x[0, 1:9].repeat(3, 1)  # a still
    y = b(x, GRID)
    one = b(x[:, :9], (1, 2, 4))
    assert torch.allclose(y[:, :9], one, atol=1e-6) and torch.allclose(y[:, 9:17], one[:, 1:], atol=1e-6)
    b = DividedSpaceTime(DIM, HEADS, order="frozen_in_time")
    assert not b.timeattn.qkv.weight.any() and bool((b.timeattn.proj.weight == 1).all())
    assert DividedSpaceTime(DIM, HEADS, time_init="random").temporal_fc.weight.any()


def test_drop_path_is_for_training_alone():
    torch.manual_seed(0)
    b = block("frozen_in_time", drop_path=0.5, drop=0.1)
    x = normal((4, 25, DIM))
    assert not torch.equal(b(x, GRID), b(x, GRID))
    b.eval()
    assert torch.equal(b(x, GRID), b(x, GRID))


@pytest.mark.parametrize("window", [(2, 3), (2, 2, 3)])
def test_windows(window):
    torch.manual_seed(1)
    layer, grid = WindowAttention(DIM, HEADS, window), (3, 3, 5)
    x = normal((2, 45, DIM), seed=4)
    box = window if len(window) == 3 else (3, *window)
    places = torch.cartesian_prod(*map(torch.arange, grid)) // torch.tensor(box)
    mask = (places[:, None] == places[None]).all(-1)

    def oracle(made, x):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in made.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(made.norm_q(q), made.norm_k(k), v, mask)
        return made.proj(out.transpose(1, 2).flatten(2))

    check_budget("out", layer(x, grid), oracle(layer, x), oracle(copy.deepcopy(layer).double(), x.double()))
    turned = layer(x, grid, lambda q, k: (q * 2, k))
    assert not torch.allclose(turned, layer(x, grid))
    assert {"norm_q.weight", "norm_k.weight"} <= set(layer.state_dict())
    assert not any("norm" in n for n in WindowAttention(DIM, HEADS, window, qk_norm=False).state_dict())


@pytest.mark.parametrize("order", ORACLES)
def test_compiles_whole(order):
    torch._dynamo.reset()
    b, x = block(order), normal((1, 25, DIM))
    compiled = torch.compile(b, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, GRID), b(x, GRID), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DividedSpaceTime(32, 3), ValueError, "heads: expected a number that divides dim = 32, got 3"),
        (lambda: DividedSpaceTime(32, 0), ValueError, "heads: expected a whole number of at least 1"),
        (lambda: DividedSpaceTime(32, 2, order="other"), ValueError, "order: expected one of 'timesformer'"),
        (lambda: DividedSpaceTime(32, 2, tokens="rows"), ValueError, "tokens: expected one of 'time_major'"),
        (lambda: DividedSpaceTime(32, 2, time_init="ones"), ValueError, "time_init: expected one of 'zeros'"),
        (lambda: DividedSpaceTime(32, 2, drop=1.0), ValueError, r"drop: expected a share in \[0, 1\), got 1.0"),
        (lambda: DividedSpaceTime(32, 2, mlp_ratio=0), ValueError, "mlp_ratio: expected a number above 0"),
        (lambda: WindowAttention(32, 2, (2,)), ValueError, "window: expected .* got 1 sizes"),
        (lambda: WindowAttention(32, 2, (2, 0)), ValueError, r"window\[1\]: expected a whole number of at least 1"),
        (lambda: block("timesformer")(torch.zeros(1, 24, 32), GRID), ValueError, r"x: expected \[B, 25, 32\]"),
        (lambda: block("timesformer")([1], GRID), TypeError, "x: expected a tensor"),
        (lambda: block("timesformer")(torch.zeros(1, 25, 32), (3, 8)), ValueError, "grid: expected three sizes"),
    ],
)  # fmt: skip
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
