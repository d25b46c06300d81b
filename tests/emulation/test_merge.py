"""merge and its gradient on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from emulation.cuda_emulator import DTYPES as DTYPE_NUMBERS
from emulation.cuda_emulator import call
from emulation.merge_structs import MAX, MEAN, REPLACE, SUM, MergeArgs, MergeGradArgs
from emulation.plan_cases import NAN, Output, Plan, bits, plan_of, random_plan, tensor

from saccade.reference import merge as reference
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MODES = {"mean": MEAN, "sum": SUM, "max": MAX, "replace": REPLACE}


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
    weighted: bool = False
    hub: int = 0
    dropped: int = 0
    padding: int = 0

    def plan(self) -> Plan:
        samples = 1 if self.shared else self.batch
        return random_plan(samples, self.tokens, self.rows, hub=self.hub, dropped=self.dropped, padding=self.padding)

    def x(self) -> torch.Tensor:
        return tensor((self.batch, self.tokens, self.width), self.dtype, self.layout, seed=1)

    def weight(self) -> torch.Tensor | None:
        if not self.weighted:
            return None
        return torch.rand(self.batch, self.tokens, generator=torch.Generator().manual_seed(2)) * 4 + 0.25


CASES = [
    Case("f32", F32, weighted=True),
    Case("f16", F16),
    Case("several_tiles_of_columns", width=520, tokens=30, rows=21, weighted=True),
    Case("many_rows_a_thread", F32, width=16, tokens=700, rows=500),
    Case("8_byte_accesses", F16, width=36, weighted=True),
    Case("odd_width", BF16, width=31),
    Case("odd_width_f32", F32, width=5, weighted=True),
    Case("packed", layout="packed"),
    Case("unaligned", layout="odd", weighted=True),
    Case("unaligned_f32", F32, layout="odd"),
    Case("one_plan_for_all", shared=True, batch=3, weighted=True),
    Case("padding_and_dropped", F32, padding=7, dropped=9, weighted=True),
    Case("hub", F32, tokens=420, rows=12, hub=300, weighted=True),
    Case("hub_many_rounds_wide", BF16, tokens=700, rows=9, hub=620, width=264, batch=1),
    Case("hub_narrow_one_plan", F16, tokens=200, rows=9, hub=150, width=3, shared=True, padding=2, weighted=True),
    Case("all_into_one", F32, tokens=33, rows=1, width=8),
    Case("one_token", F32, batch=1, tokens=1, rows=1, width=1, weighted=True),
]


def run(x: torch.Tensor, weight: torch.Tensor | None, plan: Plan, mode: int, odd: bool = False):
    batch, tokens, width = x.shape
    y = Output((batch, plan.rows, width), x.dtype, odd=odd)
    total, log_total = (Output((batch, plan.rows), F32) for _ in range(2))
    args = MergeArgs(
        x.data_ptr(),
        (ctypes.c_int64 * 2)(*x.stride()[:2]),
        None if weight is None else weight.data_ptr(),
        0 if weight is None or weight.shape[0] == 1 else tokens,
        plan.view(batch=batch),
        batch,
        tokens,
        plan.rows,
        width,
        mode,
        DTYPE_NUMBERS[x.dtype],
        y.tensor.data_ptr(),
        total.tensor.data_ptr(),
        log_total.tensor.data_ptr(),
    )
    call("merge", "merge", args)
    return y.checked(), total.checked(), log_total.checked()


def run_bwd(dy, x, weight, total, plan: Plan, mode: int, odd: bool = False) -> torch.Tensor:
    batch, rows, width = dy.shape
    tokens = plan.inverse.shape[1]
    dx = Output((batch, tokens, width), dy.dtype, odd=odd)
    args = MergeGradArgs(dy.data_ptr(), (ctypes.c_int64 * 2)(*dy.stride()[:2]))
    if x is not None:
        args.x, args.x_stride = x.data_ptr(), (ctypes.c_int64 * 2)(*x.stride()[:2])
    if weight is not None:
        args.weight, args.weight_stride = weight.data_ptr(), 0 if weight.shape[0] == 1 else tokens
    args.total, args.plan = total.data_ptr(), plan.view(batch=batch)
    args.batch, args.tokens, args.rows, args.width = batch, tokens, rows, width
    args.mode, args.dtype, args.dx = mode, DTYPE_NUMBERS[dy.dtype], dx.tensor.data_ptr()
    call("merge_bwd", "merge_bwd", args)
    return dx.checked()


def check_forward(name: str, got, x, weight, plan: Plan, mode: int) -> None:
    same = reference.merge(x, weight, plan.inverse, plan.head, mode)
    exact = reference.merge(x.double(), weight, plan.inverse, plan.head, mode)
    for part, out, peer, truth in zip(("y", "total", "log_total"), got, same, exact, strict=True):
        check_budget(f"{name} {part}", out, peer, truth)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inside_the_budget(case: Case, mode: str) -> None:
    x, weight, plan = case.x(), case.weight(), case.plan()
    odd = case.layout == "odd"
    got = run(x, weight, plan, MODES[mode], odd)
    check_forward(mode, got, x, weight, plan, MODES[mode])

    dy = tensor((case.batch, case.rows, case.width), case.dtype, case.layout, seed=3)
    dx = run_bwd(dy, x if mode == "max" else None, weight, got[1], plan, MODES[mode], odd)
    same = reference.merge_bwd(dy, x, weight, plan.inverse, plan.head, MODES[mode])
    exact = reference.merge_bwd(dy.double(), x.double(), weight, plan.inverse, plan.head, MODES[mode])
    check_budget(f"{mode} gradient", dx, same, exact, factor=3.0)
    if mode in ("max", "replace"):  # nothing is computed: what is passed on, is passed on as it is
        assert torch.equal(dx, same)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(mode: str) -> None:
    """However blocks, accesses and the plan of the others look."""
    case = Case("batch", F32, batch=3, tokens=200, rows=20, hub=120, width=32, weighted=True)
    x, weight, plan = case.x(), case.weight(), case.plan()
    assert weight is not None
    together = run(x, weight, plan, MODES[mode])
    dy = tensor((3, 20, 32), F32, seed=3)
    dx = run_bwd(dy, x, weight, together[1], plan, MODES[mode])
    for b in range(3):
        odd = tensor((1, 200, 32), F32, "odd").copy_(x[b : b + 1])
        alone = run(odd, weight[b : b + 1], plan.sample(b), MODES[mode], odd=True)
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(bits(one[0]), bits(all_of_them[b]))
        dx_alone = run_bwd(dy[b : b + 1], odd, weight[b : b + 1], alone[1], plan.sample(b), MODES[mode], odd=True)
        assert torch.equal(bits(dx_alone[0]), bits(dx[b]))


def test_one_weight_row_for_the_whole_batch_and_any_batch_stride() -> None:
    plan = random_plan(1, 50, 30)
    x = tensor((50, 2, 16), F16, seed=1).transpose(0, 1)  # tokens outermost
    one = x[:1].expand(3, -1, -1)
    weight = torch.rand(1, 50) + 0.5
    for given in (x, one):
        check_forward("strides", run(given, weight, plan, MEAN), given, weight, plan, MEAN)


@pytest.mark.parametrize("hub", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_max_with_nan_infinities_and_ties(dtype: torch.dtype, hub: bool) -> None:
    tokens = 90 if hub else 24
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([NAN, float("inf"), -float("inf"), 0.0, -0.0, 1.0, 1.0, -1.0, -1.0])
    # A NaN in few places, so that some maxima are numbers.
    chances = torch.tensor([0.01 if hub else 0.05, 0.05, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    pick = torch.multinomial(chances, tokens * 24, replacement=True, generator=generator)
    x = values[pick].view(1, tokens, 24).to(dtype)
    x[0, :, 0] = -float("inf")
    plan = plan_of(torch.arange(tokens)[None] % (2 if hub else 6), 6)
    y, total, _ = run(x, None, plan, MAX)
    expected = reference.merge(x, None, plan.inverse, plan.head, MAX)[0]
    assert torch.equal(y.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0)) and expected.isnan().any()
    dy = tensor((1, 6, 24), dtype, seed=3)
    dx = run_bwd(dy, x, None, total, plan, MAX)
    assert torch.equal(dx, reference.merge_bwd(dy, x, None, plan.inverse, plan.head, MAX))


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_stays_in_its_row(mode: str) -> None:
    x = tensor((1, 120, 8), F32)
    x[0, 5] = NAN
    plan = random_plan(1, 120, 10, hub=50, dropped=4)
    y, total, _ = run(x, None, plan, MODES[mode])
    own = int(plan.inverse[0, 5])
    others = [r for r in range(10) if r != own]
    assert y[0, others].isfinite().all() and total.isfinite().all()
    dy = tensor((1, 10, 8), F32)
    dy[0, others[0]] = NAN
    dx = run_bwd(dy, x, None, total, plan, MODES[mode])
    elsewhere = (plan.inverse[0] != others[0]) | (plan.inverse[0] < 0)
    assert dx[0, elsewhere].isfinite().all()


def test_weights_of_0_and_of_no_normal_size() -> None:
    x = tensor((1, 6, 8), BF16)
    weight = torch.tensor([[0.0, 0.0, 1e-39, 2e-39, 1e38, 1.5e38]])
    plan = plan_of(torch.tensor([[0, 0, 1, 1, 2, 2]]), 3)
    check_forward("weights", run(x, weight, plan, MEAN), x, weight, plan, MEAN)


@pytest.mark.parametrize(("batch", "tokens", "rows", "width"), [(0, 4, 2, 8), (2, 0, 0, 8), (2, 0, 3, 8), (2, 5, 3, 0)])
def test_empty_extents(batch: int, tokens: int, rows: int, width: int) -> None:
    plan = plan_of(torch.arange(tokens).expand(batch, -1) % max(rows, 1), rows) if batch else random_plan(1, 4, 2)
    x = torch.zeros(batch, tokens, width)
    for mode in MODES.values():
        got = run(x, None, plan, mode)
        if tokens == 0:  # rows of padding alone
            assert not got[0].any() and not got[1].any() and bool((got[2] == -float("inf")).all())
        else:
            check_forward("empty", got, x, None, plan, mode)
        dx = run_bwd(torch.zeros(batch, rows, width), x, None, got[1], plan, mode)
        assert dx.shape == (batch, tokens, width)


def test_other_dtypes_are_refused() -> None:
    x, plan = torch.zeros(1, 4, 2, dtype=torch.float64), random_plan(1, 4, 2)
    with pytest.raises(RuntimeError, match="merge: the GPU kernels take float32"):
        call("merge", "merge", MergeArgs(x.data_ptr(), batch=1, tokens=4, rows=2, width=2, dtype=3))
    with pytest.raises(RuntimeError, match="merge_bwd: the GPU kernels take float32"):
        run_bwd(x[:, :2], x, None, torch.ones(1, 2), plan, MEAN)
