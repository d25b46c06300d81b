"""attention_rows and attention_columns on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from emulation.attention_structs import AttentionMapArgs
from emulation.cuda_emulator import DTYPES, call, strides, workspace

from saccade.reference.attention_columns import attention_columns
from saccade.reference.attention_rows import attention_rows
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INF, NAN = float("inf"), float("nan")


@dataclass
class Case:
    id: str
    dtype: torch.dtype = BF16
    heads: tuple[int, int] = (1, 1)
    queries: int = 40
    keys: int = 70
    width: int = 64
    rows: tuple[int, ...] | None = None
    bias: bool = False
    causal: bool = False


CASES = [
    Case("large_tiles", queries=140, keys=135),
    Case("parts_of_a_list", F16, queries=30, keys=330, bias=True),
    Case("wide_rows", BF16, queries=40, keys=50, width=200),
    Case("float32", F32, (2, 1), queries=70, keys=150, width=40, bias=True),
    Case("groups_and_a_list_of_rows", F16, (2, 1), width=72, rows=(3, 39, 3, -1, 40, 0), bias=True),
    Case("causal", BF16, queries=40, keys=50, width=72, causal=True),
    Case("causal_rows_that_see_nothing", F32, queries=70, keys=66, width=40, causal=True),
    Case("causal_list", F16, queries=40, keys=50, rows=(39, 0, 20), causal=True),
    Case("one", F16, queries=1, keys=1, width=8),
]


def problem(case: Case) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(case.id))
    heads, kv_heads = case.heads
    q = torch.randn(1, heads, case.queries, case.width, generator=generator).to(case.dtype)
    k = torch.randn(1, kv_heads, case.keys, case.width, generator=generator).to(case.dtype)
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=torch.int32)
    bias = None
    if case.bias:
        bias = torch.randn(1, case.keys, generator=generator)
        bias[0, ::7] = -INF
    return q, k, rows, bias


def map_args(q, k, rows, bias, causal: bool, scale: float) -> AttentionMapArgs:
    args = AttentionMapArgs()
    inputs = getattr(args, "in")
    inputs.q, inputs.k, inputs.q_stride, inputs.k_stride = q.data_ptr(), k.data_ptr(), strides(q), strides(k)
    inputs.batch, inputs.heads, inputs.q_len, inputs.head_dim = q.shape
    inputs.kv_heads, inputs.k_len, inputs.scale, inputs.dtype = k.shape[1], k.shape[2], scale, DTYPES[q.dtype]
    if bias is not None:
        inputs.key_bias, inputs.key_bias_stride = bias.data_ptr(), 0 if bias.shape[0] == 1 else bias.stride(0)
    args.rows = None if rows is None else rows.data_ptr()
    args.row_count, args.causal = q.shape[2] if rows is None else len(rows), causal
    return args


def run_rows(q, k, rows, bias, causal, scale) -> tuple[torch.Tensor, torch.Tensor]:
    args = map_args(q, k, rows, bias, causal, scale)
    lse, entropy = (torch.full((*q.shape[:2], args.row_count), NAN) for _ in range(2))
    args.lse, args.entropy = lse.data_ptr(), entropy.data_ptr()
    space = workspace("attention_rows", "attention_rows", args)
    args.workspace = space.data_ptr()
    call("attention_rows", "attention_rows", args)
    return lse, entropy


def run_columns(q, k, lse, rows, bias, causal, scale) -> torch.Tensor:
    args = map_args(q, k, rows, bias, causal, scale)
    out = torch.full((*q.shape[:2], k.shape[2]), NAN)
    args.lse, args.columns = lse.data_ptr(), out.data_ptr()
    space = workspace("attention_columns", "attention_columns", args)
    args.workspace = space.data_ptr()
    call("attention_columns", "attention_columns", args)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rows(case: Case) -> None:
    q, k, *rest = problem(case)
    options = (*rest, case.causal, case.width**-0.5)
    exact, eager = attention_rows(q.double(), k.double(), *options), attention_rows(q.float(), k.float(), *options)
    for name, got, near, far in zip(("lse", "entropy"), run_rows(q, k, *options), eager, exact, strict=True):
        seen = exact[0].isfinite()
        assert torch.equal(got[~seen].double(), far[~seen])
        check_budget(name, got[seen], near[seen], far[seen])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_columns(case: Case) -> None:
    q, k, *rest = problem(case)
    options = (*rest, case.causal, case.width**-0.5)
    lse = attention_rows(q.double(), k.double(), *options)[0].float()
    exact = attention_columns(q.double(), k.double(), lse.double(), *options)
    eager = attention_columns(q.float(), k.float(), lse, *options)
    check_budget("columns", run_columns(q, k, lse, *options), eager, exact)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_what_is_not_finite_stays_where_it_is_seen(dtype: torch.dtype) -> None:
    case = Case("causal", dtype, queries=40, keys=40, causal=True)
    q, k, *rest = problem(case)
    lse, entropy = run_rows(q, k, *rest, True, 0.1)
    columns = run_columns(q, k, lse, *rest, True, 0.1)
    k[0, 0, 30, 3], q[0, 0, 5, 0] = NAN, INF
    got = run_rows(q, k, *rest, True, 0.1)
    clean = [n for n in range(30) if n != 5]
    assert torch.equal(got[0][..., clean], lse[..., clean]) and torch.equal(got[1][..., clean], entropy[..., clean])
    assert got[0][..., 30:].isnan().all()
    bad = run_columns(q, k, got[0], *rest, True, 0.1)
    assert bad[..., :6].isnan().all()  # query 5 sees them
    lse[..., 5] = -INF
    k[0, 0, 30, 3], q[0, 0, 5, 0] = 0.0, 0.0
    assert run_columns(q, k, lse, *rest, True, 0.1)[..., 6:].isfinite().all() and columns.isfinite().all()


def test_memory_layouts_and_refusals() -> None:
    q, k, *rest = problem(Case("odd", F16, queries=20, keys=20, width=40))
    want = run_rows(q[..., 1:33].contiguous(), k[..., 3:35].contiguous(), *rest, False, 0.2)
    assert torch.equal(run_rows(q[..., 1:33], k[..., 3:35], *rest, False, 0.2)[0], want[0])
    with pytest.raises(RuntimeError, match="256"):
        run_rows(torch.zeros(1, 1, 2, 264), torch.zeros(1, 1, 2, 264), None, None, False, 1.0)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        run_rows(q.double(), k.double(), None, None, False, 1.0)
