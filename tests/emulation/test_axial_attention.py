"""axial_attention and its gradients on the emulated GPU, inside the error budget of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attention.axial_cases import Problem, torch_axial
from emulation.axial_structs import AxialAttentionArgs, AxialAttentionGradArgs, AxialGeometry
from emulation.cuda_emulator import DTYPES, call, strides, workspace
from torch.nn.functional import scaled_dot_product_attention

from saccade.reference.axial_attention import axial_attention, axial_attention_bwd, box_tokens
from saccade.testing.budget import check_budget

F16, BF16 = torch.float16, torch.bfloat16
NAN = float("nan")
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Case:
    id: str
    prefix: int
    grid: tuple[int, int, int]
    box: tuple[int, int, int]
    mean: bool = False
    width: int = 64
    dtype: torch.dtype = BF16
    heads: int = 1
    layout: str = "bhsd"

    def numbers(self) -> tuple:
        return (self.prefix, *self.grid, *self.box, self.mean, self.width**-0.5)


CASES = [
    Case("time", 0, (8, 3, 5), (8, 1, 1), heads=2),
    Case("time_behind_a_class_token", 1, (7, 3, 4), (7, 1, 1), width=72, dtype=F16),
    Case("time_with_a_mean", 2, (5, 3, 3), (5, 1, 1), True),
    Case("space", 1, (2, 5, 14), (1, 5, 14), width=128),
    Case("space_with_a_mean", 3, (2, 5, 13), (1, 5, 13), True, width=40, dtype=F16, layout="bshd"),
    Case("ragged_windows", 1, (3, 5, 4), (2, 3, 3), dtype=F16, layout="odd"),
    Case("ragged_windows_with_a_mean", 1, (3, 5, 4), (2, 2, 3), True, width=136),
    Case("a_long_prefix", 70, (2, 3, 3), (2, 2, 2), width=64),
    Case("a_long_prefix_with_a_mean", 66, (2, 2, 2), (1, 2, 2), True, width=64),
    Case("wide", 1, (3, 2, 6), (3, 1, 6), width=256),
    Case("boxes_of_one", 1, (3, 2, 2), (1, 1, 1)),
    Case("box_beyond_the_grid", 0, (2, 3, 2), (8, 8, 8)),
    Case("no_boxes", 3, (0, 2, 2), (1, 2, 2)),
    Case("no_boxes_with_a_mean", 3, (0, 2, 2), (1, 2, 2), True),
]


def tensors(case: Case, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = case.prefix + case.grid[0] * case.grid[1] * case.grid[2]
    shape = (1, case.heads, tokens, case.width)
    extra = 3 if case.layout == "odd" else 0
    found = []
    for _ in range(count):
        x = torch.randn(shape[0], tokens, case.heads, case.width + extra, generator=generator).to(case.dtype)
        x = x[..., : case.width].transpose(1, 2)
        found.append(x.contiguous() if case.layout == "bhsd" else x)
    return found


def forward_args(case: Case, q, k, v, out, lse, group_out, group_lse) -> AxialAttentionArgs:
    args = AxialAttentionArgs(q.data_ptr(), k.data_ptr(), v.data_ptr(), strides(q), strides(k), strides(v))
    args.batch, args.heads, args.tokens, args.head_dim = q.shape
    args.scale, args.dtype = case.width**-0.5, DTYPES[q.dtype]
    args.geometry = AxialGeometry(case.prefix, case.grid, case.box, case.mean and case.prefix > 0)
    args.out, args.out_stride, args.lse = out.data_ptr(), strides(out), lse.data_ptr()
    args.group_out, args.group_lse = group_out.data_ptr(), group_lse.data_ptr()
    return args


def run(case: Case, q, k, v) -> Tensors:
    batch, heads, tokens, width = q.shape
    boxes = 1
    for n, b in zip(case.grid, case.box, strict=True):
        boxes *= -(-n // b)
    out, lse = torch.full_like(q, NAN), torch.full((batch, heads, tokens), NAN)
    group_out = torch.full((batch, heads, boxes, case.prefix, width) if case.mean else (0,), NAN)
    group_lse = torch.full((batch, heads, boxes, case.prefix) if case.mean else (0,), NAN)
    args = forward_args(case, q, k, v, out, lse, group_out, group_lse)
    space = workspace("axial_attention", "axial_attention", args)
    args.workspace = space.data_ptr()
    call("axial_attention", "axial_attention", args)
    return out, lse, group_out, group_lse


def run_backward(case: Case, dout, q, k, v, out, lse, group_out, group_lse) -> Tensors:
    args = AxialAttentionGradArgs(forward_args(case, q, k, v, out, lse, group_out, group_lse))
    found = tuple(torch.full_like(x, NAN) for x in (q, k, v))
    args.dout, args.dout_stride = dout.data_ptr(), strides(dout)
    for name, x in zip(("dq", "dk", "dv"), found, strict=True):
        setattr(args, name, x.data_ptr())
        setattr(args, f"{name}_stride", strides(x))
    space = workspace("axial_attention_bwd", "axial_attention_bwd", args)
    args.workspace = space.data_ptr()
    call("axial_attention_bwd", "axial_attention_bwd", args)
    return found


def torch_terms(case: Case, q, k, v) -> torch.Tensor:
    """[B, H, G, P, D] as torch makes them."""
    terms = []
    for box in box_tokens(case.prefix, case.grid, case.box):
        keys = torch.cat((torch.arange(case.prefix), box[box >= 0]))
        terms.append(scaled_dot_product_attention(q[:, :, : case.prefix], k[:, :, keys], v[:, :, keys]))
    return torch.stack(terms, 2) if terms else q.new_zeros(*q.shape[:2], 0, case.prefix, case.width)


def torch_problem(case: Case) -> Problem:
    return Problem(case.prefix, case.grid, case.box, case.mean)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward(case: Case) -> None:
    q, k, v = tensors(case, 3)
    out, lse, group_out, group_lse = run(case, q, k, v)
    exact = axial_attention(q.double(), k.double(), v.double(), *case.numbers())
    near = axial_attention(q.float(), k.float(), v.float(), *case.numbers())
    check_budget("out", out, torch_axial(q, k, v, torch_problem(case), case.width**-0.5), exact[0])
    torch.testing.assert_close(lse, near[1], rtol=1e-6, atol=2e-6)
    if case.mean:
        check_budget("group_out", group_out, torch_terms(case, q, k, v).float(), exact[2])
        torch.testing.assert_close(group_lse, near[3], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients(case: Case) -> None:
    q, k, v, dout = tensors(case, 4)
    wide = [x.double() for x in (q, k, v)]
    saved = axial_attention(*wide, *case.numbers())
    exact = axial_attention_bwd(dout.double(), *wide, *saved, *case.numbers())
    out = torch.empty_like(q).copy_(saved[0])
    got = run_backward(case, dout, q, k, v, out, *(x.float() for x in saved[1:]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    near = torch.autograd.grad(torch_axial(*leaves, torch_problem(case), case.width**-0.5), leaves, dout)
    for name, x, torch_x, want in zip(("dq", "dk", "dv"), got, near, exact, strict=True):
        check_budget(name, x, torch_x, want, factor=3.0)


def seen_from(case: Case, token: int) -> torch.Tensor:
    """Which queries see a token."""
    q, k, v = (torch.zeros(1, 1, x.shape[2], 8, dtype=torch.float64) for x in tensors(case, 3))
    v[:, :, token] = 1.0
    out = axial_attention(q, k, v, *case.numbers())[0]
    return out[0, 0, :, 0] > 0


@pytest.mark.parametrize("mean", [False, True])
def test_what_is_not_finite_stays_in_its_box(mean: bool) -> None:
    case = Case("time", 1, (6, 3, 4), (6, 1, 1), mean, dtype=F16)
    q, k, v, dout = tensors(case, 4)
    clean = run(case, q, k, v)
    token = 1 + 12 + 5
    sees = seen_from(case, token)
    sees[0] = True
    for x in (k, v):
        saved = x.clone()
        x[0, 0, token, 7] = NAN
        out, lse, group_out, group_lse = run(case, q, k, v)
        assert torch.equal(out[:, :, ~sees], clean[0][:, :, ~sees])
        assert out[:, :, sees].isnan().any(-1).all()
        grads = run_backward(case, dout, q, k, v, out, lse, group_out, group_lse)
        # Without a mean the prefix sees the bad token, and every key sees the prefix.
        assert all(g[:, :, ~sees].isfinite().all() for g in (grads if mean else grads[:1]))
        x.copy_(saved)
    grads = run_backward(case, dout, q, k, v, *clean)
    for x in (q, dout):
        saved = x.clone()
        x[0, 0, token, 7] = float("inf")
        bad = run_backward(case, dout, q, k, v, *run(case, q, k, v))
        for a, b in zip(bad, grads, strict=True):
            assert torch.equal(a[:, :, ~sees], b[:, :, ~sees])
        x.copy_(saved)


def test_rows_that_see_nothing() -> None:
    case = Case("time", 0, (6, 3, 4), (6, 1, 1), dtype=F16)
    q, k, v, dout = tensors(case, 4)
    q[..., 0], k[..., 0] = 60000.0, 0.0
    k[0, 0, ::12, 0] = -60000.0  # finite in the table, -inf in no score: fp32 holds the product
    out, lse, *rest = run(case, q, k, v)
    assert out.isfinite().all() and lse.isfinite().all()
    assert all(g.isfinite().all() for g in run_backward(case, dout, q, k, v, out, lse, *rest))


def test_refusals() -> None:
    case = Case("time", 0, (2, 1, 1), (2, 1, 1), width=20)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        run(case, *tensors(case, 3))
    with pytest.raises(RuntimeError, match="float16 and bfloat16"):
        run(Case("time", 0, (2, 1, 1), (2, 1, 1)), *(torch.zeros(1, 1, 2, 64) for _ in range(3)))
