"""prompt_pool3d and its gradient on the emulated GPU, inside the error budget of the reference and of torch's autograd."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import torch
from emulation.cuda_emulator import DTYPES as DTYPE_NUMBERS
from emulation.cuda_emulator import call, workspace
from emulation.merge_structs import PromptPoolArgs, PromptPoolGradArgs
from emulation.plan_cases import NAN, Output, bits, tensor

from saccade.reference.prompt_pool3d import prompt_pool3d
from saccade.testing.budget import check_budget

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    id: str
    dtype: torch.dtype = BF16
    batch: int = 1
    size: tuple[int, int, int] = (4, 6, 4)
    kernel: tuple[int, int, int] = (2, 3, 2)
    stride: tuple[int, int, int] = (2, 3, 2)
    width: int = 64
    layout: str = "dense"
    temperature: float = 0.01

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple((n - k) // s + 1 for n, k, s in zip(self.size, self.kernel, self.stride, strict=True))

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(4)
        x = tensor((self.batch, *self.size, self.width), self.dtype, self.layout, seed=1)
        weights = torch.rand(self.batch, *self.size, generator=generator) * 3 * self.temperature
        dy = tensor((self.batch, *self.out_size, self.width), self.dtype, seed=2)
        return x, weights, dy


CASES = [
    Case("f32", F32, batch=2),
    Case("f16", F16),
    Case("bf16_wide", width=520, size=(2, 3, 2)),
    Case("wider_than_a_block", width=2056, size=(2, 3, 2)),
    Case("overlapping", F32, kernel=(2, 3, 3), stride=(1, 2, 1), batch=2),
    Case("apart_with_a_remainder", F32, size=(5, 7, 6), kernel=(2, 2, 2), stride=(3, 3, 3)),
    Case("a_window_of_one", F32, kernel=(1, 1, 1), stride=(2, 2, 2)),
    Case("more_members_than_a_chunk", F16, size=(4, 4, 4), kernel=(4, 4, 3), stride=(1, 1, 1)),
    Case("the_whole_input_in_two_stages", F32, size=(8, 7, 5), kernel=(8, 7, 5), batch=2, width=24),
    Case("8_byte_accesses", F16, width=36),
    Case("odd_width", BF16, width=31),
    Case("odd_width_f32", F32, width=1, kernel=(2, 4, 3), stride=(2, 1, 1)),
    Case("packed", layout="packed"),
    Case("unaligned", layout="odd", kernel=(2, 5, 4), stride=(1, 1, 1)),
    Case("warm", F32, temperature=1.0),
]


def pool_args(x, weights, case: Case) -> PromptPoolArgs:
    triple = ctypes.c_int32 * 3
    return PromptPoolArgs(
        x.data_ptr(),
        (ctypes.c_int64 * 4)(*x.stride()[:4]),
        weights.data_ptr(),
        x.shape[0],
        case.width,
        *(triple(*v) for v in (case.size, case.kernel, case.stride, case.out_size)),
        case.temperature,
        DTYPE_NUMBERS[x.dtype],
    )


def run(x, weights, case: Case) -> torch.Tensor:
    y = Output((x.shape[0], *case.out_size, case.width), x.dtype, odd=case.layout == "odd")
    args = pool_args(x, weights, case)
    args.y = y.tensor.data_ptr()
    call("prompt_pool3d", "prompt_pool3d", args)
    return y.checked()


def run_bwd(dy, x, weights, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    dx = Output((x.shape[0], *case.size, case.width), x.dtype, odd=case.layout == "odd")
    dweights = Output((x.shape[0], *case.size), F32)
    where = dy.data_ptr(), dx.tensor.data_ptr(), dweights.tensor.data_ptr()
    args = PromptPoolGradArgs(pool_args(x, weights, case), *where)
    space = workspace("prompt_pool3d_bwd", "prompt_pool3d_bwd", args)
    args.workspace = space.data_ptr()
    call("prompt_pool3d_bwd", "prompt_pool3d_bwd", args)
    return dx.checked(), dweights.checked()


def gradients(dy, x, weights, case: Case) -> tuple[torch.Tensor, ...]:
    """By torch's autograd, in the dtype of x."""
    leaves = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = prompt_pool3d(*leaves, case.kernel, case.stride, case.temperature)
    return torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inside_the_budget(case: Case) -> None:
    x, weights, dy = case.inputs()
    same = prompt_pool3d(x, weights, case.kernel, case.stride, case.temperature)
    exact = prompt_pool3d(x.double(), weights.double(), case.kernel, case.stride, case.temperature)
    check_budget(case.id, run(x, weights, case), same, exact)

    got = run_bwd(dy, x, weights, case)
    peers = gradients(dy, x, weights, case)
    truth = gradients(dy.double(), x.double(), weights.double(), case)
    for name, out, peer, right in zip(("dx", "dweights"), got, peers, truth, strict=True):
        check_budget(f"{case.id} {name}", out, peer, right, factor=3.0)


def test_a_sample_has_the_same_bits_alone_and_in_a_batch() -> None:
    for kernel in ((2, 3, 3), (4, 4, 3)):
        case = Case("batch", F16, batch=2, size=(4, 4, 4), kernel=kernel, stride=(1, 1, 1), width=40)
        x, weights, dy = case.inputs()
        y, dx, dweights = run(x, weights, case), *run_bwd(dy, x, weights, case)
        odd = Case("alone", F16, 1, case.size, kernel, case.stride, 40, "odd")
        for b in range(2):
            one = tensor((1, *case.size, 40), F16, "odd").copy_(x[b : b + 1])
            alone = run(one, weights[b : b + 1], odd), *run_bwd(dy[b : b + 1], one, weights[b : b + 1], odd)
            for part, whole in zip(alone, (y, dx, dweights), strict=True):
                assert torch.equal(bits(part[0]), bits(whole[b]))


def test_channels_first_memory_of_a_video() -> None:
    """[B, T, D, H, W] moved to the last axis is copied by the caller; [T, B, H, W, D] is not."""
    case = Case("time_outermost", F32, batch=2)
    x, weights, _ = case.inputs()
    moved = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(run(moved, weights, case), run(x, weights, case))


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    """As torch's softmax: -inf is a weight of 0, NaN and inf spoil their window and no other."""
    case = Case("special", F32)
    x, weights, dy = case.inputs()
    weights[0, 0, 0, 0] = value
    expected = prompt_pool3d(x, weights, case.kernel, case.stride, case.temperature)
    y = run(x, weights, case)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0, 1].isfinite().all() and torch.allclose(y[0, 1], expected[0, 1])
    dx, dweights = run_bwd(dy, x, weights, case)
    spoiled = value != -float("inf")
    assert bool(dx[0, :2, :3, :2].isnan().all()) == spoiled and dx[0, 2:].isfinite().all()
    assert bool(dweights[0, :2, :3, :2].isnan().all()) == spoiled and dweights[0, 2:].isfinite().all()


@pytest.mark.parametrize(("batch", "width"), [(0, 8), (2, 0)])
def test_empty_extents(batch: int, width: int) -> None:
    case = Case("empty", F32, batch=batch, width=width)
    x, weights, dy = (
        torch.zeros(batch, *case.size, width),
        torch.zeros(batch, *case.size),
        torch.zeros(batch, *case.out_size, width),
    )
    assert run(x, weights, case).numel() == 0
    dx, dweights = run_bwd(dy, x, weights, case)
    assert dx.numel() == 0 and torch.equal(dweights, torch.zeros(batch, *case.size))


def test_other_dtypes_are_refused() -> None:
    case = Case("f64", torch.float64)
    x, weights, dy = case.inputs()
    with pytest.raises(RuntimeError, match="prompt_pool3d: the GPU kernels take float32"):
        run(x, weights, case)
    with pytest.raises(RuntimeError, match="prompt_pool3d_bwd: the GPU kernels take float32"):
        run_bwd(dy, x, weights, case)
