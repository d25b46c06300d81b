"""The raw ops sparse_attention, sparse_attention_bwd and attention_bias_grad on the CPU, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention.attention_cases import DTYPES, LAYOUTS, expected, generator, inputs, normal

from saccade._load import BINARY
from saccade.attention import BlockLayout, BlockLists
from saccade.reference.block_transpose import block_transpose
from saccade.testing import check_budget

pytestmark = pytest.mark.skipif(BINARY is None, reason="the compiled library is not here")
OPS = torch.ops.saccade
GRADS = ("dq", "dk", "dv", "dbias", "dkey_bias")
INF, NAN = float("inf"), float("nan")


def transposed(layout):
    """The lists by key block, by the reference; seven tensors, None where there are no partial blocks."""
    out = []
    for lists, ids in ((layout.full, False), (layout.partial, True)):
        if lists is None:
            out += [None] * 4
            continue
        *three, t_ids = block_transpose(*lists, layout.k_blocks)
        out += [*three, *([None if lists.ids is None else t_ids] if ids else [])]
    return out


def forward(layout, q, k, v, bias=None, key_bias=None, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OPS.sparse_attention(q, k, v, *layout.tensors(), bias, key_bias, layout.q_block, layout.k_block, scale)


def run(layout, tensors, dout, dlse=None, scale=None):
    """out, lse and (dq, dk, dv, dbias, dkey_bias), those that are asked for."""
    q, k, v, bias, key_bias = tensors
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = forward(layout, q, k, v, bias, key_bias, scale)
    tail = (bias, key_bias, layout.q_block, layout.k_block, scale)
    dq, dk, dv, dkey_bias, delta = OPS.sparse_attention_bwd(
        dout, dlse, q, k, v, out, lse, *layout.tensors(), *transposed(layout), *tail
    )
    grads = [dq, dk, dv]
    if bias is not None:
        grads.append(OPS.attention_bias_grad(dout, q, k, v, lse, delta, *layout.tensors(), *tail))
    if key_bias is not None:
        dkey_bias = dkey_bias.sum(1)
        grads.append(dkey_bias.sum(0, keepdim=True) if key_bias.shape[0] == 1 else dkey_bias)
    return out, lse, grads


def check(layout, shape, dtype, *, bias=None, key_bias=None, strides="bhsd", seed=0, scale=None, with_dlse=True):
    q, k, v = inputs(*shape, dtype, seed=seed, strides=strides)
    scale = shape[5] ** -0.5 if scale is None else scale
    dout = normal(q.shape, dtype, seed=seed + 50)
    dlse = normal(q.shape[:3], seed=seed + 51) if with_dlse else None
    tensors = [q, k, v, bias, key_bias]
    exact, same = expected(tensors, layout.to_mask().expand(shape[0], shape[1], -1, -1), scale, dout, dlse)
    out, lse, grads = run(layout, tensors, dout, dlse, scale)
    check_budget("out", out, same[0], exact[0])
    check_budget("lse", lse, same[1], exact[1])
    names = [n for n, t in zip(GRADS, tensors, strict=True) if t is not None]
    for name, ours, theirs, wide in zip(names, grads, same[2], exact[2], strict=True):
        assert ours.dtype == theirs.dtype, name
        check_budget(name, ours, theirs, wide, factor=3.0)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(dtype, head_dim):
    check(BlockLayout.dense(100, 150), (1, 2, 1, 100, 150, head_dim), dtype)
    layout = LAYOUTS["bits"](1, 2, 70, 130, 64, 64, 2)
    check(layout, (1, 2, 2, 70, 130, head_dim), dtype, strides="bshd", seed=1)


@pytest.mark.parametrize("q_len", [0, 1, 63, 65, 200])
@pytest.mark.parametrize("k_len", [0, 1, 63, 65, 200])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128)], ids=str)
def test_lengths(q_len, k_len, blocks):
    layout = BlockLayout.dense(q_len, k_len, q_block=blocks[0], k_block=blocks[1])
    shape = (2, 2, 1, q_len, k_len, 64)
    if q_len and k_len > 1:  # one key alone: gradients of 0, which no budget measures
        check(layout, shape, torch.float32)
        return
    q, k, v = inputs(*shape)
    out, lse, (dq, dk, dv) = run(layout, [q, k, v, None, None], torch.ones_like(q))
    assert out.shape == q.shape and dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    if q_len == 0:
        assert (dk == 0).all() and (dv == 0).all()
    elif k_len == 0:
        assert (out == 0).all() and (lse == -INF).all() and (dq == 0).all()
    else:
        assert torch.equal(out, v.repeat_interleave(2, 1).expand_as(out)) and (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_with_bias(kind, dtype):
    for seed, (shape, blocks, strides) in enumerate(
        [
            ((2, 4, 2, 200, 200, 64), (64, 64), "bhsd"),
            ((1, 4, 1, 130, 300, 72), (64, 128), "bshd"),
            ((2, 3, 3, 257, 127, 32), (128, 64), "packed"),
            ((1, 2, 1, 150, 321, 128), (128, 128), "packed"),
        ]
    ):
        batch, heads, _, q_len, k_len, _ = shape
        layout = LAYOUTS[kind](batch, heads, q_len, k_len, *blocks, seed)
        forms = [(1, 1), (batch, 1), (1, heads), (batch, heads)]
        bias = normal((*forms[seed], q_len, k_len), torch.float32 if seed % 2 else dtype, seed=7)
        if seed == 3:  # a slice of a wider table
            wide = torch.full((*forms[seed], q_len, k_len + 9), NAN, dtype=bias.dtype)
            wide[..., 5 : 5 + k_len] = bias
            bias = wide[..., 5 : 5 + k_len]
        sizes = torch.randint(1, 9, (1 if seed % 2 else batch, k_len), generator=generator(8))
        key_bias = sizes.float().log()  # of merged tokens
        check(layout, shape, dtype, strides=strides, seed=seed)
        check(layout, shape, dtype, bias=bias, key_bias=key_bias, strides=strides, seed=seed)
        check(layout, shape, dtype, key_bias=key_bias, strides=strides, seed=seed, with_dlse=False, scale=-0.3)


def test_orders_of_their_own_for_samples_and_heads():
    """A bias shared by samples and heads whose queries lie at other positions in each."""
    layout = LAYOUTS["window"](2, 4, 150, 130, 64, 64, 3)
    rows, columns = layout.q_order.shape[2], layout.k_order.shape[2]

    def orders(heads, n, positions, seed):
        out = torch.full((2, heads, positions), -1, dtype=torch.int32)
        for i in range(2 * heads):
            places = torch.randperm(positions, generator=generator(seed + i))[:n]
            out[i // heads, i % heads, places] = torch.arange(n, dtype=torch.int32)
        return out

    layout = BlockLayout(
        150,
        130,
        64,
        64,
        layout.full,
        layout.partial,
        box=layout.box,
        at=layout.at,
        q_order=orders(4, 150, rows, 5),
        k_order=orders(4, 130, columns, 50),
    )
    for form in ((1, 1), (2, 1), (1, 4), (2, 4)):
        check(layout, (2, 4, 4, 150, 130, 64), torch.float32, bias=normal((*form, 150, 130), seed=1))


def test_long_sums():
    """8192 keys and D = 256: errors stay those of torch. Outputs and the gradients of a few queries."""
    q, k, v = inputs(1, 1, 1, 64, 8192, 256)
    dout = normal(q.shape, seed=3)
    layout = BlockLayout.dense(64, 8192)
    mask = torch.ones(1, 1, 64, 8192, dtype=torch.bool)
    exact, same = expected([q, k, v, None, None], mask, 1 / 16, dout)
    out, lse, grads = run(layout, [q, k, v, None, None], dout)
    for name, a, b, c, factor in zip(
        ("out", "lse", "dq", "dk", "dv"),
        (out, lse, *grads),
        (*same[:2], *same[2]),
        (*exact[:2], *exact[2]),
        (2, 2, 3, 3, 3),
        strict=True,
    ):
        check_budget(name, a, b, c, factor=factor)


def test_rows_that_see_nothing():
    mask = torch.zeros(200, 130, dtype=torch.bool)
    mask[::3, ::2] = True
    layout = BlockLayout.from_mask(mask)
    q, k, v = inputs(1, 2, 1, 200, 130, 64)
    dlse = torch.full((1, 2, 200), NAN)
    dlse[..., ::3] = 1.0
    bias = normal((1, 1, 200, 130), seed=2)
    bias[..., 3, :] = -INF  # sees keys, all of weight 0
    out, lse, (dq, dk, dv, dbias) = run(layout, [q, k, v, bias, None], torch.ones_like(q), dlse)
    empty = ~mask.any(-1)
    empty[3] = True
    assert (out[:, :, empty] == 0).all() and (lse[:, :, empty] == -INF).all() and (dq[:, :, empty] == 0).all()
    assert not lse[:, :, ~empty].isinf().any()
    for t in (out, dq, dk, dv, dbias):
        assert t.isfinite().all()
    assert (dbias[0, 0][~mask] == 0).all()


def test_keys_without_a_place_get_no_gradient():
    q, k, v = inputs(1, 2, 2, 64, 128, 32)
    k_order = torch.full((1, 1, 128), -1, dtype=torch.int32)
    k_order[0, 0, :60] = torch.arange(60, dtype=torch.int32)
    layout = BlockLayout.from_block_map(torch.ones(1, 2, dtype=torch.bool), q_len=64, k_len=128, k_order=k_order)
    _, _, (_, dk, dv, dkey_bias) = run(layout, [q, k, v, None, torch.zeros(1, 128)], torch.ones_like(q))
    for t in (dk[:, :, 60:], dv[:, :, 60:], dkey_bias[:, 60:]):
        assert (t == 0).all()
    assert (dv[:, :, :60] != 0).all()


def test_outputs_are_laid_out_like_the_inputs():
    q, k, v = inputs(2, 4, 2, 70, 90, 64, strides="bshd")
    layout = BlockLayout.dense(70, 90)
    out, lse, (dq, dk, dv) = run(layout, [q, k, v, None, None], torch.ones_like(q))
    assert out.stride() == q.stride() and dq.stride() == q.stride()
    assert dk.stride() == k.stride() and dv.stride() == v.stride()
    assert lse.is_contiguous() and lse.dtype == torch.float32
    expanded = k[:, :1].expand(-1, 2, -1, -1)  # stride 0
    same = forward(layout, q, expanded.contiguous(), expanded.contiguous())
    for a, b in zip(forward(layout, q, expanded, expanded), same, strict=True):
        assert torch.equal(a, b)


def problem(kind, batch=3, seed=0):
    layout = LAYOUTS[kind](1, 4, 150, 200, 64, 64, seed)
    tensors = [*inputs(batch, 4, 2, 150, 200, 64), normal((1, 4, 150, 200), seed=1), normal((batch, 200), seed=2)]
    return layout, tensors, normal((batch, 4, 150, 64), seed=3), normal((batch, 4, 150), seed=4)


def flat(results):
    return [*results[:2], *results[2]]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_same_bits_for_any_threads_and_batch(kind):
    layout, tensors, dout, dlse = problem(kind)
    first = flat(run(layout, tensors, dout, dlse))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for a, b in zip(flat(run(layout, tensors, dout, dlse)), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    for b in range(3):
        one = [t if t.shape[0] == 1 else t[b : b + 1] for t in tensors]
        alone = flat(run(layout, one, dout[b : b + 1], dlse[b : b + 1]))
        for i in (0, 1, 2, 3, 4, 6):  # all but the bias, which the samples share
            assert torch.equal(alone[i], first[i][b : b + 1])


@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "key_bias", "dout", "dlse"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stays_where_it_is_seen(where, value):
    for kind in ("bits", "causal", "window"):
        layout, tensors, dout, dlse = problem(kind, batch=1, seed=4)
        mask = layout.to_mask().expand(1, 4, -1, -1)
        clean = flat(run(layout, tensors, dout, dlse))
        given = [t.clone() for t in (*tensors, dout, dlse)]
        target = given[["q", "k", "v", "bias", "key_bias", "dout", "dlse"].index(where)]
        queries, keys = torch.zeros(1, 4, 150, dtype=torch.bool), torch.zeros(1, 4, 200, dtype=torch.bool)
        if where in ("q", "bias", "dout", "dlse"):
            target[0, 1, 70] = value
            queries[0, 1, 70] = True
        elif where == "key_bias":
            target[0, 66] = value
            keys[..., 66] = True
        else:
            target[0, 1, 66, 5] = value
            keys[0, 2:, 66] = True
        found = flat(run(layout, given[:5], *given[5:]))
        rows = queries | (mask & keys[:, :, None]).any(-1)
        columns = keys | (mask & rows[..., None]).any(-2)
        columns = columns.view(1, 2, 2, 200).any(2)  # key heads
        for i, touched in enumerate((rows, rows, rows, columns, columns)):
            a, b = found[i], clean[i]
            assert torch.equal(a[~touched], b[~touched]), f"{kind}: result {i} changed where it was not touched"
        pairs = ~(rows[..., None] & mask)
        assert torch.equal(found[5][pairs], clean[5][pairs]), f"{kind}: dbias"
        if where in ("k", "v") and value != value:
            assert found[0][rows & mask[..., 66] & keys[..., 66:67]].isnan().all()


def test_bad_entries_of_lists_read_nothing_outside():
    """Blocks that do not exist are passed over; a direct caller may have written anything."""
    q, k, v = inputs(1, 1, 1, 64, 128, 64)
    starts, counts = torch.zeros(1, 1, 1, dtype=torch.int32), torch.full((1, 1, 1), 3, dtype=torch.int32)
    odd = BlockLayout(64, 128, 64, 64, BlockLists(starts, counts, torch.tensor([0, 7, -2], dtype=torch.int32)))
    first = BlockLayout.from_block_map(torch.tensor([[True, False]]), q_len=64, k_len=128)
    for a, b in zip(forward(odd, q, k, v), forward(first, q, k, v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.__setitem__(0, a[0].double()), "q"),
        (lambda a: a.__setitem__(1, a[1].half()), "k"),
        (lambda a: a.__setitem__(2, a[2][:, :, :-1]), "v"),
        (lambda a: a.__setitem__(1, a[1].transpose(2, 3).contiguous().transpose(2, 3)), "k"),
        (lambda a: a.__setitem__(3, a[3].long()), "starts"),
        (lambda a: a.__setitem__(4, a[4][..., :1]), "counts"),
        (lambda a: a.__setitem__(5, a[5].flatten()[::2]), "indices"),
        (lambda a: a.__setitem__(15, torch.zeros(1, 3, 100, 130)), "bias"),
        (lambda a: a.__setitem__(16, torch.zeros(2, 130)), "key_bias"),
        (lambda a: a.__setitem__(17, 32), "q_block"),
        (lambda a: a.__setitem__(6, a[3]), "p_starts"),
        (lambda a: a.__setitem__(13, torch.zeros(1, 1, 100, dtype=torch.int32)), "q_order"),
    ],
)
def test_refusals(change, word):
    q, k, v = inputs(1, 2, 1, 100, 130, 64)
    layout = BlockLayout.dense(100, 130)
    arguments = [q, k, v, *layout.tensors(), None, None, 64, 64, 0.125]
    OPS.sparse_attention(*arguments)
    change(arguments)
    with pytest.raises(RuntimeError, match=word):
        OPS.sparse_attention(*arguments)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level):
    """The layouts again in a process of its own; a level that this processor lacks runs the best below it."""
    if os.environ.get("SACCADE_RAW_CHILD"):
        pytest.skip("this is the child")
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "SACCADE_CPU_CAPABILITY": level, "SACCADE_RAW_CHILD": "1"}
    chosen = "test_rows or ((test_layouts_with_bias or test_head_dims) and float32)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, cwd=tests, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
