"""Checks of the sparse-attention Triton kernels in Triton's interpreter: run as a program, with TRITON_INTERPRET=1, it takes the name of
a check per line and answers with a JSON line. Names come from `CHECKS`, which needs no Triton to be read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from attention.attention_cases import LAYOUTS, expected, inputs, normal
from interpreted import serve

from saccade.attention import BlockLayout
from saccade.reference.block_transpose import block_transpose as reference_transpose
from saccade.testing import check_budget

CHECKS: dict[str, Callable[[], None]] = {}
FP32: dict[str, Any] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    words = (*args, *(k if v is True else f"{k}={v}" for k, v in kwargs.items()))
    name = "-".join([function.__name__, *(str(a).removeprefix("torch.") for a in words)])
    assert name not in CHECKS, name
    CHECKS[name] = lambda: function(*args, **kwargs)


def lists_by_key(layout: BlockLayout) -> tuple[torch.Tensor | None, ...]:
    """t_ and tp_ of the schemas, by the specification."""
    full = reference_transpose(*layout.full[:3], None, layout.k_blocks)[:3]
    if layout.partial is None:
        return *full, None, None, None, None
    *partial, ids = reference_transpose(*layout.partial, layout.k_blocks)
    return *full, *partial, None if layout.partial.ids is None else ids


def tiles_of(large, architecture=90):
    """fp32 tiles as on a GPU, or large ones: the interpreter takes as long for a small tile as for a large one."""
    from saccade._triton import attention_configs

    names, widths = ("forward", "dk_dv", "dq", "bias_grad"), (32, 64, 128, 256)
    own = FP32.setdefault("own", attention_configs.FP32)
    big = {n: attention_configs.Tile(64, 64, 4, 2) for n in widths}
    attention_configs.FP32 = dict.fromkeys(names, big) if large else own
    attention_configs.ASSUMED = architecture


def run(layout, tensors, scale, dout, dlse):
    """out, lse, gradients of q, k, v, bias, key_bias (those given), and delta, of the kernels."""
    from saccade._triton.attention_bias_grad import attention_bias_grad
    from saccade._triton.sparse_attention import sparse_attention
    from saccade._triton.sparse_attention_bwd import sparse_attention_bwd

    q, k, v, bias, key_bias = tensors
    numbers = (layout.q_block, layout.k_block, scale)
    out, lse = sparse_attention(q, k, v, *layout.tensors(), bias, key_bias, *numbers)
    rest = *layout.tensors(), *lists_by_key(layout), bias, key_bias, *numbers
    *grads, dkey_bias, delta = sparse_attention_bwd(dout, dlse, q, k, v, out, lse, *rest)
    if bias is not None:
        args = dout, q, k, v, lse, delta, *layout.tensors(), bias, key_bias, *numbers
        grads.append(attention_bias_grad(*args))
    if key_bias is not None:
        dkey_bias = dkey_bias.sum(1)
        grads.append(dkey_bias.sum(0, keepdim=True) if key_bias.shape[0] == 1 else dkey_bias)
    else:
        assert dkey_bias.numel() == 0
    return out, lse, grads


def some_bias(kind, batch, heads, q_len, k_len, dtype):
    """kind: which axes of the bias have their full length, after "f" where it is fp32; k: a key bias too."""
    bias = key_bias = None
    if kind and kind != "k":
        shape = batch if "b" in kind else 1, heads if "h" in kind else 1, q_len, k_len
        bias = normal(shape, F32 if "f" in kind else dtype, seed=11)
    if kind and "k" in kind:
        key_bias = normal((batch if "b" in kind else 1, k_len), seed=12)
    return bias, key_bias


def compare(layout, sizes, bias="", strides="bhsd"):
    """Forward and every gradient within the budget; sizes: batch, heads, key heads, queries, keys, head_dim, dtype."""
    batch, heads, _, q_len, k_len, head_dim, dtype = sizes
    q, k, v = inputs(*sizes, strides=strides)
    tensors = q, k, v, *some_bias(bias, batch, heads, q_len, k_len, dtype)
    dout, dlse = normal(q.shape, dtype, seed=21), normal(q.shape[:3], seed=22)
    scale = 1 / math.sqrt(head_dim)
    out, lse, grads = run(layout, tensors, scale, dout, dlse)
    (e_out, e_lse, e_grads), (p_out, p_lse, p_grads) = expected(tensors, layout.to_mask(), scale, dout, dlse)
    given = [t for t in tensors if t is not None]
    assert [t.dtype for t in (out, *grads)] == [t.dtype for t in (q, *given)]
    assert strides != "bshd" or all(t.transpose(1, 2).is_contiguous() for t in (out, *grads[:3]))
    check_budget("out", out, p_out, e_out)
    check_budget("lse", lse, p_lse, e_lse)
    names = [n for n, t in zip(("dq", "dk", "dv", "dbias", "dkey_bias"), tensors, strict=True) if t is not None]
    for name, own, peer, exact in zip(names, grads, p_grads, e_grads, strict=True):
        check_budget(name, own, peer, exact, factor=3)


def attention_case(
    form, q_len, k_len, head_dim, dtype, blocks=(64, 64), heads=(2, 2), batch=1, bias="", strides="bhsd", small=False,
    architecture=90,
):  # fmt: skip
    tiles_of(not small, architecture)
    layout = LAYOUTS[form](batch, heads[0], q_len, k_len, *blocks)
    compare(layout, (batch, *heads, q_len, k_len, head_dim, dtype), bias, strides)


for _dtype in (F32, F16, BF16):
    check(attention_case, "whole", 100, 150, 32, _dtype, blocks=(128, 64), batch=2)
    check(attention_case, "bits", 130, 90, 64, _dtype, bias="h")
    check(attention_case, "causal", 130, 130, 64, _dtype, blocks=(64, 128), bias="k")
    check(attention_case, "window", 90, 100, 32, _dtype, heads=(4, 2), bias="fk", strides="bshd")
for _head_dim in (72, 80, 96, 128, 256):
    check(attention_case, "causal", 70, 70, _head_dim, BF16, strides="packed")
check(attention_case, "bits", 70, 100, 40, F16, blocks=(64, 128), heads=(2, 1), batch=2, bias="b")
check(attention_case, "window", 70, 60, 248, F16, heads=(2, 1), bias="h")
check(attention_case, "window", 60, 70, 256, BF16, heads=(1, 1), bias="b", architecture=80)
check(attention_case, "causal", 70, 70, 128, F16, heads=(1, 1), blocks=(128, 64), architecture=89)
check(attention_case, "window", 60, 70, 72, F32, heads=(2, 1), bias="bhk")
check(attention_case, "causal", 70, 60, 256, F32, bias="f")
check(attention_case, "bits", 65, 65, 96, F32, bias="k")
check(attention_case, "whole", 5, 9, 32, F32, small=True, bias="k")  # the tiles of a GPU
check(attention_case, "bits", 20, 40, 64, F32, small=True, bias="h")
check(attention_case, "window", 20, 10, 72, F32, small=True, heads=(1, 1), blocks=(64, 64))


def orders_case(which):
    """Orders of their own for samples, heads and key heads, with a bias that these share."""
    batch, heads = 2, 2
    layout = LAYOUTS["window"](1, heads, 70, 60, 64, 64)
    some = [LAYOUTS["window"](1, 1, 70, 60, 64, 64, seed=seed) for seed in range(20, 24)]
    axis = {"sample": (batch, 1), "head": (1, heads), "both": (batch, heads)}[which]
    n = axis[0] * axis[1]
    orders = {
        name: torch.cat([getattr(x, name) for x in some[:n]]).view(*axis, -1).contiguous()
        for name in ("q_order", "k_order")
    }
    layout = dataclasses.replace(layout, **orders, _transposed=[])
    compare(layout, (batch, heads, heads, 70, 60, 32, F16), "k")


for _which in ("sample", "head", "both"):
    check(orders_case, _which)


def lonely_case(dtype):
    """Queries that see nothing at all, keys that nobody sees, empty lists, and a bias of -inf."""
    layout = BlockLayout.from_block_map(torch.zeros(2, 2, dtype=torch.bool), q_len=70, k_len=70)
    q, k, v = inputs(1, 1, 1, 70, 70, 32, dtype)
    zeros = torch.zeros(1, 1, 70, 32, dtype=dtype)
    out, lse, grads = run(layout, (q, k, v, torch.zeros(1, 1, 70, 70), torch.zeros(1, 70)), 1.0, q, q[..., 0].float())
    assert torch.equal(out, zeros) and (lse == -math.inf).all() and not any(g.any() for g in grads)
    layout = BlockLayout.dense(70, 70)
    bias = torch.zeros(1, 1, 70, 70)
    bias[:, :, 5:9], bias[:, :, :, 3] = -math.inf, -math.inf
    out, lse, grads = run(layout, (q, k, v, bias, None), 1.0, q, q[..., 0].float())
    rest = torch.cat([torch.arange(5), torch.arange(9, 70)])
    assert torch.equal(out[:, :, 5:9], zeros[:, :, :4]) and (lse[:, :, 5:9] == -math.inf).all()
    assert out[:, :, rest].isfinite().all() and lse[:, :, rest].isfinite().all() and out[:, :, rest].any()
    assert all(g.isfinite().all() for g in grads) and not grads[0][:, :, 5:9].any() and not grads[1][:, :, 3].any()


check(lonely_case, F32)
check(lonely_case, BF16)


def single(dtype):
    """One query that sees one key: its value, and the gradient of that, to the bit."""
    q, k, v = inputs(1, 2, 2, 1, 1, 40, dtype)
    out, lse, grads = run(BlockLayout.dense(1, 1), (q, k, v, None, torch.ones(1, 1)), 1.0, q, None)
    assert torch.equal(out, v) and torch.equal(grads[2], q)
    assert torch.allclose(lse, (q.float() * k.float()).sum(-1) + 1, atol=1e-5)


check(single, F32)
check(single, BF16)


def not_finite_case(form, where, value, dtype=F16, blocks=(64, 64)):
    """What is not finite reaches the rows that see it, and the keys that these see; other bits do not change."""
    tiles_of(True)
    layout = LAYOUTS[form](1, 1, 100, 130, *blocks, 4)
    mask = layout.to_mask()
    q, k, v = inputs(1, 1, 1, 100, 130, 32, dtype)
    bias = normal((1, 1, 100, 130), seed=8)
    dout, dlse = normal((1, 1, 100, 32), dtype, seed=9), normal((1, 1, 100), seed=10)
    clean = run(layout, (q, k, v, bias, None), 0.2, dout, dlse)
    rows, keys = torch.zeros(1, 1, 100, dtype=torch.bool), torch.zeros(1, 1, 130, dtype=torch.bool)
    given = {"q": q, "k": k, "v": v, "dout": dout}
    given[where] = given[where].clone()
    given[where][0, 0, 66, 5] = value
    (keys if where in ("k", "v") else rows)[0, 0, 66] = True
    found = run(layout, (*(given[n] for n in "qkv"), bias, None), 0.2, given["dout"], dlse)
    rows |= (mask & keys[:, :, None]).any(-1)
    keys |= (mask & rows[..., None]).any(-2)
    (out, lse, grads), (c_out, c_lse, c_grads) = found, clean
    pairs = zip((out, lse, *grads[:3]), (c_out, c_lse, *c_grads[:3]), (rows,) * 3 + (keys,) * 2, strict=True)
    for i, (a, b, touched) in enumerate(pairs):
        assert torch.equal(a[~touched], b[~touched]), (form, where, i)
    apart = ~(rows[..., None] & mask)
    assert torch.equal(grads[3][apart], c_grads[3][apart])
    seen = rows & mask.any(-1)
    if where != "dout":
        assert not out[seen].isfinite().all(-1).any() or math.isinf(value)


for _form in ("bits", "causal", "window"):
    for _where in ("q", "k", "v", "dout"):
        check(not_finite_case, _form, _where, math.nan)
check(not_finite_case, "bits", "k", -math.inf, BF16, blocks=(64, 128))
check(not_finite_case, "window", "v", math.inf, F32)
check(not_finite_case, "causal", "dout", math.inf, BF16, blocks=(128, 64))


def same_bits():
    """A sample alone has the bits that it has among others."""
    tiles_of(True)
    layout = LAYOUTS["bits"](1, 2, 90, 70, 64, 64)
    q, k, v = inputs(3, 2, 2, 90, 70, 64, BF16)
    dout, dlse = normal(q.shape, BF16, seed=5), normal(q.shape[:3], seed=6)
    out, lse, grads = run(layout, (q, k, v, None, None), 0.1, dout, dlse)
    own = run(layout, (q[1:2], k[1:2], v[1:2], None, None), 0.1, dout[1:2], dlse[1:2])
    for a, b in zip((own[0], own[1], *own[2]), (out, lse, *grads), strict=True):
        assert torch.equal(a, b[1:2])


check(same_bits)


def empty(batch, q_len, k_len):
    """No sample, no query or no key."""
    layout = BlockLayout.dense(q_len, k_len)
    q, k, v = inputs(batch, 2, 1, q_len, k_len, 32, F16)
    bias, key_bias = torch.zeros(1, 2, q_len, k_len), torch.zeros(1, k_len)
    out, lse, grads = run(layout, (q, k, v, bias, key_bias), 1.0, q, lse_like(q))
    assert not out.any() and (lse == -math.inf).all() and not any(g.any() for g in grads)
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v, bias, key_bias)]


def lse_like(q: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[:3])


for _sizes in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
    check(empty, *_sizes)


def far():
    """A batch stride beyond 2^31 elements, and a token stride that 64 tokens carry beyond it."""
    tiles_of(True)
    layout = LAYOUTS["bits"](1, 1, 70, 70, 64, 64)
    q, k, v = inputs(2, 1, 1, 70, 70, 32, F16)
    store = torch.empty(2**31 + 8192, dtype=F16)
    wide = store.as_strided((2, 1, 70, 32), (2**31 + 8, 32, 32, 1)).copy_(k)
    long = torch.empty(36 * 2**20 * 69 + 32, dtype=F16).as_strided((1, 1, 70, 32), (0, 0, 36 * 2**20, 1))
    long.copy_(k[:1])
    dout, dlse = normal(q.shape, F16, seed=5), normal(q.shape[:3], seed=6)
    tensors = [q, k, v]
    for i in range(3):
        for x, some in ((wide, slice(None)), (long, slice(1))):
            given = [x if n == i else k[some] if i == n else t[some] for n, t in enumerate(tensors)]
            near = [x.contiguous() if n == i else t for n, t in enumerate(given)]
            a, b = (run(layout, (*t, None, None), 0.1, dout[some], dlse[some]) for t in (given, near))
            for one, other in zip((a[0], a[1], *a[2]), (b[0], b[1], *b[2]), strict=True):
                assert torch.equal(one, other)


check(far)


def registered():
    """Ops and schemas under their _triton names."""
    layout = LAYOUTS["bits"](1, 2, 70, 70, 64, 64)
    q, k, v = inputs(1, 2, 1, 70, 70, 32, F16, strides="bshd")
    bias, key_bias = normal((1, 2, 70, 70), F16), normal((1, 70))
    numbers = bias, key_bias, 64, 64, 0.1
    lse = torch.zeros(1, 2, 70)
    calls = {
        "sparse_attention": (q, k, v, *layout.tensors(), *numbers),
        "sparse_attention_bwd": (q, lse, q, k, v, q, lse, *layout.tensors(), *lists_by_key(layout), *numbers),
        "attention_bias_grad": (q, q, k, v, lse, lse, *layout.tensors(), *numbers),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.saccade, f"{name}_triton").default
        base = getattr(torch.ops.saccade, name).default
        assert str(op._schema).split("(", 1)[1] == str(base._schema).split("(", 1)[1]
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


check(registered)


if __name__ == "__main__":
    serve(CHECKS)
