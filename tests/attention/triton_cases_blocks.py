"""Checks of the planning and attention-map Triton kernels in Triton's interpreter: run as a program, with TRITON_INTERPRET=1, it takes
the name of a check per line and answers with a JSON line. Names come from `CHECKS`, which needs no Triton to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attention import block_cases as cases
from attention.attention_cases import inputs, normal
from interpreted import serve

from saccade.reference.attention_columns import attention_columns as columns_reference
from saccade.reference.attention_rows import attention_rows as rows_reference
from saccade.testing import check_budget

CHECKS: dict[str, Callable[[], None]] = {}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TRITON = "triton", "cpu"


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    words = (*args, *(k if v is True else f"{k}={v}" for k, v in kwargs.items()))
    name = "-".join([function.__name__, *(str(a).removeprefix("torch.") for a in words)])
    assert name not in CHECKS, name
    CHECKS[name] = lambda: function(*args, **kwargs)


def registered() -> None:
    """The ops under their names."""
    from saccade._triton.register import register

    register()


def pool(shape, dtype, kind):
    registered()
    cases.check_pool(*TRITON, shape, dtype, kind)


def pool_exact():
    registered()
    cases.check_pool_exact(*TRITON)
    cases.check_pool_contains(*TRITON)


def select(shape, classes, every=True):
    registered()
    cases.check_select(*TRITON, shape, classes, cases.RULES if every else cases.RULES[::7])


def select_special():
    registered()
    cases.check_select_special(*TRITON)


def transpose(lead, rows, columns, storage, with_ids):
    registered()
    cases.check_transpose(*TRITON, lead, rows, columns, storage, with_ids)


def maps(shape, dtype, rows=None, bias=None, causal=False):
    """Both ops, each from what the specification gives the other."""
    from saccade._triton.attention_columns import attention_columns
    from saccade._triton.attention_rows import attention_rows

    batch, _, _, _, keys, width = shape
    q, k, _ = inputs(*shape, dtype, strides="bshd")
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    key_bias = None if bias is None else normal((1 if bias == 1 else batch, keys), seed=4)
    if key_bias is not None:
        key_bias[:, 1::5] = -math.inf
    rest = rows, key_bias, causal, width**-0.5
    truth, peer = rows_reference(q.double(), k.double(), *rest), rows_reference(q, k, *rest)
    for name, own, same, exact in zip(("lse", "entropy"), attention_rows(q, k, *rest), peer, truth, strict=True):
        check_budget(name, own, same, exact)
    given = truth[0].float()
    truth, peer = (columns_reference(x, y, given, *rest) for x, y in ((q.double(), k.double()), (q, k)))
    check_budget("columns", attention_columns(q, k, given, *rest), peer, truth)


def contained(value):
    """What is not finite stays with the queries that see it."""
    from saccade._triton.attention_columns import attention_columns
    from saccade._triton.attention_rows import attention_rows

    q, k, _ = inputs(1, 2, 1, 90, 90, 32, seed=2)
    clean = attention_rows(q, k, None, None, True, 0.2)
    sums = attention_columns(q, k, clean[0], None, None, True, 0.2)
    bad = k.clone()
    bad[0, 0, 50, 3] = value
    for own, was in zip(attention_rows(q, bad, None, None, True, 0.2), clean, strict=True):
        assert torch.equal(own[..., :50], was[..., :50])
        assert value == math.inf or own[..., 50:].isnan().all()
    own = attention_columns(q, bad, clean[0], None, None, True, 0.2)
    keep = torch.arange(90) != 50
    assert torch.equal(own[..., keep], sums[..., keep])


def empty():
    from saccade._triton.attention_columns import attention_columns
    from saccade._triton.attention_rows import attention_rows

    z = torch.zeros
    assert attention_rows(z(1, 2, 3, 8), z(1, 2, 0, 8), None, None, False, 1.0)[0].tolist() == [[[-math.inf] * 3] * 2]
    assert attention_rows(z(1, 2, 0, 8), z(1, 2, 4, 8), None, None, False, 1.0)[0].shape == (1, 2, 0)
    assert not attention_columns(z(1, 2, 0, 8), z(1, 2, 4, 8), z(1, 2, 0), None, None, False, 1.0).any()
    assert attention_columns(z(1, 2, 3, 8), z(1, 2, 0, 8), z(1, 2, 3), None, None, False, 1.0).shape == (1, 2, 0)


for _dtype in (F32, F16, BF16):
    for _kind in ("plain", "orders"):
        check(pool, (2, 2, 130, 72, 64), _dtype, _kind)
    check(maps, (2, 4, 2, 40, 150, 64), _dtype)
    check(maps, (1, 4, 2, 90, 130, 72), _dtype, causal=True, bias=1)
    check(maps, (2, 6, 3, 40, 70, 32), _dtype, rows=[39, 0, -1, 40, 7, 7], bias="batch")
check(maps, (1, 4, 4, 40, 90, 256), BF16, causal=True)
check(maps, (1, 4, 4, 70, 90, 128), F32, causal=True)
check(pool, (1, 2, 257, 33, 128), F32, "order")
check(pool, (1, 1, 1, 8, 64), F32, "plain")
check(pool_exact)
for _classes in ("none", "shared", "own"):
    check(select, (1, 2, 1, 5, 7, 8), _classes)
    check(select, (1, 2, 2, 3, 130, 12), _classes, every=False)
check(select_special)
for _storage in ("padded", "compressed"):
    check(transpose, (1, 1), 5, 9, _storage, True)
    check(transpose, (2, 3), 70, 66, _storage, False)
    check(transpose, (1, 2), 3, 200, _storage, True)
check(contained, math.nan)
check(contained, math.inf)
check(empty)


if __name__ == "__main__":
    serve(CHECKS)
