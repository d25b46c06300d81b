"""unmerge on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from emulation.cuda_emulator import DTYPES as DTYPE_NUMBERS
from emulation.cuda_emulator import call
from emulation.merge_structs import UnmergeArgs
from emulation.plan_cases import NAN, Output, bits, random_plan, tensor

from saccade.reference.unmerge import unmerge
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    id: str
    dtype: torch.dtype = BF16
    batch: int = 2
    tokens: int = 60
    rows: int = 40
    width: int = 64
    layout: str = "dense"
    shared: bool = False
    dropped: int = 5
    residual: bool = True
    gate: tuple[bool, bool] | None = (True, False)  # has a batch, has tokens


CASES = [
    Case("copy", residual=False, gate=None),
    Case("copy_f32", F32, residual=False, gate=None),
    Case("residual", F16, gate=None),
    Case("gate", F32, residual=False),
    Case("gate_of_every_token", gate=(True, True)),
    Case("gate_of_every_token_for_all", F32, gate=(False, True), residual=False),
    Case("one_gate", F16, gate=(False, False)),
    Case("many_tokens_a_thread", F32, width=16, tokens=700),
    Case("several_tiles_of_columns", width=520, tokens=30),
    Case("8_byte_accesses", F16, width=36),
    Case("odd_width", BF16, width=31, gate=(True, True)),
    Case("odd_width_f32", F32, width=3),
    Case("packed", layout="packed", gate=(True, True)),
    Case("unaligned", layout="odd", gate=(True, True)),
    Case("unaligned_f32", F32, layout="odd"),
    Case("one_plan_for_all", shared=True, batch=3),
    Case("one_token", F32, batch=1, tokens=1, rows=1, width=1, dropped=0),
    Case("all_dropped", F32, tokens=9, dropped=9),
]


def pair(x: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Batch and token strides, 0 where there is one entry."""
    return (ctypes.c_int64 * 2)(*(0 if n == 1 else s for n, s in zip(x.shape[:2], x.stride()[:2], strict=True)))


def run(y, inverse, residual, gate, odd: bool = False) -> torch.Tensor:
    batch, rows, width = y.shape
    tokens = inverse.shape[1]
    out = Output((batch, tokens, width), y.dtype, odd=odd)
    args = UnmergeArgs(y.data_ptr(), pair(y))
    if residual is not None:
        args.residual, args.residual_stride = residual.data_ptr(), pair(residual)
    if gate is not None:
        args.gate, args.gate_stride = gate.data_ptr(), pair(gate)
    args.inverse, args.shared = inverse.data_ptr(), inverse.shape[0] == 1 and batch > 1
    args.batch, args.tokens, args.rows, args.width = batch, tokens, rows, width
    args.dtype, args.out = DTYPE_NUMBERS[y.dtype], out.tensor.data_ptr()
    call("unmerge", "unmerge", args)
    return out.checked()


def inputs(case: Case):
    plan = random_plan(1 if case.shared else case.batch, case.tokens, case.rows, dropped=case.dropped)
    y = tensor((case.batch, case.rows, case.width), case.dtype, case.layout, seed=1)
    residual = tensor((case.batch, case.tokens, case.width), case.dtype, case.layout, seed=2) if case.residual else None
    gate = None
    if case.gate is not None:
        of_batch, of_tokens = case.gate
        shape = (case.batch if of_batch else 1, case.tokens if of_tokens else 1, case.width)
        gate = tensor(shape, case.dtype, case.layout, seed=3)
    return y, plan.inverse, residual, gate


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inside_the_budget(case: Case) -> None:
    y, inverse, residual, gate = inputs(case)
    out = run(y, inverse, residual, gate, odd=case.layout == "odd")
    same = unmerge(y, inverse, residual, gate)
    exact = unmerge(y.double(), inverse, residual, gate)
    check_budget(case.id, out, same, exact)
    if residual is None and gate is None:
        assert torch.equal(bits(out), bits(same))


def test_a_sample_has_the_same_bits_alone_and_in_a_batch() -> None:
    case = Case("batch", F16, batch=3, tokens=300, width=24, gate=(True, True))
    y, inverse, residual, gate = inputs(case)
    assert residual is not None and gate is not None
    out = run(y, inverse, residual, gate)
    for b in range(3):
        one = slice(b, b + 1)
        odd = tensor((1, case.rows, case.width), F16, "odd").copy_(y[one])
        assert torch.equal(bits(run(odd, inverse[one], residual[one], gate[one], odd=True)[0]), bits(out[b]))


def test_a_nan_stays_in_its_row() -> None:
    y, inverse, residual, gate = inputs(Case("nan", F32))
    y[0, 3] = NAN
    out = run(y, inverse, residual, gate)
    assert torch.equal(out.isnan().all(-1)[0], inverse[0] == 3) and not out[1].isnan().any()


@pytest.mark.parametrize(("batch", "tokens", "rows", "width"), [(0, 4, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 3, 0)])
def test_empty_extents(batch: int, tokens: int, rows: int, width: int) -> None:
    inverse = torch.full((batch, tokens), -1 if rows == 0 else 0, dtype=torch.int32)
    y, residual = torch.zeros(batch, rows, width), torch.ones(batch, tokens, width)
    assert torch.equal(run(y, inverse, residual, None), residual)


def test_other_dtypes_are_refused() -> None:
    y = torch.zeros(1, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="unmerge: the GPU kernels take float32"):
        run(y, torch.zeros(1, 3, dtype=torch.int32), None, None)
